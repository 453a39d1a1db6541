"""Load a model that was exported in the format ``merged``, without a workspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from peso.errors import ExportError, PesoError
from peso.items.names import ItemNames
from peso.items.semantic_ids import SemanticIds, read_release_index
from peso.model.backbone import embedding_scale
from peso.model.export import INDEX, ITEM_HEAD, PROMPT
from peso.model.generative import GenerativeModel
from peso.model.item_head import ItemHead
from peso.model.layout import make_layout
from peso.model.transitions import Transitions
from peso.model.vocabulary import SemanticVocabulary
from peso.runtime.files import read_json_object
from peso.runtime.hugging_face import loading


@loading()
def load_merged(directory: str | Path) -> GenerativeModel:
    """The model in a directory that ``peso export --format merged`` wrote, in evaluation mode on the CPU.

    It answers as the stage that was exported, in float32. Histories may have earlier ids of renamed items.

    Raises:
        ExportError: the directory is not such an export, an earlier version wrote it, or it is damaged.
        DataError: ``prompt.json`` or ``index.json`` is missing or unreadable.
    """
    folder = Path(directory)
    prompt = read_json_object(folder / PROMPT)
    if "codes" not in prompt:
        raise ExportError(f"{folder} was exported by an earlier version; export the model again")
    ids = read_release_index(folder / INDEX, prompt["codes"])
    try:
        model = _read(folder, prompt, ids)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, PesoError) as error:
        # only the cause: advice such as "train the stage again" is for workspaces
        reason = str(error).strip().partition("\n")[0].partition("; ")[0]
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        raise ExportError(f"{folder} is not readable ({reason}); export the model again") from error
    return model.requires_grad_(False).eval()


def _read(folder: Path, prompt: dict[str, Any], ids: SemanticIds) -> GenerativeModel:
    """The model of a directory, given the contents of its ``prompt.json`` and ``index.json``."""
    ids = ids.named(ItemNames.of_earlier(dict(prompt.get("earlier_ids", {}))))
    causal_lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    head = _item_head(folder, ids, causal_lm.get_input_embeddings().weight.shape[1])
    model = GenerativeModel(
        causal_lm,
        tokenizer,
        _vocabulary(causal_lm, ids),
        make_layout(prompt["layout"], tokenizer, prompt["window"]),
        ids,
        prompt["loss_vocabulary"],
    )
    model.vocabulary.item_head = head
    model.transitions = Transitions.load(folder, len(ids.item_ids))
    return model


@torch.no_grad()
def _vocabulary(causal_lm: Any, ids: SemanticIds) -> SemanticVocabulary:
    """The rows of the semantic tokens, which are the last rows of embedding and head."""
    embedding, head = (
        m.weight for m in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    )
    vocabulary = SemanticVocabulary(len(embedding) - sum(ids.sizes), ids.sizes, embedding.shape[1])
    vocabulary.input_rows.copy_(embedding[vocabulary.first_id :] * embedding_scale(causal_lm))
    vocabulary.output_rows.copy_(head[vocabulary.first_id :])
    return vocabulary


@torch.no_grad()
def _item_head(folder: Path, ids: SemanticIds, width: int) -> ItemHead | None:
    """The item head, with vectors and biases as rows of the items; the rows of codes are zero."""
    if not (folder / ITEM_HEAD).is_file():
        return None
    with safe_open(folder / ITEM_HEAD, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if json.loads(metadata["items"]) != ids.item_ids:
        raise ValueError(f"{ITEM_HEAD} has other items than {INDEX}")
    head = ItemHead(ids, width, reads="inputs" in stored)
    for into, name in ((head.rows, "vectors"), (head.bias, "biases"), (head.query, "query")):
        into.copy_(stored[name])
    head.shares.copy_(stored["shares"])
    if head.reads:
        head.input_scale.fill_(float(metadata["input_scale"]))
    return head

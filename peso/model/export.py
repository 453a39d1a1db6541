"""Export a model in formats that other tools can load: plain Transformers, or PEFT on an extended backbone.

The model in memory does not change, and an export is written completely or not at all. The input and output
rows of the semantic tokens differ, so an exported model never ties its embeddings, even if the backbone did.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig

from peso.adapters.groups import lora_layers
from peso.adapters.lora import as_one_adapter, weights_without_adapter, write_adapter
from peso.errors import ExportError
from peso.items.semantic_ids import write_release_index
from peso.model.backbone import embedding_scale
from peso.model.build import has_adapter
from peso.model.ensemble import Ensemble
from peso.model.generative import GenerativeModel
from peso.model.item_head import LENGTHS
from peso.model.layout import INSTRUCTION
from peso.runtime.files import commit_directory, require_free, write_json
from peso.runtime.hugging_face import loading

ITEM_HEAD = "item_head.safetensors"
INDEX, PROMPT, CARD = "index.json", "prompt.json", "README.md"


@dataclass(frozen=True)
class PromptText:
    """A layout as text: before, item, between, item, …, after. An item is its tokens without spaces."""

    before: str
    between: str
    after: str
    window: int  # the largest number of items of a history

    @classmethod
    def of(cls, model: GenerativeModel) -> PromptText:
        """The texts of a model's prompts."""
        layout, tokenizer = model.layout, model.tokenizer
        if layout.name == "instruct":
            return cls(*INSTRUCTION, layout.window)
        # include the begin token if the tokenizer does not add it
        opens = tokenizer.encode("a")[:1] == list(layout.prefix)
        return cls("" if opens else tokenizer.convert_ids_to_tokens(layout.prefix[0]), "", "", layout.window)

    def prompt(self, items: list[str]) -> str:
        """The text of a history. Each item is given as its tokens in one string."""
        return self.before + self.between.join(items[-self.window :]) + self.after


def export_merged(
    model: GenerativeModel,
    directory: str | Path,
    *,
    leaves_out_seen: bool = False,
    retired: Collection[str] = (),
    card: str = "",
) -> None:
    """Write a plain Transformers model with the adapter merged and the semantic tokens added to embedding,
    head and tokenizer.

    The model is always in float32, because rounding to bfloat16 would lose most of what a stage learns. The
    file ``prompt.json`` describes how a history is written as text, and whether items of the history must be
    left out of the answers (``leaves_out_seen``). If items are retired, it has their semantic IDs; if items
    were renamed, their ids by the earlier ones (``earlier_ids``). The file ``index.json`` has the semantic
    IDs of all items.

    Args:
        directory: the directory to write to, missing or empty.
        leaves_out_seen: whether items of the history are left out of the answers.
        retired: ids of items that must not be recommended.
        card: the text of ``README.md``. If it is empty, the file is not written.

    Raises:
        ExportError: the directory is not empty, the tokenizer would not encode prompts as the model does, or
            the model is an ensemble.
    """
    _require_one(model)
    with commit_directory(require_free(directory)) as aside:
        plain = _plain(model, _table_rows(model), model.vocabulary.output_rows, merged=True)
        _save(plain, model, aside, leaves_out_seen, retired)
        _save_beside(model, aside, card)


def export_peft(
    model: GenerativeModel,
    directory: str | Path,
    *,
    leaves_out_seen: bool = False,
    retired: Collection[str] = (),
    card: str = "",
) -> None:
    """Write ``backbone/``, extended by neutral rows and untied, and ``adapter/`` in PEFT's format.

    Adapters of earlier stages that are active with the trained one become part of the same adapter, whose
    rank is the sum of theirs. The adapter also has the rows of the semantic tokens
    (``trainable_token_indices`` of embedding and head). PEFT drops a head's bias when it replaces rows, so if
    the head has a bias, its rows are in the backbone instead.

    Args:
        directory: the directory to write to, missing or empty.
        leaves_out_seen: whether items of the history are left out of the answers.
        retired: ids of items that must not be recommended.
        card: the text of ``README.md``. If it is empty, the file is not written.

    Raises:
        ExportError: see :func:`export_merged`; or the model has no adapter because its backbone was trained.
    """
    _require_one(model)
    if not has_adapter(model):
        raise ExportError(
            "the model has no adapter because its backbone was trained; export it with --format merged"
        )
    causal_lm, first, rows = model.causal_lm, model.vocabulary.first_id, model.vocabulary
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    in_adapter = {_name(causal_lm, embedding): _table_rows(model)}
    neutral_input, output = (_neutral(module.weight[:first], len(rows)) for module in (embedding, head))
    if getattr(head, "bias", None) is None:
        in_adapter[_name(causal_lm, head)] = rows.output_rows
    else:
        output = rows.output_rows
    ids = list(range(first, first + len(rows)))
    state = {
        f"base_model.model.{name}.token_adapter.trainable_tokens_delta": _stored(tensor)
        for name, tensor in in_adapter.items()
    }
    adapter, matrices = as_one_adapter(model.backbone)
    config = {
        **adapter,
        "base_model_name_or_path": "backbone",  # the directory next to the adapter
        "trainable_token_indices": dict.fromkeys(in_adapter, ids),
    }
    with commit_directory(require_free(directory)) as aside:
        plain = _plain(model, neutral_input, output, merged=False)
        _save(plain, model, aside / "backbone", leaves_out_seen, retired)
        write_adapter(config, matrices | state, aside / "adapter")
        _save_beside(model, aside, card)


def _require_one(model: Any) -> None:
    if isinstance(model, Ensemble):
        raise ExportError(
            "this stage averages the logits of two models, which no single model can do; strategy lsat with "
            "fusion: arithmetic adds their weights instead, and can be exported"
        )


@torch.no_grad()
def _plain(model: GenerativeModel, input_rows: Tensor, output_rows: Tensor, *, merged: bool) -> nn.Module:
    """The backbone without PEFT and with the semantic rows, on the CPU. Unchanged weights are not copied.

    Args:
        input_rows: (tokens, width), rows to append to the embedding.
        output_rows: (tokens, width), rows to append to the head.
        merged: whether to add the active adapters to their weights, in float32.
    """
    causal_lm, words, tokens = model.causal_lm, model.vocabulary.first_id, len(model.vocabulary)
    weights = weights_without_adapter(causal_lm)
    if merged:
        weights = {name: _exact(tensor) for name, tensor in weights.items()} | _merged_weights(causal_lm)
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    tables = ((embedding, _input_words(model), input_rows), (head, _output_words(model), output_rows))
    for module, of_words, rows in tables:
        # some backbones pad their vocabulary; our rows replace rows beyond the tokenizer's words
        kept = _exact(of_words) if merged else of_words.to(module.weight)
        weights[f"{_name(causal_lm, module)}.weight"] = torch.cat([kept, rows.to(kept)])
    if getattr(head, "bias", None) is not None:
        kept = _exact(head.bias[:words]) if merged else head.bias[:words]
        weights[f"{_name(causal_lm, head)}.bias"] = torch.cat([kept, kept.new_zeros(tokens)])
    config = deepcopy(causal_lm.config)
    for part in (config, config.get_text_config()):
        part.vocab_size = words + tokens
        part.tie_word_embeddings = False  # otherwise Transformers silently drops the head
    with torch.device("meta"):
        plain = type(causal_lm)(config)
    plain.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()}, assign=True)
    tokenizer = model.tokenizer
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    return plain


def _merged_weights(causal_lm: nn.Module) -> dict[str, Tensor]:
    """W + (alpha / rank) · B A of every layer with an active adapter, in float32. The layers do not change.

    PEFT's own merge would round to the precision of W.
    """
    result = {}
    for name, layer in lora_layers(causal_lm).items():
        deltas = [layer.get_delta_weight(a).float() for a in layer.active_adapters if a in layer.lora_A]
        result[f"{name}.weight"] = sum(deltas, layer.get_base_layer().weight.float())
    return result


def _exact(tensor: Tensor) -> Tensor:
    """Convert tensors of lower precision to float32; others are not copied."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _save(
    plain: Any, model: GenerativeModel, directory: Path, leaves_out_seen: bool, retired: Collection[str]
) -> None:
    with loading():
        plain.save_pretrained(directory)
        _extended_tokenizer(model).save_pretrained(directory)
        text = PromptText.of(model)
        ids = model.semantic_ids
        blocked = {item: "".join(ids.semantic_id(item)) for item in sorted(retired) if item in ids}
        settings: dict[str, Any] = {
            "leaves_out_seen": leaves_out_seen,
            "layout": model.layout.name,
            "loss_vocabulary": model.loss_vocabulary,
            "codes": list(ids.sizes),
            **({"retired": blocked} if blocked else {}),
            **({"earlier_ids": earlier} if (earlier := ids.earlier_ids) else {}),
        }
        write_json(directory / PROMPT, asdict(text) | settings)
        _check_reading(model, text, AutoTokenizer.from_pretrained(directory))


def _save_beside(model: GenerativeModel, directory: Path, card: str) -> None:
    """Write the index, the item head and the card."""
    write_release_index(model.semantic_ids, directory / INDEX)
    _save_item_head(model, directory)
    if card:
        (directory / CARD).write_text(card, encoding="utf-8")


@torch.no_grad()
def _save_item_head(model: GenerativeModel, directory: Path) -> None:
    """Write ``item_head.safetensors`` if the model has an item head.

    It has ``vectors`` (items, width), ``biases`` (items,), ``query`` (width, width) and ``shares``, by the
    number of items in the prompt. If the model reads the vectors, it also has ``inputs`` (items, width), to
    add to the embeddings of the last codes. The ids and semantic IDs of the items in the order of the
    vectors, and the groups of the shares, are in its metadata (docs/how-to/export.md). If the model counts
    transitions, ``transitions.safetensors`` is written as well.
    """
    head = model.vocabulary.item_head
    if head is None:
        return
    tensors = {"vectors": head.vectors(), "biases": head.biases(), "query": head.query, "shares": head.shares}
    ids = model.semantic_ids
    if head.reads:  # items that share a semantic ID are read as the first of them
        first = ids.trie.items[ids.trie.item_starts[:-1]][ids.trie.leaf_of]
        tensors["inputs"] = head.input_scale * head.vectors()[torch.from_numpy(first.astype(np.int64))]
    metadata = {
        "items": json.dumps(ids.item_ids),
        "semantic_ids": json.dumps(["".join(ids.semantic_id(item)) for item in ids.item_ids]),
        "shares_up_to": json.dumps(list(LENGTHS)),
        **({"input_scale": repr(float(head.input_scale))} if head.reads else {}),
    }
    save_file({name: _stored(x) for name, x in tensors.items()}, directory / ITEM_HEAD, metadata)
    if model.transitions is not None:
        model.transitions.save(directory)


def _extended_tokenizer(model: GenerativeModel) -> Any:
    tokenizer = deepcopy(model.tokenizer)
    # not special, so that decoding keeps them; not normalized, so that they are recognized anywhere
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=False) for name in model.semantic_ids.tokens()]
    )
    return tokenizer


def _check_reading(model: GenerativeModel, text: PromptText, tokenizer: Any) -> None:
    """Check that the exported tokenizer encodes prompts as the model does.

    Raises:
        ExportError: it does not.
    """
    catalogue = model.semantic_ids
    history = np.arange(min(2, len(catalogue.item_ids)))
    prompt = text.prompt(["".join(catalogue.semantic_id(catalogue.item_ids[row])) for row in history])
    expected = model.layout.prompt(model.item_token_ids(history)).tolist()
    every = "".join(catalogue.tokens())
    first = model.vocabulary.first_id
    if (
        tokenizer(prompt)["input_ids"] != expected
        or tokenizer.encode(every, add_special_tokens=False)
        != list(range(first, first + len(model.vocabulary)))
        or len(tokenizer) != first + len(model.vocabulary)
    ):
        raise ExportError(
            "after extending and saving, this backbone's tokenizer does not encode prompts as the model "
            "does: the exported model would get other token ids than those it was trained on. Use the model "
            "from its workspace instead (`peso recommend`, `peso serve`)"
        )


def _table_rows(model: GenerativeModel) -> Tensor:
    """The input rows as rows of the embedding module's table."""
    return model.vocabulary.input_rows.detach() / embedding_scale(model.causal_lm)


def _input_words(model: GenerativeModel) -> Tensor:
    """The rows of the words in the embedding module's table, whether trained or not: (words, width)."""
    own, causal_lm = model.vocabulary.input_words, model.causal_lm
    if own is None:
        return causal_lm.get_input_embeddings().weight[: model.vocabulary.first_id]
    return own.detach() / embedding_scale(causal_lm)


def _output_words(model: GenerativeModel) -> Tensor:
    """The rows of the words in the output head, whether trained or not: (words, width)."""
    own = model.vocabulary.output_words
    head: Tensor = model.causal_lm.get_output_embeddings().weight
    return head[: model.vocabulary.first_id] if own is None else own.detach()


def _neutral(weight: Tensor, count: int) -> Tensor:
    """The mean of the rows, ``count`` times."""
    return weight.float().mean(0).expand(count, -1)


def _name(causal_lm: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in causal_lm.named_modules() if other is module)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()

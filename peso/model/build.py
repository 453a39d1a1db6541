"""Build a generative model from its configuration, and read and write its weights as a stage's files.

The files of a stage are ``vocabulary.safetensors``, ``transitions.safetensors`` if the item head counts
transitions, ``adapter/`` if there is one, and ``backbone/`` if its weights were trained.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peso.adapters.lora import add_adapter, load_adapter, save_adapter, weights_without_adapter
from peso.config import AdapterConfig, BackboneConfig, HeadConfig, PromptConfig
from peso.errors import BackboneError, WorkspaceError
from peso.items.semantic_ids import SemanticIds
from peso.model.backbone import embedding_scale, load_backbone
from peso.model.backbone_checks import check_reach
from peso.model.generative import GenerativeModel, trained_whole
from peso.model.item_head import OF_ITEMS, ItemHead
from peso.model.layout import PromptLayout, make_layout
from peso.model.transitions import FILE, Transitions
from peso.model.vocabulary import SemanticVocabulary
from peso.runtime.hugging_face import loading

VOCABULARY, ADAPTER, BACKBONE = "vocabulary.safetensors", "adapter", "backbone"
WEIGHTS = (VOCABULARY, FILE, ADAPTER, BACKBONE)  # files and folders of a stage that make up its model


@loading()
def build_model(
    backbone: BackboneConfig,
    prompt: PromptConfig,
    adapter: AdapterConfig | None,
    loss_vocabulary: str,
    semantic_ids: SemanticIds,
    *,
    seed: int,
    head: HeadConfig | None = None,
    train_words: bool = False,
) -> GenerativeModel:
    """Build a model from a backbone, a semantic vocabulary, an adapter and a layout, in float32 on the CPU.

    The vocabulary rows and the adapter are trainable. The same arguments give the same weights.

    Args:
        adapter: the configuration of the adapter; None to train the backbone itself.
        loss_vocabulary: the normalization of probabilities, see :class:`GenerativeModel`.
        seed: the seed of everything random. Backbone, vocabulary, adapter and head have separate random
            streams.
        head: the configuration of the head; None to use only codes.
        train_words: whether to train the words' rows of embedding and head, too.

    Raises:
        BackboneError: the backbone cannot be loaded, fails a check, has too short a context for the prompts,
            or its tokenizer already has semantic tokens.
    """
    seeds = [int(state) for state in np.random.SeedSequence(seed).generate_state(4)]
    causal_lm, tokenizer = load_backbone(
        backbone.name,
        layers=backbone.layers,
        width=backbone.width,
        dropout=backbone.dropout,
        initializer_range=backbone.initializer_range,
        pretrained=backbone.pretrained,
        seed=seeds[0],
    )
    layout = make_layout(prompt.layout, tokenizer, prompt.window)
    check_reach(causal_lm, longest_sequence(layout, semantic_ids.levels))
    taken = sorted(set(semantic_ids.tokens()) & tokenizer.get_vocab().keys())
    if taken:
        raise BackboneError(
            f"the tokenizer of {backbone.name} already has semantic tokens ({taken[0]}, …); "
            "use the backbone that it was exported from"
        )
    first_id = len(tokenizer)
    embedding = causal_lm.get_input_embeddings().weight[:first_id]
    vocabulary = SemanticVocabulary(first_id, semantic_ids.sizes, embedding.shape[1])
    scale = embedding_scale(causal_lm)
    vocabulary.initialise(
        embedding if scale == 1 else embedding * scale,
        causal_lm.get_output_embeddings().weight[:first_id],
        seeds[1],
    )
    if train_words:
        vocabulary.train_words(embedding * scale, causal_lm.get_output_embeddings().weight[:first_id])
    if head is not None and head.name == "items":
        vocabulary.item_head = ItemHead(
            semantic_ids,
            embedding.shape[1],
            head.negatives,
            reads=bool(head.reads),
            contents=head.contents,
            arrivals=head.arrivals,
        )
        vocabulary.item_head.initialise(seeds[3], float(embedding.std()) * scale)
    if adapter is None:
        model = trained_whole(causal_lm, vocabulary)
    else:
        model = add_adapter(
            causal_lm, adapter.rank, adapter.alpha, adapter.dropout, adapter.targets, seed=seeds[2]
        )
    return GenerativeModel(model, tokenizer, vocabulary, layout, semantic_ids, loss_vocabulary)


def longest_sequence(layout: PromptLayout, levels: int) -> int:
    """The number of tokens of the longest sequence: two windows, which training packs, and a target."""
    item = levels + len(layout.separator)
    return len(layout.prefix) + 2 * layout.window * item + len(layout.suffix) + levels + len(layout.end)


def save_stage_weights(model: GenerativeModel, directory: str | Path, *, whole_backbone: bool) -> None:
    """Write the trained weights of a stage.

    Args:
        directory: the directory to write to; it is created if it is missing.
        whole_backbone: whether the backbone itself was trained (it then has no adapter). Its weights are
            also written, as a directory that Transformers can load.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: rows.detach().cpu().contiguous() for name, rows in model.vocabulary.state_dict().items()}
    save_file(rows, folder / VOCABULARY)
    if model.transitions is not None:
        model.transitions.save(folder)
    if whole_backbone:
        with loading():
            model.causal_lm.save_pretrained(folder / BACKBONE)
            model.tokenizer.save_pretrained(folder / BACKBONE)
    if has_adapter(model):
        save_adapter(model.backbone, folder / ADAPTER)


@torch.no_grad()
def load_stage_weights(model: GenerativeModel, directory: str | Path) -> None:
    """Read the weights that :func:`save_stage_weights` wrote, bit for bit. Other weights do not change.

    A backbone that was trained at stage 0 is stored only there, so read stage 0 first, then the stage.

    Raises:
        WorkspaceError: the vocabulary is missing, a file is damaged, or weights have other shapes than those
            of the model.
    """
    folder = Path(directory)
    try:
        rows = load_file(folder / VOCABULARY)
    except FileNotFoundError:
        raise WorkspaceError(f"{folder / VOCABULARY} is missing; train the stage again") from None
    except (OSError, SafetensorError) as error:
        raise WorkspaceError(f"{folder / VOCABULARY} is damaged ({error}); train the stage again") from error
    into = model.vocabulary.state_dict()
    for name in (f"item_head.{part}" for part in OF_ITEMS):
        if name in into and name in rows:  # items that were added later keep their initial values
            rows[name] = torch.cat([rows[name], into[name][len(rows[name]) :].cpu()])
    _copy(into, rows, folder / VOCABULARY)
    model.transitions = Transitions.load(folder, len(model.semantic_ids.item_ids))
    if (folder / BACKBONE).is_dir():
        try:
            with loading():
                stored = AutoModelForCausalLM.from_pretrained(
                    folder / BACKBONE, dtype="auto", trust_remote_code=False, use_safetensors=True
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise WorkspaceError(
                f"{folder / BACKBONE} is damaged ({error}); train the stage again"
            ) from error
        _copy(weights_without_adapter(model.causal_lm), stored.state_dict(), folder / BACKBONE)
    if has_adapter(model) and (folder / ADAPTER).is_dir():
        load_adapter(model.backbone, folder / ADAPTER)


def round_frozen(model: GenerativeModel, dtype: torch.dtype) -> None:
    """Convert the weights of a frozen backbone to another precision. Adapters, vocabulary and buffers (such
    as the frequencies of rotary positions) do not change."""
    for name, p in model.causal_lm.named_parameters():
        if not p.requires_grad and "lora_" not in name:
            p.data = p.data.to(dtype)


def has_adapter(model: GenerativeModel) -> bool:
    """Whether the model has an adapter. If not, the backbone itself is trained."""
    return hasattr(model.backbone, "peft_config")


def _copy(into: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], source: Path) -> None:
    """Copy the tensors read from ``source`` into those of the model."""
    wrong = {name for name in into.keys() | stored.keys() if _shape(into, name) != _shape(stored, name)}
    if wrong:
        name = min(wrong)
        raise WorkspaceError(
            f"{source} does not match the model: {name} has the shape {_shape(stored, name)} in the file and "
            f"{_shape(into, name)} in the model. Restore the configuration with which the file was written, "
            "or train the stage again"
        )
    for name, tensor in into.items():
        tensor.copy_(stored[name])


def _shape(tensors: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None

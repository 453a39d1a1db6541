"""Checks on a few tokens, when a backbone is loaded, that it supports what training and decoding do.

The checks run the code of :class:`peso.model.generative.GenerativeModel` itself, not a copy of it:

1. the tokenizer's ids have no gaps, so that the semantic tokens get the ids after them;
2. embeddings as input give the same result as token ids;
3. our head gives the model's own logits, including scaling and capping;
4. branches of a common trunk, under a four-dimensional mask and explicit positions, get the hidden states of
   their separate sequences, in one pass and with a cache.

A fifth check refuses nothing: where attention along a tree gives a different result, it is disabled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from peso.errors import BackboneError
from peso.items.semantic_ids import SemanticIds
from peso.model import visibility
from peso.model.generative import GenerativeModel
from peso.model.layout import make_layout
from peso.model.tree_attention import REFUSES
from peso.model.vocabulary import SemanticVocabulary

TRUNK, BRANCH = 10, 3  # the numbers of tokens for the checks
# Relative to the largest value. Half precision is less exact, but still shows if a mask is ignored.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


@torch.no_grad()
def check_backbone(causal_lm: Any, tokenizer: Any) -> None:
    """Check that a causal LM can be used as a backbone.

    Raises:
        BackboneError: it cannot be used; the message gives the reason.
    """
    _check_ids(causal_lm, tokenizer)
    device, words = causal_lm.device, len(tokenizer)
    ids = (
        torch.arange(TRUNK + 2 * BRANCH, device=device) * 7919 + 11
    ) % words  # scattered over the vocabulary
    trunk, first, second = ids.split([TRUNK, BRANCH, BRANCH])
    apart = torch.stack([torch.cat([trunk, first]), torch.cat([trunk, second])])  # (2, trunk + branch)
    positions = torch.arange(TRUNK + BRANCH, device=device).expand(2, -1)
    model = _trial_model(causal_lm, tokenizer)
    try:
        own = causal_lm(input_ids=apart, use_cache=False).logits[..., :words].float()
        embedded = causal_lm(inputs_embeds=model.embed(apart), use_cache=False).logits[..., :words].float()
        _compare(embedded, own, model.dtype, "embeddings as input give another result than token ids")
        hidden = model.hidden(apart, None, positions)
        _compare(
            model.word_logits(hidden),
            own,
            model.dtype,
            "its logits are not cap · tanh(scale · head(hidden) / cap) with the scale and cap of its "
            "configuration",
        )
        expected = torch.cat([hidden[0], hidden[1, TRUNK:]])  # trunk, first branch, second branch
        reason = "a branch under a four-dimensional mask differs from its separate sequence"
        _compare(_in_one_pass(model, ids), expected, model.dtype, reason)
        _compare(_on_a_cache(model, ids), expected, model.dtype, f"{reason} when the trunk is cached")
        setattr(causal_lm, REFUSES, not _same_along_a_tree(model, ids, expected))
    except (
        TypeError,
        ValueError,
        RuntimeError,
        IndexError,
        KeyError,
        AttributeError,
        NotImplementedError,
    ) as e:
        raise BackboneError(
            f"it does not accept embeddings, a four-dimensional mask and positions ({type(e).__name__}: {e})"
        ) from e


def check_reach(causal_lm: Any, length: int) -> None:
    """Check that every layer of a backbone sees all of a sequence of ``length`` tokens.

    Beyond a sliding window, our masks, which let a target see its whole history, would differ from the
    backbone's own attention. Beyond its context, the backbone was never trained.

    Raises:
        BackboneError: the sequence is too long.
    """
    config = causal_lm.config.get_text_config()
    limits = {"max_position_embeddings": getattr(config, "max_position_embeddings", None)}
    kinds = getattr(config, "layer_types", None)
    if kinds is None or any(kind != "full_attention" for kind in kinds):
        for key in ("sliding_window", "attention_chunk_size", "window_size"):
            limits[key] = getattr(config, key, None)
    for key, limit in limits.items():
        if isinstance(limit, int) and 0 < limit < length:
            raise BackboneError(
                f"prompts reach {length} tokens, but the backbone's {key} is {limit}; "
                "reduce prompt.window or choose another backbone"
            )


def _check_ids(causal_lm: Any, tokenizer: Any) -> None:
    if causal_lm.config.is_encoder_decoder:
        raise BackboneError("it is an encoder-decoder model; a decoder-only causal LM is needed")
    words = len(tokenizer)
    if set(tokenizer.get_vocab().values()) != set(range(words)):
        raise BackboneError(
            f"the ids of its tokenizer have gaps: {words} tokens are not numbered 0 to {words - 1}"
        )
    shapes = []
    for side, module in (
        ("input embedding", causal_lm.get_input_embeddings()),
        ("output head", causal_lm.get_output_embeddings()),
    ):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise BackboneError(f"it has no {side} with one row per token")
        if len(weight) < words:
            raise BackboneError(
                f"its tokenizer has {words} tokens, but its {side} has only {len(weight)} rows"
            )
        shapes.append(weight.shape[1])
    if shapes[0] != shapes[1]:
        raise BackboneError(
            f"its input embedding has the width {shapes[0]}, but its output head has {shapes[1]}"
        )


def _trial_model(causal_lm: Any, tokenizer: Any) -> GenerativeModel:
    """The model as it is normally used, with one semantic token that is never needed."""
    width = causal_lm.get_input_embeddings().weight.shape[1]
    vocabulary = SemanticVocabulary(len(tokenizer), (1,), width).to(causal_lm.device)
    catalogue = SemanticIds(["an item"], np.zeros((1, 1), dtype=np.int32), (1,))
    layout = make_layout("stream", tokenizer, window=1)
    return GenerativeModel(causal_lm, tokenizer, vocabulary, layout, catalogue, "full")


def _branch_visibility() -> tuple[Tensor, Tensor]:
    """The visibility (n, n) and positions (n,) of a trunk and two branches that do not see each other."""
    n = TRUNK + 2 * BRANCH
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[TRUNK + BRANCH :, TRUNK : TRUNK + BRANCH] = False
    one = torch.arange(TRUNK, TRUNK + BRANCH)
    return visible, torch.cat([torch.arange(TRUNK), one, one])


def _in_one_pass(model: GenerativeModel, ids: Tensor) -> Tensor:
    visible, positions = (x.to(ids.device) for x in _branch_visibility())
    return model.hidden(ids[None], visible[None, None], positions[None])[0]


def _on_a_cache(model: GenerativeModel, ids: Tensor) -> Tensor:
    visible, positions = (x.to(ids.device) for x in _branch_visibility())
    cache = DynamicCache()
    parts = [
        model.hidden(
            ids[None, start:stop], visible[None, None, start:stop, :stop], positions[None, start:stop], cache
        )
        for start, stop in ((0, TRUNK), (TRUNK, len(ids)))
    ]
    return torch.cat(parts, dim=1)[0]


def _same_along_a_tree(model: GenerativeModel, ids: Tensor, expected: Tensor) -> bool:
    """Whether attention along a tree gives the expected result. Here the trunk is the root, and the branches
    are the trunks of two sequences."""
    _, positions = (x.to(ids.device) for x in _branch_visibility())
    number = torch.arange(3, device=ids.device).repeat_interleave(
        torch.tensor([TRUNK, BRANCH, BRANCH], device=ids.device)
    )  # the root is 0
    order = torch.where(number == visibility.ROOT, positions, positions - TRUNK)
    branch = torch.full_like(number, visibility.TRUNK)
    tree = visibility.Tree(*(x[None] for x in (number, branch, order, order)))
    try:
        found = model.hidden(ids[None], tree, positions[None])[0]
    except Exception:  # a backbone that does not support it may fail in any way
        return False
    return _error(found, expected) <= TOLERANCE[model.dtype]  # False for NaN


def _error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def _compare(ours: Tensor, theirs: Tensor, dtype: torch.dtype, reason: str) -> None:
    error = _error(ours, theirs)
    if not error <= TOLERANCE[dtype]:  # written so that a NaN fails
        raise BackboneError(f"{reason} (by {error:.1e} of the largest value)")

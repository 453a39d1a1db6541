"""The usual way, for comparison: a plain Transformers model that holds our rows, and its beam search."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from peso.model.generative import GenerativeModel


def extended_causal_lm(model: GenerativeModel) -> Any:
    """A copy of the backbone whose own embedding and head hold words and semantic tokens, untied."""
    causal_lm = copy.deepcopy(model.causal_lm).eval()
    first, vocabulary = model.vocabulary.first_id, model.vocabulary
    for old, rows, put in (
        (causal_lm.get_input_embeddings(), vocabulary.input_rows, causal_lm.set_input_embeddings),
        (causal_lm.get_output_embeddings(), vocabulary.output_rows, causal_lm.set_output_embeddings),
    ):
        weight = torch.cat([old.weight.detach()[:first], rows.detach().to(old.weight.dtype)])
        module = copy.copy(old)
        module._parameters = {**old._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
        assert module._parameters.get("bias") is None
        put(module)
    causal_lm.config.tie_word_embeddings = False
    causal_lm.config.vocab_size = first + len(vocabulary)
    causal_lm.generation_config.eos_token_id = None
    causal_lm.generation_config.pad_token_id = 0
    return causal_lm


class Renormalise(LogitsProcessor):
    """Leave the semantic tokens, or those of the level, and make their probabilities sum to one."""

    def __init__(self, model: GenerativeModel, prompt_length: int) -> None:
        self.model, self.prompt_length = model, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocabulary = self.model.vocabulary
        start, stop = vocabulary.first_id, vocabulary.first_id + len(vocabulary)
        if self.model.loss_vocabulary == "level":
            level = input_ids.shape[1] - self.prompt_length
            start += int(vocabulary.offsets[level])
            stop = start + vocabulary.sizes[level]
        kept = torch.full_like(scores, -torch.inf)
        kept[:, start:stop] = scores[:, start:stop]
        return kept.log_softmax(-1)


def allowed_tokens(model: GenerativeModel, prompt_length: int) -> Callable[[int, Tensor], list[int]]:
    """``prefix_allowed_tokens_fn`` over a dictionary trie, as the released scripts have it."""
    children: dict[tuple[int, ...], set[int]] = {}
    for tokens in model.item_token_ids(np.arange(len(model.semantic_ids.item_ids))).tolist():
        for level in range(len(tokens)):
            children.setdefault(tuple(tokens[:level]), set()).add(tokens[level])
    sorted_children = {prefix: sorted(tokens) for prefix, tokens in children.items()}

    def allowed(_: int, ids: Tensor) -> list[int]:
        # a beam that generate keeps for want of better ones may be no prefix; its score is -inf already
        return sorted_children.get(tuple(ids[prompt_length:].tolist()), [0])

    return allowed


@torch.no_grad()
def generate(
    causal_lm: Any,
    model: GenerativeModel,
    histories: list[np.ndarray],
    beams: int,
    allowed: Callable[[int, Tensor], list[int]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(users, beams) leaves and log-probabilities by Transformers' own beam search.

    Prompts of different length are left-padded. ``allowed``: a ready ``prefix_allowed_tokens_fn`` for
    prompts of this length.
    """
    layout, levels = model.layout, model.semantic_ids.levels
    prompts = [layout.prompt(model.item_token_ids(history[-layout.window :])) for history in histories]
    length = max(len(prompt) for prompt in prompts)
    ids, mask = (torch.zeros(len(prompts), length, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, length - len(prompt) :] = 1
    allowed = allowed or allowed_tokens(model, length)
    if model.loss_vocabulary == "full":
        constraint = {"prefix_allowed_tokens_fn": allowed}
    else:  # the built-in constraint would come before the renormalisation, so it is put behind it by hand
        both = [Renormalise(model, length), PrefixConstrainedLogitsProcessor(allowed, beams)]
        constraint = {"logits_processor": LogitsProcessorList(both)}
    output = causal_lm.generate(
        ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=levels,
        length_penalty=0.0,
        early_stopping=False,
        do_sample=False,
        **constraint,
        return_dict_in_generate=True,
        output_scores=True,
    )
    trie = model.semantic_ids.trie
    leaf = {tuple(path): number for number, path in enumerate(trie.paths(np.arange(trie.leaves)).tolist())}
    numbers = output.sequences[:, length:].numpy() - model.vocabulary.first_id
    codes = numbers - model.semantic_ids.offsets
    leaves = np.array([leaf.get(tuple(path), -1) for path in codes.tolist()])
    return leaves.reshape(-1, beams), output.sequences_scores.numpy().reshape(-1, beams)


def assert_same_ranking(
    expected: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray], tolerance: float = 1e-4
) -> None:
    """Same log-probabilities by rank, and the same leaves except where two lie within the tolerance.

    Each argument: leaves and scores, (users, beams), best first.
    """
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=tolerance)
    for e_leaves, e_scores, f_leaves in zip(*expected, found[0], strict=True):
        assert len(set(f_leaves.tolist())) == len(f_leaves)
        for rank in np.flatnonzero(e_leaves != f_leaves):
            elsewhere = np.flatnonzero(e_leaves == f_leaves[rank])
            # a leaf that the other list lacks may only stand among those tied with its last
            other = e_scores[elsewhere[0]] if len(elsewhere) else e_scores[-1]
            assert abs(other - e_scores[rank]) <= 2 * tolerance

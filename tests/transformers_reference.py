"""The usual way, for comparison: a plain Transformers model that holds our rows, and its beam search."""

from __future__ import annotations

import copy
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


class UsualWay:
    """Transformers' beam search over the catalogue of one of our models, made ready once."""

    def __init__(self, model: GenerativeModel) -> None:
        self.model = model
        self.causal_lm = extended_causal_lm(model)
        # a trie of dictionaries and a lookup of whole IDs, as scripts have them
        tokens = model.item_token_ids(np.arange(len(model.semantic_ids.item_ids))).tolist()
        children: dict[tuple[int, ...], set[int]] = {}
        for item in tokens:
            for level in range(len(item)):
                children.setdefault(tuple(item[:level]), set()).add(item[level])
        self.children = {prefix: sorted(codes) for prefix, codes in children.items()}
        self.leaf = {
            tuple(i): int(leaf) for i, leaf in zip(tokens, model.semantic_ids.trie.leaf_of, strict=True)
        }

    def constraint(self, length: int, beams: int) -> dict[str, Any]:
        """What `generate` is given so that it writes items; ``length``: tokens of a prompt."""

        def allowed(_: int, sequence: Tensor) -> list[int]:
            # a beam that generate keeps for want of better ones may be no prefix; its score is -inf already
            return self.children.get(tuple(sequence[length:].tolist()), [0])

        if self.model.loss_vocabulary == "full":
            return {"prefix_allowed_tokens_fn": allowed}
        # the built-in constraint would come before the renormalisation, so it is put behind it by hand
        both = [Renormalise(self.model, length), PrefixConstrainedLogitsProcessor(allowed, beams)]
        return {"logits_processor": LogitsProcessorList(both)}

    @torch.no_grad()
    def generate(self, histories: list[np.ndarray], beams: int) -> tuple[np.ndarray, np.ndarray]:
        """(users, beams) leaves and log-probabilities. Prompts of different length are left-padded."""
        model, layout = self.model, self.model.layout
        prompts = [layout.prompt(model.item_token_ids(history[-layout.window :])) for history in histories]
        length = max(len(prompt) for prompt in prompts)
        ids, mask = (torch.zeros(len(prompts), length, dtype=torch.int64) for _ in range(2))
        for i, prompt in enumerate(prompts):
            ids[i, length - len(prompt) :] = torch.from_numpy(prompt)
            mask[i, length - len(prompt) :] = 1

        output = self.causal_lm.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=model.semantic_ids.levels,
            length_penalty=0.0,
            early_stopping=False,
            do_sample=False,
            **self.constraint(length, beams),
            return_dict_in_generate=True,
            output_scores=True,
        )
        leaves = [self.leaf.get(tuple(sequence), -1) for sequence in output.sequences[:, length:].tolist()]
        scores = output.sequences_scores.float().cpu().numpy()
        return np.array(leaves).reshape(-1, beams), scores.reshape(-1, beams)

    def in_batches(
        self, histories: list[np.ndarray], beams: int, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same in batches of ``batch_size``, in the given order."""
        starts = range(0, len(histories), batch_size)
        parts = [self.generate(histories[start : start + batch_size], beams) for start in starts]
        return np.concatenate([leaves for leaves, _ in parts]), np.concatenate(
            [scores for _, scores in parts]
        )


class TrieConstraint(LogitsProcessor):
    """The catalogue as arrays: all rows of a batch at once, no Python per beam. ``full`` only."""

    def __init__(self, model: GenerativeModel, length: int, keys: list[np.ndarray]) -> None:
        self.trie, self.vocabulary, self.length = model.semantic_ids.trie, model.vocabulary, length
        self.keys = keys  # per level: parent · codes + code of each node, ascending

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        trie, vocabulary = self.trie, self.vocabulary
        written = input_ids[:, self.length :].cpu().numpy() - vocabulary.first_id
        node = np.zeros(len(written), dtype=np.int64)
        alive = np.ones(len(written), dtype=bool)
        for level, numbers in enumerate(written.T):
            codes = numbers - int(vocabulary.offsets[level])
            size, keys = vocabulary.sizes[level], self.keys[level]
            place = np.searchsorted(keys, node * size + codes).clip(max=len(keys) - 1)
            alive &= (keys[place] == node * size + codes) & (codes >= 0) & (codes < size)
            node = np.where(alive, place, 0)
        level = written.shape[1]
        starts = trie.starts[level]
        counts = np.where(alive, starts[node + 1] - starts[node], 0)
        rows = np.repeat(np.arange(len(node)), counts)
        children = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts - starts[node], counts)
        tokens = trie.codes[level][children] + int(vocabulary.offsets[level]) + vocabulary.first_id
        dead = np.flatnonzero(~alive)  # kept for want of better ones; the score is -inf already
        rows, tokens = np.append(rows, dead), np.append(tokens, np.zeros_like(dead))
        place = torch.from_numpy(np.stack([rows, tokens])).to(scores.device)
        kept = torch.full_like(scores, -torch.inf)
        kept[place[0], place[1]] = scores[place[0], place[1]]
        return kept


class ExpertWay(UsualWay):
    """The same libraries in expert hands: users of like length together, the catalogue as arrays."""

    def __init__(self, model: GenerativeModel) -> None:
        super().__init__(model)
        levels = zip(
            model.semantic_ids.trie.starts, model.semantic_ids.trie.codes, model.vocabulary.sizes, strict=True
        )
        self.keys = [
            np.repeat(np.arange(len(starts) - 1), np.diff(starts)) * size + codes
            for starts, codes, size in levels
        ]

    def constraint(self, length: int, beams: int) -> dict[str, Any]:
        return {"logits_processor": LogitsProcessorList([TrieConstraint(self.model, length, self.keys)])}

    def in_batches(
        self, histories: list[np.ndarray], beams: int, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort([-len(history) for history in histories], kind="stable")
        leaves, scores = super().in_batches([histories[i] for i in order], beams, batch_size)
        back = np.argsort(order)
        return leaves[back], scores[back]


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

"""How sequences become chunks, chunks batches, and batches rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peso.events.histories import TargetSequence
from peso.model.layout import PromptLayout
from peso.model.visibility import visibility
from peso.training.batches import Piece, cut, lay_out, pack, plan_epoch
from peso.training.plan import ALONG_TREES, DENSE_ON_CPU, ELSEWHERE

lengths = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 89)), min_size=1, max_size=8)


def sequences_of(pairs: list[tuple[int, int]]) -> list[TargetSequence]:
    return [
        TargetSequence(str(n), np.arange(length, dtype=np.int32), min(first, length - 1))
        for n, (length, first) in enumerate(pairs)
    ]


@given(lengths, st.integers(1, 12), st.integers(1, 40))
def test_every_target_is_in_one_chunk_and_sees_between_one_and_two_windows(
    pairs: list[tuple[int, int]], window: int, most: int
) -> None:
    sequences = sequences_of(pairs)
    seen = []
    for chunk in cut(sequences, window, most):
        assert 1 <= chunk.targets <= most
        for target in range(chunk.first, chunk.stop):
            seen.append((chunk.sequence, target))
            assert min(target, window) <= target - chunk.start <= max(min(target, window), 2 * window - 1)
            if target <= window:
                assert chunk.start == 0  # the whole history, as in a prompt of its own
    assert seen == [(n, t) for n, s in enumerate(sequences) for t in range(s.first_target, len(s.items))]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=200), st.integers(9, 40), st.integers(0, 5))
def test_an_epoch_has_every_chunk_once_and_no_batch_too_many_targets(
    targets: list[int], batch_size: int, seed: int
) -> None:
    sizes = np.array(targets)
    batches = plan_epoch(sizes, batch_size, (seed, 1, 2))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sizes)))
    assert max(int(sizes[batch].sum()) for batch in batches) <= batch_size


@pytest.mark.parametrize("batch_size", [32, 700])
def test_nearly_all_batches_are_exactly_full(batch_size: int) -> None:
    sizes = np.random.default_rng(0).geometric(0.2, 2000).clip(1, 32)
    full = [int(sizes[batch].sum()) == batch_size for batch in plan_epoch(sizes, batch_size, (0, 0, 0))]
    assert all(full[:-2])
    assert len(full) <= -(-sizes.sum() // batch_size) + 1


def test_chunks_of_one_target_fill_a_large_batch() -> None:
    assert [len(batch) for batch in plan_epoch(np.ones(1000, dtype=int), 400, (0,))] == [400, 400, 200]


def test_an_epoch_is_fixed_by_its_seed_and_differs_from_the_next() -> None:
    sizes = np.full(100, 3)
    one, same, other = (plan_epoch(sizes, 32, seed) for seed in ((5, 1, 0), (5, 1, 0), (5, 1, 1)))
    assert [b.tolist() for b in one] == [b.tolist() for b in same]
    assert [b.tolist() for b in one] != [b.tolist() for b in other]


def test_a_chunk_larger_than_the_batch_stands_alone() -> None:
    assert [b.tolist() for b in plan_epoch(np.array([7, 7]), 3, (0,))] in ([[0], [1]], [[1], [0]])


STREAM = PromptLayout("stream", (90,), (), (), (), 20)
INSTRUCT = PromptLayout("instruct", (90, 91), (80,), (70, 71), (60,), 20)


def test_a_stream_chunk_is_its_items_back_to_back_without_the_last_token() -> None:
    piece = lay_out(STREAM, np.array([[1, 2], [3, 4], [5, 6]]), 1, predict_end=True)
    assert piece.ids.tolist() == [1, 2, 3, 4, 5]
    assert piece.positions.tolist() == [1, 2, 3, 4, 5]
    assert piece.targets.tolist() == [3, 4, 5, 6]
    assert piece.states.tolist() == [2, 3, 4, 5]  # place 0 is the root


def test_the_first_item_of_an_empty_history_is_predicted_from_the_root() -> None:
    piece = lay_out(STREAM, np.array([[1, 2]]), 0, predict_end=True)
    assert (piece.ids.tolist(), piece.targets.tolist(), piece.states.tolist()) == ([1], [1, 2], [0, 1])


def test_branches_leave_the_trunk_after_the_last_item_before_their_target() -> None:
    piece = lay_out(INSTRUCT, np.array([[1, 2], [3, 4], [5, 6]]), 0, predict_end=True)
    trunk, branch = [1, 2, 80, 3, 4], [70, 71]
    assert piece.ids.tolist() == [*trunk, *branch, 1, 2, *branch, 3, 4, *branch, 5, 6]
    # positions of the separate prompts: prefix (2 tokens), items and separators, suffix, target
    assert piece.positions.tolist() == [2, 3, 4, 5, 6, 2, 3, 4, 5, 4, 5, 6, 7, 7, 8, 9, 10]
    assert piece.limit[5::4].tolist() == [-1, 1, 4]
    assert piece.targets.tolist() == [1, 2, 60, 3, 4, 60, 5, 6, 60]
    assert piece.states.tolist() == [8, 9, 10, 12, 13, 14, 16, 17, 18]


def test_without_the_end_token_the_last_token_of_the_item_needs_no_place() -> None:
    piece = lay_out(INSTRUCT, np.array([[1, 2], [3, 4]]), 1, predict_end=False)
    assert piece.ids.tolist() == [1, 2, 70, 71, 3]
    assert piece.targets.tolist() == [3, 4]
    assert piece.states.tolist() == [5, 6]


def test_a_layout_with_separators_but_no_suffix_predicts_from_the_trunk_all_the_same() -> None:
    layout = PromptLayout("listed", (90,), (80,), (), (), 20)
    piece = lay_out(layout, np.array([[1, 2], [3, 4], [5, 6]]), 1, predict_end=True)
    assert piece.ids.tolist() == [1, 2, 80, 3, 4, 3, 5]
    assert piece.states.tolist() == [2, 6, 5, 7]  # after item 1 and item 2, not after a separator


def test_a_layout_without_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="prefix"):
        lay_out(PromptLayout("bare", (), (), (), (), 20), np.array([[1, 2]]), 0, predict_end=True)


def random_pieces(sizes: list[int]) -> list[Piece]:
    items = [np.arange(2 * (n + 1)).reshape(-1, 2) + 100 * i for i, n in enumerate(sizes)]
    return [lay_out(STREAM, rows, len(rows) - 1, predict_end=True) for rows in items]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=30),
    st.integers(1, 200),
    st.integers(1, 500),
    st.sampled_from([64, 64, 3]),
)
@settings(deadline=None)
def test_rows_keep_to_their_budget_and_hold_every_piece_whole(
    sizes: list[int], row_tokens: int, pass_tokens: int, digits: int
) -> None:
    pieces = random_pieces(sizes)
    passes = pack(pieces, STREAM.prefix, row_tokens, pass_tokens, digits)
    longest = max(len(piece) for piece in pieces)
    owners = []
    for packed in passes:
        rows, length = packed.ids.shape
        assert f"{length:b}"[digits:].strip("0") == ""
        assert length < max(row_tokens, 1 + longest) * (1 + 2.0 ** (1 - digits)) + 1
        assert rows == 1 or rows * length <= pass_tokens
        # each target's state is the token before it in its own piece, or the root
        before = packed.ids.flatten()[packed.states]
        for owner in packed.owners.unique().tolist():
            mine = packed.owners == owner
            assert packed.targets[mine].tolist() == pieces[owner].targets.tolist()
            path = [90, *pieces[owner].ids.tolist()]
            assert before[mine].tolist() == [path[i] for i in pieces[owner].states.tolist()]
        owners += packed.owners.unique().tolist()
    assert sorted(owners) == list(range(len(pieces)))
    roots = sum(packed.ids.shape[0] for packed in passes)
    assert sum(packed.tokens for packed in passes) == sum(map(len, pieces)) + roots


def test_no_pieces_are_no_passes() -> None:
    assert pack([], STREAM.prefix, *ELSEWHERE) == []


def test_padding_stays_under_five_per_cent() -> None:
    generator = np.random.default_rng(0)
    streams = random_pieces(generator.integers(5, 40, 300).tolist())
    # as long as SmolLM2's tokenizer makes the instruction; eight optimiser steps of targets together
    layout = PromptLayout("instruct", tuple(range(31)), (80, 81), tuple(range(22)), (60,), 20)
    chunks = [(int(generator.integers(1, 21)), min(16, generator.geometric(0.2))) for _ in range(50)]
    prompts = [
        lay_out(layout, np.zeros((seen + targets, 4), dtype=np.int64), seen, predict_end=True)
        for seen, targets in chunks
    ]
    for pieces, prefix, budget in (
        (streams, STREAM.prefix, (256, 256)),
        (streams, STREAM.prefix, (512, 4096)),
        (prompts, layout.prefix, ALONG_TREES),
        (prompts, layout.prefix, DENSE_ON_CPU),
        (prompts, layout.prefix, ELSEWHERE),
    ):
        passes = pack(pieces, prefix, *budget)
        places = sum(packed.ids.numel() for packed in passes)
        assert sum(packed.tokens for packed in passes) > 0.95 * places


def test_who_sees_whom() -> None:
    # root, trunk of two, a branch after its first token and one after none; another user; padding
    sequence = torch.tensor([[0, 1, 1, 1, 1, 1, 2, -1]])
    branch = torch.tensor([[0, 0, 0, 1, 1, 2, 0, 0]])
    order = torch.tensor([[0, 0, 1, 0, 1, 0, 0, 0]])
    limit = torch.tensor([[0, 0, 1, 0, 0, -1, 0, 0]])
    seen = visibility(sequence, branch, order, limit)[0, 0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


@given(st.integers(2, 20), st.integers(1, 8))
def test_chunks_of_one_user_overlap_by_the_window(window: int, most: int) -> None:
    chunks = cut(sequences_of([(6 * window, 0)]), window, most)
    for one, two in pairwise(chunks):
        assert two.first == one.stop
        assert two.start == max(0, two.first - window)

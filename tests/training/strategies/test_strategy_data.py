"""Strategies that choose their examples: what they learn from, and what they keep of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from strategy_runs import Runs, check_same_results, state
from torch import Tensor, nn

from peso.errors import TrainingError
from peso.events.histories import TargetSequence
from peso.runs import pipeline
from peso.runs.models import starting_model
from peso.runs.stage import FORMAT, RunStage
from peso.runs.workspace import Workspace
from peso.runtime.manifest import replace_file
from peso.training.batches import cut
from peso.training.plan import StageExamples
from peso.training.strategies.inf_lora import InfLora
from peso.training.strategies.recent import Recent, latest
from peso.training.strategies.replay import Replay, stored, trimmed
from peso.training.strategies.retrain import Retrain
from peso.training.strategies.strategy import StageContext

pytestmark = pytest.mark.slow

WINDOW = 5


class Numbered:
    """60 sequences a stage; the first item of each is its number."""

    tokens, window = 2, WINDOW

    def of(self, stage: int) -> list[TargetSequence]:
        return [TargetSequence("u", np.array([60 * stage + i, 1], dtype=np.int32), 1) for i in range(60)]


def context(number: int, seed: int, memory: dict[str, Tensor]) -> StageContext:
    examples = Numbered()
    return StageContext(number, nn.Identity(), 0, seed=seed, examples=examples, memory=memory)  # type: ignore


def test_the_reservoir_is_a_uniform_sample_of_all_earlier_stages() -> None:
    """Over 800 seeds every one of 180 sequences is kept equally often, whichever stage it came with."""
    budget, stages, seeds = 20, 3, 800
    counts = np.zeros(60 * stages)
    for seed in range(seeds):
        memory: dict[str, Tensor] = {}
        for number in range(1, stages + 1):
            chosen = Replay(budget=budget).choose(context(number, seed, memory))
            assert chosen is not None
            assert len(chosen) == 60 + budget
        kept, seen = stored(memory)
        assert seen == 60 * stages
        numbers = [int(sequence.items[0]) for sequence in kept]
        assert len(set(numbers)) == budget
        counts[numbers] += 1
    assert chisquare(counts).pvalue > 1e-3
    assert chisquare(counts.reshape(stages, 60).sum(1)).pvalue > 1e-3


def test_the_reservoir_goes_on_from_what_is_stored_not_from_the_old_log() -> None:
    """Of earlier stages but the last nothing is asked for: they may be gone."""

    class Recent(Numbered):
        def of(self, stage: int) -> list[TargetSequence]:
            assert stage >= 4
            return super().of(stage)

    memory: dict[str, Tensor] = {}
    for number in range(1, 5):
        Replay(budget=20).choose(context(number, 0, memory))
    before = {int(sequence.items[0]) for sequence in stored(memory)[0]}
    later = dataclasses.replace(context(5, 0, memory), examples=Recent())  # type: ignore[arg-type]
    Replay(budget=20).choose(later)
    after = {int(sequence.items[0]) for sequence in stored(memory)[0]}
    assert after <= before | set(range(240, 300))
    assert after & before


def test_fewer_sequences_than_the_budget_are_all_kept() -> None:
    memory: dict[str, Tensor] = {}
    Replay(budget=100).choose(context(1, 0, memory))
    assert sorted(int(sequence.items[0]) for sequence in stored(memory)[0]) == list(range(60))


@given(
    length=st.integers(1, 60), first=st.integers(0, 59), window=st.integers(1, 20), most=st.integers(1, 16)
)
def test_what_is_trimmed_is_what_no_target_sees(length: int, first: int, window: int, most: int) -> None:
    items = np.arange(length, dtype=np.int32)
    whole = TargetSequence("u", items, min(first, length - 1))
    short = trimmed(whole, window)
    assert len(short.items) <= window + whole.targets

    def seen(sequence: TargetSequence) -> list[tuple[list[int], list[int]]]:
        return [
            (sequence.items[c.start : c.stop].tolist(), sequence.items[c.first : c.stop].tolist())
            for c in cut([sequence], window, most)
        ]

    assert seen(short) == seen(whole)


def test_a_run_keeps_no_more_than_the_budget(runs: Runs) -> None:
    workspace = runs({"name": "replay", "budget": 7})
    window = workspace.config.prompt.window
    for stage in (1, 2, 3):
        kept, seen = stored(state(workspace, stage))
        assert len(kept) == 7
        stream = workspace.stream
        assert seen == sum(len(stream.stage(earlier).training_sequences()) for earlier in range(stage))
        assert all(sequence.first_target <= window for sequence in kept)


@given(targets=st.lists(st.integers(0, 9), max_size=12), count=st.integers(0, 60), seed=st.integers(0, 9))
def test_the_latest_targets_are_taken_from_the_end_of_every_sequence_alike(
    targets: list[int], count: int, seed: int
) -> None:
    sequences = [
        TargetSequence(str(user), np.arange(3 + number, dtype=np.int32), 3)
        for user, number in enumerate(targets)
    ]
    found = latest(sequences, count, np.random.default_rng(seed))
    taken = {int(sequence.user): sequence.targets for sequence in found}
    assert sum(taken.values()) == min(count, sum(targets))
    assert all(0 < number <= targets[user] for user, number in taken.items())
    for sequence in found:  # the history before the first target is complete
        assert sequence.items.tolist() == sequences[int(sequence.user)].items.tolist()
    shortened = [taken.get(user, 0) for user, number in enumerate(targets) if taken.get(user, 0) < number]
    assert all(number <= min(shortened, default=9) + 1 for number in taken.values())


def test_recent_replays_a_share_of_the_new_targets_from_the_last_stage_alone(runs: Runs) -> None:
    workspace = runs({"name": "recent", "share": 0.5})
    examples = examples_at(workspace, 2)
    plain = StageContext(2, nn.Identity(), 0, examples=examples)
    chosen = Recent(share=0.5).choose(plain)
    new, before = (workspace.stream.stage(number).training_sequences() for number in (2, 1))
    assert chosen is not None
    assert [s.user for s in chosen[: len(new)]] == [s.user for s in new]
    replayed = chosen[len(new) :]
    assert sum(s.targets for s in replayed) == round(0.5 * sum(s.targets for s in new))
    last = {s.user: s.items.tolist() for s in before}
    assert all(last[s.user] == s.items.tolist() for s in replayed)
    assert state(workspace, 2) == {}
    other = dataclasses.replace(plain, seed=1)
    assert [s.targets for s in Recent(share=0.5).choose(other)[len(new) :]] != [s.targets for s in replayed]


def examples_at(workspace: Workspace, stage: int) -> StageExamples:
    model = starting_model(workspace.stage(stage))
    stream = workspace.stream
    return StageExamples(model, stream.stage, stage, workspace.config.training, 0)


def test_retrain_learns_every_target_of_the_stages_so_far_and_no_other(runs: Runs) -> None:
    workspace = runs("retrain")
    examples = examples_at(workspace, 2)
    chosen = Retrain().choose(StageContext(2, nn.Identity(), 0, examples=examples))
    stream = workspace.stream
    expected = [sequence for stage in range(3) for sequence in stream.stage(stage).training_sequences()]
    assert [(s.user, s.items.tolist(), s.first_target) for s in chosen] == [
        (s.user, s.items.tolist(), s.first_target) for s in expected
    ]


@pytest.mark.parametrize("backbone", ["pretrained", "tiny"])
def test_retrain_owes_nothing_to_earlier_states(runs: Runs, tmp_path: Path, backbone: str) -> None:
    """Other weights in the stage before change no bit; of stage 0 only the backbone trained there counts."""
    workspace = runs("retrain", backbone=backbone)
    other = runs.start(tmp_path / "other", "retrain", backbone=backbone)
    base = runs("none", backbone=backbone).root
    learn_two_stages(other, base)
    directory = other.stage(1).directory
    for file in directory.rglob("*.safetensors"):
        with replace_file(directory, str(file.relative_to(directory)), FORMAT) as aside:
            save_file({name: torch.randn_like(t) for name, t in load_file(file).items()}, aside)
    pipeline.run(other)
    check_same_results(other, workspace, 2)


def learn_two_stages(workspace: Workspace, base: Path) -> None:
    """Stage 0 from ``base`` and stage 1, as an interrupted run leaves them."""
    from unittest.mock import patch

    plain = pipeline.learn

    def learn(stage: RunStage, *rest: object) -> None:
        if stage.number == 2:
            raise KeyboardInterrupt
        plain(stage, *rest)  # type: ignore[arg-type]

    with patch.object(pipeline, "learn", learn), pytest.raises(KeyboardInterrupt):
        pipeline.run(workspace, base=base)
    assert workspace.finished_stages == [0, 1]


def test_no_stage_but_those_up_to_the_one_that_is_learnt_can_be_looked_at(runs: Runs) -> None:
    examples = examples_at(runs("none"), 1)
    for stage, message in ((2, "stage 2 cannot be read while stage 1"), (-1, "there is no stage -1")):
        with pytest.raises(TrainingError, match=message):
            examples.of(stage)
        with pytest.raises(TrainingError, match=message):
            examples.show(stage, 1)
        with pytest.raises(TrainingError, match=message):
            next(examples.losses(stage, 2))


def test_a_strategy_that_needs_an_earlier_stage_says_so_at_stage_0(runs: Runs) -> None:
    examples = examples_at(runs("none"), 0)
    backbone = starting_model(runs("none").stage(1)).backbone
    at_0 = StageContext(0, backbone, 0, examples=examples)
    for ask in (lambda: Replay().choose(at_0), lambda: InfLora().begin(at_0)):
        with pytest.raises(TrainingError, match=r"there is no stage -1.*stage 0 has none"):
            ask()

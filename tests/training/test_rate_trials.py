"""Trials choose the rates that validate best, and change nothing else of the training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_path import cases_of, random_sequences, with_adapter

from peso.config import TrainingConfig, TrialsConfig
from peso.errors import TrainingError
from peso.model.generative import GenerativeModel
from peso.runtime.progress import Silent
from peso.training.likelihood import tokens_of_target
from peso.training.loop import train_stage
from peso.training.rate_trials import Rates, choose_rates, halving, read_choice, trial_steps
from peso.training.strategies.peso import Peso
from peso.training.strategies.strategy import StageContext, Strategy
from peso.training.task import StageResult, StageTask

pytestmark = pytest.mark.slow

SEQUENCES = random_sequences(0, count=12, longest=8)
CANDIDATES = [Rates(rate, rows) for rate in (1e-5, 1e-2) for rows in (0.3, 3.0)]


class Setting:
    """A training whose every start is the same."""

    checkpoint_seconds = 1e9  # at the ends of epochs alone

    def __init__(self, make_model: Callable[..., GenerativeModel], **settings: Any) -> None:
        self.make_model = make_model
        self.settings = TrainingConfig(**{"epochs": 3, "batch_size": 8, "device": "cpu", **settings})

    def model(self) -> GenerativeModel:
        return with_adapter(self.make_model("stream", "semantic", layers=1), dropout=0.1)

    def start(self) -> tuple[GenerativeModel, Strategy, StageContext]:
        model = self.model()
        context = StageContext(2, model.backbone, 0, seed=7, vocabulary=model.vocabulary)
        return model, Peso(weight=1.0, reduction="sum"), context

    def task(self, directory: Path, rates: Rates = CANDIDATES[0]) -> tuple[GenerativeModel, StageTask]:
        model, strategy, context = self.start()
        directory.mkdir(parents=True, exist_ok=True)
        return model, StageTask(
            SEQUENCES,
            cases_of(SEQUENCES, model.layout.window),
            self.settings.model_copy(update={"rows_learning_rate_scale": rates.rows}),
            stage=2,
            learning_rate=rates.learning_rate,
            strategy=strategy,
            seed=7,
            directory=directory,
            log=directory / "log.jsonl",
            context=context,
            checkpoint_seconds=self.checkpoint_seconds,
        )

    def by_trials(
        self, directory: Path, observer: Silent | None = None, **trials: Any
    ) -> tuple[GenerativeModel, StageResult]:
        model, task = self.task(directory)
        task, _ = choose_rates(
            model, task, CANDIDATES, TrialsConfig(**trials), self.start, observer or Silent()
        )
        return model, train_stage(model, task)

    def plainly(self, directory: Path, rates: Rates) -> tuple[GenerativeModel, StageResult]:
        model, task = self.task(directory, rates)
        return model, train_stage(model, task)


@pytest.fixture
def setting(make_model: Callable[..., GenerativeModel]) -> Setting:
    return Setting(make_model)


def check_same(one: GenerativeModel, two: GenerativeModel) -> None:
    others = dict(two.named_parameters())
    for name, value in one.named_parameters():
        assert torch.equal(value, others[name]), name


def test_a_stage_by_trials_ends_with_the_bits_of_its_rates(setting: Setting, tmp_path: Path) -> None:
    model, result = setting.by_trials(tmp_path / "auto", budget=2.0)
    told = read_choice(tmp_path / "auto")
    assert told is not None
    chosen = Rates(told["learning_rate"], told["rows"])
    plain, expected = setting.plainly(tmp_path / "plain", chosen)
    check_same(model, plain)
    assert result.validation_losses == expected.validation_losses
    assert (result.steps, result.best_epoch) == (expected.steps, expected.best_epoch)
    assert read_choice(tmp_path / "plain") is None


def test_each_round_keeps_the_better_half(setting: Setting, tmp_path: Path) -> None:
    model, _ = setting.by_trials(tmp_path, budget=2.0)
    told = read_choice(tmp_path)
    assert told is not None
    trials = told["trials"]
    steps = sorted({trial["steps"] for trial in trials})
    rounds = [[trial for trial in trials if trial["steps"] == each] for each in steps]
    assert [len(each) for each in rounds] == [4, 2]
    for round_, following in pairwise(rounds):
        best = sorted(round_, key=lambda trial: trial["loss"])[: len(following)]
        assert {(t["learning_rate"], t["rows"]) for t in best} == {
            (t["learning_rate"], t["rows"]) for t in following
        }
    last = min(rounds[-1], key=lambda trial: trial["loss"])
    assert (last["learning_rate"], last["rows"]) == (told["learning_rate"], told["rows"])
    # what judges a trial is the lowest validation loss of that very training
    for trial in rounds[-1]:
        plain, task = setting.task(tmp_path / f"{trial}"[:40], Rates(trial["learning_rate"], trial["rows"]))
        losses = train_stage(plain, task).validation_losses
        assert trial["loss"] / tokens_of_target(model) >= min(losses) - 1e-9


class Interrupted(Silent):
    """Stops the run, as Ctrl-C does, after so many steps of whatever."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, done: int, **_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_interrupted_trials_end_the_same(setting: Setting, tmp_path: Path) -> None:
    whole, _ = setting.by_trials(tmp_path / "whole")
    setting.checkpoint_seconds = 0.0
    for after in (4, 17, 14):  # within a first round, at the end of a trial, in the second round
        with pytest.raises(KeyboardInterrupt):
            setting.by_trials(tmp_path / "parts", Interrupted(after))
    parts, _ = setting.by_trials(tmp_path / "parts")
    check_same(parts, whole)

    def without_seconds(directory: Path) -> Any:
        told = read_choice(directory)
        assert told is not None
        return {**told, "trials": [{**trial, "seconds": 0} for trial in told["trials"]]}

    assert without_seconds(tmp_path / "parts") == without_seconds(tmp_path / "whole")


def test_a_rate_that_diverges_loses_and_if_all_do_it_is_an_error(setting: Setting, tmp_path: Path) -> None:
    model, task = setting.task(tmp_path / "one")
    wild, tame = Rates(1e38), Rates(1e-3)
    task, choice = choose_rates(model, task, [tame, wild], TrialsConfig(), setting.start, Silent())
    assert choice.rates == tame
    assert task.learning_rate == 1e-3
    assert {trial.rates: trial.loss is None for trial in choice.trials} == {tame: False, wild: True}
    model, task = setting.task(tmp_path / "two")
    with pytest.raises(TrainingError, match=r"no trial has a finite loss.*training\.later\.trials\.scales"):
        choose_rates(model, task, [wild, Rates(2e38)], TrialsConfig(), setting.start, Silent())


def test_the_budget_is_kept_but_for_the_least_that_a_trial_needs() -> None:
    for candidates in (2, 3, 4, 7, 12):
        for steps in (100, 1000):
            rounds = halving(candidates, budget=steps, first=1, most=steps)
            before = [0, *(reached for _, reached in rounds)]
            spent = sum(size * (b - a) for (size, b), a in zip(rounds, before, strict=False))
            assert 0.7 * steps < spent <= steps
            assert 0 < trial_steps(rounds) < spent
            assert rounds[0][0] == candidates
            assert [a for _, a in rounds] == sorted({a for _, a in rounds})
    assert halving(4, budget=4, first=10, most=12) == [(4, 10), (2, 11)]

"""Trials that choose the learning rates of a stage by successive halving on its validation cases.

In successive halving (Karnin et al. 2013; Jamieson and Talwalkar 2016), all candidates train for some steps,
and the better half continues, until one is left. Every round has the same share of the budget. A trial is the
beginning of the stage's training with its rates, and is judged by its lowest validation loss. The training of
the winner continues, so the result is bit-identical to a training with the same rates without trials.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from peso.config import TrainingConfig, TrialsConfig
from peso.errors import Divergence, TrainingError, WorkspaceError
from peso.model.generative import GenerativeModel
from peso.runtime.files import read_sealed, write_atomically, write_sealed
from peso.runtime.progress import Observer
from peso.training.checkpoint import FILE as CHECKPOINT
from peso.training.likelihood import tokens_of_target
from peso.training.loop import train_until
from peso.training.optimizer import warmup_steps
from peso.training.plan import StagePlan, most_targets
from peso.training.strategies.strategy import StageContext, Strategy
from peso.training.task import Progress, StageTask

LEAST_STEPS = 8  # of the first round after the warm-up; with fewer, the ranking would be random
FILE = "trials.json"
Start = Callable[[], tuple[GenerativeModel, Strategy, StageContext]]


@dataclass(frozen=True)
class Rates:
    """The learning rates of a training.

    Attributes:
        learning_rate: the peak rate of the adapter, or of the backbone if there is none.
        rows: the rate of the vocabulary's rows and of the item head, relative to ``learning_rate``.
    """

    learning_rate: float
    rows: float = 1.0

    def __str__(self) -> str:
        rows = "" if self.rows == 1 else f", rows × {self.rows:g}"
        return f"{self.learning_rate:g}{rows}"


@dataclass(frozen=True)
class Trial:
    """A candidate at the end of a round.

    Attributes:
        learning_rate, rows: see :class:`Rates`.
        steps: the number of steps since the start of the trial.
        loss: the lowest validation loss so far, in nats per item; None if a loss or gradient was not finite.
        seconds: the computing time since the start of the trial.
    """

    learning_rate: float
    rows: float
    steps: int
    loss: float | None
    seconds: float

    @property
    def rates(self) -> Rates:
        return Rates(self.learning_rate, self.rows)


@dataclass(frozen=True)
class Choice:
    """The ``rates`` of the winner, and all ``trials`` in the order in which they ran."""

    rates: Rates
    trials: Sequence[Trial]

    @property
    def seconds(self) -> float:
        """The computing time of the candidates that did not win."""
        spent = {trial.rates: trial.seconds for trial in self.trials}  # of the last trial of each
        return math.fsum(seconds for rates, seconds in spent.items() if rates != self.rates)

    def __str__(self) -> str:
        tried = {trial.rates for trial in self.trials}
        steps = max(trial.steps for trial in self.trials)
        best = f"learning rate {self.rates}, the best of {len(tried)}"
        return f"{best} in trials of up to {steps:,} steps{self.edge}"

    @property
    def edge(self) -> str:
        """A hint if the chosen rate is the lowest or highest that was tried; empty otherwise."""
        rates = [trial.learning_rate for trial in self.trials]
        if min(rates) == max(rates) or min(rates) < self.rates.learning_rate < max(rates):
            return ""
        which = "lower" if self.rates.learning_rate == min(rates) else "higher"
        return f"; no {which} one was tried (training.later.trials.scales)"

    def figures(self) -> dict[str, Any]:
        """The values for the stage's metrics, as JSON."""
        return {**asdict(self.rates), "trials": [asdict(trial) for trial in self.trials]}


def halving(candidates: int, budget: int, first: int, most: int) -> list[tuple[int, int]]:
    """The rounds of successive halving. Each is the number of candidates, and the number of steps that each
    candidate has completed at the end.

    Args:
        candidates: the number of candidates in the first round.
        budget: the total number of steps of all candidates, which is split equally over the rounds.
        first: the smallest number of steps of the first round, even if this exceeds the budget.
        most: the number of steps of the whole training.

    >>> halving(4, budget=80, first=8, most=100)
    [(4, 10), (2, 30)]
    >>> halving(5, budget=80, first=12, most=24)
    [(5, 12), (3, 20), (2, 24)]
    """
    sizes = []
    while candidates > 1:
        sizes.append(candidates)
        candidates = math.ceil(candidates / 2)
    rounds, reached = [], 0
    for size in sizes:
        reached = min(max(reached + budget // len(sizes) // size, first), most)
        rounds.append((size, reached))
    return rounds


def trial_rounds(
    steps: int, settings: TrainingConfig, trials: TrialsConfig, candidates: int
) -> list[tuple[int, int]]:
    """The rounds of :func:`halving` for a training of ``steps`` steps."""
    first = min(warmup_steps(settings, steps) + LEAST_STEPS, steps)
    return halving(candidates, round(trials.budget * steps), first, steps)


def trial_steps(rounds: Sequence[tuple[int, int]]) -> int:
    """The total number of steps of the candidates that do not win.

    Args:
        rounds: the result of :func:`halving`.

    >>> trial_steps([(4, 10), (2, 30)])
    50
    """
    before = [0, *(reached for _, reached in rounds)]
    return sum((size - 1) * (reached - start) for (size, reached), start in zip(rounds, before, strict=False))


def choose_rates(
    model: GenerativeModel,
    task: StageTask,
    candidates: Sequence[Rates],
    trials: TrialsConfig,
    start: Start,
    observer: Observer,
) -> tuple[StageTask, Choice]:
    """Find the candidate with the lowest validation loss. Of equal ones, the one that was better in the round
    before is chosen; in the first round, the one with the lower rate.

    Trials are stored in ``trials/`` in the task's directory. If they are interrupted, they continue from
    their checkpoints.

    Args:
        model: the model to train. It does not change.
        task: the training, with any rates.
        candidates: two or more candidates, ascending.
        trials: the section ``training.later.trials`` of the configuration.
        start: a function that creates the model, strategy and context as at the start of the stage. It is
            called for each trial.
        observer: gets the progress of each trial.

    Returns:
        The task with the rates of the winner, and the choice. The task's directory has the checkpoint and the
        log of the winning trial.

    Raises:
        TrainingError: no candidate has a finite loss; or see :func:`peso.training.loop.train_stage`.
    """
    directory, processes = task.directory / "trials", task.processes
    most = most_targets(model.layout)
    plan = StagePlan(task.sequences, model.layout.window, task.settings, task.seed, task.stage, most)
    done = [Trial(**trial) for trial in processes.on_main(partial(_read, directory / FILE))["trials"]]
    left = list(candidates)
    for _, steps in trial_rounds(len(plan), task.settings, trials, len(candidates)):
        known = {trial.rates: trial for trial in done if trial.steps == steps}
        for rates in left:
            if rates not in known:
                title = f"stage {task.stage}: trial of learning rate {rates}"
                bar = _bar(observer, title, steps)
                known[rates] = _trial(_with_rates(task, rates), rates, steps, start, bar)
                done.append(known[rates])
                processes.on_main(partial(_write, directory / FILE, _as_json(done)))
        half = math.ceil(len(left) / 2)
        finite = [known[rates] for rates in left if known[rates].loss is not None]
        kept = [trial.rates for trial in sorted(finite, key=attrgetter("loss"))[:half]]
        if not kept:
            raise TrainingError(
                f"stage {task.stage}: no trial has a finite loss, not even the one with the lowest learning "
                f"rate, {candidates[0].learning_rate:g}; use lower training.later.trials.scales"
            )
        for rates in set(left) - set(kept):
            processes.on_main(partial(shutil.rmtree, _trial_directory(task, rates), ignore_errors=True))
        left = kept
    choice = Choice(left[0], done)
    processes.on_main(partial(_adopt_winner, task, choice))
    return _with_rates(task, choice.rates), choice


def read_choice(directory: Path) -> dict[str, Any] | None:
    """The choice that :func:`choose_rates` stored in a training's directory, as JSON; None if there were no
    trials."""
    file = directory / "trials" / FILE
    return _read(file) if file.is_file() else None


def _with_rates(task: StageTask, rates: Rates) -> StageTask:
    settings = task.settings.model_copy(update={"rows_learning_rate_scale": rates.rows})
    return replace(task, settings=settings, learning_rate=rates.learning_rate)


def _trial_directory(task: StageTask, rates: Rates) -> Path:
    return task.directory / "trials" / f"{rates.learning_rate!r} {rates.rows!r}"


def _trial(
    task: StageTask, rates: Rates, steps: int, start: Start, on_progress: Callable[[Progress], None]
) -> Trial:
    """Train a candidate until it has completed ``steps`` steps."""
    model, strategy, context = start()
    strategy.choose(context)  # only because hooks are called in a fixed order; the task has the examples
    directory = _trial_directory(task, rates)
    began = time.monotonic()
    task = replace(
        task,
        strategy=strategy,
        context=context,
        directory=directory,
        log=directory / task.log.name,
        on_progress=on_progress,
    )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        loss, seconds = train_until(model, task, steps)
    except Divergence:
        return Trial(rates.learning_rate, rates.rows, steps, None, time.monotonic() - began)
    return Trial(rates.learning_rate, rates.rows, steps, loss * tokens_of_target(model), seconds)


def _adopt_winner(task: StageTask, choice: Choice) -> None:
    """Copy the winner's checkpoint and log into the task's directory, unless training has begun there."""
    _write(task.directory / "trials" / FILE, choice.figures())
    if not (task.directory / CHECKPOINT).exists():
        for name in (task.log.name, CHECKPOINT):  # the log is ignored until the checkpoint exists
            write_atomically(
                task.directory / name, (_trial_directory(task, choice.rates) / name).read_bytes()
            )


def _bar(observer: Observer, title: str, steps: int) -> Callable[[Progress], None]:
    """A function that shows the progress of a trial. The bar begins with the first step, so a trial that was
    completed before has none."""
    begun = False

    def show(progress: Progress) -> None:
        nonlocal begun
        if not begun:
            observer.begin(title, steps, "steps")
            begun = True
        observer.advance(progress.step, loss=progress.loss, tokens_per_second=progress.tokens_per_second)
        if progress.step == steps:
            observer.end()

    return show


def _as_json(trials: Sequence[Trial]) -> dict[str, Any]:
    return {"trials": [asdict(trial) for trial in trials]}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return _as_json([])
    try:
        return json.loads(read_sealed(file))
    except (OSError, ValueError, WorkspaceError) as error:
        raise WorkspaceError(f"{file} is damaged ({error}); remove it to repeat the trials") from None


def _write(file: Path, figures: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(file, json.dumps(figures).encode())

"""A strategy that keeps something, interrupted anywhere, ends with the bits of one that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from strategy_runs import Runs, check_same_results

from peso.model.generative import GenerativeModel
from peso.runs import learn, pipeline
from peso.runtime.progress import Silent
from peso.training.loop import train_stage
from peso.training.task import StageResult, StageTask


class Interrupted(Silent):
    """Stops the run, as Ctrl-C does, when a training begins or after one of its steps."""

    def __init__(self, title: str, step: int | None) -> None:
        self.title, self.step = title, step
        self.here = False

    def begin(self, title: str, *rest: Any) -> None:
        self.here = title == self.title
        if self.here and self.step is None:
            raise KeyboardInterrupt

    def advance(self, done: int, **_: Any) -> None:
        if self.here and done == self.step:
            raise KeyboardInterrupt


STOPS = [("learn stage 2", 2)]
PHASES = [
    ("learn stage 1, long-term", 2),
    ("learn stage 1, short-term", None),  # after the first step, before anything of it is stored
    ("learn stage 2, short-term", 2),
]


@pytest.mark.parametrize(
    ("strategy", "stops"),
    [
        ("sd_lora", STOPS),
        ("ema", STOPS),
        ({"name": "sa_caisr", "examples": 9}, STOPS),
        ({"name": "replay", "budget": 7}, STOPS),
        ({"name": "inf_lora", "threshold": 0.9, "examples": 20}, STOPS),
        ({"name": "lsat", "fusion": "outputs", "long_share": 0.3}, PHASES),
        ({"name": "lsat", "fusion": "arithmetic", "long_share": 0.3}, PHASES),
    ],
    ids=str,
)
@pytest.mark.slow
def test_an_interrupted_run_ends_the_same(
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: Any,
    stops: list[tuple[str, int | None]],
) -> None:
    monkeypatch.setattr(
        learn, "train_stage", lambda model, task: train_stage(model, replace(task, checkpoint_seconds=0.0))
    )
    workspace = runs.start(tmp_path / "interrupted", strategy)
    base = runs("none").root
    for title, step in stops:
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(workspace, base=base, observer=Interrupted(title, step))
    pipeline.run(workspace, base=base)
    check_same_results(workspace, runs(strategy), 0, 1, 2, 3)


def test_a_finished_phase_is_not_learnt_again(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = runs.start(tmp_path / "interrupted", "lsat")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(
            workspace, base=runs("none").root, observer=Interrupted("learn stage 1, short-term", None)
        )
    phases: list[str] = []

    def counted(model: GenerativeModel, task: StageTask) -> StageResult:
        phases.append(task.context.phase)
        return train_stage(model, task)

    monkeypatch.setattr(learn, "train_stage", counted)
    pipeline.run(workspace)
    assert phases == ["short-term", *["long-term", "short-term"] * 2]

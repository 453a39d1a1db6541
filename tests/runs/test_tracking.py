"""Trackers get what a run's own files say: one run a stage, each line once, whatever interrupts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small_runs import TREE, Notes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peso.config import load_config
from peso.errors import ConfigError
from peso.runs import pipeline, tracking
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow  # whole runs
TRACKED = ["baselines=none", "tracking=[tensorboard]"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def tables_only(workspaces: object, directory: Path) -> None:  # plots take most of the time
        (directory / "tables").mkdir(parents=True, exist_ok=True)
        (directory / "tables" / "averages.md").write_text("| NDCG@10 |")

    monkeypatch.setattr("peso.runs.report.report", tables_only)
    monkeypatch.setattr(tracking, "EVERY", 0.0)


def run(root: Path, *overrides: str) -> tuple[Workspace, Notes]:
    workspace, notes = Workspace.create_or_open(root, load_config(TREE, [*TRACKED, *overrides])), Notes()
    with workspace.lock():
        pipeline.run(workspace, observer=notes)
    return workspace, notes


def events(workspace: Workspace, stage: int) -> EventAccumulator:
    found = EventAccumulator(str(workspace.root / "tracking" / "tensorboard" / f"stage-{stage}"))
    return found.Reload()


def scalars(workspace: Workspace, stage: int, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(workspace, stage).Scalars(name)]


def near(pairs: list[tuple[int, float]]) -> list[tuple[int, object]]:
    return [(step, pytest.approx(value, rel=1e-5)) for step, value in pairs]


def check(workspace: Workspace, stage: int) -> None:
    """Every line of the log is there once, and so are the metrics and the figures of the anchor."""
    log, metrics = workspace.stage(stage).log, workspace.stage(stage).metrics
    steps = [record for record in log if "loss" in record]
    assert steps
    assert scalars(workspace, stage, "train/loss") == near([(each["step"], each["loss"]) for each in steps])
    losses = [record for record in log if "loss" not in record]
    name = next(key for key in losses[0] if key.startswith("validation"))
    expected = [(each["step"], each[name]) for each in losses]
    assert scalars(workspace, stage, f"validation/{name}") == near(expected)
    for name, told in metrics.get("test", {}).get("metrics", {}).items():
        assert scalars(workspace, stage, f"test/{name}") == near([(steps[-1]["step"], told["value"])])
    if stage:
        tags = events(workspace, stage).Tags()["scalars"]
        assert any(tag.startswith("anchor/") for tag in tags)
        assert any(tag.startswith("moved/") for tag in tags)


def test_every_stage_is_a_run_with_what_its_files_say(tmp_path: Path) -> None:
    workspace, _ = run(tmp_path / "w", "evaluation.enabled=true")
    assert workspace.stage(1).metrics["test"]["metrics"]
    for stage in (0, 1):
        check(workspace, stage)
    text = events(workspace, 1).Tensors("report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "NDCG@10" in text
    assert "report/text_summary" not in events(workspace, 0).Tags()["tensors"]
    config = events(workspace, 0).Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]
    assert b"learning_rate" in config
    run(tmp_path / "w", "evaluation.enabled=true")  # nothing is left to do, and nothing is sent again
    for stage in (0, 1):
        check(workspace, stage)
    untracked = workspace.with_config(workspace.config.model_copy(update={"tracking": []}))
    assert untracked.stage(1).determination() == workspace.stage(1).determined_by


def test_an_interrupted_stage_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow, calls = tracking.Tracking.follow, []

    def interrupted(self: tracking.Tracking, log: Path, phase: str, last: bool = False) -> None:
        follow(self, log, phase, last)
        calls.append(log)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(tracking.Tracking, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "w")
    workspace, _ = run(tmp_path / "w")
    for stage in (0, 1):
        check(workspace, stage)


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(tracking, "_tracker", failing)
    workspace, notes = run(tmp_path / "w")
    assert workspace.stage(1).is_trained
    told = "WARNING: tracking with tensorboard has failed (no connection); going on without it"
    assert told in notes.notes


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"wandb is not installed; install it with pip install 'peso\[wandb\]'"
    ):
        run(tmp_path / "w", f"tracking={json.dumps(['tensorboard', 'wandb'])}")
    assert not (tmp_path / "w" / "stages").exists()
    with pytest.raises(ConfigError, match="tracking"):
        load_config(TREE, ["tracking=[comet]"])

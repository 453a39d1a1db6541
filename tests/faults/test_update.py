"""An update says whether it helped; what is not tested ends without an error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_logs import write_log

from peso.config import load_config
from peso.runs import pipeline, preparation, report
from peso.runs.estimate import estimate
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

TREE = {
    "data": {"format": "simulate", "simulate": {"users": 50, "items": 30, "stages": 3}},
    "backbone": {"name": "tiny", "layers": 1},
    "training": {"epochs": 1, "max_steps": 12, "learning_rate": 1e-2, "later_learning_rate_scale": 1.0},
    "strategy": "single",
    "baselines": [],
}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The stages of each report, instead of its plots."""
    written: list[list[int]] = []

    def write(workspaces: list[Workspace], directory: Path) -> None:
        written.append(sorted(report.summarize(workspaces[0], "w").stages))
        directory.mkdir(exist_ok=True)
        (directory / "index.html").write_text("")

    monkeypatch.setattr("peso.runs.report.report", write)
    return written


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace.create_or_open(tmp_path_factory.mktemp("base") / "w", load_config(TREE))
    preparation.ingest(workspace, Silent())
    preparation.tokenize(workspace, Silent())
    pipeline.learn(workspace.stage(0), Silent())
    return workspace


@pytest.fixture(scope="module")
def updated(base: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With stage 1, not tested."""
    workspace = Workspace.open(shutil.copytree(base.root, tmp_path_factory.mktemp("updated") / "w"))
    pipeline.learn(workspace.stage(1), Silent())
    return workspace


@pytest.fixture
def root(base: Workspace, tmp_path: Path) -> Path:
    return shutil.copytree(base.root, tmp_path / "w")


def files(root: Path) -> dict[str, str]:
    return {str(p): checksum(p) for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def test_an_update_compares_old_and_new_on_the_same_cases(root: Path, peso: Call, reports: list) -> None:
    status, out, err = peso("update", "-w", root)
    assert status == 0, err
    assert "stage 1 is trained" in out
    workspace = Workspace.open(root)
    old, new = (workspace.stage(stage).on(1).predictions for stage in (0, 1))
    assert (old.users, old.targets) == (new.users, new.targets)
    assert f"on the same {len(new)} test cases of stage 1" in out
    change = float(np.mean(new.target_log_probability.astype(float) - old.target_log_probability))
    assert change > 0.2  # twelve steps more of learning
    assert "- The model after stage 1 is " in out
    assert f"Log-probability: difference {change:+.3f}, 95 % interval +" in out
    assert reports == [[1]]
    # the next one renews the report, and after the last there is nothing to do
    pipeline.update(workspace, Silent())
    assert reports == [[1], [1, 2]]
    before = files(root)
    status, out, err = peso("update", "-w", root)
    assert status == 0
    assert "all 3 stages are trained; there is nothing to do" in out
    assert f"ingest NEW --append -w {root}" in err
    assert files(root) == before
    assert len(reports) == 2


@pytest.mark.parametrize("stop", ["before its test", "before the test of the old model", "before the report"])
def test_an_interrupted_update_is_finished(
    updated: Workspace, tmp_path: Path, reports: list, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of the last stage, after which nothing is left to train."""
    workspace = Workspace.open(shutil.copytree(updated.root, tmp_path / "w"))
    last = {"before its test": (2, 2), "before the test of the old model": (1, 2)}.get(stop)
    test = pipeline.test

    def interrupt(*arguments: Any) -> Any:
        tested = arguments[0]
        if last is not None and (tested.stage.number, tested.cases) != last:
            return test(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_conclude" if last is None else "test", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline.update(workspace, Silent())
    assert reports == []
    assert workspace.finished_stages == [0, 1, 2]
    assert pipeline.update(workspace, Silent()) == 2
    assert reports == [[1, 2]]
    assert report.before_and_after(workspace)
    assert pipeline.update(workspace, Silent()) is None


def test_settings_that_no_stage_is_trained_with_are_not_stored(
    updated: Workspace, tmp_path: Path, peso: Call
) -> None:
    workspace = Workspace.open(shutil.copytree(updated.root, tmp_path / "w"))
    pipeline.learn(workspace.stage(2), Silent())
    root, before = workspace.root, files(workspace.root)
    given = ("--set", "training.later.epochs=3")
    status, _, err = peso("update", "-w", root, *given)  # all are trained, the last is not tested
    assert status == 1
    assert "training.later.epochs: no stage is left to train with this" in err
    assert files(root) == before
    status, out, _ = peso("update", "-w", root, *given, "--set", "evaluation.enabled=false")
    assert status == 0
    assert "there is nothing to do; the values of --set are not stored" in out
    assert files(root) == before


@pytest.mark.parametrize(
    "call", ["run CONFIG", "evaluate", "update", "baseline popularity", "tokenize --append"]
)
def test_a_device_that_is_not_there_is_stored_by_no_command(
    updated: Workspace, tmp_path: Path, peso: Call, call: str
) -> None:
    """Not by one either that would not use it, since its work is done."""
    root = shutil.copytree(updated.root, tmp_path / "w")
    workspace = Workspace.open(root)
    pipeline.learn(workspace.stage(2), Silent())
    pipeline.test(workspace.stage(2).on(2), Silent())
    before = files(root)
    (tmp_path / "c.yaml").write_text(json.dumps(TREE))
    words = [str(tmp_path / "c.yaml") if word == "CONFIG" else word for word in call.split()]
    for device in ("cuda:77", "mps:3"):
        status, _, err = peso(*words, "-w", root, "--set", f"training.device={device}")
        assert status == 1
        assert f"training.device '{device}' cannot be used" in err
        assert files(root) == before


def test_a_stage_that_keeps_the_old_model_is_no_better(root: Path, peso: Call, reports: list) -> None:
    status, out, err = peso("update", "-w", root, "--set", "strategy=none")
    assert status == 0, err
    assert "Log-probability: no difference in any case." in out


def test_without_evaluation_a_run_and_an_update_end_well(
    root: Path, tmp_path: Path, peso: Call, reports: list
) -> None:
    off = ("--set", "evaluation.enabled=false")
    status, out, err = peso("update", "-w", root, *off)
    assert status == 0, err
    assert "not tested, because evaluation.enabled is false" in out
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(TREE))
    status, out, err = peso("run", config, "-w", root, *off)
    assert status == 0, err
    assert "3 stages are trained" in out
    assert "evaluation.enabled is false" in out
    status, out, err = peso("update", "-w", root)
    assert status == 0, err
    assert "nothing to do" in out
    assert peso("run", config, "-w", root, *off)[0] == 0  # again, nothing being left
    assert not list(root.glob("stages/*/predictions.parquet"))
    status, _, err = peso("report", "-w", root)
    assert status == 1
    assert "no tested stage" in err
    assert reports == []
    assert peso("run", config, "-w", root)[0] == 0  # and with evaluation again: all is made up for
    assert reports == [[0, 1, 2]]


def test_a_dry_run_reads_the_log(tmp_path: Path, peso: Call) -> None:
    """What is not ingested yet is read for its counts, and nothing is written."""
    events = [(f"u{n % 20}", f"i{n * 7 % 30}", 1_700_000_000 + 3600 * n) for n in range(400)]
    table = write_log(tmp_path / "items.csv", [(f"i{n}", f"Cup {n}") for n in range(30)], "item,title")
    items = {"path": str(table), "columns": {"item": "item", "title": "title"}}
    log = str(write_log(tmp_path / "log.csv", events))
    tree = {
        "data": {"format": "csv", "path": log, "stages": 3, "items": items},
        "items": {"encoder": "nobody/has-this-encoder", "codes": 8, "levels": 2},
        "backbone": {"name": "tiny", "layers": 1},
        "training": {"epochs": 1, "batch_size": 8},
        "baselines": ["popularity"],
    }
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    status, out, err = peso("run", tmp_path / "c.yaml", "-w", tmp_path / "w", "--dry-run")
    assert status == 0, err
    assert "400 events" in out
    for step in ("learn stage 0", "test stage 2", "baseline popularity"):
        assert step in out
    assert re.search(
        r"about (0\.[1-9]|[1-9][\d.]*) (s|min \d+ s) in total on this machine \(a rough estimate\)", out
    )
    assert "not included: tokenize" in out  # the encoder is not at hand
    steps = [
        e
        for e in estimate(Workspace(tmp_path / "w", load_config(tmp_path / "c.yaml")))
        if e.step.name == "learn"
    ]
    assert all(e.minutes > 0 and "optimizer steps" in e.note for e in steps)
    assert not (tmp_path / "w").exists()

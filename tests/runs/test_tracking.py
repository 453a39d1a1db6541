"""Trackers get what a run's own files say: one run a stage, each line once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import struct
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def expected(workspace: Workspace, stage: int) -> dict[str, list[float]]:
    """Some of the values that a tracker has of a stage, by name, in their order."""
    steps = [record for record in workspace.stage(stage).log if "loss" in record]
    told = workspace.stage(stage).metrics["test"]["metrics"]["ndcg@10"]["value"]
    moved = {"moved/distance": [workspace.stage(1).metrics["training"]["moved"]["distance"]]}
    losses = [record["loss"] for record in steps]
    return {"train/loss": losses, "test/ndcg@10": [told], **(moved if stage else {})}


def in_mlflow(workspace: Workspace, stage: int) -> tuple[dict[str, list[float]], set[str], str]:
    import mlflow

    client = mlflow.MlflowClient(
        f"sqlite:///{workspace.root.resolve() / 'tracking' / 'mlflow' / 'mlflow.db'}"
    )
    experiment = client.get_experiment_by_name(workspace.root.name)
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = 'stage-{stage}'")
    values = {
        name: [each.value for each in client.get_metric_history(run.info.run_id, name.replace("@", "_at_"))]
        for name in expected(workspace, stage)
    }
    files = {file.path for file in client.list_artifacts(run.info.run_id, "report/tables")}
    return values, files, run.data.params["training/learning_rate"]


def in_trackio(workspace: Workspace, stage: int) -> tuple[dict[str, list[float]], set[str], str]:
    from trackio.sqlite_storage import SQLiteStorage

    project, run = workspace.root.name, f"stage-{stage}"
    logs = SQLiteStorage.get_logs(project, run)
    values = {name: [log[name] for log in logs if name in log] for name in expected(workspace, stage)}
    with sqlite3.connect(workspace.root / "tracking" / "trackio" / f"{project}.db") as database:
        found = database.execute(
            "SELECT manifest FROM artifact_versions WHERE producer_run_name = ?", (run,)
        ).fetchall()
    files = {f"report/{name}" for (text,) in found for name in re.findall(r"tables/\w+\.md", str(text))}
    return values, files, SQLiteStorage.get_run_config(project, run)["training/learning_rate"]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a file of W&B: the log format of LevelDB, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, place, begun = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := -place % 32768) and left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        begun += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(begun)
            begun = b""
            yield record


def in_wandb(workspace: Workspace, stage: int) -> tuple[dict[str, list[float]], set[str], str]:
    values: dict[str, list[float]] = {name: [] for name in expected(workspace, stage)}
    files, rates, ids = set(), set(), set()
    paths = (workspace.root / "tracking" / "wandb" / "wandb").glob("offline-run-*/*.wandb")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        records = [*wandb_records(path)]
        run = next(record.run for record in records if record.HasField("run"))
        if run.display_name != f"{workspace.root.name} stage-{stage}":
            continue
        ids.add((run.run_id, run.run_group))
        for update in run.config.update:
            if (update.key or "/".join(update.nested_key)) == "training/learning_rate":
                rates.add(json.loads(update.value_json))
        for record in records:
            for update in record.config.update if record.HasField("config") else ():
                if (update.key or "/".join(update.nested_key)) == "training/learning_rate":
                    rates.add(json.loads(update.value_json))
            for item in record.history.item if record.HasField("history") else ():
                name = item.key or "/".join(item.nested_key)
                if name in values:
                    values[name].append(json.loads(item.value_json))
            if record.HasField("artifact"):
                files |= {f"report/{entry.path}" for entry in record.artifact.manifest.contents}
    ((_, group),) = ids  # one run, in several files
    assert group == workspace.root.name
    (rate,) = rates
    return values, files, rate


@pytest.mark.parametrize(
    ("name", "package", "found"),
    [("mlflow", "mlflow", in_mlflow), ("trackio", "trackio", in_trackio), ("wandb", "wandb", in_wandb)],
)
def test_other_trackers_have_a_run_a_stage_the_configuration_and_the_report(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    package: str,
    found: Any,
) -> None:
    if find_spec(package) is None:  # trackio reads its settings when it is imported
        pytest.skip(f"{package} is not installed")
    for variable in [v for v in os.environ if v.startswith(("WANDB_", "TRACKIO_", "MLFLOW_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked = []

    def audit(event: str, arguments: Any) -> None:
        if event == "socket.connect" and isinstance(
            arguments[1], tuple
        ):  # a text is a socket of this machine
            host = str(arguments[1][0])
        elif event == "socket.getaddrinfo":
            host = str(arguments[0])
        else:
            return
        if host not in ("127.0.0.1", "::1", "localhost"):
            asked.append((event, host))

    sys.addaudithook(audit)  # stays until the process ends
    workspace, notes = run(tmp_path / "w", "evaluation.enabled=true", f"tracking=[{name}]")
    assert not any("warning: tracking" in note for note in notes.notes)
    for stage in (0, 1):
        values, files, rate = found(workspace, stage)
        assert values == {k: pytest.approx(v, rel=1e-5) for k, v in expected(workspace, stage).items()}
        assert ("report/tables/averages.md" in files) == (stage == 1)
        assert float(rate) == workspace.config.training.learning_rate
    assert asked == [], "nothing was sent"
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "home").exists(), "all files are in the workspace"


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
    told = "warning: tracking with tensorboard failed (no connection); continuing without it"
    assert told in notes.notes


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(TREE, TRACKED))
    (workspace.root / "tracking").write_text("not a folder")
    _, notes = run(tmp_path / "w")
    assert workspace.stage(1).is_trained
    told = [note for note in notes.notes if note.startswith("warning: tracking failed")]
    assert told
    assert f"Check that {workspace.root / 'tracking'} is a folder that can be written" in told[0]


def test_when_the_note_cannot_be_written_the_run_goes_on_without_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tracking, "write_atomically", full)
    workspace, notes = run(tmp_path / "w")
    assert workspace.stage(1).is_trained
    assert any("tracking failed (No space left on device)" in note for note in notes.notes)


def test_a_tracker_whose_server_does_not_answer_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ended = [], threading.Event()

    def mute(name: str, *_: object) -> None:
        asked.append(name)
        ended.wait()

    monkeypatch.setattr(tracking, "_tracker", mute)
    monkeypatch.setattr(tracking, "LIMIT", 0.1)
    monkeypatch.setattr(tracking, "_silent", set())
    workspace, notes = run(tmp_path / "w")
    ended.set()
    assert workspace.stage(1).is_trained
    told = "warning: tracking with tensorboard failed (no answer within 0.1 s); continuing without it"
    assert notes.notes.count(told) == len(asked) == 1, "it is not waited for again"


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

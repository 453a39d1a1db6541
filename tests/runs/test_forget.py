"""A person who is forgotten is in no file of the workspace; everybody else, and every stage, stays."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from event_logs import histories, write_log
from every_file import EVERY_FILE

from peso.config import load_config
from peso.config.baselines import read_baseline
from peso.errors import DataError, WorkspaceError
from peso.evaluation.metrics import default_metrics, stage_metrics
from peso.events.histories import stage_counts
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.runs import evaluate, pipeline, preparation
from peso.runs import forget as forgetting
from peso.runs.baselines import BaselineRun
from peso.runs.forget import forget, holdings, own_files_with, predicted_tests
from peso.runs.recommender import Recommender
from peso.runs.report import runs_of
from peso.runs.undo import last_step, undo
from peso.runs.workspace import Workspace
from peso.runtime.manifest import MANIFEST, read_manifest
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than everything else here."""
    monkeypatch.setattr("peso.runs.report.report", lambda workspaces, directory: None)


@pytest.fixture
def workspace(root: Path) -> Workspace:
    workspace = Workspace.open(root)
    with ReceivedEvents(workspace.events_file) as received:
        received.add(
            [ReceivedEvent(user, "i", n) for n in range(3) for user in (somebody(workspace), "else")]
        )
    return workspace


def somebody(workspace: Workspace) -> str:
    """Who is a test case of every stage, as most are in so small a shop."""
    stages = [workspace.stream.stage(number) for number in range(workspace.stream.stages)]
    everywhere = set.intersection(*({stage.users[row] for row in stage.eligible()} for stage in stages))
    return min(everywhere)


def erase(workspace: Workspace, user: str) -> None:
    with workspace.lock():
        forget(workspace, user, Silent())


def names_in(path: Path) -> set[str]:
    """Every text in a file that could be a name."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        found = {str(value) for name in table.column_names for value in table[name].to_pylist()}
        return found | set(re.findall(r"[\w-]+", str(table.schema)))
    return set(re.findall(r"[\w-]+", path.read_bytes().decode(errors="replace")))


def files_naming(workspace: Workspace, user: str) -> list[str]:
    gc.collect()  # ends what still has a database open, whose file *-wal would vanish while files are listed
    files = [path for path in workspace.root.rglob("*") if path.is_file()]
    return [str(path.relative_to(workspace.root)) for path in files if user in names_in(path)]


def test_no_file_names_a_person_who_is_forgotten(workspace: Workspace) -> None:
    user = somebody(workspace)
    Recommender(workspace).history(user)  # makes the index
    before = files_naming(workspace, user)
    assert {"stages/1/predictions.parquet", "stages/1/on=2/predictions.parquet"} <= set(before)
    assert {"stream/stage=0/users.parquet", "stream/events.parquet"} <= set(before)
    assert any(name.endswith("users.json") for name in before)
    assert any(name.startswith("events.sqlite") for name in before)
    assert "histories.sqlite" in before
    erase(workspace, user)
    assert files_naming(workspace, user) == []
    with pytest.raises(DataError, match="is in none of the stages"):
        Recommender(workspace).history(user)
    with ReceivedEvents(workspace.events_file) as received:
        assert [received.of_user(name) != [] for name in (user, "else")] == [False, True]


def test_everybody_else_and_every_stage_stay(workspace: Workspace) -> None:
    user = somebody(workspace)
    expected = [
        {name: had for name, had in stage.items() if name != user} for stage in histories(workspace.stream)
    ]
    tests = [(test.stage.number, test.cases) for test in predicted_tests(workspace) if test.is_done]
    digests = [stage.determined_by for stage in workspace.stages]
    items = workspace.stream.items
    erase(workspace, user)
    workspace = Workspace.open(workspace.root)
    stream = workspace.stream
    assert histories(stream) == expected
    assert stream.items.equals(items)
    assert stream.counts == [stage_counts(stream.stage(number)) for number in range(stream.stages)]
    assert [stage.determined_by for stage in workspace.stages] == digests
    for stage in workspace.stages:
        stage.require_as_determined()
    assert tests
    for number, cases in tests:
        test = workspace.stage(number).on(cases)
        assert test.is_done, "no model is needed again"
        assert test.predictions.users == stream.stage(cases).test_cases(20).users
        measured = test.metrics["test"]["metrics"]
        again = stage_metrics(test.predictions, default_metrics(workspace.config.evaluation.k))
        assert {name: measured[name] for name in again} == {name: e.as_json() for name, e in again.items()}


def test_a_stage_that_is_trained_afterwards_is_another_one(workspace: Workspace) -> None:
    user = somebody(workspace)
    before = workspace.stage(2).determined_by
    erase(workspace, user)
    with workspace.lock():
        undo(workspace, last_step(workspace), Silent())
        assert pipeline.update(workspace, Silent()) == 2
    stage = Workspace.open(workspace.root).stage(2)
    stage.require_as_determined()
    assert stage.determined_by != before
    assert stage.manifest["erasures"] == 1
    assert stage.is_tested
    other = next(name for name in stage.workspace.stream.stage(0).users)
    erase(workspace, other)
    for each in Workspace.open(workspace.root).stages:
        each.require_as_determined()


def test_an_exchanged_stage_is_still_noticed_after_an_erasure(workspace: Workspace) -> None:
    erase(workspace, somebody(workspace))
    stream = workspace.stream
    path = stream.directory / "stage=2" / "users.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    content = {key: value for key, value in stream.manifest.items() if key != "files"}
    from peso.runtime.manifest import write_manifest

    write_manifest(stream.directory, 1, {**content, "erased": []})
    with pytest.raises(WorkspaceError, match="was not trained with the stream"):
        Workspace.open(workspace.root).stage(2).require_as_determined()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["ReceivedEvents", "write_without", "erase_user", "measure"])
def test_an_interrupted_call_can_be_repeated(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    user = somebody(workspace)
    whole = Workspace.open(shutil.copytree(workspace.root, tmp_path / "whole"))
    erase(whole, user)
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = getattr(forgetting, step)

        def killed(*given: object, **also: object) -> object:
            calls.append(1)
            # the second call: in the middle of the step, where it has several
            if len(calls) == (2 if step in ("write_without", "measure", "ReceivedEvents") else 1):
                raise Killed
            return real(*given, **also)

        patch.setattr(forgetting, step, killed)
        with pytest.raises(Killed):
            erase(workspace, user)
    Workspace.open(workspace.root)  # works at any moment
    erase(workspace, user)
    assert files_naming(workspace, user) == []
    assert not (workspace.root / forgetting.NOTE).exists()
    for stage in workspace.stages:
        assert stage.manifest["files"] == whole.stage(stage.number).manifest["files"]
    assert workspace.stream.manifest["files"] == whole.stream.manifest["files"]
    assert workspace.stream.erasures == 1


def test_damaged_predictions_are_named_and_nothing_is_erased(workspace: Workspace) -> None:
    """Also if they can still be read; to write them again would hide the damage."""
    user = somebody(workspace)
    before = files_naming(workspace, user)
    path = workspace.root / "stages" / "1" / "predictions.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.slice(1), path)
    with pytest.raises(WorkspaceError, match=f"{path} is damaged.*evaluate again: `peso evaluate"):
        erase(workspace, user)
    assert files_naming(workspace, user) == before
    path.unlink()  # the cure that the message names
    erase(workspace, user)
    assert files_naming(workspace, user) == []
    evaluate.test(workspace.stage(1).on(1), Silent())
    assert user not in names_in(path)


def test_samples_that_replay_keeps_lose_the_person(tmp_path: Path) -> None:
    from peso.runs.models import stored_memory
    from peso.training.strategies.replay import stored

    tree = {**EVERY_FILE, "strategy": "replay", "evaluation": {"enabled": False}, "baselines": []}
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(tree))
    with workspace.lock():
        pipeline.run(workspace)
    user = somebody(workspace)
    before, seen = stored(stored_memory(workspace.stage(2)))
    erase(workspace, user)
    after, still = stored(stored_memory(workspace.stage(2)))
    assert (len(before) - len(after), seen) == (2, still)  # of stages 0 and 1
    gone = {tuple(sample.items) for sample in before} - {tuple(sample.items) for sample in after}
    assert len(gone) == 2
    workspace.stage(2).model()


def test_files_of_the_users_own_are_named(tmp_path: Path) -> None:
    events = [(f"u{k % 5}", f"i{k % 7}", 1_600_000_000 + k) for k in range(60)]
    later = [(f"u{k % 3}", f"i{k % 7}", 1_600_001_000 + k) for k in range(30)]
    log = write_log(tmp_path / "log.csv", events)
    more = write_log(tmp_path / "more.csv", later)
    people = tmp_path / "people.csv"
    people.write_text("user_id,age\nu4,30\n")
    data = {"format": "csv", "path": str(log), "stages": 2}
    tree = {"data": data, "backbone": "tiny", "report": {"users": str(people)}}
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(tree))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
        preparation.append(workspace, Silent(), workspace.config.data.model_copy(update={"path": str(more)}))
    assert own_files_with(workspace, "u4") == [str(log), str(people)]
    assert own_files_with(workspace, "u0") == [str(log), str(more)]
    assert own_files_with(workspace, "nobody") == []
    log.unlink()
    assert own_files_with(workspace, "u0") == [str(more)]
    erase(workspace, "u0")
    assert "u0" not in {user for stage in histories(workspace.stream) for user in stage}
    assert own_files_with(workspace, "u0") == [str(more)], "they are not changed"


def test_a_person_who_is_too_rare_for_a_stage_can_be_forgotten(tmp_path: Path) -> None:
    events = [(f"u{k % 5}", f"i{k % 7}", 1_600_000_000 + k) for k in range(60)]
    log = write_log(tmp_path / "log.csv", [*events, ("seldom", "i1", 1_600_000_009)])
    tree = {"data": {"format": "csv", "path": str(log), "stages": 2, "min_user": 3}, "backbone": "tiny"}
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(tree))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
    assert files_naming(workspace, "seldom") == ["stream/stage=0/rare.parquet"]
    erase(workspace, "seldom")
    assert files_naming(workspace, "seldom") == []
    with pytest.raises(DataError, match="has the user 'seldom'"):
        erase(workspace, "seldom")


def test_a_stage_whose_only_test_case_is_forgotten_is_not_tested_any_more(
    tmp_path: Path, peso: Callable[..., tuple[int, str, str]]
) -> None:
    events = [(f"u{k % 8}", f"i{k * 7 % 11}", 1_600_000_000 + k) for k in range(100)]
    later = [("only", f"i{k}", 1_600_001_000 + k) for k in range(5)] + [("u1", "i2", 1_600_001_010)]
    log = write_log(tmp_path / "log.csv", [*events, *later])
    table = [(f"i{k}", f"thing number {k} of kind {k % 3}") for k in range(11)]
    items = write_log(tmp_path / "items.csv", table, "item,title")
    tree = {
        "data": {
            "format": "csv",
            "path": str(log),
            "items": {"path": str(items), "columns": {"title": "title"}},
            "stages": {"fractions": [100 / 106, 6 / 106]},
        },
        "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
        "backbone": {"name": "tiny", "layers": 1},
        "strategy": {"name": "peso", "examples": 8},
        "training": {"epochs": 1, "max_steps": 2},
        "evaluation": {"k": [2]},
        "baselines": [],
    }
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(tree))
    with workspace.lock():
        pipeline.run(workspace)
        evaluate.test(workspace.stage(0).on(1), Silent())
    assert {(test.stage.number, test.cases) for test in predicted_tests(workspace)} == {
        (0, 0),
        (0, 1),
        (1, 1),
    }
    erase(workspace, "only")
    workspace = Workspace.open(workspace.root)
    (left,) = predicted_tests(workspace)
    assert (left.stage.number, left.cases, left.is_done) == (0, 0, True)
    assert "test" not in workspace.stage(1).metrics
    assert workspace.stage(1).metrics["training"]
    for stage in workspace.stages:
        stage.require_answers()
    status, _, error = peso("evaluate", "-w", workspace.root)
    assert status == 1
    assert "no test case of stage 1" in error
    assert "peso evaluate --on STAGE" in error
    assert [step.name for step in pipeline.missing_steps(workspace, 2)] == []
    with workspace.lock():
        pipeline.run(workspace)
    runs = runs_of([workspace])  # all that the report shows
    assert [list(run.stages) for run in runs] == [[0], [0]]
    assert runs[0].catalogue.percentiles(1).shape == (11,)
    baseline = BaselineRun(workspace, read_baseline({"name": "two-tower", "epochs": 1}))
    baseline.run(Silent())
    assert [baseline.stage_directory(stage).exists() for stage in (0, 1)] == [True, False]
    assert json.loads(peso("status", "-w", workspace.root, "--json")[1])["stages"][1]["metrics"] is None


def test_the_command_asks_and_says_what_is_left(
    peso: Callable[..., tuple[int, str, str]], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, root = somebody(workspace), workspace.root
    before = read_manifest(root / "stream", 1)
    status, _, error = peso("forget", "-w", root, "--user", "nobody", "--yes")
    assert status == 1
    assert "has the user 'nobody'; check the id" in error
    monkeypatch.setattr("typer.confirm", lambda text, **also: "erase" not in text)
    status, out, _ = peso("forget", "-w", root, "--user", user)
    assert (status, out) == (0, "nothing was erased\n")
    assert read_manifest(root / "stream", 1) == before
    assert (root / "stream" / MANIFEST).is_file()
    status, out, _ = peso("forget", "-w", root, "--user", user, "--yes")
    assert status == 0
    assert "stages [0, 1, 2] of the stream, 3 received events" in out
    assert "stages [0, 1, 2] were trained with the user's events" in out
    assert "strategy.name=retrain" in out
    assert not holdings(workspace, user).anything

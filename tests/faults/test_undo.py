"""Every step can be taken back, and a kill leaves no state in between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from growing_shop import (
    SHELVES,
    TWO_STAGES,
    codes,
    snapshot,
    table,
)

from peso.events.stream import Stream
from peso.items.semantic_ids import read_semantic_ids
from peso.runs import pipeline, preparation
from peso.runs.undo import last_step
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("reports")]


# -- undo --------------------------------------------------------------------------------------------


def test_an_append_is_taken_back_without_a_trace_and_repeated_alike(peso, logs: Path, shop: Path) -> None:
    """Append, tokenize, update, tests across: undone, the workspace is as before; done again, as after."""
    timed = ("report", "baselines", "stages/2/manifest", "stages/2/metrics", "stages/2/log")  # tell seconds
    start = snapshot(shop, "report")
    assert peso("ingest", logs / "week.csv", "--append", "-w", shop)[0] == 0
    appended = snapshot(shop, "report")
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    tokenized = snapshot(shop, "report")
    assert peso("update", "-w", shop)[0] == 0
    updated = snapshot(shop, *timed)
    assert peso("evaluate", "--stage", "0", "--on", "2", "-w", shop)[0] == 0
    assert (shop / "stages/0/on=2").is_dir()

    status, out, err = peso("undo", "--yes", "-w", shop)
    assert status == 0, err
    assert "the training of stage 2" in out
    assert snapshot(shop, "report") == tokenized
    status, out, _ = peso("undo", "--yes", "-w", shop)
    assert status == 0
    assert "their 4 new items and 4 semantic IDs" in out
    assert snapshot(shop, "report") == start
    assert list(pipeline.missing_steps(Workspace.open(shop), 2)) == []

    assert peso("ingest", logs / "week.csv", "--append", "-w", shop)[0] == 0
    assert snapshot(shop, "report") == appended
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    assert peso("update", "-w", shop)[0] == 0
    assert snapshot(shop, *timed) == updated


def test_the_report_shows_no_removed_stage(peso, shop: Path, reports: list[list[int]]) -> None:
    (shop / "report").mkdir()
    (shop / "report" / "index.html").write_text("[0, 1]")
    (shop / "baselines" / "ease" / "1").mkdir(parents=True)
    assert peso("undo", "--yes", "-w", shop)[0] == 0
    assert reports == [[0]]
    assert (shop / "report" / "index.html").read_text() == "[0]"
    assert not (shop / "baselines" / "ease" / "1").exists()


def test_undo_asks_and_stops_at_stage_0(peso, shop: Path, monkeypatch) -> None:
    before = snapshot(shop)
    for answer, expected in (("n", 0), ("", 2)):
        monkeypatch.setattr("sys.stdin", open(os.devnull) if not answer else _Answer(answer))  # noqa: SIM115
        status, out, err = peso("undo", "-w", shop)
        assert status == expected
        assert "nothing was removed" in out + err
        assert snapshot(shop) == before
    monkeypatch.setattr("sys.stdin", _Answer("y"))
    status, _, err = peso("undo", "-w", shop)
    assert status == 0
    assert "remove the training of stage 1" in err
    assert Workspace.open(shop).finished_stages == [0]
    status, _, err = peso("undo", "--yes", "-w", shop)
    assert status == 1
    assert "stage 0 and the ingested stream cannot be undone" in err
    assert Workspace.open(shop).finished_stages == [0]


class _Answer:
    """A standard input that holds one line."""

    def __init__(self, line: str) -> None:
        self.line = line

    def readline(self, *_: int) -> str:
        return self.line + "\n"


def test_undo_needs_the_lock_and_a_stream(peso, logs: Path, shop: Path, tmp_path: Path) -> None:
    with Workspace.open(shop).lock():
        before = snapshot(shop)
        status, _, err = peso("undo", "--yes", "-w", shop)
        assert status == 1
        assert "another process" in err
        assert snapshot(shop) == before


def test_appends_are_undone_one_by_one(peso, logs: Path, shelves: Path) -> None:
    """Two appends whose items got their IDs in one go; what was corrected in between stays corrected."""
    start = codes(shelves)
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert peso("ingest", logs / "later.csv", "--append", "-w", shelves)[0] == 0
    assert peso("ingest", "--items", table(logs / "fix.csv", [("i0", "fixed", "")]), "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0
    both = codes(shelves)
    assert peso("undo", "--yes", "-w", shelves)[0] == 0
    assert codes(shelves) == {item: code for item, code in both.items() if item != "m0"}
    assert peso("diagnose", "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0  # nothing to do
    assert peso("undo", "--yes", "-w", shelves)[0] == 0
    assert codes(shelves) == start
    stream = Stream.open(shelves / "stream")
    assert (stream.stages, len(stream.items), "appended" in stream.manifest) == (2, 20, False)
    assert "fixed" in stream.titles
    for log in ("week.csv", "later.csv"):
        assert peso("ingest", logs / log, "--append", "-w", shelves)[0] == 0
    assert peso("tokenize", "--append", "-w", shelves)[0] == 0
    assert codes(shelves) == both


def test_ids_that_were_made_after_an_append_go_with_it(peso, logs: Path, shelves: Path) -> None:
    """Their sizes leave room for the items of the append as well: without it they would be others."""
    before, sizes = snapshot(shelves), read_semantic_ids(shelves / "semantic_ids").sizes
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert peso("tokenize", "-w", shelves)[0] == 0
    assert read_semantic_ids(shelves / "semantic_ids").sizes != sizes
    status, out, _ = peso("undo", "--yes", "-w", shelves)
    assert status == 0
    assert "all 24 semantic IDs" in out
    assert not (shelves / "semantic_ids").exists()
    assert peso("tokenize", "-w", shelves)[0] == 0
    assert snapshot(shelves) == before


def test_an_append_that_is_trained_in_part_loses_its_training_first(peso, logs: Path, shop: Path) -> None:
    assert peso("ingest", logs / "week.csv", "--append", "-w", shop, "--set", TWO_STAGES)[0] == 0
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    assert peso("update", "-w", shop)[0] == 0
    for stages, trained, left in (([2], [0, 1], 4), ([2, 3], [0, 1], 2), ([1], [0], 2)):
        status, out, _ = peso("undo", "--yes", "-w", shop, "--json")
        assert status == 0
        assert json.loads(out)["stages"] == stages
        assert Workspace.open(shop).finished_stages == trained
        assert Stream.open(shop / "stream").stages == left


def test_an_append_of_several_stages_goes_whole(peso, logs: Path, shelves: Path) -> None:
    before = snapshot(shelves)
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves, "--set", TWO_STAGES)[0] == 0
    assert Stream.open(shelves / "stream").stages == 4
    status, out, _ = peso("undo", "--yes", "-w", shelves, "--json")
    assert status == 0
    assert json.loads(out)["stages"] == [2, 3]
    assert snapshot(shelves) == before


def test_an_undo_that_was_killed_is_finished_and_no_further_one_begun(
    peso, shop: Path, monkeypatch, reports: list[list[int]]
) -> None:
    shutil.copytree(shop / "stages" / "1", shop / "kept")

    def killed(*_: object) -> None:
        raise Killed

    for again in ([], ["--json"]):
        (shop / "report").mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr("peso.runs.report.report", killed)
            with pytest.raises(Killed):
                peso("undo", "--yes", "-w", shop)
        assert Workspace.open(shop).finished_stages == [0]
        status, out, _ = peso("undo", "-w", shop, *again)  # does not ask: it was answered before
        assert status == 0
        assert json.loads(out)["gone"] if again else "nothing else was removed" in out
        assert Workspace.open(shop).finished_stages == reports[-1] == [0]
        shutil.copytree(shop / "kept", shop / "stages" / "1")

    (shop / "report").mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr("peso.runs.report.report", killed)
        with pytest.raises(Killed):
            peso("undo", "--yes", "-w", shop)
    shutil.copytree(shop / "kept", shop / "stages" / "1")  # trained again: this undo is another one
    status, out, _ = peso("undo", "--yes", "-w", shop, "--json")
    assert (status, json.loads(out)["gone"]) == (0, False)
    assert Workspace.open(shop).finished_stages == [0]
    (shop / ".undo").write_text("{")
    status, _, err = peso("undo", "--yes", "-w", shop)
    assert status == 1
    assert ".undo is damaged" in err


def test_an_append_of_an_earlier_version_is_undone(peso, logs: Path, shelves: Path) -> None:
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    manifest = shelves / "stream" / "manifest.json"
    content = json.loads(manifest.read_text())
    for key in ("before", "events", "users", "new_users", "new_items_without_text"):
        del content["appended"][0][key]
    del content["sha256"]
    manifest.write_text(json.dumps(content))
    assert peso("undo", "--yes", "-w", shelves)[0] == 0
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    assert Stream.open(shelves / "stream").counts[2]["events"] == 60


def test_ingesting_again_does_not_drop_what_was_appended(peso, logs: Path, shelves: Path) -> None:
    assert peso("ingest", logs / "week.csv", "--append", "-w", shelves)[0] == 0
    before = snapshot(shelves)
    status, _, err = peso("ingest", "-w", shelves)
    assert status == 1
    assert f"peso undo -w {shelves}" in err
    assert snapshot(shelves) == before


# -- killed at any moment ----------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler expects. From then on nothing reaches the disk, as in a process that is gone."""


def killed_at(monkeypatch, moment: int, work: Callable[[], object]) -> bool:
    """Do ``work``, killed at the ``moment``-th of its renames, replacements and removals; whether it was."""
    count = 0

    def deadly(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count >= moment:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(module, name, deadly(getattr(module, name)))
        try:
            work()
        except Killed:
            return True
    return False


def command(root: Path, name: str, logs: Path) -> Callable[[], object]:
    workspace = Workspace.open(root)
    fixed = {"data.items.path": str(logs / "fixed.csv")}

    def work() -> None:
        with workspace.lock():
            if name == "append":
                path = str(logs / "week.csv")
                preparation.append(
                    workspace, Silent(), workspace.config.data.model_copy(update={"path": path})
                )
            elif name == "tokenize":
                preparation.tokenize_new(workspace, Silent())
            elif name == "items":
                assert workspace.config.data.items is not None
                table_of = workspace.config.data.items.model_copy(update={"path": fixed["data.items.path"]})
                preparation.update_items(
                    workspace, workspace.config.data.model_copy(update={"items": table_of}), Silent()
                )
            else:
                from peso.runs.undo import undo

                undo(workspace, last_step(workspace), Silent())

    return work


@pytest.mark.parametrize("name", ["append", "items", "tokenize", "undo append", "undo training"])
def test_killed_at_any_moment_the_workspace_is_as_before_or_as_after(
    logs: Path, shop: Path, shelves: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    root = shop if name == "undo training" else shelves
    table(logs / "fixed.csv", [("i0", "fixed", SHELVES[1])])
    prepared = {"tokenize": ["append"], "undo append": ["append", "tokenize"]}.get(name, [])
    for step in prepared:
        command(root, step, logs)()
    (root / "report").mkdir(exist_ok=True)
    before = snapshot(root, "report")
    finished = shutil.copytree(root, tmp_path / "finished")
    command(finished, name, logs)()
    after = snapshot(finished, "report")
    assert after != before
    moment = 0
    while True:
        moment += 1
        copy = shutil.copytree(root, tmp_path / str(moment))
        work = command(copy, name, logs)
        if not killed_at(monkeypatch, moment, work):
            break
        with Workspace.open(copy).lock():  # as the next command does
            found = snapshot(copy, "report")  # a report is removed first, and written again last
        if not name.startswith("undo"):
            assert found in (before, after)
            continue
        workspace = Workspace.open(copy)
        list(pipeline.missing_steps(workspace, Stream.open(copy / "stream").stages))
        assert workspace.stage(0).is_tested in (True, False)
        command(copy, name, logs)()  # as whoever saw no answer does
        assert snapshot(copy, "report") == after
        assert not (copy / ".undo").exists()
    assert moment > 3

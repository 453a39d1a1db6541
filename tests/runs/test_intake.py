"""Received events become a stage: each once, whatever is killed; what cannot go into one waits."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from event_logs import histories, write_log

from peso.config import load_config
from peso.errors import DataError, WorkspaceError
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.runs import intake, pipeline, preparation
from peso.runs.intake import Cut, cut_received
from peso.runs.undo import last_step, undo
from peso.runs.user_histories import UserHistories
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

T = 1_600_000_000
EVENTS = [(f"u{k % 7}", f"i{(k * 5 + k // 7) % 19}", T + k * 3600) for k in range(90)]
LAST = EVENTS[-1][2] * 1_000_000
PRODUCTS = [(f"i{k}", f"thing {k}") for k in range(21)]  # i19 and i20 are in no event


def sent(user: str, item: str, hours: float) -> ReceivedEvent:
    """``hours`` after the stream's last event."""
    return ReceivedEvent(user, item, LAST + int(hours * 3.6e9))


NEW = [sent(f"u{k % 3}", f"i{19 if k == 5 else (k * k + 2) % 12}", k + 1) for k in range(12)]


def make_shop(folder: Path, **data: object) -> Workspace:
    write_log(folder / "log.csv", EVENTS)
    write_log(folder / "products.csv", PRODUCTS, "item,title")
    tree = {
        "data": {"format": "csv", "path": "log.csv", "stages": 2, **data},
        "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 4},
        "backbone": "tiny",
        "strategy": "single",
        "baselines": [],
        "training": {"epochs": 1, "max_steps": 2, "batch_size": 8},
        "evaluation": {"k": [5]},
    }
    workspace = Workspace.create_or_open(folder / "shop", load_config(tree, base=folder))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
        if "items" in data:
            preparation.tokenize(workspace, Silent())
    return workspace


CONTINUE = preparation._continue_ids
TABLE = {"items": {"path": "products.csv", "columns": {"title": "title"}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shops")
    make_shop(folder, **TABLE)
    return folder


@pytest.fixture
def shop(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """As if all of its stages were trained. Whether new items can get IDs is tried in two tests alone."""
    monkeypatch.setattr(preparation, "_continue_ids", lambda *given: None)
    monkeypatch.setattr(pipeline, "unfinished", lambda workspace: (None, True))
    return Workspace.open(shutil.copytree(made / "shop", tmp_path / "shop"))


def receive(workspace: Workspace, *events: ReceivedEvent) -> None:
    with ReceivedEvents(workspace.events_file) as received:
        received.add(events)


def cut(workspace: Workspace, items: str | None = None) -> Cut:
    with workspace.lock():
        return cut_received(workspace, Silent(), items)


def whole_history(workspace: Workspace, user: str) -> list[str]:
    found = UserHistories(workspace).of(user)
    assert found is not None
    return [*found.items, *found.left_out]


def test_received_events_become_one_stage_as_an_append_of_them_would(shop: Workspace, tmp_path: Path) -> None:
    other = Workspace.open(shutil.copytree(shop.root, tmp_path / "other"))
    receive(shop, *reversed(NEW))  # received in another order than they happened
    made = cut(shop)
    assert (made.stage, made.events, made.users, made.new_items, made.waiting) == (2, 12, 3, 1, 0)
    rows = [(event.user, event.item, event.time / 1e6) for event in NEW]
    log = write_log(tmp_path / "new.csv", rows)
    data = load_config(
        {"data": {"format": "csv", "path": str(log), "stages": 1, **TABLE}}, base=tmp_path
    ).data.model_copy(update={"items": shop.config.data.items})
    with other.lock():
        preparation.append(other, Silent(), data)
    assert histories(shop.stream) == histories(other.stream)
    assert shop.stream.items.equals(other.stream.items)
    assert shop.stream.titles[-1] == "thing 19"


def test_no_event_is_cut_twice(shop: Workspace) -> None:
    receive(shop, *NEW)
    before = whole_history(shop, "u1")
    assert cut(shop).stage == 2
    assert cut(shop) == Cut(why="no event was received since the last stage")
    assert whole_history(shop, "u1") == before
    receive(shop, *NEW, *[sent("u1", f"i{n}", 20 + n) for n in range(3)])  # the old ones are sent again
    assert cut(shop).events == 3
    assert whole_history(shop, "u1") == [*before, "i0", "i1", "i2"]


def test_what_is_undone_is_cut_again(shop: Workspace) -> None:
    receive(shop, *NEW)
    cut(shop)
    after = histories(shop.stream)
    with shop.lock():
        undo(shop, last_step(shop), Silent())
    assert whole_history(shop, "u1")[-4:] == [event.item for event in NEW if event.user == "u1"]
    assert cut(shop).events == 12
    assert histories(shop.stream) == after


def test_a_late_event_counts_after_the_stream_and_a_repeat_of_one_does_not(shop: Workspace) -> None:
    had = whole_history(shop, "u1")
    new = next(f"i{n}" for n in range(19) if f"i{n}" not in had)
    receive(shop, sent("u1", new, -30), sent("u1", had[0], -40), sent("u1", had[1], 5), sent("u1", had[2], 4))
    expected = [*had, new, had[2], had[1]]
    assert whole_history(shop, "u1") == expected
    made = cut(shop)
    assert (made.events, made.waiting) == (3, 0)
    assert whole_history(shop, "u1") == expected
    assert cut(shop).why == "no event was received since the last stage"


def test_events_that_the_stream_has_make_no_stage(shop: Workspace) -> None:
    receive(shop, *[ReceivedEvent(user, item, at * 1_000_000) for user, item, at in EVENTS[:9]])
    made = cut(shop)
    assert (made.stage, made.why) == (None, "the stream already has every received event")
    assert shop.stream.stages == 2


def test_events_of_items_without_a_row_wait_until_they_have_one(shop: Workspace, tmp_path: Path) -> None:
    receive(shop, *NEW, sent("u0", "x2", 50), sent("u0", "x1", 51), sent("u9", "x1", 52))
    made = cut(shop)
    assert (made.events, made.waiting, made.unknown_items, made.example) == (12, 3, 2, "x1")
    assert whole_history(shop, "u0")[-2:] == ["x2", "x1"], "they are in the history all the same"
    assert cut(shop).why == "no received event has an item that is in the stream or the product table"
    table = write_log(tmp_path / "more.csv", [("x1", "new one"), ("x2", "another")], "item,title")
    receive(shop, sent("u0", "i1", 53))
    made = cut(shop, str(table))
    assert (made.stage, made.events, made.new_items, made.waiting) == (3, 4, 2, 0)
    assert shop.stream.titles[-2:] == ["another", "new one"]


def test_without_any_product_table_new_items_come_as_they_do_in_an_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "unfinished", lambda workspace: (None, True))
    shop = make_shop(tmp_path)
    receive(shop, *NEW, sent("u0", "x1", 50))
    made = cut(shop)
    assert (made.new_items, made.waiting) == (2, 0)


def test_rare_users_and_items_wait_until_they_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "unfinished", lambda workspace: (None, True))
    shop = make_shop(tmp_path, min_user=3, **TABLE)
    receive(shop, *NEW, sent("new", "i1", 20), sent("new", "i2", 21))
    made = cut(shop)
    assert (made.events, made.waiting) == (12, 2)
    assert whole_history(shop, "new") == ["i1", "i2"]
    made = cut(shop)
    assert made.stage is None
    assert made.why.startswith("no user has enough events yet")
    receive(shop, sent("new", "i3", 60))
    assert cut(shop).events == 3
    assert whole_history(shop, "new") == ["i1", "i2", "i3"]
    stage = histories(shop.stream)[3]
    assert stage == {"new": ([], ["i1", "i2", "i3"])}


def test_a_stage_that_nobody_could_learn_from_is_not_made(shop: Workspace) -> None:
    receive(shop, sent("u1", "i1", 1), sent("u1", "i2", 2), sent("u2", "i2", 3))
    made = cut(shop)
    assert (made.stage, made.waiting) == (None, 3)
    assert shop.stream.stages == 2
    receive(shop, sent("u1", "i3", 4))
    assert (cut(shop).events, cut(shop).waiting) == (4, 0)


def test_an_unfinished_update_comes_first(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "unfinished", lambda workspace: (1, False))
    receive(shop, *NEW)
    assert cut(shop).why == "stage 1 is not finished yet; received events wait for the next update"
    assert shop.stream.stages == 2


def test_a_damaged_file_of_events_stops_the_update(shop: Workspace) -> None:
    receive(shop, *NEW)
    content = bytearray(shop.events_file.read_bytes())
    content[8192:12288] = b"\xff" * 4096
    shop.events_file.write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"events\.sqlite is damaged"):
        cut(shop)
    assert shop.stream.stages == 2


def test_new_items_that_get_no_semantic_id_leave_everything_as_it_was(
    shop: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise DataError("no more room in the category")

    monkeypatch.setattr(preparation, "_continue_ids", refuse)
    receive(shop, *NEW)
    before = whole_history(shop, "u1")
    with pytest.raises(DataError, match=r"nothing was appended.*no more room"):
        cut(shop)
    assert shop.stream.stages == 2
    assert whole_history(shop, "u1") == before
    monkeypatch.undo()


@pytest.mark.parametrize("moment", ["before the marks", "after the marks", "after the rename"])
def test_a_kill_at_any_step_cuts_each_event_once(
    shop: Workspace, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    receive(shop, *NEW)
    expected = {user: whole_history(shop, user) for user in ("u0", "u1", "u2")}

    class Killed(BaseException):
        pass

    def kill(*given: object, **also: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        if moment == "before the marks":
            patch.setattr(ReceivedEvents, "mark", kill)
        elif moment == "after the marks":
            patch.setattr("peso.runtime.files._put_in_place", kill)
        else:
            patch.setattr(preparation, "report_users_found", kill)  # the first thing after it
        with pytest.raises(Killed):
            cut(shop)
    assert {user: whole_history(shop, user) for user in expected} == expected
    stages = shop.stream.stages
    assert stages == (3 if moment == "after the rename" else 2)
    receive(shop, sent("u5", "i1", 30), sent("u5", "i2", 31), sent("u5", "i3", 32))
    assert cut(shop).events == (3 if stages == 3 else 15)
    assert {user: whole_history(shop, user) for user in expected} == expected
    assert sum(count["events"] for count in shop.stream.counts) == len(EVENTS) + 15


CUT = """
import sys
from peso.runs import pipeline, preparation
from peso.runs.intake import cut_received
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent
pipeline.unfinished = lambda workspace: (None, True)
preparation._continue_ids = lambda *given: None  # that loads PyTorch, and says nothing here
workspace = Workspace.open(sys.argv[1])
print("ready", flush=True)
with workspace.lock():
    cut_received(workspace, Silent())
"""


def test_kills_at_random_moments_cut_each_event_once(shop: Workspace) -> None:
    moments, total = random.Random(3), 0
    for turn in range(4):
        user = f"u{turn}"
        receive(shop, *[sent(user, f"i{n}", 100 * turn + n + 1) for n in range(4)])
        total += 4
        process = subprocess.Popen(
            [sys.executable, "-c", CUT, str(shop.root)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
    with shop.lock():  # puts back what a kill between two renames left
        pass
    cut(shop)
    assert sum(count["events"] for count in shop.stream.counts) == len(EVENTS) + total
    for turn in range(4):
        assert whole_history(shop, f"u{turn}")[-4:] == ["i0", "i1", "i2", "i3"]
    assert not (shop.root / intake.WORK).exists()


def test_the_command_finishes_what_is_left_before_it_cuts(
    peso: Callable[..., tuple[int, str, str]], shop: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also items of an append, or of a cut that was killed, that have no semantic ID yet."""
    left, done = [1, 2], []

    def update(workspace: Workspace, observer: object) -> int | None:
        done.append((workspace.stream.stages, workspace.items_without_id))
        return left.pop(0) if left else None

    receive(shop, *NEW)
    cut(shop)  # as if it was killed here
    assert shop.items_without_id == 1
    monkeypatch.setattr(preparation, "_continue_ids", CONTINUE)
    monkeypatch.setattr(pipeline, "unfinished", lambda workspace: (left[0] if left else None, False))
    monkeypatch.setattr(pipeline, "update", update)
    monkeypatch.setattr("peso.runs.report.before_and_after", lambda workspace: ("", ["a"], []))
    for shown in ("show_drift", "show_results", "show_verdict"):
        monkeypatch.setattr(f"peso.cli.steps.{shown}", lambda *given: None)
    receive(shop, *[sent("u1", f"i{n}", 40 + n) for n in range(3)])
    status, out, error = peso("update", "-w", shop.root, "--from-events")
    assert status == 0, error
    assert "stage 3: 3 received events of 1 users" in out
    assert done == [(3, 0), (3, 0), (4, 0)], "twice what was left, then the new stage"


def test_the_command_says_what_became_of_the_events(
    peso: Callable[..., tuple[int, str, str]], shop: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    updated: list[int] = []
    monkeypatch.setattr(preparation, "_continue_ids", CONTINUE)
    monkeypatch.setattr(pipeline, "update", lambda workspace, observer: updated.append(1))
    receive(shop, *NEW, sent("u0", "x1", 50))
    status, out, _ = peso("update", "-w", shop.root, "--from-events")
    assert status == 0
    assert "stage 2: 12 received events of 3 users; 1 new item" in out
    assert "warning: items of received events that are not in the product table: 1 (such as 'x1')" in out
    assert "1 received events wait for a later stage" in out
    assert shop.items_without_id == 0, "the new item has its ID"
    status, out, _ = peso("update", "-w", shop.root, "--from-events")
    assert "no stage was made from received events: no received event has an item that" in out
    assert len(updated) == 2
    status, _, error = peso("update", "-w", shop.root, "--items", "x.csv")
    assert status == 2
    assert "--items needs --from-events" in error

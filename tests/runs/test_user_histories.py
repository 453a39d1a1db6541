"""A user's history is the stream and what was received since; everybody gets recommendations, once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from peso.errors import DataError, WorkspaceError
from peso.events.erase import erase_user
from peso.events.history_index import HistoryIndex
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.runs import recommend_all, user_histories
from peso.runs.recommender import Recommender
from peso.runs.user_histories import UserHistories, UserHistory
from peso.runs.workspace import Workspace
from peso.runtime.files import commit_directory
from peso.runtime.progress import Silent

DAY = 86_400_000_000


def last_of(workspace: Workspace) -> int:
    return int(workspace.stream.manifest["time"]["last"])


def receive(workspace: Workspace, *events: tuple[str, str, int]) -> None:
    """``events``: user, item, and the time after the stream's last event."""
    last = last_of(workspace)
    with ReceivedEvents(workspace.events_file) as received:
        assert all(received.add([ReceivedEvent(user, item, last + after) for user, item, after in events]))


def a_user(workspace: Workspace) -> tuple[str, list[str]]:
    """Somebody of the last stage, with what the stream knows."""
    stream = workspace.stream
    users, histories = stream.stage(stream.stages - 1).histories()
    return users[0], [stream.item_ids[row] for row in histories[0]]


def never_had(workspace: Workspace, items: list[str], count: int = 2) -> list[str]:
    return [item for item in workspace.stream.item_ids if item not in items][:count]


# -- one user ----------------------------------------------------------------------------------------


def test_an_event_is_in_the_history_as_soon_as_it_is_stored(workspace: Workspace) -> None:
    recommender, (user, items) = Recommender(workspace), a_user(workspace)
    assert recommender.history(user) == items
    receive(workspace, (user, items[0], 2), (user, "no such item", 3), ("new user", items[1], 1))
    assert recommender.history(user) == [*items, items[0]]
    assert recommender.histories.of(user) == UserHistory([*items, items[0]], ["no such item"], 2)
    assert recommender.history("new user") == [items[1]]
    receive(workspace, (user, items[2], 1))
    assert recommender.history(user) == [*items, items[2], items[0]], "oldest first"


def test_a_stage_that_is_named_looks_back(workspace: Workspace) -> None:
    user, items = a_user(workspace)
    receive(workspace, (user, items[0], 1), ("new user", items[1], 1))
    early = Recommender(workspace, 0)
    assert user not in workspace.stream.stage(0).users or len(early.history(user)) < len(items)
    with pytest.raises(DataError, match="user 'new user' is in none of the stages 0 to 0"):
        early.history("new user")
    assert Recommender(workspace, 0, live=True).history(user) == [*items, items[0]]


def test_an_unknown_user_is_refused(workspace: Workspace) -> None:
    with pytest.raises(
        DataError,
        match=r"'nobody' is in none of the stages of .* nor in the events received since; check the id",
    ):
        Recommender(workspace).history("nobody")
    assert not workspace.events_file.exists(), "asking makes no file"


def test_what_the_stream_may_hold_already_counts_once(workspace: Workspace) -> None:
    """An event that is not newer than the stream's last one: only if its user never had the item."""
    user, items = a_user(workspace)
    new, other = never_had(workspace, items)
    receive(workspace, (user, items[0], 0), (user, new, -DAY), (user, new, -DAY + 1), (user, other, 5))
    assert Recommender(workspace).history(user) == [*items, new, other]


def test_an_event_that_a_stage_has_taken_counts_there_alone(workspace: Workspace) -> None:
    user, items = a_user(workspace)
    receive(workspace, (user, items[0], 1), (user, items[1], 2))
    with ReceivedEvents(workspace.events_file) as received:
        received.mark([1], "a cut")
        histories = UserHistories(workspace)
        assert histories.of(user) == UserHistory([*items, items[0], items[1]], [], 2), "not in the stream yet"
        appended = [{"first_stage": 9, "new_items": 0, "received": {"log": received.id, "cut": "a cut"}}]
        elsewhere = [{"first_stage": 9, "new_items": 0, "received": {"log": "other", "cut": "a cut"}}]
    state = histories._state
    assert state is not None
    state.stream.manifest["appended"] = elsewhere  # type: ignore[index]
    assert histories.of(user) == UserHistory([*items, items[0], items[1]], [], 2)
    state.stream.manifest["appended"] = appended  # type: ignore[index]
    assert histories.of(user) == UserHistory([*items, items[1]], [], 1)


# -- everybody ---------------------------------------------------------------------------------------


def written(file: Path) -> dict[str, list[str]]:
    rows = pq.read_table(file).to_pylist()
    assert len({row["user"] for row in rows}) == len(rows), "everybody once"
    return {row["user"]: row["items"] for row in rows}


def test_everybody_is_in_the_file_received_users_too(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]]
) -> None:
    user, items = a_user(workspace)
    receive(workspace, (user, items[0], 1), ("new b", items[1], 1), ("new a", items[2], 1))
    count = Recommender(workspace).recommend_all(tmp_path / "r.parquet", k=1)
    found = written(tmp_path / "r.parquet")
    everybody = {name for number in range(3) for name in workspace.stream.stage(number).users}
    assert count == len(found) == len(everybody) + 2
    assert list(found)[-2:] == ["new a", "new b"]
    assert (found[user], found["new a"]) == ([items[0]], [items[2]])
    assert not list(tmp_path.glob(".*.parts"))


def test_users_without_a_readable_item_get_the_popular_ones_without_scores(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]]
) -> None:
    receive(workspace, ("new", "no such item", 1))
    recommender = Recommender(workspace)
    newest = workspace.stream.item_counts(2)
    assert newest[workspace.stream.item_ids.index(recommender.popular(1)[0])] == newest.max()
    for ending in ("parquet", "csv", "jsonl"):
        recommender.recommend_all(tmp_path / f"r.{ending}", k=3)
    row = pq.read_table(tmp_path / "r.parquet").to_pylist()[-1]
    assert row == {"user": "new", "items": recommender.popular(3), "scores": None}
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[-1]) == row
    lines = (tmp_path / "r.csv").read_text().splitlines()[-3:]
    assert lines == [f"new,{rank},{item}," for rank, item in enumerate(row["items"], 1)]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_have_everybody_once(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]], parts: int
) -> None:
    receive(workspace, *[(f"new {n}", workspace.stream.item_ids[n], n + 1) for n in range(7)])
    recommender = Recommender(workspace)
    recommender.recommend_all(tmp_path / "all.parquet", k=2)
    together: dict[str, list[str]] = {}
    for number in range(1, parts + 1):
        file = tmp_path / f"{number}.parquet"
        recommender.recommend_all(file, k=2, part=(number, parts))
        found = written(file)
        assert found
        assert not set(found) & set(together)
        together |= found
    assert together == written(tmp_path / "all.parquet")


def test_a_call_that_was_stopped_goes_on_with_the_same_result(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    user, items = a_user(workspace)
    receive(workspace, (user, items[0], 1), ("new", items[0], 2))
    recommender, answer = Recommender(workspace), Recommender.search
    recommender.recommend_all(tmp_path / "whole.parquet", k=3)
    everybody, calls = list(answering), []

    def stopped(*asked, **also):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*asked, **also)

    monkeypatch.setattr(Recommender, "search", stopped)
    with pytest.raises(KeyboardInterrupt):
        recommender.recommend_all(tmp_path / "r.parquet", k=3)
    assert not (tmp_path / "r.parquet").exists()
    receive(workspace, (user, items[1], 3), ("another", items[0], 4))  # meanwhile; not part of that call
    for left in (".lock", "half.writing"):  # by a kill
        (tmp_path / ".r.parquet.parts" / left).write_bytes(b"123")
    answering.clear()
    Recommender(workspace).recommend_all(tmp_path / "r.parquet", k=3)
    assert answering == everybody[32:], "the first two parts are not answered again"
    assert (tmp_path / "r.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    # the next call is one of its own, and knows what was received
    Recommender(workspace).recommend_all(tmp_path / "next.parquet", k=3)
    assert written(tmp_path / "next.parquet")[user][-1] == items[1]


@pytest.mark.parametrize("change", ["k", "part", "exclude_seen", "stage", "damaged"])
def test_what_another_call_left_is_not_taken_over(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]], change: str
) -> None:
    folder = tmp_path / ".r.parquet.parts"
    other = {"k": 3, "part": (1, 2), "exclude_seen": False}
    call = recommend_all.AllUsers(Recommender(workspace), 2, True, (1, 1))
    folder.mkdir()
    call._data_state(folder, Silent())
    (folder / "00000000.parquet").write_bytes(b"not an answer")
    if change == "damaged":
        (folder / recommend_all.NOTE).write_bytes(b"{}")
    settings = {"k": 2, "exclude_seen": True, **({change: other[change]} if change in other else {})}
    recommender = Recommender(workspace, 1, live=True) if change == "stage" else Recommender(workspace)
    users = recommender.recommend_all(tmp_path / "r.parquet", **settings)
    assert len(written(tmp_path / "r.parquet")) == users


def test_two_calls_do_not_write_one_file(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]]
) -> None:
    from peso.runtime.files import only_writer

    with (
        only_writer(tmp_path / ".r.csv.parts"),
        pytest.raises(WorkspaceError, match="is being written by another process"),
    ):
        Recommender(workspace).recommend_all(tmp_path / "r.csv")
    assert (tmp_path / ".r.csv.parts").is_dir(), "what the other one has is left alone"


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_does_not_exist_is_refused(
    peso: Callable[..., tuple[int, str, str]], root: Path, tmp_path: Path, part: str
) -> None:
    status, _, error = peso("recommend", "-w", root, "--all", "-o", tmp_path / "r.csv", f"--part={part}")
    assert status == 2
    assert f"--part is I/N, such as 2/8 for the second of eight parts, not {part!r}" in error
    assert {path.name for path in tmp_path.iterdir()} == {"w"}


def test_a_changed_stream_is_read_beside_the_answers(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers come at once from what was there, received events included, and then from what is there now."""
    user, items = a_user(workspace)
    histories = UserHistories(workspace, background=True)
    assert histories.of(user) == UserHistory(items, [], 0)
    begun, go = threading.Event(), threading.Event()

    def slow(*given: object, **also: object) -> HistoryIndex:
        begun.set()
        assert go.wait(30)
        return HistoryIndex.open(*given, **also)  # type: ignore[arg-type]

    monkeypatch.setattr(user_histories, "HistoryIndex", SimpleNamespace(open=slow))
    with workspace.lock(), commit_directory(workspace.stream_directory) as directory:
        erase_user(workspace.stream_directory, directory, user)
    receive(workspace, (user, items[0], 1))
    assert histories.of(user) == UserHistory([*items, items[0]], [], 1)
    assert begun.wait(30)
    assert histories.of(user) == UserHistory([*items, items[0]], [], 1), "nobody waits"
    go.set()
    while not histories.is_current:
        time.sleep(0.01)
    assert histories.of(user) == UserHistory([items[0]], [], 1)


def test_events_may_come_from_elsewhere(workspace: Workspace, tmp_path: Path) -> None:
    user, items = a_user(workspace)
    receive(workspace, (user, items[0], 1))
    with ReceivedEvents(tmp_path / "other.sqlite") as other:
        other.add([ReceivedEvent(user, items[1], last_of(workspace) + 1)])
        assert UserHistories(workspace, events=lambda: other).of(user) == UserHistory(
            [*items, items[1]], [], 1
        )
    assert UserHistories(workspace, events=lambda: None).of(user) == UserHistory(items, [], 0)

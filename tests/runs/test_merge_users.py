"""Merged users: two histories become one in order of time; what was trained and tested stays as it was."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from event_logs import histories, write_log
from small_runs import Notes

from peso.config import load_config
from peso.errors import DataError
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.runs import preparation
from peso.runs.forget import forget, holdings
from peso.runs.intake import cut_received
from peso.runs.merge_users import Merged, merge, plan
from peso.runs.rename import rename
from peso.runs.undo import last_step, undo
from peso.runs.user_histories import UserHistories
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

T = 1_600_000_000
EVENTS = [(f"u{k % 7}", f"i{(k * 5 + k // 7) % 19}", T + k * 3600) for k in range(90)]
EVENTS += [("rare", f"i{k}", T + 1800 + k * 36_000) for k in range(2)]
EVENTS.sort(key=lambda event: event[2])
LAST = EVENTS[-1][2]
NEW = [(f"u{k % 4}", f"i{(k * k + 2) % 12}", LAST + 60 * (k + 1)) for k in range(16)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shops")
    make_shop(folder / "shop", write_log(folder / "log.csv", EVENTS))
    return folder


def make_shop(root: Path, log: Path) -> Workspace:
    tree = {
        "data": {"format": "csv", "path": str(log), "stages": 3, "min_user": 3},
        "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 4},
        "backbone": "tiny",
        "strategy": "single",
        "baselines": [],
    }
    workspace = Workspace.create_or_open(root, load_config(tree))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
    return workspace


@pytest.fixture
def shop(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A stream of three stages. Every item counts as one with a semantic ID."""
    monkeypatch.setattr("peso.runs.intake.pipeline.unfinished", lambda workspace: (None, True))
    monkeypatch.setattr(Workspace, "semantic_ids", property(lambda workspace: Everything(workspace)))
    return Workspace.open(shutil.copytree(made / "shop", tmp_path / "shop"))


class Everything:
    def __init__(self, workspace: Workspace) -> None:
        self.stored_ids = workspace.stream.item_ids


def join(workspace: Workspace, *pairs: tuple[str, str]) -> list[str]:
    """Merge users; returns what was noted."""
    observer = Notes()
    with workspace.lock():
        merge(workspace, pairs, observer)
    return observer.notes


def history(workspace: Workspace, user: str) -> list[str] | None:
    found = UserHistories(workspace).of(user)
    return None if found is None else [*found.items, *found.left_out]


def by_time(users: tuple[str, ...], *logs: list[tuple[str, str, int]]) -> list[str]:
    """The history of several users as one, computed from the logs."""
    events = [event for log in logs for event in log if event[0] in users]
    return [item for _, item, _ in sorted(events, key=lambda event: event[2])]


def append(workspace: Workspace, folder: Path, rows: list[tuple[str, str, int]], least: int = 1) -> None:
    data = workspace.config.data.model_copy(
        update={"path": str(write_log(folder / "new.csv", rows)), "min_user": least}
    )
    with workspace.lock():
        preparation.append(workspace, Silent(), data)


def everyone(workspace: Workspace) -> dict[str, list[str]]:
    return {user: known.items for users in UserHistories(workspace).parts(3) for user, known in users}


def test_two_histories_become_one_in_order_of_time(shop: Workspace) -> None:
    before, stages = everyone(shop), histories(shop.stream)
    assert join(shop, ("u1", "u2")) == []  # the log has all times
    both = by_time(("u1", "u2"), EVENTS)
    assert history(shop, "u1") == history(shop, "u2") == both
    assert everyone(shop) == {**{user: before[user] for user in before if user != "u1"}, "u2": both}
    assert histories(shop.stream) == stages  # what was trained and tested stays as it was
    users = UserHistories(shop)
    assert (users.count(), "u1" in dict(users.named("", "", 99))) == (len(before) - 1, False)
    early = UserHistories(shop, through=1)  # before that, they were two
    assert early.of("u1") != early.of("u2")


def test_chains_and_several_pairs_give_the_history_of_all(shop: Workspace) -> None:
    join(shop, ("u1", "u2"), ("u4", "rare"))
    assert plan(shop, [("u1", "u2")]) == Merged({}, ["u1"], [])
    join(shop, ("u2", "u3"), ("u5", "u1"))  # u1 is u2, who is u3
    group = ("u1", "u2", "u3", "u5")
    assert shop.stream.merged_users == {"u1": "u3", "u2": "u3", "u5": "u3", "u4": "rare"}
    assert all(history(shop, user) == by_time(group, EVENTS) for user in group)
    assert history(shop, "u4") == history(shop, "rare") == by_time(("u4", "rare"), EVENTS)
    assert set(everyone(shop)) == {"u0", "u3", "u6", "rare"}


def test_somebody_without_events_can_be_who_they_become(shop: Workspace) -> None:
    with shop.lock():
        done = merge(shop, [("u1", "anna")], Silent())
    assert done == Merged({"u1": "anna"}, [], ["anna"])
    assert history(shop, "anna") == history(shop, "u1") == by_time(("u1",), EVENTS)


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        ([("nobody", "u1")], r"1 of 1 users to merge have no event in .*: 'nobody'; check the ids"),
        ([("u3", "u4"), ("nobody", "u1")], r"1 of 2 users .*'nobody'"),
        ([("u3", "u3")], r"user 'u3' cannot be merged into 'u3', which is the same user"),
        ([("u2", "u1")], r"user 'u2' cannot be merged into 'u1', which is the same user"),
        ([("u3", "u4"), ("u4", "u3")], r"user 'u4' cannot be merged into 'u3', which is the same user"),
        ([("u1", "u3")], r"user 'u1' was merged into 'u2' before, and cannot be merged into 'u3', too"),
        ([("u3", "")], r"'' cannot be the id of a new user"),
        ([("u3", " anna")], r"' anna' cannot be the id of a new user: .* without spaces around them"),
        ([("u3", "  ")], r"'  ' cannot be the id of a new user"),
    ],
)
def test_pairs_that_cannot_be_are_refused_and_nothing_changes(shop: Workspace, pairs, why: str) -> None:
    join(shop, ("u1", "u2"))
    before = shop.stream.manifest
    with pytest.raises(DataError, match=why), shop.lock():
        merge(shop, pairs, Silent())
    assert shop.stream.manifest == before


def test_later_stages_are_those_of_one_user(shop: Workspace, tmp_path: Path) -> None:
    to = {"u1": "u2"}
    join(shop, ("u1", "u2"))
    append(shop, tmp_path, NEW)  # the log has both names
    own = [(to.get(user, user), item, time) for user, item, time in EVENTS]
    one = make_shop(tmp_path / "one", write_log(tmp_path / "one.csv", own))
    append(one, tmp_path, [(to.get(user, user), item, time) for user, item, time in NEW])
    assert histories(shop.stream)[3] == histories(one.stream)[3]
    assert everyone(shop) == everyone(one)
    join(shop, ("u0", "u2"))  # with events in the new stage, too
    assert history(shop, "u0") == by_time(("u0", "u1", "u2"), EVENTS, NEW)


def test_without_the_log_the_order_is_that_of_the_stages_and_is_told(shop: Workspace, tmp_path: Path) -> None:
    stages = histories(shop.stream)
    data = shop.config.data.model_copy(update={"path": str(tmp_path / "gone.csv")})
    shop.config = shop.config.model_copy(update={"data": data})
    (note,) = join(shop, ("u1", "u2"))
    assert "the logs no longer have the times of all events of 1 merged users" in note
    parts = [stage[user][1] for stage in stages for user in ("u1", "u2") if user in stage]
    assert history(shop, "u1") == [item for part in parts for item in part]
    append(shop, tmp_path, [("new", item, time) for _, item, time in NEW[:4]])
    assert join(shop, ("new", "u3")) == []  # no stage has events of both


def test_received_events_of_both_are_of_one_user(shop: Workspace) -> None:
    sent = [("u1", "i3"), ("u2", "i9"), ("visitor", "i4"), ("u1", "i5"), ("visitor", "i6"), ("other", "i7")]
    with ReceivedEvents(shop.events_file) as received:
        received.add([ReceivedEvent(u, i, (LAST + n) * 10**6 + 1) for n, (u, i) in enumerate(sent)])
    rename(shop, [("i9", "nine")])
    join(shop, ("u1", "u2"), ("visitor", "u2"), ("other", "else"))
    whole = [*by_time(("u1", "u2"), EVENTS), "i3", "i9", "i4", "i5", "i6"]
    assert [history(shop, user) for user in ("u1", "u2", "visitor")] == [whole] * 3
    assert history(shop, "other") == history(shop, "else") == ["i7"]
    assert {user: items for user, items in everyone(shop).items() if user in ("visitor", "u2", "else")} == {
        "u2": whole,
        "else": ["i7"],
    }
    with shop.lock():
        cut = cut_received(shop, Silent())
    assert (cut.stage, cut.users, cut.events, cut.waiting) == (3, 1, 5, 1)  # `else` has too few events
    assert history(shop, "visitor") == whole
    assert histories(shop.stream)[3] == {"u2": (whole[:-5], whole[-5:])}
    with ReceivedEvents(shop.events_file) as received:
        received.add([ReceivedEvent("visitor", "i1", (LAST + 99) * 10**6)])
    assert history(shop, "u2") == [*whole, "i1"]
    join(shop, ("u3", "u1"))  # received events that are in a stage have times
    assert history(shop, "u3") == [*by_time(("u1", "u2", "u3"), EVENTS), *whole[-5:], "i1"]


def test_an_undone_append_leaves_the_merged_history_of_the_rest(shop: Workspace, tmp_path: Path) -> None:
    join(shop, ("u5", "u6"))
    rows = [
        (user, f"i{k}", LAST + 9000 + k) for user, most in (("fresh", 4), ("few", 2)) for k in range(most)
    ]
    append(shop, tmp_path, [*NEW, *rows], least=3)  # `few` is too rare for a stage
    join(shop, ("u1", "u2"), ("u2", "u6"), ("fresh", "u3"), ("few", "u4"))
    assert history(shop, "few") == by_time(("u4", "few"), EVENTS, rows)
    with shop.lock():
        undo(shop, last_step(shop), Silent())
    assert shop.stream.stages == 3
    assert history(shop, "u1") == by_time(("u1", "u2", "u5", "u6"), EVENTS)
    assert history(shop, "fresh") == by_time(("u3",), EVENTS)
    assert history(shop, "few") == by_time(("u4",), EVENTS)
    append(shop, tmp_path, NEW)
    assert history(shop, "u1") == by_time(("u1", "u2", "u5", "u6"), EVENTS, NEW)
    assert set(everyone(shop)) == {"u0", "u3", "u4", "u6", "rare"}


def test_a_kill_leaves_all_users_as_they_were(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = everyone(shop), shop.stream.manifest["files"]

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    for place in ("peso.runs.merge_users.write_merged", "peso.runtime.files._put_in_place"):
        with monkeypatch.context() as patched:
            patched.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                join(shop, ("u1", "u2"))
        assert (everyone(shop), shop.stream.manifest["files"]) == (before, files)
    join(shop, ("u1", "u2"))
    assert history(shop, "u1") == by_time(("u1", "u2"), EVENTS)


def test_a_file_of_histories_is_extended_to_what_a_new_one_has(shop: Workspace, tmp_path: Path) -> None:
    everyone(shop)  # made before the merge
    join(shop, ("u1", "u2"))
    everyone(shop)
    append(shop, tmp_path, NEW)
    extended = everyone(shop)
    shop.histories_file.unlink()
    assert everyone(shop) == extended


@pytest.mark.parametrize("named", ["u1", "u2"])
def test_forgetting_one_of_them_erases_both(shop: Workspace, named: str) -> None:
    with ReceivedEvents(shop.events_file) as received:
        received.add([ReceivedEvent(user, "i3", (LAST + 1) * 10**6) for user in ("u1", "u2", "u3")])
    join(shop, ("u1", "u2"), ("u4", "u3"))
    held = holdings(shop, named)
    assert (held.users, held.received, held.stages) == (["u2", "u1"], 2, [0, 1, 2])
    with shop.lock():
        forget(shop, named, Silent())
    assert set(everyone(shop)) == {"u0", "u3", "u5", "u6", "rare"}
    assert shop.stream.merged_users == {"u4": "u3"}
    names = [b'"u1"', b'"u2"']
    assert not any(name in (shop.stream_directory / "manifest.json").read_bytes() for name in names)
    with pytest.raises(DataError, match="has the user"), shop.lock():
        forget(shop, named, Silent())


def test_reading_the_data_again_separates_them_and_says_so(shop: Workspace) -> None:
    before = everyone(shop)
    join(shop, ("u1", "u2"))
    observer = Notes()
    with shop.lock():
        preparation.ingest(shop, observer)
    assert any("1 merged users are separate again" in note for note in observer.notes)
    assert everyone(shop) == before


def test_the_command(made: Path, tmp_path: Path, peso, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shutil.copytree(made / "shop", tmp_path / "shop")
    status, out, err = peso("users", "merge", "u1", "u2", "--yes", "-w", root)
    assert (status, "merged 1 users into others" in out) == (0, True), err
    (tmp_path / "pairs.csv").write_text("from,into\nu1,u2\nu3,anna\n")
    status, out, _ = peso("users", "merge", "--file", tmp_path / "pairs.csv", "--yes", "-w", root, "--json")
    assert json.loads(out) == {"merged": {"u3": "anna"}, "unchanged": ["u1"], "new": ["anna"], "done": True}
    status, out, _ = peso("users", "list", "-w", root, "--json")
    assert json.loads(out) == {"merged": {"u1": "u2", "u3": "anna"}}
    for arguments, why in (
        ([], "name two users"),
        (["u1"], "give two users: the one to merge"),
        (["u2", "u1"], "which is the same user"),
    ):
        status, _, err = peso("users", "merge", *arguments, "-w", root)
        assert (status != 0, why in err) == (True, True), err
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    status, out, _ = peso("users", "merge", "u4", "u5", "-w", root)
    assert (status, "nothing was merged" in out) == (0, True)
    assert peso("users", "list", "-w", root)[0] == 0

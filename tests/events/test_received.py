"""What was received stays: once each, in order, whatever is killed, full or damaged."""

from __future__ import annotations

import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from peso.errors import DataError, FullDisk, WorkspaceError
from peso.events.received import APPLICATION, ReceivedEvent, ReceivedEvents

NOW = int(time.time() * 1e6)

# Sends batches of three events whose users are 0, 1, 2, … and says on stdout which batch is stored.
SENDER = """
import sys
from peso.events.received import ReceivedEvent, ReceivedEvents
events, batch = ReceivedEvents(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    events.add([ReceivedEvent(f"u{batch}", f"i{n}", 1_700_000_000_000_000 + batch) for n in range(3)])
    print(batch, flush=True)
    batch += 1
"""


def an_event(user: str = "u", item: str = "i", at: int = 0, key: str = "") -> ReceivedEvent:
    return ReceivedEvent(user, item, NOW - 1_000_000 + at, key)


def some_events(count: int, user: str = "u") -> list[ReceivedEvent]:
    return [an_event(user, f"item {n}", n) for n in range(count)]


@pytest.fixture
def events(tmp_path: Path):
    with ReceivedEvents(tmp_path / "events.sqlite") as opened:
        yield opened


def test_a_users_events_come_back_oldest_first_and_without_those_of_others(events) -> None:
    events.add([an_event("anna", "late", 9), an_event("ben", "x", 1), an_event("anna", "early", 3)])
    events.add([an_event("anna", "tie", 9)])
    assert [event.item for event in events.of_user("anna")] == ["early", "late", "tie"]
    assert [event.number for event in events.of_user("anna")] == [3, 1, 4]
    assert events.of_user("nobody") == []
    assert events.count() == 4


def test_an_event_that_is_sent_again_is_stored_once(events) -> None:
    first = an_event("u", "i", 1)
    assert events.add([first, an_event("u", "i", 2), first]) == [True, True, False]
    assert events.add([first]) == [False]
    # the sender's key decides, whatever else is said
    assert events.add([an_event("u", "i", 1, key="k"), an_event("u", "other", 7, key="k")]) == [True, False]
    assert events.count() == 3


def test_a_key_of_a_sender_never_meets_a_key_made_here(events) -> None:
    event = an_event()
    assert events.add([event, an_event("v", "j", 5, key=event.stored_key)]) == [True, True]


def test_the_events_of_a_file_are_there_when_it_is_opened_again(events) -> None:
    events.add(some_events(5))
    with ReceivedEvents(events.path) as again:
        assert again.of_user("u") == events.of_user("u")
        assert again.id == events.id


def test_no_event_is_lost_or_doubled_by_ten_kills_at_random_moments(tmp_path: Path) -> None:
    path, batch, acknowledged, moments = tmp_path / "events.sqlite", 0, set(), random.Random(5)
    for _ in range(10):
        sender = subprocess.Popen(
            [sys.executable, "-c", SENDER, str(path), str(batch)], stdout=subprocess.PIPE, text=True
        )
        assert sender.stdout is not None
        assert sender.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.05))
        sender.send_signal(signal.SIGKILL)
        told = [int(line) for line in sender.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        sender.wait()
        acknowledged |= set(told)
        batch = max(acknowledged, default=-1) + 1  # what was not acknowledged is sent again
    with ReceivedEvents(path) as events:
        stored = [event for part in events.waiting(()) for event in part]
        events.check()
    assert acknowledged, "some batches were stored"
    by_user = {
        user: [event.item for event in stored if event.user == user] for user in {e.user for e in stored}
    }
    # a batch that was killed before its acknowledgement may be there, but then whole
    assert all(items == ["i0", "i1", "i2"] for items in by_user.values())
    assert {f"u{number}" for number in acknowledged} <= set(by_user)
    assert len(by_user) <= len(acknowledged) + 1


def test_two_writers_on_one_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    code = (
        "import sys; from peso.events.received import *\n"
        "events = ReceivedEvents(sys.argv[1])\n"
        "for n in range(60): events.add([ReceivedEvent(sys.argv[2], f'own {n}', n), "
        "ReceivedEvent('both', f'shared {n}', n)])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    with ReceivedEvents(path) as events:
        assert events.count() == 180
        assert [len(events.of_user(user)) for user in ("a", "b", "both")] == [60, 60, 60]


def test_threads_share_one_opened_file(events) -> None:
    def work(name: str) -> None:
        for n in range(30):
            events.add([an_event(name, f"{n}", n)])
            assert len(events.of_user(name)) == n + 1

    threads = [threading.Thread(target=work, args=[f"thread {n}"]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events.count() == 120


def test_a_full_disk_is_told_apart_and_loses_nothing(events) -> None:
    events.add(some_events(10))
    pages = events._writer.execute("PRAGMA page_count").fetchone()[0]
    events._writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(FullDisk, match=r"no space left while writing .*events\.sqlite"):
        events.add(some_events(5000, "v"))
    assert events.count() == 10
    assert len(events.of_user("u")) == 10
    events._writer.execute("PRAGMA max_page_count = 100000")
    assert all(events.add(some_events(5000, "v"))), "sent again, they are all new"


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import sys, resource, signal; from peso.events.received import *; from peso.errors import FullDisk\n"
        "events = ReceivedEvents(sys.argv[1]); events.add([ReceivedEvent('u', 'before', 1)])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))\n"
        "try: events.add([ReceivedEvent('u', f'{n}' * 100, n) for n in range(5000)])\n"
        "except FullDisk: print('full', [event.item for event in events.of_user('u')])\n"
    )
    path = tmp_path / "events.sqlite"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "full ['before']\n", done.stderr
    with ReceivedEvents(path) as events:
        assert events.count() == 1


def _overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


@pytest.mark.parametrize("damage", ["emptied", "cut off", "other content", "header", "a foreign database"])
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "events.sqlite"
    if damage == "a foreign database":
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE events (number)")
    else:
        with ReceivedEvents(path) as events:
            events.add(some_events(3000))
        if damage == "emptied":
            path.write_bytes(b"")
        elif damage == "cut off":
            path.write_bytes(path.read_bytes()[:20_000])
        elif damage == "header":
            _overwrite(path, 0, b"\0" * 100)
        else:
            path.write_text("user,item\n1,2\n")
    before = path.read_bytes()
    with (
        pytest.raises(WorkspaceError, match=re.escape(f"{path} is damaged")),
        ReceivedEvents(path) as events,
    ):
        events.check()
    assert path.read_bytes() == before


def test_a_file_of_a_newer_version_is_refused(events) -> None:
    assert events._writer.execute("PRAGMA application_id").fetchone()[0] == APPLICATION
    events._writer.execute("PRAGMA user_version = 99")
    with pytest.raises(WorkspaceError, match=r"newer version of peso \(format 99.*update peso"):
        ReceivedEvents(events.path)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (ReceivedEvent("", "i", 1), "user must be text that is not empty"),
        (ReceivedEvent("u", 7, 1), "item must be text that is not empty, not 7"),  # type: ignore[arg-type]
        (ReceivedEvent("u\0", "i", 1), "user is not text that can be stored"),
        (ReceivedEvent("u", "\ud800", 1), "item is not text that can be stored"),
        (ReceivedEvent("u", "i", -1), "time must be microseconds since 1970, not -1"),
        (ReceivedEvent("u", "i", 1.5), "time must be microseconds since 1970, not 1.5"),  # type: ignore[arg-type]
        (
            ReceivedEvent("u", "i", NOW + 2 * 86_400_000_000),
            "more than a day ahead; check the sender's clock",
        ),
        (ReceivedEvent("u", "i", 10**19), "9999-.*more than a day ahead"),
    ],
)
def test_an_unsound_event_is_refused_with_all_of_its_call(events, event, message: str) -> None:
    with pytest.raises(DataError, match=message):
        events.add([an_event(), event])
    assert events.count() == 0


def test_waiting_are_the_events_that_no_listed_cut_took(events) -> None:
    events.add(some_events(6))
    events.mark([1, 2], "first")
    events.mark([4], "second")

    def numbers(*cuts: str) -> list[int]:
        return [event.number for part in events.waiting(cuts) for event in part]

    assert numbers() == [1, 2, 3, 4, 5, 6]
    assert numbers("first") == [3, 4, 5, 6]
    assert numbers("first", "second") == [3, 5, 6]


def test_a_forgotten_user_is_in_no_byte_of_the_file(events) -> None:
    events.add([*some_events(50, "a person"), *some_events(50, "another"), an_event(key="a person's key")])
    assert events.forget("a person") == 50
    assert events.forget("a person") == 0
    files = [*events.path.parent.iterdir()]
    assert events.count() == 51
    assert len(files) > 1
    assert not any(b"a person" in path.read_bytes().replace(b"a person's", b"") for path in files)
    assert events.add([an_event("new")]) == [True]
    assert events.of_user("new")[0].number == 102, "no number is given twice"


def test_users_are_listed_in_order_in_parts(events) -> None:
    events.add([an_event(f"user {n}", "i", n) for n in (3, 1, 2)])
    assert events.users_after("", 2) == ["user 1", "user 2"]
    assert events.users_after("user 2", 2) == ["user 3"]


def test_two_thousand_events_are_one_flush(events) -> None:
    """What 2,000 events a second rest on: a batch costs one transaction, not one an event."""
    flushed = []
    events._writer.set_trace_callback(lambda text: flushed.append(text) if text == "COMMIT" else None)
    assert sum(events.add(some_events(2000))) == 2000
    assert len(flushed) == 1

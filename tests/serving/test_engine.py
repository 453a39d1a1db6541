"""Questions that arrive together are answered together, from one snapshot, and not without bound."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from itertools import pairwise

import pytest

from peso.serving.engine import Engine, Overloaded


class Recorder:
    """Stands for a snapshot: an answer is the question and who answered."""

    def __init__(self, name: str = "a") -> None:
        self.name = name
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.open.set()

    def answer(self, questions):
        self.open.wait()
        self.batches.append(list(questions))
        return [(question, self.name) for question in questions]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def busy(engine: Engine, recorder: Recorder) -> None:
    """Have the engine answer two requests together, and forget that."""
    recorder.open.clear()
    first = engine.ask(["first"])
    while engine.waiting:
        time.sleep(0.001)
    others = [engine.ask([name]) for name in ("second", "third")]
    recorder.open.set()
    for future in (first, *others):
        future.result(100)
    assert recorder.batches == [["first"], ["second", "third"]]
    recorder.batches.clear()


def test_after_a_batch_of_several_what_arrives_within_the_window_is_one_batch(recorder):
    engine = Engine(recorder.answer, wait=0.5)
    busy(engine, recorder)
    futures = [engine.ask([f"{number}", f"{number}b"]) for number in range(5)]
    for number, future in enumerate(futures):
        assert future.result(10) == [(f"{number}", "a"), (f"{number}b", "a")]
    assert len(recorder.batches) == 1
    engine.stop()


def test_who_comes_alone_waits_for_nobody(recorder):
    engine = Engine(recorder.answer, wait=600)
    for name in "abc":
        assert engine.ask([name]).result(100) == [(name, "a")]
    engine.stop()


def test_a_full_batch_waits_for_nobody_and_a_request_stays_whole(recorder):
    engine = Engine(recorder.answer, wait=0.5, together=4)
    busy(engine, recorder)
    engine._wait = 60  # from here on only a full batch, or the end
    futures = [engine.ask(["a", "b", "c"]), engine.ask(["d", "e"]), engine.ask(["f", "g", "h"])]
    assert [len(future.result(10)) for future in futures[:2]] == [3, 2]
    engine.stop()
    assert len(futures[2].result(10)) == 3
    assert recorder.batches == [["a", "b", "c"], ["d", "e"], ["f", "g", "h"]]


def test_more_than_the_queue_holds_is_refused_with_a_time(recorder):
    recorder.open.clear()
    engine = Engine(recorder.answer, wait=0, most=3)
    first = engine.ask(["first"])
    while engine.waiting:
        time.sleep(0.001)
    waiting = [engine.ask([f"{number}"]) for number in range(3)]
    with pytest.raises(Overloaded) as refusal:
        engine.ask(["one more"])
    assert refusal.value.seconds >= 1
    recorder.open.set()
    assert [len(future.result(10)) for future in [first, *waiting]] == [1] * 4
    assert engine.ask(["again"]).result(10)
    engine.stop()
    with pytest.raises(Overloaded):
        engine.ask(["late"])


def test_a_question_that_nobody_waits_for_is_not_computed(recorder):
    recorder.open.clear()
    engine = Engine(recorder.answer, wait=0)
    first = engine.ask(["first"])
    while engine.waiting:
        time.sleep(0.001)
    gone = engine.ask(["gone"])
    assert gone.cancel()
    recorder.open.set()
    assert first.result(10)
    engine.stop()
    assert recorder.batches == [["first"]]
    with pytest.raises(CancelledError):
        gone.result(10)


def test_a_failure_is_that_of_its_request_alone(recorder):
    def answer(questions):
        if "broken" in questions:
            raise RuntimeError("broken")
        return recorder.answer(questions)

    engine = Engine(answer, wait=0.2)
    busy(engine, recorder)
    futures = [engine.ask([name]) for name in ("a", "broken", "c")]
    assert [futures[place].result(10) for place in (0, 2)] == [[("a", "a")], [("c", "a")]]
    with pytest.raises(RuntimeError, match="broken"):
        futures[1].result(10)
    assert engine.ask(["b"]).result(10) == [("b", "a")]
    engine.stop()


def test_every_request_is_answered_by_one_snapshot_while_they_change():
    """Many threads ask while the snapshot changes all the time."""
    current, stop = [Recorder("0")], threading.Event()
    engine = Engine(lambda questions: current[0].answer(questions), wait=0.001, together=8, most=10_000)

    def change() -> None:
        number = 0
        while not stop.wait(0.0005):
            current[0], number = Recorder(f"{number}"), number + 1

    answers: list[list[tuple[str, str]]] = []

    def ask() -> None:
        for _ in range(50):
            answers.append(engine.ask(["x", "y", "z"]).result(30))

    changer, askers = threading.Thread(target=change), [threading.Thread(target=ask) for _ in range(8)]
    for thread in (changer, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    changer.join()
    engine.stop()
    assert len(answers) == 400
    assert all(len({name for _, name in answer}) == 1 for answer in answers)
    assert len({answer[0][1] for answer in answers}) > 1


def test_other_work_runs_between_batches_on_the_same_thread(recorder):
    engine = Engine(recorder.answer, wait=0, most=3)
    recorder.open.clear()
    first = engine.ask(["first"])
    while engine.waiting:
        time.sleep(0.001)
    waiting = [engine.ask(["a"]), engine.run(threading.current_thread), engine.ask(["b"])]
    with pytest.raises(Overloaded):
        engine.run(list)
    recorder.open.set()
    assert first.result(100)
    assert waiting[1].result(100) is engine._thread
    assert [waiting[place].result(100) for place in (0, 2)] == [[("a", "a")], [("b", "a")]]
    assert recorder.batches == [["first"], ["a"], ["b"]]
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 // 0).result(100)
    assert engine.ask(["again"]).result(100)
    engine.stop()


def test_answers_are_prepared_one_by_one_when_no_question_waits(recorder):
    recorder.open.clear()
    done, went = [], threading.Event()

    def prepare(user: str) -> None:
        done.append(user)
        went.wait(100)

    engine = Engine(recorder.answer, wait=0, prepare=prepare)
    first = engine.ask(["first"])
    engine.expect(["a", "b"])
    engine.expect(["c", "a"])  # its last event is the newest
    time.sleep(0.1)
    assert done == []  # a question is being answered
    recorder.open.set()
    assert first.result(100)
    while not done:
        time.sleep(0.001)
    asked = [engine.ask(["second"]), engine.ask(["third"])]
    went.set()
    assert [future.result(100) for future in asked] == [[("second", "a")], [("third", "a")]]
    assert done == ["b"]  # questions go first
    while len(done) < 3:
        time.sleep(0.001)
    engine.stop()
    assert done == ["b", "c", "a"]


def test_preparation_takes_at_most_a_quarter_of_the_time(recorder):
    times: list[tuple[float, float]] = []

    def prepare(user: str) -> None:
        started = time.monotonic()
        time.sleep(0.03)
        times.append((started, time.monotonic()))

    engine = Engine(recorder.answer, prepare=prepare)
    engine.expect("abc")
    while len(times) < 3:
        time.sleep(0.001)
    engine.stop()
    for (started, ended), (following, _) in pairwise(times):
        assert following - started >= 3.9 * (ended - started)


def test_a_preparation_that_fails_is_logged_and_the_engine_goes_on(recorder, caplog):
    engine = Engine(recorder.answer, prepare=lambda user: 1 // 0)
    with caplog.at_level("ERROR", "peso.serving"):
        engine.expect(["a"])
        while not caplog.records:
            time.sleep(0.001)
    assert caplog.records[0].getMessage() == "an answer was not prepared"
    assert engine.ask(["first"]).result(100)
    engine.stop()


def test_the_latest_users_are_prepared_if_too_many_are_expected(recorder, monkeypatch):
    monkeypatch.setattr("peso.serving.engine.MOST_EXPECTED", 3)
    done: list[str] = []
    engine = Engine(recorder.answer, prepare=done.append)
    recorder.open.clear()
    first = engine.ask(["first"])
    engine.expect(f"{number}" for number in range(6))
    recorder.open.set()
    first.result(100)
    while len(done) < 3:
        time.sleep(0.001)
    engine.stop()
    assert done == ["3", "4", "5"]


def test_an_engine_stops_without_preparing_what_is_expected(recorder):
    done: list[str] = []
    engine = Engine(recorder.answer, prepare=done.append)
    recorder.open.clear()
    first = engine.ask(["first"])
    engine.expect(["a"])
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    recorder.open.set()
    stopping.join(100)
    assert first.result(100)
    assert done == []

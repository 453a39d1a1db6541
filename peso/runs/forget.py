"""`peso forget`: erases one user from a workspace, with all users that were merged into this one.

Derived data are removed first (report, baselines, checkpoints), then the user's received events, rows in
predictions, stored samples, and events in the stream (in one rename), and the index of histories. If
interrupted, the call can be repeated; it erases what is left. Metrics of tests whose cases changed are
computed again from their predictions; no model is loaded, and stages keep their digests
(:mod:`peso.events.erase`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from peso.config import DataConfig
from peso.config.data import STREAMS
from peso.errors import DataError, PesoError, WorkspaceError
from peso.events.database import literal, scalar, temporary_database
from peso.events.erase import erase_user, files_with, has_user, stages_with, write_without
from peso.events.histories import Part
from peso.events.merge import members_of
from peso.events.received import ReceivedEvents
from peso.events.sources import open_source
from peso.events.sources.reading import Reading
from peso.runs.evaluate import measure, remove_test
from peso.runs.intake import WORK
from peso.runs.preparation import logs_of
from peso.runs.report import read_user_table, renew_report
from peso.runs.stage import FORMAT, PREDICTIONS, RunStage, StageTest
from peso.runs.workspace import Workspace
from peso.runtime.files import commit_directory, read_sealed, remove_directory, remove_left, write_sealed
from peso.runtime.manifest import replace_file
from peso.runtime.progress import Observer
from peso.runtime.remote import is_remote, local

NOTE = ".forget"  # lists the tests to measure again; does not contain the user
PARTS: tuple[Part, ...] = ("test", "validation")
Test = tuple[int, int, Part]  # stage, cases and part


@dataclass(frozen=True)
class Holdings:
    """Where a user occurs in a workspace.

    Attributes:
        users: the user, and those that were merged into this one.
        stages: stages of the stream with events of the user.
        rare: whether the stream has the user only among those with too few events for a stage.
        received: number of received events.
        tests: tests whose predictions have rows of the user, as stage, cases and part.
        trained: stages whose model was trained on events of the user, which it may still reflect.
        samples: stages that store training sequences which may be the user's (strategy ``replay``).
        own_files: source files with events of the user; `peso` does not change them.
    """

    users: list[str] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)
    rare: bool = False
    received: int = 0
    tests: list[Test] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    own_files: list[str] = field(default_factory=list)

    @property
    def anything(self) -> bool:
        return bool(self.stages or self.rare or self.received or self.tests)


def holdings(workspace: Workspace, user: str) -> Holdings:
    """Find where a user occurs. A user that was merged into another one counts as that one.

    Raises:
        WorkspaceError: a file is damaged.
    """
    stream = workspace.stream
    user = stream.merged_users.get(user, user)
    users = [user, *members_of(stream.merged_users).get(user, ())]
    stages = stages_with(stream, *users)
    first = min(stages, default=stream.stages)
    tests = [_named(test) for test in predicted_tests(workspace) if has_user(_intact(test), *users)]
    return Holdings(
        users=users,
        stages=stages,
        rare=not stages and bool(files_with(stream, *users)),
        received=sum(_received(workspace, each) for each in users),
        tests=tests,
        trained=[number for number in workspace.finished_stages if number >= first],
        samples=[stage.number for stage in workspace.stages if stages and _keeps_samples(stage)],
        own_files=own_files_with(workspace, *users),
    )


def forget(workspace: Workspace, user: str, observer: Observer) -> Holdings:
    """Erase a user from the workspace; returns where the user occurred. The caller holds the lock.

    Raises:
        DataError: the user does not occur in the workspace.
        WorkspaceError: a file is damaged, or the disk is full; the call can be repeated.
    """
    held = holdings(workspace, user)
    if not held.anything and not (workspace.root / NOTE).is_file():
        raise DataError(
            f"no stage, prediction or received event of {workspace.root} has the user {user!r}; check the id"
        )
    left = _note(workspace, held)
    for directory in (workspace.report_directory, workspace.root / "baselines"):
        remove_directory(directory)
    for unfinished in workspace.root.glob("stages/.*.unfinished"):
        remove_directory(unfinished)
    shutil.rmtree(workspace.root / WORK, ignore_errors=True)
    if workspace.events_file.exists():
        with ReceivedEvents(workspace.events_file) as received:
            for each in held.users:
                received.forget(each)
    for number, cases, part in held.tests:
        test = StageTest(workspace.stage(number), cases, part)
        with replace_file(test.stage.directory, test.name(PREDICTIONS), FORMAT) as aside:
            write_without(test.path(PREDICTIONS), aside, *held.users)
    _erase_samples(workspace, held)
    if files_with(workspace.stream, *held.users) or len(held.users) > 1:
        with commit_directory(workspace.stream_directory) as directory:
            erase_user(workspace.stream_directory, directory, *held.users)
    workspace.histories_file.unlink(missing_ok=True)
    for directory in (workspace.root, *workspace.root.glob("stages/*")):
        remove_left(directory)
    _conclude(workspace, left, observer)
    return held


def predicted_tests(workspace: Workspace) -> Iterator[StageTest]:
    """The tests of a workspace that have predictions."""
    for stage in workspace.stages:
        for cases in range(workspace.stream.stages):
            for part in PARTS:
                test = StageTest(stage, cases, part)
                if test.path(PREDICTIONS).is_file():
                    yield test


def _intact(test: StageTest) -> Path:
    """The path of its predictions, checked if the manifest lists them."""
    return test.stage.file(test.name(PREDICTIONS)) or test.path(PREDICTIONS)


def _named(test: StageTest) -> Test:
    return test.stage.number, test.cases, test.part


@dataclass(frozen=True)
class _Left:
    """What to compute again at the end: tests that were up to date and whose cases change, and the report."""

    tests: list[Test]
    report: bool


def _note(workspace: Workspace, held: Holdings) -> _Left:
    """Determine what to compute again, and store it before anything is changed."""
    path = workspace.root / NOTE
    earlier = _Left([], False)
    with suppress(OSError, ValueError, WorkspaceError):  # missing or damaged: then `peso evaluate` helps
        stored = json.loads(read_sealed(path))
        earlier = _Left([(number, cases, part) for number, cases, part in stored["tests"]], stored["report"])
    tests = list(earlier.tests)
    for test in predicted_tests(workspace):
        changes = _named(test) in held.tests or test.cases in held.stages
        if changes and _named(test) not in tests and test.is_predicted:
            tests.append(_named(test))
    left = _Left(tests, earlier.report or workspace.report_directory.is_dir())
    write_sealed(path, json.dumps({"tests": left.tests, "report": left.report}).encode())
    return left


def _conclude(workspace: Workspace, left: _Left, observer: Observer) -> None:
    """Measure the tests and write the report again, then remove the note."""
    for number, cases, part in left.tests:
        test = StageTest(workspace.stage(number), cases, part)
        if not test.stage.is_trained or not test.path(PREDICTIONS).is_file():
            continue
        if test.has_cases:
            measure(test)
        else:
            remove_test(test)
            observer.note(
                f"no {part} case of stage {cases} is left, so the model of stage {number} is not tested on it"
            )
    if left.report:
        renew_report(workspace, observer)
    (workspace.root / NOTE).unlink()


def _received(workspace: Workspace, user: str) -> int:
    if not workspace.events_file.exists():
        return 0
    with ReceivedEvents(workspace.events_file) as received:
        return len(received.of_user(user))


# -- samples stored by a strategy --------------------------------------------------------------------


def _keeps_samples(stage: RunStage) -> bool:
    if stage.pruned is not None:
        return False
    from peso.runs.models import stored_memory

    return any(name.startswith("replay.") for name in stored_memory(stage))


def _erase_samples(workspace: Workspace, held: Holdings) -> None:
    """Remove the user's sequences from the samples of ``replay``."""
    if not held.samples:
        return
    from safetensors.torch import save_file

    from peso.runs.models import MEMORY, stored_memory
    from peso.training.strategies.replay import as_tensors, stored, trimmed

    window = workspace.config.prompt.window
    own = [
        trimmed(sequence, window)
        for number in held.stages
        for sequence in workspace.stream.stage(number).training_sequences()
        if sequence.user in held.users
    ]
    for number in held.samples:
        stage = workspace.stage(number)
        memory = stored_memory(stage)
        kept, seen = stored(memory)
        left = [
            sample
            for sample in kept
            if not any(
                sample.first_target == mine.first_target and np.array_equal(sample.items, mine.items)
                for mine in own
            )
        ]
        if len(left) < len(kept):
            with replace_file(stage.directory, MEMORY, FORMAT) as aside:
                save_file({**memory, **as_tensors(left, seen)}, aside)


# -- source files, outside the workspace --------------------------------------------------------------


def own_files_with(workspace: Workspace, *users: str) -> list[str]:
    """The existing files, of the configured log, the appended logs and the user table, that contain one of
    the users or cannot be read."""
    found: list[str] = []
    for data in logs_of(workspace):
        path = data.path
        if data.format in STREAMS or path is None or not (is_remote(path) or Path(path).exists()):
            continue
        if path not in found and _log_has(data, users):
            found.append(path)
            if is_remote(path):
                with suppress(DataError):
                    found.append(local(path))
    table = workspace.config.report.users
    if table and Path(table).exists():
        try:
            values = read_user_table(table)
        except DataError:
            return [*found, f"{table} (not readable)"]
        if any(user in column for column in values.values() for user in users):
            found.append(str(table))
    return found


def _log_has(data: DataConfig, users: Sequence[str]) -> bool:
    """Whether a log contains one of the users; True also if it cannot be read, so that it is reported."""
    try:
        with TemporaryDirectory() as aside, temporary_database(Path(aside)) as connection:
            log = open_source(data).log
            reading = Reading(connection, log.table, True, log.time)
            reading.create("people", f"{reading.id(log.user, 'data.columns.user')} AS name")
            names = ", ".join(map(literal, users))
            return bool(scalar(connection, f"SELECT count(*) FROM people WHERE name IN ({names})"))
    except PesoError:
        return True

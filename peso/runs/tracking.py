"""Experiment trackers: one run per stage, grouped by workspace, through Accelerate's trackers.

While a stage is trained, the lines of its ``log.jsonl`` are sent (losses, gradient norms, the figures of the
anchor); when it is tested, its metrics; when the report is written, the report. Nothing leaves the machine
unless the tracker's own environment variables say so (``WANDB_MODE=online``, ``MLFLOW_TRACKING_URI``,
``TRACKIO_SPACE_ID``); files are in ``tracking/`` of the workspace. What was sent is noted there, so that an
interrupted stage continues in the same run. A tracker that fails or does not answer in time is reported; the
training continues without it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from peso.errors import PesoError
from peso.runs.place import TRACKING
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.files import digest, write_atomically
from peso.runtime.processes import current
from peso.runtime.progress import Observer

EVERY = 5.0  # seconds between two looks at the log
LIMIT = 120.0  # seconds for one call of a tracker
STATE = "sent.json"
# For environment variables that the user has not set: files are in the workspace, and nothing is sent.
DEFAULTS = {
    "wandb": {
        "WANDB_MODE": "offline",
        "WANDB_DATA_DIR": "{folder}",  # of the files of artifacts until they are uploaded
        "WANDB_CACHE_DIR": "{folder}/cache",
        "WANDB_CONFIG_DIR": "{folder}/config",
        "WANDB_ERROR_REPORTING": "false",
    },
    "trackio": {"TRACKIO_DIR": "{folder}"},
}
ONLINE = {"wandb": ("WANDB_MODE",), "trackio": ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")}
_silent: set[str] = set()  # trackers that did not answer in this process


class _Caller:
    """Calls a tracker in a thread of its own, so that a call that never returns blocks nothing else.

    It is one thread for all calls, because MLflow and Trackio store the current run by thread. It does not
    keep the process alive.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="peso tracking", daemon=True).start()

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of the function.

        Raises:
            TimeoutError: it did not return within ``LIMIT`` seconds.
        """
        answer: Future[Any] = Future()
        self._calls.put((function, answer))
        return answer.result(LIMIT)

    def close(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while (asked := self._calls.get()) is not None:
            function, answer = asked
            try:
                answer.set_result(function())
            except BaseException as error:  # goes to the caller, which may have given up
                answer.set_exception(error)


class Tracking:
    """The runs of a stage in all configured trackers. Does nothing if there are none, and in all processes
    but the main one.

    Args:
        observer: receives a warning if a tracker fails.
    """

    def __init__(self, stage: RunStage, observer: Observer) -> None:
        self._stage, self._observer = stage, observer
        self._folder = stage.workspace.root / TRACKING
        self._file = _note_of(stage)
        self._trackers: dict[str, Any] = {}
        self._callers: dict[str, _Caller] = {}
        self._sent: dict[str, Any] = {}
        self._looked = 0.0
        names = stage.workspace.config.tracking if current().is_main else []
        if not names:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
            return
        self._sent = _sent(stage)
        for name in dict.fromkeys(names):
            if name not in _silent:
                self._callers[name] = _Caller()
                if (opened := self._guarded(name, lambda name=name: self._open(name))) is not None:
                    self._trackers[name] = opened
        self._note(began=_began(stage))

    def follow(self, log: Path, phase: str, last: bool = False) -> None:
        """Send the lines of a log that were not sent yet, at most once in some seconds.

        Args:
            log: the log of a phase of the training; it need not exist yet.
            phase: its name; "" if there is only one.
            last: the phase has ended.
        """
        if not self._trackers or (not last and time.monotonic() - self._looked < EVERY):
            return
        self._looked = time.monotonic()
        done = dict(self._sent.get("lines", {}))
        base = int(self._sent.get("steps", 0))
        lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
        step = base
        for line in [line for line in lines if line.endswith(b"\n")][done.get(phase, 0) :]:
            record = json.loads(line)
            step = base + int(record.pop("step", 0))
            kind = "train" if "loss" in record else "validation"
            self._log(dict(_numbers(record, f"{phase}/{kind}" if phase else kind)), step)
            done[phase] = done.get(phase, 0) + 1
        self._note(lines=done, **({"steps": max(step, base)} if last and step > base else {}))

    def publish(self, report: Path | None = None) -> None:
        """Send the figures of training and test, if they have changed, and a report."""
        if not self._trackers:
            return
        values, sent = dict(_figures(self._stage)), self._sent.get("values", {})
        if values and self._sent.get("figures") != digest(values):
            new = {name: value for name, value in values.items() if sent.get(name) != value}
            if new:
                self._log(new, int(self._sent.get("steps", 0)))
            self._note(figures=digest(values), values=values)
        if report is not None:
            for name in [*self._trackers]:
                self._guarded(name, lambda name=name: _attach(name, self._trackers[name], report))

    def close(self) -> None:
        for name in [*self._trackers]:
            self._guarded(name, lambda name=name: _finish(name, self._trackers[name]))
        for caller in self._callers.values():
            caller.close()
        self._trackers, self._callers = {}, {}

    def _open(self, name: str) -> Any:
        stage, folder = self._stage, self._folder / name
        group, run = stage.workspace.root.resolve().name, f"stage-{stage.number}"
        tracker = _tracker(
            name, folder, group, run, self._sent.setdefault("id", os.urandom(8).hex()), self._sent
        )
        tracker.start()
        if name == "mlflow":
            self._sent["mlflow"] = tracker.tracker.info.run_id
        # trackio stores what was configured last, also of a run that is continued
        if not self._sent.get("began") or name == "trackio":
            config = stage.workspace.config.model_dump(mode="json")
            if name == "tensorboard":
                tracker.log({"configuration": f"```\n{yaml.safe_dump(config, sort_keys=False)}```"}, step=0)
            else:
                tracker.store_init_configuration(dict(_leaves(config, "")))
        return tracker

    def _log(self, values: dict[str, float], step: int) -> None:
        for name in [*self._trackers]:
            given = values
            if name == "mlflow":  # it refuses @ in names
                given = {key.replace("@", "_at_"): value for key, value in values.items()}
            self._guarded(name, lambda name=name, given=given: self._trackers[name].log(given, step=step))

    def _note(self, **told: Any) -> None:
        self._sent.update(told)
        try:
            write_atomically(self._file, json.dumps(self._sent).encode())
        except (OSError, PesoError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on without trackers: without the note, a stage that is continued would send its lines again."""
        self.close()
        self._observer.note(
            f"warning: tracking failed ({error}); continuing without it. Check that "
            f"{self._stage.workspace.root / TRACKING} is a folder that can be written"
        )

    def _guarded(self, name: str, call: Any) -> Any:
        """The result of a call; None if it fails or does not return in time, which is reported."""
        try:
            with _quiet(name):
                return self._callers[name].call(call)
        except Exception as error:  # whatever a tracker does, it must not end a training
            self._trackers.pop(name, None)
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, TimeoutError) and not str(error):
                said = f"no answer within {LIMIT:g} s"
                _silent.add(name)
            self._observer.note(f"warning: tracking with {name} failed ({said}); continuing without it")
            return None


def publish(workspace: Workspace, observer: Observer, report: Path | None = None) -> None:
    """Send the metrics of every tested stage, and the report to the newest one. Nothing is sent twice."""
    if not workspace.config.tracking or not current().is_main:
        return
    finished = workspace.finished_stages
    for number in finished:
        stage, attached = workspace.stage(number), report if number == finished[-1] else None
        if attached is None and _sent(stage).get("figures") == digest(dict(_figures(stage))):
            continue
        tracking = Tracking(stage, observer)
        tracking.publish(attached)
        tracking.close()


def _sent(stage: RunStage) -> dict[str, Any]:
    """What was sent for a stage; {} if the stage was learned again since, from another one."""
    with suppress(OSError, ValueError):
        sent = dict(json.loads(_note_of(stage).read_text()))
        return sent if sent.get("began") == _began(stage) else {}
    return {}


def _note_of(stage: RunStage) -> Path:
    return stage.workspace.root / TRACKING / f"stage-{stage.number}" / STATE


def _began(stage: RunStage) -> str:
    return stage.before.determined_by if stage.number else "stage 0"


def _tracker(name: str, folder: Path, group: str, run: str, id: str, sent: Mapping[str, Any]) -> Any:
    """One of Accelerate's trackers, which is not started yet."""
    from accelerate import PartialState, tracking

    PartialState()  # Accelerate's trackers log through it
    folder.mkdir(parents=True, exist_ok=True)
    for variable, value in DEFAULTS.get(name, {}).items():
        _set_default(variable, value.format(folder=folder.resolve()))
    if name == "tensorboard":
        return tracking.TensorBoardTracker(run, folder)
    if name == "wandb":
        return tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT", "peso"),
            group=group,
            name=f"{group} {run}",
            id=id,
            resume="allow",
            dir=str(folder),
        )
    if name == "trackio":
        return tracking.TrackioTracker(group, name=run, group=group, resume="allow")
    return tracking.MLflowTracker(group, use_mlflow(folder), run_id=sent.get("mlflow"), run_name=run)


def _finish(name: str, tracker: Any) -> None:
    if name == "trackio":
        import trackio

        trackio.finish()  # else it finishes the run again, and says so, when the process ends
    else:
        tracker.finish()


def use_mlflow(folder: Path) -> str | None:
    """Use the database in a folder, unless ``MLFLOW_TRACKING_URI`` names another place.

    Returns:
        The address of the artifacts; None: the place decides.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    if "MLFLOW_TRACKING_URI" in os.environ:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    # newer versions refuse a folder of plain files
    mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    return (folder.resolve() / "artifacts").as_uri()


def _attach(name: str, tracker: Any, report: Path) -> None:
    """Add a report to a run: as an artifact or, in TensorBoard, its summary as text."""
    if name == "tensorboard":
        tables = sorted((report / "tables").glob("*averages.md"))
        tracker.log({"report": "\n\n".join(table.read_text(encoding="utf-8") for table in tables)}, step=0)
    elif name == "wandb":
        import wandb

        artifact = wandb.Artifact("report", type="report")
        artifact.add_dir(str(report))
        tracker.tracker.log_artifact(artifact)
    elif name == "mlflow":
        tracker.log_artifacts(str(report), "report")
    elif name == "trackio":
        tracker.tracker.log_artifact(report, name="report", type="report")


_ours: dict[str, str] = {}  # environment variables that were set here


def _set_default(variable: str, value: str) -> None:
    if os.environ.get(variable) == _ours.get(variable):  # not set, or set here for another workspace
        os.environ[variable] = _ours[variable] = value


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Within the context, the output of a tracker is suppressed, unless the user has named a server."""
    if any(os.environ.get(v) not in (None, _ours.get(v)) for v in ONLINE.get(name, ())):
        yield
        return
    if name == "wandb":
        _set_default("WANDB_SILENT", "true")
    with redirect_stdout(StringIO()):
        yield


def _figures(stage: RunStage) -> Iterator[tuple[str, float]]:
    """Results of a stage's training, the figures of its anchor, and its metrics, as numbers with names."""
    training = stage.metrics.get("training", {})
    yield from _numbers({k: v for k, v in training.items() if k not in ("anchor", "moved")}, "training")
    moved = {k: v for k, v in (training.get("moved") or {}).items() if k != "modules"}
    yield from _numbers({"anchor": training.get("anchor") or {}, "moved": moved}, "")
    if stage.is_tested:  # stage 0 may have no metrics
        for name, told in stage.metrics.get("test", {}).get("metrics", {}).items():
            yield f"test/{name}", float(told["value"])


def _numbers(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested objects, by their paths. Lists are left out."""
    for path, value in _leaves(values, before):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield path, float(value)


def _leaves(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{before}/{key}" if before else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield path, value

"""The directory a run lives in: layout, manifests, checked files, one writer at a time."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peso.config import Config, TrainingConfig, changed_keys, dump_config, load_config
from peso.config.parsing import read_tree, shown
from peso.config.reading import (
    MOST_PROBLEMS,
    leaves,
    missing_keys,
    override,
    with_earlier_defaults,
)
from peso.config.shape import Changes, changed_data, changed_items, changed_shape, is_later
from peso.errors import ConfigError, ExportError, PesoError, WorkspaceError
from peso.runs.stage import RunStage
from peso.runtime.files import LOCK, only_writer, require_writable, restore, write_atomically
from peso.runtime.machine import require_device
from peso.runtime.manifest import MANIFEST, Manifest, read_manifest
from peso.runtime.processes import current

if TYPE_CHECKING:
    from peso.events.stream import Stream
    from peso.items.semantic_ids import SemanticIds

CONFIG = "config.yaml"
RESTORE = "restore it: the manifest of each trained stage (stages/*/manifest.json) has it as `configuration`"
MADE = ("stream", "semantic_ids", "stages", "baselines", "report")
EVENTS = "events.sqlite"  # what was received since (peso.events.received)
BESIDE_EVENTS = [f"{EVENTS}{ending}" for ending in ("-wal", "-shm")]  # SQLite's own
HISTORIES = "histories.sqlite"  # what each user did, made of the stream (peso.events.history_index)
SERVED, SERVED_LOCK = "served.json", ".served.lock"  # see peso.runs.served
RETIRED, RETIRED_LOCK = "retired.json", ".retired.lock"  # see peso.runs.retired
OF_ITS_OWN = {SERVED, SERVED_LOCK, RETIRED, RETIRED_LOCK}  # files that change without the workspace's lock
PARTS = {CONFIG, LOCK, EVENTS, *BESIDE_EVENTS, *OF_ITS_OWN, HISTORIES, *MADE}

# What is fixed once the stream and the semantic IDs are made; what is fixed once a stage is trained says
# RunStage.determination. Keys of evaluation, decoding and report may change at any time.
DEPENDS = {
    "stream": ("data", "seed", "data_seed"),
    "semantic IDs": ("data", "seed", "data_seed", "items"),
}
PATHS = {"data.path", "data.items.path"}


class Workspace:
    """A run's directory: config.yaml, stream/, semantic_ids/, stages/{t}/, baselines/, report/. ::

        workspace = peso.Workspace.open("runs/games")
        workspace.stream.titles[:3]                        # what was ingested
        workspace.semantic_ids.semantic_id("0")            # ["<a_128>", "<b_72>", "<c_95>", "<d_83>"]
        stage = workspace.trained()                        # the newest; workspace.stage(1) is another
        stage.metrics["test"]["metrics"]["ndcg@10"]["value"]
        stage.on(0).predictions                            # its answers to the cases of stage 0, if tested
        model = stage.model()                              # to train on or to look into

    What is read is checked against the sha256 in its manifest.
    """

    def __init__(self, root: Path, config: Config, trust: Iterable[str] | None = None) -> None:
        """
        Args:
            trust: classes that may be imported as strategies, as ``module.Class``. None: what ``config``
                names, since it is the caller's own.
        """
        self.root = root
        self.config = config
        self.trusted = frozenset(config.strategy.foreign if trust is None else trust)
        self._read_ids: tuple[Manifest, SemanticIds] | None = None

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path, trust: Iterable[str] = (), *, anew: str = "") -> Workspace:
        """Open an existing workspace.

        Args:
            trust: classes that may be imported as strategies, as ``module.Class``; nothing else that a
                workspace names is imported.
            anew: ``stream`` or ``semantic IDs`` to make these again, where no stage is trained on them yet:
                what they depend on may then have been edited.

        Raises:
            WorkspaceError: there is none, its manifests are damaged or were written by a newer version, or
                ``config.yaml`` is damaged, or not what stream, semantic IDs and stages were made with.
        """
        root = Path(path)
        if not os.path.isfile(root / CONFIG):
            if (root / "stages").is_dir():
                raise WorkspaceError(f"{root / CONFIG} is missing; {RESTORE}")
            raise WorkspaceError(
                f"{root} is not a workspace (no {CONFIG}); make one with `peso run CONFIG -w {root}`"
            )
        workspace = cls(root, _read_resolved(root / CONFIG), trust)
        workspace._refuse_edits(anew)
        return workspace

    @classmethod
    def create_or_open(
        cls, path: str | Path, config: Config, *, trust: Iterable[str] | None = None, later: bool = False
    ) -> Workspace:
        """Open with this configuration, or create. The workspace's lock is held while that is done.

        A key may change as long as nothing that depends on it is done; evaluation, decoding and report
        keys may always change.

        Args:
            trust: see the constructor.
            later: settings of later stages may differ from those that finished ones were trained with: they
                are for the stages to come.

        Raises:
            WorkspaceError: another process writes there, or keys changed that finished steps depend on (says
                which, and what to do). Nothing is written then.
            TrainingError: another device, which this machine does not have.
        """
        with _held(Path(path)):
            return cls._configured(Path(path), config, trust, later)

    @classmethod
    @contextmanager
    def hold(
        cls, path: str | Path, config: Config, *, trust: Iterable[str] | None = None
    ) -> Iterator[Workspace]:
        """As :meth:`create_or_open`, and be the only writer of the workspace, see :func:`writing`."""
        with writing(Path(path)):
            yield current().on_main(lambda: cls._configured(Path(path), config, trust, False))

    @classmethod
    @contextmanager
    def change(
        cls,
        path: str | Path,
        overrides: Sequence[str] = (),
        *,
        trust: Iterable[str] = (),
        later: bool = False,
        anew: str = "",
    ) -> Iterator[Workspace]:
        """Be the only writer of an existing workspace, with keys changed as ``--set`` does.

        Args:
            trust, later: see :meth:`create_or_open`.
            anew: see :meth:`open`.

        Raises:
            WorkspaceError: as :meth:`create_or_open`, or there is not a workspace.
        """
        root = Path(path)
        cls.open(root, trust, anew=anew)  # before anything is written there

        def changed() -> Workspace:
            if not overrides:
                return cls.open(root, trust, anew=anew)
            resolved = with_earlier_defaults(read_tree(root / CONFIG))
            config = load_config(resolved, overrides, base=root)
            # stages may have been trained with others of these, so they matter only where this call has some
            kept = not any(map(is_later, changed_keys(cls.open(root, trust, anew=anew).config, config)))
            return cls._configured(root, config, trust, later or kept, anew)

        with writing(root):
            yield current().on_main(changed)

    @classmethod
    def _configured(
        cls, root: Path, config: Config, trust: Iterable[str] | None, later: bool, anew: str = ""
    ) -> Workspace:
        """See :meth:`create_or_open`; the caller holds the lock."""
        if os.path.isfile(root / CONFIG):
            done = cls.open(root, anew=anew)
            done.refuse_changes(config, later=later, anew=anew)
            changed = changed_keys(done.config, config)
            if not changed:
                return cls(root, config, trust)
            if "training.device" in changed:  # of what may change, nothing else says whether it is there
                _require_usable(config.training)
        write_atomically(root / CONFIG, dump_config(config).encode())
        return cls(root, config, trust)

    @classmethod
    def preview(cls, path: str | Path, config: Config, trust: Iterable[str] | None = None) -> Workspace:
        """As :meth:`create_or_open`, but nothing is written: to say what would be done."""
        root = Path(path)
        _refuse_foreign(root)
        if os.path.isfile(root / CONFIG):
            cls.open(root).refuse_changes(config)
        return cls(root, config, trust)

    def refuse_changes(self, config: Config, *, later: bool = False, anew: str = "") -> None:
        """Raise WorkspaceError if `config` differs where something that is done depends on it.

        Args:
            later: settings of later stages may differ.
            anew: see :meth:`open`.
        """
        for stage in reversed(self.stages):
            changed = changed_shape(stage.config, config, stage.number)
            kept = [key for key in changed if not (later and is_later(key))]
            self._refuse(kept, f"stage {stage.number} was trained")
        keys = changed_keys(self.config, config)
        for done, step in ((self.has_semantic_ids, "semantic IDs"), (self.has_stream, "stream")):
            fixed = [key for key in keys if key.split(".")[0] in DEPENDS[step]]
            self._refuse(fixed if done and anew not in (step, "stream") else [], f"its {step} were made")

    def _refuse_edits(self, anew: str) -> None:
        """Raise WorkspaceError if `config.yaml` is not what was made with it, or a part of that is gone."""
        trained = self.finished_stages
        for place in (self.stream_directory, self.semantic_ids_directory):
            killed = place.with_name(f".{place.name}.old")  # from which a writer puts it back
            if trained and not place.is_dir() and not killed.is_dir():
                raise WorkspaceError(
                    f"{place} is missing, on which stages {trained} were trained; restore it from a copy, or "
                    "take a new workspace (-w)"
                )
        for stage in self.stages:
            changed = changed_shape(stage.config, self.config, stage.number)
            edits = {key: both for key, both in changed.items() if not is_later(key)}
            cure = "; to train with other ones, run into a new workspace with -w"
            self._refuse_edit(edits, f"stage {stage.number} was trained", cure)
        elsewhere = "; for other ones take a new workspace (-w)"
        if self.has_stream and (trained or anew != "stream"):
            stream = self.stream.manifest
            again = f", or read the data again: `peso ingest -w {self.root}`"
            cure = elsewhere if trained or "appended" in stream else again
            edits = changed_data(stream, self.config)
            if any(key.startswith("data.") for key in edits):
                cure += (
                    ". New events are added, with other settings of `data` if need be, by `peso ingest NEW "
                    f"--append --set … -w {self.root}`"
                )
            self._refuse_edit(edits, "its stream was made", cure)
        if self.has_semantic_ids and (trained or not anew):
            cure = elsewhere if trained else f", or make the IDs again: `peso tokenize -w {self.root}`"
            edits = changed_items(self.semantic_ids_manifest, self.config)
            self._refuse_edit(edits, "its semantic IDs were made", cure)

    def _refuse_edit(self, edits: Changes, since: str, cure: str) -> None:
        if edits:
            said = [f"{key} was {shown(then)}, is {shown(now)}" for key, (then, now) in edits.items()]
            said[MOST_PROBLEMS:] = [f"and {len(said) - MOST_PROBLEMS} more"] * (len(said) > MOST_PROBLEMS)
            raise WorkspaceError(
                f"{self.root / CONFIG} was edited after {since}: {'; '.join(said)}. Put the old values "
                f"back{cure}"
            )

    def _refuse(self, fixed: Sequence[str], since: str) -> None:
        if not fixed:
            return
        message = (
            f"the configuration of {self.root} has changed since {since}: {', '.join(fixed)}. Put the old "
            f"values back (see {self.root / 'config.yaml'}), or run into a new workspace with -w (--base "
            f"takes over the stages that stay the same), or remove {self.root}. Keys of evaluation, decoding "
            "and report may change."
        )
        if all(map(is_later, fixed)):
            message += f" To train the next stage with other settings: `peso update -w {self.root} --set …`."
        if "data.path" in fixed and set(fixed) <= PATHS:
            message += (
                " If the path leads to new events, add them as further stages: "
                f"`peso ingest NEW --append -w {self.root}`. If the same data were moved: "
                f"`peso run {self.root / CONFIG} -w {self.root}`."
            )
        raise WorkspaceError(message)

    def with_config(self, config: Config) -> Workspace:
        """The same directory with another configuration, which is written nowhere."""
        other = Workspace(self.root, config, self.trusted)
        other._read_ids = self._read_ids
        return other

    # -- layout ----------------------------------------------------------------------------------

    @property
    def stream_directory(self) -> Path:
        return self.root / "stream"

    @property
    def semantic_ids_directory(self) -> Path:
        return self.root / "semantic_ids"

    @property
    def events_file(self) -> Path:
        """Where events that are received one by one are stored (:mod:`peso.events.received`)."""
        return self.root / EVENTS

    @property
    def histories_file(self) -> Path:
        """Where the users' histories are looked up (:mod:`peso.events.history_index`)."""
        return self.root / HISTORIES

    @property
    def report_directory(self) -> Path:
        return self.root / "report"

    @property
    def has_stream(self) -> bool:
        return self.stream_directory.is_dir()

    @property
    def has_semantic_ids(self) -> bool:
        return self.semantic_ids_directory.is_dir()

    @property
    def finished_stages(self) -> list[int]:
        """Numbers of the stages whose training is committed, ascending.

        Raises:
            WorkspaceError: a stage is missing between others, or one has no manifest.
        """
        found = os.listdir(self.root / "stages") if (self.root / "stages").is_dir() else []
        stages = sorted(int(name) for name in found if re.fullmatch("0|[1-9][0-9]*", name))
        for stage in range(len(stages)):
            directory = self.stage(stage).directory
            if not (directory / MANIFEST).is_file():
                later = f" and those after it ({stages[-1]} is the last)" if stage < stages[-1] else ""
                raise WorkspaceError(
                    f"{directory / MANIFEST} is missing; restore it from a copy, or remove {directory}{later}"
                    " and train again"
                )
        return stages

    def stage(self, number: int) -> RunStage:
        """A stage, trained or not."""
        return RunStage(self, number)

    @property
    def stages(self) -> list[RunStage]:
        """The stages whose training is committed, in order."""
        return [self.stage(number) for number in self.finished_stages]

    def trained(self, number: int | None = None) -> RunStage:
        """The stage asked for, or the newest. Raises WorkspaceError if it is not trained."""
        done = self.finished_stages
        if not done:
            raise WorkspaceError(
                f"{self.root} has no trained stage yet; `peso run` or `peso train -w {self.root}`"
            )
        if number is not None and number not in done:
            raise WorkspaceError(f"stage {number} of {self.root} is not trained; trained are {done}")
        return self.stage(done[-1] if number is None else number)

    # -- stream and semantic IDs -------------------------------------------------------------------

    @property
    def stream(self) -> Stream:
        """The stream as it is now.

        Raises:
            WorkspaceError: there is none yet, or its manifest is damaged.
        """
        from peso.events.stream import Stream

        if not self.has_stream:
            raise WorkspaceError(f"{self.root} has no stream yet; `peso ingest -w {self.root}` comes first")
        return Stream.open(self.stream_directory)

    @property
    def semantic_ids_manifest(self) -> Manifest:
        """
        Raises:
            WorkspaceError: there are no semantic IDs yet, or their manifest is damaged.
        """
        from peso.items.semantic_ids import FORMAT

        if not self.has_semantic_ids:
            _ = self.stream  # which comes before
            raise WorkspaceError(
                f"{self.root} has no semantic IDs yet; `peso tokenize -w {self.root}` comes first"
            )
        return read_manifest(self.semantic_ids_directory, FORMAT)

    @property
    def semantic_ids(self) -> SemanticIds:
        """The semantic IDs as they are now, read and checked once as long as their manifest stays the same.

        Raises:
            WorkspaceError: there are none yet, or a file is damaged.
        """
        from peso.items.semantic_ids import read_semantic_ids

        manifest = self.semantic_ids_manifest
        if self._read_ids is None or self._read_ids[0] != manifest:
            self._read_ids = manifest, read_semantic_ids(self.semantic_ids_directory)
        return self._read_ids[1]

    @property
    def items_without_id(self) -> int:
        """How many items the stream has gained since the semantic IDs were made; 0 before that."""
        if not self.has_stream or not self.has_semantic_ids:
            return 0
        return int(self.stream.manifest["items"]) - int(self.semantic_ids_manifest["items"])

    def require_semantic_ids(self) -> None:
        """Raise WorkspaceError if there are no semantic IDs yet."""
        _ = self.semantic_ids_manifest

    # -- writing ---------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer, see :func:`writing`."""
        with writing(self.root):
            yield


def _require_usable(training: TrainingConfig) -> None:
    """Raise TrainingError where this machine does not have the device."""
    require_device(training.device)
    if training.device not in ("auto", "cpu"):
        from peso.runtime.device import Precision

        Precision.of(training.precision, training.device)


def _read_resolved(path: Path) -> Config:
    """A configuration that was written as resolved, so that every key has to be there."""
    try:
        tree = with_earlier_defaults(read_tree(path))
        config = load_config(tree, base=path.parent)
    except ConfigError as error:
        named = "" if str(path) in str(error) else f"{path}: "
        raise ConfigError(f"{named}{error}") from None
    if missing := missing_keys(tree, config):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise WorkspaceError(
            f"{path} is incomplete: {', '.join(missing[:5])}{more} are missing, which peso always writes. It "
            f"was cut off or edited; {RESTORE}"
        )
    return config


def trusted_classes(config: Config, overrides: Sequence[str], file: Path | None = None) -> list[str]:
    """Classes that a configuration names, and that the caller has named as well: in ``overrides``, or in a
    ``file`` of the caller's own, which ``config.yaml`` of a workspace is not."""
    if file is not None and not (file.name == CONFIG and any((file.parent / p).is_dir() for p in MADE)):
        return config.strategy.foreign
    given: dict[str, Any] = {}
    for text in overrides:
        override(given, text)
    named = {value for _, value in leaves(given) if isinstance(value, str)}
    return [name for name in config.strategy.foreign if name in named]


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Be the only writer of the workspace at a path, there yet or not.

    Of several processes that train together the main one holds the lock. If the work is refused before a
    step was done, the configuration is as before; where there was none, nothing is left.

    Raises:
        WorkspaceError: another process is writing, the place cannot be written, or something else is there.
    """
    with ExitStack() as held:
        current().on_main(lambda: held.enter_context(_held(root)))
        yield


@contextmanager
def _held(root: Path) -> Iterator[None]:
    made = not os.path.lexists(root)
    _refuse_foreign(root)
    with only_writer(root):
        for name in ("stream", "semantic_ids"):
            restore(root / name)
        before, done = _content(root), _manifests(root)
        config = (root / CONFIG).read_bytes() if CONFIG in before else None
        try:
            yield
        except BaseException as error:
            if not before and _content(root) <= {CONFIG}:
                for name in (CONFIG, LOCK):
                    (root / name).unlink(missing_ok=True)
                if made:
                    with suppress(OSError):
                        root.rmdir()
            elif config is not None and isinstance(error, PesoError) and _manifests(root) == done:
                write_atomically(root / CONFIG, config)  # refused: its keys are not taken over
            raise


def _refuse_foreign(root: Path) -> None:
    """Raise WorkspaceError if something is there that is not a workspace."""
    if os.path.lexists(root) and not os.path.isfile(root / CONFIG) and (not root.is_dir() or _content(root)):
        raise WorkspaceError(f"{root} exists and is not a workspace; choose another place with -w")


def _manifests(root: Path) -> dict[Path, tuple[int, int]]:
    """Every manifest, by when it was written: equal as long as no step was done."""
    found = {path: path.stat() for path in root.rglob(MANIFEST)}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in found.items()}


def _content(root: Path) -> set[str]:
    """Names of what is there beside the lock and what a killed process was writing."""
    return {name for name in os.listdir(root) if name != LOCK and not name.endswith(".writing")}


def _is_workspace(root: Path) -> bool:
    """Whether more is there than a file of somebody's that is called config.yaml, with a report beside it."""
    begun = ("stream", "semantic_ids", "stages", LOCK)
    return os.path.isfile(root / CONFIG) and any(os.path.lexists(root / name) for name in begun)


def require_place(path: Path) -> None:
    """Check a path that output is to go to, before what is to be written there is made.

    Raises:
        ExportError: it is a file or directory of a workspace.
        WorkspaceError: nothing can be written there.
    """
    place = Path(os.path.realpath(path))
    for root in place.parents:
        if place.relative_to(root).parts[0] in PARTS and _is_workspace(root):
            raise ExportError(f"{path} belongs to the workspace {root}; name another place")
    require_writable(path)


def provenance() -> dict[str, Any]:
    """Versions, hardware and time, for manifests."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("peso", "torch", "transformers", "peft", "safetensors")},
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "processor": _processor(),
            "accelerator": _accelerator(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "command": " ".join(["peso", *sys.argv[1:]]) if Path(sys.argv[0]).name == "peso" else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    """None for what is imported without being installed, such as peso from its source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _accelerator() -> str | None:
    torch = sys.modules.get("torch")  # where it was not needed, no accelerator was used
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

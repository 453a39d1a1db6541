"""A workspace: the directory of a run, its configuration, stream, semantic IDs and stages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peso.config import Config, TrainingConfig, changed_keys, dump_config, load_config
from peso.config.parsing import read_tree
from peso.config.reading import leaves, missing_keys, override, with_earlier_defaults
from peso.config.shape import is_later
from peso.errors import ConfigError, WorkspaceError
from peso.runs.changes import refuse_changes, refuse_edits
from peso.runs.names import current_names
from peso.runs.place import CONFIG, EVENTS, HISTORIES, MADE, hold_lock, refuse_foreign, writing
from peso.runs.sizes import Sizes, chosen_sizes, record, require_sizes, settled, sizes_for
from peso.runs.stage import RunStage
from peso.runtime.failures import listed
from peso.runtime.files import write_atomically
from peso.runtime.machine import require_device
from peso.runtime.manifest import MANIFEST, Manifest, read_manifest
from peso.runtime.processes import current
from peso.runtime.progress import Observer

if TYPE_CHECKING:
    from peso.events.stream import Stream
    from peso.items.ids_by_stage import IdsByStage
    from peso.items.names import ItemNames
    from peso.items.semantic_ids import SemanticIds

RESTORE = "restore it: the manifest of each trained stage (stages/*/manifest.json) has it as `configuration`"


class Workspace:
    """The directory of a run: config.yaml, stream/, semantic_ids/, stages/{t}/, baselines/, report/. ::

        workspace = peso.Workspace.open("runs/games")
        workspace.stream.titles[:3]
        workspace.semantic_ids.semantic_id("0")            # ["<a_128>", "<b_72>", "<c_95>", "<d_83>"]
        stage = workspace.trained()                        # the newest stage; workspace.stage(1) is stage 1
        stage.metrics["test"]["metrics"]["ndcg@10"]["value"]
        stage.on(0).predictions                            # on the test cases of stage 0, if evaluated
        model = stage.model()                              # the trained model

    Files are checked against the sha256 in their manifest when they are read.
    """

    def __init__(self, root: Path, config: Config, trust: Iterable[str] | None = None) -> None:
        """
        Args:
            root: the directory; it need not exist.
            config: the configuration.
            trust: classes that may be imported as strategies, as ``module.Class``. None: those that
                ``config`` names; use it only for a configuration that you wrote yourself.
        """
        self.root = root
        self.config = settled(root, config)
        self.trusted = frozenset(config.strategy.foreign if trust is None else trust)
        self._names = current_names(root)
        self._read_ids: tuple[Manifest, ItemNames, IdsByStage] | None = None

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path, trust: Iterable[str] = (), *, anew: str = "") -> Workspace:
        """Open an existing workspace.

        Args:
            path: the directory.
            trust: classes that may be imported as strategies, as ``module.Class``; no other class that the
                workspace names is imported.
            anew: ``stream`` or ``semantic IDs`` if these are about to be made again: their settings may then
                have been edited, as long as no stage is trained.

        Raises:
            WorkspaceError: there is no workspace; a manifest is damaged or was written by a newer version; or
                ``config.yaml`` is damaged or differs from the configuration of the finished steps.
        """
        root = Path(path)
        if not os.path.isfile(root / CONFIG):
            if (root / "stages").is_dir():
                raise WorkspaceError(f"{root / CONFIG} is missing; {RESTORE}")
            raise WorkspaceError(
                f"{root} is not a workspace (no {CONFIG}); create one with `peso run CONFIG -w {root}`"
            )
        workspace = cls(root, _read_resolved(root / CONFIG), trust)
        refuse_edits(workspace, anew)
        return workspace

    @classmethod
    def create_or_open(
        cls, path: str | Path, config: Config, *, trust: Iterable[str] | None = None, later: bool = False
    ) -> Workspace:
        """Open with this configuration, or create. The lock is held meanwhile.

        A key may change as long as no finished step depends on it; keys of evaluation, decoding and report
        may always change.

        Args:
            path: the directory.
            config: the configuration.
            trust: see the constructor.
            later: settings of later stages may differ from those of finished stages; they apply to stages
                trained from now on.

        Raises:
            WorkspaceError: another process holds the lock, or keys changed on which finished steps depend.
                Nothing is written.
            TrainingError: the device was changed to one that this machine does not have.
        """
        with hold_lock(Path(path)):
            return cls._configured(Path(path), config, trust, later)

    @classmethod
    @contextmanager
    def hold(
        cls, path: str | Path, config: Config, *, trust: Iterable[str] | None = None
    ) -> Iterator[Workspace]:
        """As :meth:`create_or_open`, holding the lock within the context."""
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
        """Open an existing workspace with changed keys, holding the lock within the context.

        Args:
            path: the directory.
            overrides: changed keys as ``a.b=value``, as for ``--set``.
            trust, anew: see :meth:`open`.
            later: see :meth:`create_or_open`.

        Raises:
            WorkspaceError: as :meth:`create_or_open`, or there is no workspace.
            ConfigError: an unknown key or an invalid value.
        """
        root = Path(path)
        cls.open(root, trust, anew=anew)  # raises before anything is written

        def changed() -> Workspace:
            before = _read_resolved(root / CONFIG)
            if not overrides and not before.backbone.is_auto:
                return cls.open(root, trust, anew=anew)
            resolved = with_earlier_defaults(read_tree(root / CONFIG))
            config = load_config(resolved, overrides, base=root)
            if config.backbone.is_auto and not before.backbone.is_auto:
                raise ConfigError(
                    f"backbone: auto chooses the sizes of a new workspace, but {root / CONFIG} has them "
                    "already; use auto with a new workspace (-w), or set the sizes themselves"
                )
            # settings of later stages may differ between stages: check them only if this call changes one
            kept = not any(map(is_later, changed_keys(cls.open(root, trust, anew=anew).config, config)))
            return cls._configured(root, config, trust, later or kept, anew)

        with writing(root):
            yield current().on_main(changed)

    @classmethod
    def _configured(
        cls, root: Path, config: Config, trust: Iterable[str] | None, later: bool, anew: str = ""
    ) -> Workspace:
        """:meth:`create_or_open` for a caller that holds the lock."""
        configured = cls(root, config, trust)
        if os.path.isfile(root / CONFIG):
            done = cls.open(root, anew=anew)
            refuse_changes(done, configured.config, later=later, anew=anew)
            changed = changed_keys(_read_resolved(root / CONFIG), configured.config)
            if not changed:
                return configured
            if "training.device" in changed:
                _require_usable(config.training)
        configured._write(sizes_for(root, config))
        return configured

    @classmethod
    def preview(cls, path: str | Path, config: Config, trust: Iterable[str] | None = None) -> Workspace:
        """As :meth:`create_or_open`, without writing anything."""
        root = Path(path)
        refuse_foreign(root)
        previewed = cls(root, config, trust)
        if os.path.isfile(root / CONFIG):
            refuse_changes(cls.open(root), previewed.config)
        return previewed

    def choose_sizes(self, observer: Observer) -> None:
        """Choose what ``backbone: auto`` leaves open, for the stream that was just made. The caller holds the
        workspace's lock. Without ``auto``, and where the sizes fit the stream already, nothing changes.

        Raises:
            DataError: the log is too small.
            WorkspaceError: sizes.json is damaged.
        """
        before = chosen_sizes(self.root)
        config = self.config if before is None else before.unsettle(self.config)
        if not config.backbone.is_auto:
            return
        stream = self.stream.manifest
        require_sizes(stream, config)
        sizes = Sizes.of(stream, config)
        self.config = sizes.settle(config)
        self._write(sizes)
        observer.note(str(sizes))
        if sizes.leaves_out_contents(self.config) and self.stream.is_described:
            observer.note(
                "backbone: auto does not choose head.contents, because it decides how semantic IDs are "
                "stored. These items have texts; with --set head.contents=true in a new workspace, they are "
                "also scored by them, which ranks new items better (docs/results/item-head.md)"
            )

    def _write(self, sizes: Sizes | None) -> None:
        """Write config.yaml, and before it the sizes that it has from ``backbone: auto``."""
        if sizes is not None:
            record(self.root, sizes)
        write_atomically(self.root / CONFIG, dump_config(self.config).encode())

    def with_config(self, config: Config) -> Workspace:
        """The same directory with another configuration in memory; config.yaml is not changed."""
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
        """The database of received events (:mod:`peso.events.received`)."""
        return self.root / EVENTS

    @property
    def histories_file(self) -> Path:
        """The index of the users' histories (:mod:`peso.events.history_index`)."""
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
        """Numbers of the trained stages, ascending.

        Raises:
            WorkspaceError: a stage before the last one is missing, or a stage has no manifest.
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
        """The trained stages, in order."""
        return [self.stage(number) for number in self.finished_stages]

    def trained(self, number: int | None = None) -> RunStage:
        """A trained stage, by default the newest. Raises WorkspaceError if it is not trained."""
        done = self.finished_stages
        if not done:
            raise WorkspaceError(
                f"{self.root} has no trained stage yet; run `peso train -w {self.root}` first"
            )
        if number is not None and number not in done:
            raise WorkspaceError(f"stage {number} of {self.root} is not trained; trained: {done}")
        return self.stage(done[-1] if number is None else number)

    # -- stream and semantic IDs -------------------------------------------------------------------

    @property
    def stream(self) -> Stream:
        """The stream. Its items have the ids under which they entered it, also if they were renamed since.

        Raises:
            WorkspaceError: there is none yet, or its manifest is damaged.
        """
        from peso.events.stream import Stream

        if not self.has_stream:
            raise WorkspaceError(f"{self.root} has no stream yet; run `peso ingest -w {self.root}` first")
        return Stream.open(self.stream_directory, self.config.training.users)

    @property
    def semantic_ids_manifest(self) -> Manifest:
        """The manifest of the semantic IDs.

        Raises:
            WorkspaceError: there are no semantic IDs yet, or their manifest is damaged.
        """
        from peso.items.semantic_ids import FORMAT

        if not self.has_semantic_ids:
            _ = self.stream  # raises if there is no stream
            raise WorkspaceError(
                f"{self.root} has no semantic IDs yet; run `peso tokenize -w {self.root}` first"
            )
        return read_manifest(self.semantic_ids_directory, FORMAT)

    @property
    def semantic_ids(self) -> SemanticIds:
        """The semantic IDs; with ``items.refresh``, the newest ones (:attr:`RunStage.semantic_ids` are those
        of a stage's model). They have the current names of renamed items, and understand every other name.
        They are cached as long as their manifest and the names do not change.

        Raises:
            WorkspaceError: there are none yet, or a file is damaged.
        """
        return self.semantic_ids_at(None)

    def semantic_ids_at(self, stage: int | None) -> SemanticIds:
        """The semantic IDs with the changes up to a stage, or with all.

        Raises:
            WorkspaceError: as :attr:`semantic_ids`.
        """
        from peso.items.ids_by_stage import IdsByStage

        manifest, names = self.semantic_ids_manifest, self._names.current()
        if self._read_ids is None or self._read_ids[:2] != (manifest, names):
            self._read_ids = manifest, names, IdsByStage.read(self.semantic_ids_directory, names)
        return self._read_ids[2].at(stage)

    @property
    def names(self) -> ItemNames:
        """The names of renamed items. Raises WorkspaceError if ``names.json`` is damaged."""
        return self._names.current()

    @property
    def items_without_id(self) -> int:
        """Number of items in the stream without a semantic ID; 0 if there are no semantic IDs at all."""
        if not self.has_stream or not self.has_semantic_ids:
            return 0
        return int(self.stream.manifest["items"]) - int(self.semantic_ids_manifest["items"])

    @property
    def stages_without_refresh(self) -> int:
        """Number of stages in the stream whose codes are not refreshed yet; 0 without ``items.refresh``."""
        if self.config.items.refresh is None or not self.has_stream or not self.has_semantic_ids:
            return 0
        from peso.items.ids_by_stage import REFRESH

        refreshed = self.semantic_ids_manifest.get(REFRESH)  # an imported index has none
        return 0 if refreshed is None else self.stream.stages - int(refreshed["through"])

    @property
    def lacks_semantic_ids(self) -> bool:
        """Whether `peso tokenize --append` has to be run: items have no semantic ID yet, or the codes of a
        stage are not refreshed."""
        return bool(self.items_without_id or self.stages_without_refresh)

    def require_semantic_ids(self) -> None:
        """Raise WorkspaceError if there are no semantic IDs yet."""
        _ = self.semantic_ids_manifest

    # -- writing ---------------------------------------------------------------------------------

    @contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """Within the context, this process is the only writer, see :func:`peso.runs.place.writing`."""
        with writing(self.root, patience):
            yield


def _require_usable(training: TrainingConfig) -> None:
    """Raise TrainingError if this machine does not have the device."""
    require_device(training.device)
    if training.device not in ("auto", "cpu"):
        from peso.runtime.device import Precision

        Precision.of(training.precision, training.device)


def _read_resolved(path: Path) -> Config:
    """Read config.yaml of a workspace, in which every key must be present."""
    try:
        tree = with_earlier_defaults(read_tree(path))
        config = load_config(tree, base=path.parent)
    except ConfigError as error:
        named = "" if str(path) in str(error) else f"{path}: "
        raise ConfigError(f"{named}{error}") from None
    if missing := missing_keys(tree, config):
        raise WorkspaceError(
            f"{path} is incomplete: {listed(missing)} are missing, which peso always writes. It "
            f"was truncated or edited; {RESTORE}"
        )
    return config


def trusted_classes(config: Config, overrides: Sequence[str], file: Path | None = None) -> list[str]:
    """Classes that a configuration names and the caller has named too: in ``overrides``, or in ``file``
    unless that is the config.yaml of a workspace."""
    if file is not None and not (file.name == CONFIG and any((file.parent / p).is_dir() for p in MADE)):
        return config.strategy.foreign
    given: dict[str, Any] = {}
    for text in overrides:
        override(given, text)
    named = {value for _, value in leaves(given) if isinstance(value, str)}
    return [name for name in config.strategy.foreign if name in named]

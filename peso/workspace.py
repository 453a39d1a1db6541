"""The directory a run lives in: layout, manifests, one writer at a time.

Knows paths and locks; knows nothing of how a stage is learnt or of what the files mean.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peso.config import Config, CustomConfig, changed_keys, dump_config, load_config
from peso.config.parsing import read_tree
from peso.config.reading import missing_keys
from peso.determination import changed_shape, is_later
from peso.durable import only_writer, restore, write_atomically
from peso.errors import ConfigError, WorkspaceError
from peso.manifest import MANIFEST, read_manifest
from peso.processes import current

PREDICTIONS, METRICS, LOG = "predictions.parquet", "metrics.json", "log.jsonl"  # of a stage
FORMAT = 1  # of a stage directory; a higher number was written by a newer version

# What is fixed once the stream and the semantic IDs are made; what is fixed once a stage is trained says
# peso.determination. Keys of evaluation, decoding and report may change at any time.
DEPENDS = {
    "stream": ("data", "seed", "data_seed"),
    "semantic IDs": ("data", "seed", "data_seed", "items"),
}


class Workspace:
    """A run's directory (design: config.yaml, stream/, semantic_ids/, stages/{t}/, report/)."""

    def __init__(self, root: Path, config: Config, trust: Iterable[str] | None = None) -> None:
        """
        Args:
            trust: classes that may be imported as strategies, as ``module.Class``. None: what ``config``
                names, since it is the caller's own.
        """
        self.root = root
        self.config = config
        self.trusted = frozenset(own_strategy(config) if trust is None else trust)

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path, trust: Iterable[str] = ()) -> Workspace:
        """Open an existing workspace.

        Args:
            trust: classes that may be imported as strategies, as ``module.Class``; nothing else that a
                workspace names is imported.

        Raises:
            WorkspaceError: there is none, its manifests are damaged or were written by a newer version, or
                ``config.yaml`` is damaged or not what the stages were trained with.
        """
        root = Path(path)
        if not (root / "config.yaml").is_file():
            raise WorkspaceError(
                f"{root} is no workspace (no config.yaml); make one with `peso run CONFIG -w {root}`"
            )
        workspace = cls(root, _read_resolved(root / "config.yaml"), trust)
        for stage in workspace.finished_stages:
            changed = workspace._changed(stage, workspace.config)
            if edited := [f"{k} was {a}, is {b}" for k, (a, b) in changed.items() if not is_later(k)]:
                raise WorkspaceError(
                    f"{root / 'config.yaml'} was edited after stage {stage} was trained: {'; '.join(edited)}"
                    ". Put the old values back; to train with other ones, run into a new workspace with -w"
                )
        return workspace

    @classmethod
    def create_or_open(
        cls, path: str | Path, config: Config, *, trust: Iterable[str] | None = None, later: bool = False
    ) -> Workspace:
        """Open with this configuration, or create.

        A key may change as long as nothing that depends on it is done; evaluation, decoding and report
        keys may always change.

        Args:
            trust: see the constructor.
            later: settings of later stages may differ from those that finished ones were trained with: they
                are for the stages to come.

        Raises:
            WorkspaceError: keys changed that finished steps depend on; says which and what to do.
        """
        root = Path(path)
        if (root / "config.yaml").is_file():
            done = cls.open(root)
            done.refuse_changes(config, later=later)
            if not changed_keys(done.config, config):
                return cls(root, config, trust)
        elif root.exists() and (not root.is_dir() or any(p.name != ".lock" for p in root.iterdir())):
            raise WorkspaceError(f"{root} exists and is no workspace; choose another place with -w")
        workspace = cls(root, config, trust)
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / "config.yaml", dump_config(config).encode())
        return workspace

    @classmethod
    def preview(cls, path: str | Path, config: Config) -> Workspace:
        """As :meth:`create_or_open`, but nothing is written: to say what would be done."""
        root = Path(path)
        if (root / "config.yaml").is_file():
            cls.open(root).refuse_changes(config)
        return cls(root, config)

    def refuse_changes(self, config: Config, *, later: bool = False) -> None:
        """Raise WorkspaceError if `config` differs where something that is done depends on it.

        Args:
            later: settings of later stages may differ.
        """
        for stage in reversed(self.finished_stages):
            changed = self._changed(stage, config)
            self._refuse(
                [key for key in changed if not (later and is_later(key))], f"stage {stage} was trained"
            )
        keys = changed_keys(self.config, config)
        for done, step in ((self.has_semantic_ids, "semantic IDs"), (self.has_stream, "stream")):
            fixed = [key for key in keys if key.split(".")[0] in DEPENDS[step]]
            self._refuse(fixed if done else [], f"its {step} were made")

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
        if list(fixed) == ["data.path"]:
            message += (
                " If the path leads to new events, add them as further stages: "
                f"`peso ingest NEW --append -w {self.root}`."
            )
        raise WorkspaceError(message)

    def config_of(self, stage: int) -> Config:
        """The configuration that a finished stage was trained with.

        Raises:
            WorkspaceError: its manifest is damaged.
        """
        try:
            return Config.model_validate(self.stage_manifest(stage)["configuration"])
        except (KeyError, ValidationError):
            raise WorkspaceError(
                f"{self.stage_directory(stage) / MANIFEST} is damaged: it does not hold the configuration of "
                f"the stage; remove {self.stage_directory(stage)} and the stages after it, and train again"
            ) from None

    def as_trained(self, stage: int) -> Workspace:
        """This workspace with the configuration that a finished stage was trained with."""
        return Workspace(self.root, self.config_of(stage), self.trusted)

    def _changed(self, stage: int, config: Config) -> dict[str, tuple[Any, Any]]:
        """Keys that shape a finished stage: how it was trained, and a value of ``config`` that differs."""
        return changed_shape(self.config_of(stage), config, stage)

    # -- layout ----------------------------------------------------------------------------------

    @property
    def stream_directory(self) -> Path:
        return self.root / "stream"

    @property
    def semantic_ids_directory(self) -> Path:
        return self.root / "semantic_ids"

    @property
    def report_directory(self) -> Path:
        return self.root / "report"

    def stage_directory(self, stage: int) -> Path:
        return self.root / "stages" / str(stage)

    @property
    def has_stream(self) -> bool:
        return (self.stream_directory / MANIFEST).is_file()

    @property
    def has_semantic_ids(self) -> bool:
        return (self.semantic_ids_directory / MANIFEST).is_file()

    @property
    def finished_stages(self) -> list[int]:
        """Numbers of the stages whose training is committed, ascending."""
        found = self.root.glob(f"stages/*/{MANIFEST}")
        return sorted(int(manifest.parent.name) for manifest in found if manifest.parent.name.isdigit())

    def require_stage(self, stage: int | None) -> int:
        """The stage asked for, or the newest. Raises WorkspaceError if it is not trained."""
        done = self.finished_stages
        if not done:
            raise WorkspaceError(
                f"{self.root} has no trained stage yet; `peso run` or `peso train -w {self.root}`"
            )
        if stage is None:
            return done[-1]
        if stage not in done:
            raise WorkspaceError(f"stage {stage} of {self.root} is not trained; trained are {done}")
        return stage

    def stage_manifest(self, stage: int) -> dict[str, Any]:
        return read_manifest(self.stage_directory(stage), FORMAT)

    # -- writing ---------------------------------------------------------------------------------

    def discard_if_bare(self) -> None:
        """Remove a workspace in which nothing was done: what a mistaken first call would leave behind."""
        if self.root.is_dir() and {path.name for path in self.root.iterdir()} <= {"config.yaml", ".lock"}:
            shutil.rmtree(self.root)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer. Raises WorkspaceError at once if another process is.

        Of several processes that train together the main one holds the lock.
        """
        with ExitStack() as held:

            def hold() -> None:
                held.enter_context(only_writer(self.root))
                for directory in (self.stream_directory, self.semantic_ids_directory):
                    restore(directory)

            current().on_main(hold)
            yield

    def unfinished_directory(self, stage: int) -> Path:
        """Where an unfinished stage keeps its checkpoints; gone once the stage is committed."""
        return self.root / "stages" / f".{stage}.unfinished"


def own_strategy(config: Config) -> list[str]:
    """The class that is not peso's own, as ``module.Class``: of a custom strategy or of a proximal term."""
    named = config.strategy.module if isinstance(config.strategy, CustomConfig) else ""
    named = named or getattr(config.strategy, "proximal", "")
    return [named] if "." in named else []


def _read_resolved(path: Path) -> Config:
    """A configuration that was written as resolved, so that every key has to be there."""
    try:
        config = load_config(path)
    except ConfigError as error:
        named = "" if str(path) in str(error) else f"{path}: "
        raise ConfigError(f"{named}{error}") from None
    if missing := missing_keys(read_tree(path), config):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise WorkspaceError(
            f"{path} is incomplete: {', '.join(missing[:5])}{more} are missing, which peso always writes. It "
            "was cut off or edited; restore it. The manifest of each trained stage (stages/*/manifest.json) "
            "holds it under `configuration`"
        )
    return config


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

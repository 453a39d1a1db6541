"""The directory a run lives in: layout, manifests, one writer at a time.

Knows paths and locks; knows nothing of how a stage is learnt or of what the files mean.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peso.config import HOW, Config, changed_keys, dump_config, load_config
from peso.durable import only_writer, restore, write_atomically
from peso.errors import WorkspaceError
from peso.manifest import MANIFEST, read_manifest
from peso.processes import current

PREDICTIONS, METRICS, LOG = "predictions.parquet", "metrics.json", "log.jsonl"  # of a stage
FORMAT = 1  # of a stage directory; a higher number was written by a newer version

_SEEDS = ("seed", "data_seed", "base_seed")
# What is fixed once a step is done. Keys of evaluation, decoding and report may change at any time.
DEPENDS = {
    "stream": ("data", *_SEEDS[:2]),
    "semantic IDs": ("data", *_SEEDS[:2], "items"),
    "stage 0": ("data", *_SEEDS, "items", "backbone", "prompt", "adapter", "training"),
    "later stages": ("data", *_SEEDS, "items", "backbone", "prompt", "adapter", "training", "strategy"),
}
FREE = {f"training.{key}" for key in HOW}  # may change at any time too
_APPEND = (
    " If the path leads to new events, add them as further stages: `peso ingest NEW --append -w {root}`."
)


class Workspace:
    """A run's directory (design: config.yaml, stream/, semantic_ids/, stages/{t}/, report/)."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root = root
        self.config = config

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path) -> Workspace:
        """Open an existing workspace.

        Raises:
            WorkspaceError: there is none, its manifests are damaged or were written by a newer version.
        """
        root = Path(path)
        if not (root / "config.yaml").is_file():
            raise WorkspaceError(
                f"{root} is no workspace (no config.yaml); make one with `peso run CONFIG -w {root}`"
            )
        workspace = cls(root, load_config(root / "config.yaml"))
        for stage in workspace.finished_stages:
            workspace.stage_manifest(stage)
        return workspace

    @classmethod
    def create_or_open(cls, path: str | Path, config: Config) -> Workspace:
        """Open with this configuration, or create.

        A key may change as long as nothing that depends on it is done; evaluation, decoding and report
        keys may always change.

        Raises:
            WorkspaceError: keys changed that finished steps depend on; says which and what to do.
        """
        root = Path(path)
        if (root / "config.yaml").is_file():
            done = cls.open(root)
            done.refuse_changes(config)
            if not changed_keys(done.config, config):
                return done
        elif root.exists() and (not root.is_dir() or any(p.name != ".lock" for p in root.iterdir())):
            raise WorkspaceError(f"{root} exists and is no workspace; choose another place with -w")
        workspace = cls(root, config)
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

    def refuse_changes(self, config: Config) -> None:
        """Raise WorkspaceError if `config` differs where a finished step depends on it."""
        changed = [key for key in changed_keys(self.config, config) if key not in FREE]
        done = ["stream"] * self.has_stream + ["semantic IDs"] * self.has_semantic_ids
        stages = self.finished_stages
        done += ["stage 0"] * (0 in stages) + ["later stages"] * any(stages)
        for step in reversed(done):
            fixed = [key for key in changed if key.split(".")[0] in DEPENDS[step]]
            if fixed:
                raise WorkspaceError(
                    f"the configuration of {self.root} has changed since its {step} were made: "
                    f"{', '.join(fixed)}. Take the old values back (see {self.root / 'config.yaml'}), "
                    "or run into a new workspace with -w (--base takes over the stages that stay the same), "
                    f"or remove {self.root}. Keys of evaluation, decoding and report may change."
                    + (_APPEND.format(root=self.root) if fixed == ["data.path"] else "")
                )

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

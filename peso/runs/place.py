"""The directory of a workspace: names of its files, one writer at a time, and paths that output may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from peso.errors import ExportError, PesoError, WorkspaceError
from peso.runtime.files import LOCK, only_writer, require_writable, restore, write_atomically
from peso.runtime.manifest import MANIFEST
from peso.runtime.processes import current

CONFIG = "config.yaml"
MADE = ("stream", "semantic_ids", "stages", "baselines", "report")
SIZES = "sizes.json"  # what `backbone: auto` chose (peso.runs.sizes)
TRACKING = "tracking"  # files of experiment trackers (peso.runs.tracking)
EVENTS = "events.sqlite"  # received events that are not in a stage yet (peso.events.received)
BESIDE_EVENTS = [f"{EVENTS}{ending}" for ending in ("-wal", "-shm")]  # written by SQLite
HISTORIES = "histories.sqlite"  # index of the users' histories (peso.events.history_index)
SERVED, SERVED_LOCK = "served.json", ".served.lock"  # see peso.runs.served
RETIRED, RETIRED_LOCK = "retired.json", ".retired.lock"  # see peso.runs.retired
NAMES, NAMES_LOCK = "names.json", ".names.lock"  # see peso.runs.names
# files that have their own lock and change without the workspace's
WITH_OWN_LOCK = {SERVED, SERVED_LOCK, RETIRED, RETIRED_LOCK, NAMES, NAMES_LOCK}
PARTS = {CONFIG, LOCK, EVENTS, *BESIDE_EVENTS, *WITH_OWN_LOCK, HISTORIES, SIZES, TRACKING, *MADE}


@contextmanager
def writing(root: Path, patience: float = 0.0) -> Iterator[None]:
    """Within the context, this process is the only writer of the workspace at ``root``, which need not exist.

    Of several processes that train together, the main one holds the lock. If an error ends the context before
    any step was completed, config.yaml is restored, or removed if there was none.

    Args:
        patience: seconds to wait for another process that holds the lock.

    Raises:
        WorkspaceError: another process holds the lock, the directory cannot be written, or it exists and is
            not a workspace.
    """
    with ExitStack() as held:
        current().on_main(lambda: held.enter_context(hold_lock(root, patience)))
        yield


@contextmanager
def hold_lock(root: Path, patience: float = 0.0) -> Iterator[None]:
    """As :func:`writing`, in this process only."""
    made = not os.path.lexists(root)
    refuse_foreign(root)
    with only_writer(root, patience):
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
                write_atomically(root / CONFIG, config)
            raise


def refuse_foreign(root: Path) -> None:
    """Raise WorkspaceError if ``root`` exists and is not a workspace."""
    if os.path.lexists(root) and not os.path.isfile(root / CONFIG) and (not root.is_dir() or _content(root)):
        raise WorkspaceError(f"{root} exists and is not a workspace; choose another place with -w")


def _manifests(root: Path) -> dict[Path, tuple[int, int]]:
    """Inode and modification time of every manifest: unchanged as long as no step was completed."""
    found = {path: path.stat() for path in root.rglob(MANIFEST)}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in found.items()}


def _content(root: Path) -> set[str]:
    """Names of the entries, without the lock and temporary files of killed processes."""
    return {name for name in os.listdir(root) if name != LOCK and not name.endswith(".writing")}


def require_place(path: Path) -> None:
    """Check that an output path can be used, before the output is computed.

    Raises:
        ExportError: the path is inside a workspace.
        WorkspaceError: nothing can be written there.
    """
    place = Path(os.path.realpath(path))
    for root in place.parents:
        if place.relative_to(root).parts[0] in PARTS and _is_workspace(root):
            raise ExportError(f"{path} belongs to the workspace {root}; choose another path")
    require_writable(path)


def _is_workspace(root: Path) -> bool:
    """Whether a directory is a workspace. A file config.yaml with a directory report/ beside it may belong to
    something else, so they are not enough."""
    begun = ("stream", "semantic_ids", "stages", LOCK)
    return os.path.isfile(root / CONFIG) and any(os.path.lexists(root / name) for name in begun)

"""The steps before training: read the data into the stream, append to it, and make the semantic IDs.

PyTorch is imported only where it is needed, so that a refused command answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from peso.config import DataConfig
from peso.config.data import STREAMS
from peso.errors import ConfigError, DataError, ExportError, WorkspaceError
from peso.events.append import CORRECTED, correct_items, extend_stream
from peso.events.ingest import ingest as fill_stream
from peso.events.loading import Aliases
from peso.events.release import read_release
from peso.events.sources import fetch
from peso.events.stream import MERGED, Stream
from peso.items.catalog_files import write_catalog
from peso.items.semantic_ids import SemanticIds, read_release_index, write_release_index
from peso.runs.checks import check_configuration
from peso.runs.names import names_held
from peso.runs.place import require_place
from peso.runs.report import read_user_table, report_users_found
from peso.runs.retired import retired
from peso.runs.workspace import Workspace
from peso.runtime import assets
from peso.runtime.files import commit_directory, remove_directory
from peso.runtime.machine import threads
from peso.runtime.progress import Observer
from peso.runtime.remote import shown

if TYPE_CHECKING:
    from peso.items.refresh import TrainingLog


def ingest(workspace: Workspace, observer: Observer) -> dict[str, Any]:
    """Read the data into stream/. Semantic IDs of a different stream are removed.

    Returns:
        The manifest of the stream.

    Raises:
        DataError: the data are invalid; nothing is written. Or the log is too small for ``backbone: auto``;
            the stream is kept.
        WorkspaceError: stages were trained on the existing stream, or events were appended to it.
    """
    data = workspace.config.data
    fetch(data, observer)
    check_configuration(workspace.config)
    _refuse_if_trained(workspace, "stream")
    before = workspace.stream.manifest if workspace.has_stream else {}
    if merges := before.get(MERGED):
        observer.note(
            f"note: the data are read again, so {len(merges):,} merged users are separate again; merge them "
            "again with `peso users merge`"
        )
    if appended := len(before.get("appended", [])):
        raise WorkspaceError(
            f"the stream of {workspace.root} was appended to {appended} times, and reading the data again "
            f"would lose that. `peso undo -w {workspace.root}` removes one append. Or use a new workspace "
            "(-w)"
        )
    observer.note(f"ingest: {data.format} {shown(data.path or '')}".rstrip())
    user_table = read_user_table(workspace.config.report.users)
    with names_held(workspace.root), commit_directory(workspace.stream_directory) as directory:
        seed = workspace.config.seed_of_data
        names = aliases(workspace, with_users=False)
        manifest = fill_stream(data, directory, seed, observer, aliases=names)
        if workspace.has_semantic_ids and manifest["files"] != before.get("files"):
            remove_directory(workspace.semantic_ids_directory)  # before the new stream replaces theirs
            observer.note("the data changed: the semantic IDs were removed and have to be made again")
    report_users_found(user_table, workspace.stream, observer)
    workspace.choose_sizes(observer)
    return manifest


def append(workspace: Workspace, observer: Observer, data: DataConfig | None = None) -> dict[str, Any]:
    """Add new events to stream/ as further stages. Trained stages stay valid.

    If there are semantic IDs, those of the new items are made on trial first; if that fails, nothing is
    appended.

    Args:
        data: source, cleaning and cutting of the new events; None: as configured (for example a folder to
            which files were added). The workspace's configuration does not change.

    Returns:
        The manifest of the stream.

    Raises:
        WorkspaceError: there is no stream, or it is damaged.
        DataError: see :func:`peso.events.append.extend_stream`, or a new item cannot get an ID. The stream is
            not changed.
        ConfigError: as :func:`tokenize_new`. The stream is not changed.
    """
    given = data or workspace.config.data
    if given.format in STREAMS:
        raise DataError(
            f"{given.format} data have no new events; name a log of them: "
            f"`peso ingest NEW --format csv --append -w {workspace.root}`"
        )
    fetch(given, observer)
    observer.note(f"append: {given.format} {shown(str(given.path))}")
    earlier = workspace.stream.directory

    def fill(place: Path) -> dict[str, Any]:
        return extend_stream(given, earlier, place, observer, aliases=aliases(workspace))

    with names_held(workspace.root):
        return extend(workspace, observer, fill)


def aliases(workspace: Workspace, *, with_users: bool = True) -> Aliases:
    """The renamed items and merged users, whose names in new data differ from those in the stream."""
    return Aliases(workspace.names.stored, workspace.stream.merged_users if with_users else {})


def logs_of(workspace: Workspace) -> list[DataConfig]:
    """The configured log and the appended ones, without received events."""
    logs = [workspace.config.data]
    for brought in workspace.stream.manifest.get("appended", []):
        with suppress(ValueError):  # received events, or an entry of an earlier version
            logs.append(DataConfig.model_validate(brought["source"]))
    return logs


def extend(
    workspace: Workspace, observer: Observer, fill: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Replace the workspace's stream by a longer one; returns its manifest.

    Args:
        fill: writes the longer stream into an empty directory and returns its manifest; if it raises, nothing
            is changed.

    Raises:
        PesoError: as :func:`append`.
    """
    user_table = read_user_table(workspace.config.report.users)
    with commit_directory(workspace.stream_directory) as directory:
        stream = workspace.stream
        manifest = fill(directory)
        brought = manifest["appended"][-1]
        if CORRECTED in brought:
            _keep_tree(workspace, stream)
        if workspace.has_semantic_ids and brought["new_items"]:
            with TemporaryDirectory() as trial:
                observer.note("checking that the new items can get semantic IDs")
                try:
                    _continue_ids(workspace, Stream.open(directory), Path(trial), observer)
                except (DataError, ConfigError) as error:
                    raise type(error)(
                        f"nothing was appended, because the new items cannot get semantic IDs: {error}"
                    ) from None
    report_users_found(user_table, workspace.stream, observer)
    return manifest


def update_items(workspace: Workspace, data: DataConfig, observer: Observer) -> dict[str, Any]:
    """Correct titles, texts and categories in the item table. Semantic IDs do not change.

    Args:
        data: ``data.items`` is the product table.

    Returns:
        What changed, see :func:`peso.events.append.correct_items`.

    Raises:
        WorkspaceError: there is no stream, or it is damaged.
        DataError: see :func:`peso.events.append.correct_items`. The stream is not changed.
    """
    stream = workspace.stream
    fetch(data, observer)
    with commit_directory(workspace.stream_directory) as directory:
        done = correct_items(data, stream.directory, directory, observer, aliases=aliases(workspace))
        _keep_tree(workspace, stream)
    return done


def _keep_tree(workspace: Workspace, stream: Stream) -> None:
    """Store the tree of categories of semantic IDs that an earlier version made without it, before ``stream``
    is replaced: only the old categories can still give the tree."""
    from peso.items.tokenize import extend_semantic_ids, lacks_tree

    ids = workspace.semantic_ids_directory
    if workspace.has_semantic_ids and lacks_tree(ids):
        known = _items(stream, workspace).slice(0, len(workspace.semantic_ids.item_ids))
        with commit_directory(ids) as kept:
            extend_semantic_ids(known, workspace.config.items, ids, kept, vector_cache())


def tokenize(workspace: Workspace, observer: Observer) -> dict[str, Any]:
    """Make the semantic IDs of all items of the stream, in semantic_ids/; returns their manifest.

    Raises:
        WorkspaceError: there is no stream, or stages were trained on the existing IDs.
        DataError, ConfigError: see :mod:`peso.items.tokenize` and :mod:`peso.items.imported`.
    """
    stream, config = workspace.stream, workspace.config
    check_configuration(workspace.config)
    _refuse_if_trained(workspace, "semantic IDs")
    from peso.items.imported import adopt
    from peso.items.tokenize import tokenize as make_semantic_ids

    number = config.training.threads
    with threads(number=number), commit_directory(workspace.semantic_ids_directory) as directory:
        further = (config.items, directory, config.seed_of_data, vector_cache(), observer)
        keeps, items = config.head.contents, _items(stream, workspace)
        base = np.flatnonzero((stream.first_stages() == 0) | (config.items.fit == "all")) if keeps else None
        if config.items.index is not None:
            index = read_release_index(config.items.index)
            adopt(items, index, config.items.index, *further, base)
        elif config.data.format == "peso-release":
            released = read_release(str(config.data.path))[2]
            adopt(items, released, "index of the release", *further, base)
        else:
            fitted = range(stream.stages if config.items.fit == "all" else 1)
            events = () if config.items.behavior is None else stream.training_events(fitted)
            make_semantic_ids(items, *further, stream.first_stages(), events, keeps, _log(stream))
    manifest = workspace.semantic_ids_manifest
    observer.note(
        f"tokenize: {manifest['items']:,} items, {manifest['distinct_ids']:,} distinct semantic IDs"
    )
    return manifest


def tokenize_new(workspace: Workspace, observer: Observer) -> dict[str, Any]:
    """Make semantic IDs for items that were appended, with the existing codebooks, and with ``items.refresh``
    new codes for items that have drifted in the appended stages; returns the manifest.

    Raises:
        WorkspaceError: there is no stream, or there are no semantic IDs.
        DataError, ConfigError: as :func:`tokenize`. The IDs are not changed.
    """
    stream, ids = workspace.stream, workspace.semantic_ids_directory
    workspace.require_semantic_ids()
    new, before = workspace.items_without_id, workspace.semantic_ids
    if workspace.lacks_semantic_ids:
        from peso.items.earlier import remember

        with commit_directory(ids) as directory:
            try:
                _continue_ids(workspace, stream, directory, observer)
            except (DataError, ConfigError) as error:
                raise type(error)(
                    f"{error}. Then repeat this; the item table is corrected by `peso ingest --items FILE -w "
                    f"{workspace.root}`. Or remove the appended stage: `peso undo -w {workspace.root}`"
                ) from None
            remember(ids, directory)
    after = workspace.semantic_ids.codes[: len(before.codes)]
    changed = int((after != before.codes).any(axis=1).sum())
    arrived = f"{new:,} new item{'s' * (new != 1)}"
    observer.note(f"tokenize: {arrived}; {changed or 'no'} earlier ID{'s' * (changed > 1)} changed")
    return workspace.semantic_ids_manifest


def _continue_ids(workspace: Workspace, stream: Stream, directory: Path, observer: Observer) -> None:
    """Write the workspace's semantic IDs and those of the new items of ``stream`` into a directory."""
    from peso.items.imported import adopt_more
    from peso.items.tokenize import extend_semantic_ids

    config, source = workspace.config.items, workspace.semantic_ids_directory
    items = _items(stream, workspace)
    further = (config, source, directory, vector_cache(), observer)
    if config.index is not None:
        index = read_release_index(config.index, workspace.semantic_ids.sizes)
        adopt_more(items, index, config.index, *further, seed=workspace.config.seed_of_data)
    else:
        extend_semantic_ids(items, *further, stream.first_stages(), _log(stream))


def _items(stream: Stream, workspace: Workspace) -> pa.Table:
    """The item table, with all ids of each item if any were renamed."""
    from peso.items.vectors import NAMES

    items, names = stream.items, workspace.names
    return items.append_column(NAMES, pa.array(names.every(stream.item_ids))) if names else items


def _log(stream: Stream) -> TrainingLog:
    from peso.items.refresh import TrainingLog

    return TrainingLog(stream.stages, stream.training_events)


def export_index(
    workspace: Workspace,
    path: Path,
    stage: int | None = None,
    with_retired: bool = False,
    form: Literal["index", "catalog"] = "index",
    ids: SemanticIds | None = None,
) -> int:
    """Write the semantic IDs for other programs.

    Args:
        path: a new file, or for ``catalog`` a new directory.
        stage: only the items that were known at this stage, with their codes at that stage; None: all, with
            the newest codes.
        with_retired: include retired items.
        form: ``index``: as index.json, the format of released research code; ``catalog``: arrays for serving
            stacks, see :func:`peso.items.catalog_files.write_catalog`.
        ids: those to write; None: those of the workspace.

    Returns:
        The number of retired items that are left out.

    Raises:
        WorkspaceError: there are no semantic IDs, or the disk is full.
        DataError: the stream has no such stage.
        ExportError: the file exists, or is inside a workspace.
    """
    workspace.require_semantic_ids()
    require_place(path)
    if os.path.lexists(path):
        raise ExportError(f"{path} exists already; choose another name")
    ids = workspace.semantic_ids_at(stage) if ids is None else ids
    if stage is not None:
        stream = workspace.stream
        stream.stage(stage)  # raises if there is no such stage
        count = stream.items_known(stage)
        ids = ids.first(count)
    never = {} if with_retired else retired(workspace.root)
    kept = [row for row, item in enumerate(ids.stored_ids) if item not in never]
    write = write_release_index if form == "index" else write_catalog
    names = [ids.item_ids[row] for row in kept]
    write(SemanticIds(names, ids.codes[kept], ids.sizes, names=ids.names), path)
    return len(ids.item_ids) - len(kept)


def vector_cache() -> Path:
    """The directory in which vectors of item texts are cached."""
    return assets.cache_directory() / "vectors"


def _refuse_if_trained(workspace: Workspace, what: str) -> None:
    if workspace.finished_stages:
        raise WorkspaceError(
            f"stages {workspace.finished_stages} of {workspace.root} were trained on the existing {what}; "
            "use a new workspace (-w) for other data"
        )

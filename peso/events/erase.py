"""Erase a user from a stream, including a simulated log in it.

Stages that were already trained do not change: their digests are based on the checksums of the earlier files,
which the manifest keeps under ``erased``. Stages that are trained later are based on the new files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from peso.events import columns
from peso.events.histories import stage_counts
from peso.events.stream import ERASED, FORMAT, MERGED, Stream, readable, stage_file
from peso.runtime.files import link
from peso.runtime.manifest import write_manifest
from peso.runtime.provenance import timestamp


def files_with(stream: Stream, *users: str) -> list[str]:
    """The names of the files of a stream that have rows of a user, or of one of several.

    Raises:
        WorkspaceError: if a file is damaged.
    """
    files = {name: stream.file(name) for name in stream.manifest["files"]}
    return [name for name, path in files.items() if path.suffix == ".parquet" and has_user(path, *users)]


def stages_with(stream: Stream, *users: str) -> list[int]:
    """The stages in which a user, or one of several, has events."""
    held = files_with(stream, *users)
    return [number for number in range(stream.stages) if stage_file(number) in held]


def erase_user(earlier: str | Path, directory: Path, *users: str) -> None:
    """Write a stream without one user to an existing empty directory.

    Items are kept, even those that only this user had. So are the counts of reading and cleaning in the
    manifest.

    Args:
        earlier: the directory of the stream.
        users: the user's id, and the ids of the users that were merged into this one.

    Raises:
        WorkspaceError: if the stream is damaged, or the disk is full.
    """
    stream = Stream.open(earlier)
    known, before, counts = dict[str, str](), dict[str, str](), stream.counts
    held = files_with(stream, *users)
    for name, sha256 in stream.manifest["files"].items():
        path = stream.file(name)
        if name in held:
            before[name] = sha256
            (directory / name).parent.mkdir(exist_ok=True)
            write_without(path, directory / name, *users)
        else:
            known[name] = sha256
            link(path, directory / name)
    for number in range(stream.stages):
        if stage_file(number) in held:
            own = stage_counts(stream.rows_of(stage_file(number), users))
            counts[number] = {key: count - own.get(key, 0) for key, count in counts[number].items()}
    erased = {"time": timestamp(), "before": before}
    content = {
        **_without_names(stream.manifest, users),
        "stages": counts,
        ERASED: [*stream.manifest.get(ERASED, []), erased],
    }
    if "appended" in content:
        content["appended"] = [_without_names(brought, users) for brought in content["appended"]]
    if MERGED in content:
        kept = [merge for merge in content[MERGED] if not {merge["from"], merge["into"]} & {*users}]
        content[MERGED] = kept
    write_manifest(directory, FORMAT, content, known)


def has_user(path: Path, *users: str) -> bool:
    """Whether a Parquet file has a row with a user, or one of several, in its column ``user``.

    Raises:
        WorkspaceError: if the file cannot be read.
    """
    with readable(path), pq.ParquetFile(path) as file:
        if columns.USER not in file.schema_arrow.names:
            return False
        batches, wanted = file.iter_batches(columns=[columns.USER]), pa.array(users, pa.string())
        return any(pc.any(pc.is_in(batch[columns.USER], wanted)).as_py() for batch in batches)


def write_without(path: Path, new: Path, *users: str) -> None:
    """Write a Parquet file without the rows of one or several users."""
    gone = pa.array(users, pa.string())
    with pq.ParquetFile(path) as file, pq.ParquetWriter(new, file.schema_arrow) as writer:
        for batch in file.iter_batches():
            writer.write_batch(batch.filter(pc.invert(pc.is_in(batch[columns.USER], gone))))


def _without_names(told: Mapping[str, Any], users: Sequence[str]) -> dict[str, Any]:
    """The contents of a manifest without remarks that name a user as an example."""
    if "remarks" not in told:
        return dict(told)
    kept = [text for text in told["remarks"] if not any(repr(user) in text for user in users)]
    return {**told, "remarks": kept}

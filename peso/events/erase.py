"""Erase a user from a stream, including a simulated log in it.

Stages that were already trained do not change: their digests are based on the checksums of the earlier files,
which the manifest keeps under ``erased``. Stages that are trained later are based on the new files.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from peso.errors import WorkspaceError
from peso.events import columns
from peso.events.histories import Stage, stage_counts
from peso.events.stream import ERASED, FORMAT, Stream, as_stage, stage_file
from peso.runtime.files import link
from peso.runtime.manifest import intact, write_manifest


def files_with(stream: Stream, user: str) -> list[str]:
    """The names of the files of a stream that have rows of a user.

    Raises:
        WorkspaceError: if a file is damaged.
    """
    return [name for name in stream.manifest["files"] if _has(_checked(stream, name), user)]


def stages_with(stream: Stream, user: str) -> list[int]:
    """The stages in which a user has events."""
    held = files_with(stream, user)
    return [number for number in range(stream.stages) if stage_file(number) in held]


def erase_user(earlier: str | Path, directory: Path, user: str) -> None:
    """Write a stream without one user to an existing, empty directory.

    Items stay, even those that only this user had. The counts of reading and cleaning stay in the manifest.

    Args:
        earlier: the directory of the stream.
        directory: the empty directory.
        user: the user's id.

    Raises:
        WorkspaceError: if the stream is damaged, or the disk is full.
    """
    stream = Stream.open(earlier)
    known, before, counts = dict[str, str](), dict[str, str](), stream.counts
    held = files_with(stream, user)
    for name, sha256 in stream.manifest["files"].items():
        path = _checked(stream, name)
        if name in held:
            before[name] = sha256
            (directory / name).parent.mkdir(exist_ok=True)
            write_without(path, directory / name, user)
        else:
            known[name] = sha256
            link(path, directory / name)
    for number in range(stream.stages):
        if stage_file(number) in held:
            own = stage_counts(_only(stream, number, user))
            counts[number] = {key: count - own.get(key, 0) for key, count in counts[number].items()}
    erased = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "before": before}
    content = {
        **_without_name(stream.manifest, user),
        "stages": counts,
        ERASED: [*stream.manifest.get(ERASED, []), erased],
    }
    if "appended" in content:
        content["appended"] = [_without_name(brought, user) for brought in content["appended"]]
    write_manifest(directory, FORMAT, content, known)


def has_user(path: Path, user: str) -> bool:
    """Whether a Parquet file has a row with a user in its column ``user``.

    Raises:
        WorkspaceError: if the file cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            if columns.USER not in file.schema_arrow.names:
                return False
            batches = file.iter_batches(columns=[columns.USER])
            return any(pc.any(pc.equal(batch[columns.USER], user)).as_py() for batch in batches)
    except (pa.ArrowException, OSError) as error:
        raise WorkspaceError(f"{path} is not readable Parquet: {error}") from None


def write_without(path: Path, new: Path, user: str) -> None:
    """Write a Parquet file without the rows of a user."""
    with pq.ParquetFile(path) as file, pq.ParquetWriter(new, file.schema_arrow) as writer:
        for batch in file.iter_batches():
            writer.write_batch(batch.filter(pc.not_equal(batch[columns.USER], user)))


def _only(stream: Stream, number: int, user: str) -> Stage:
    """A stage with only one of its users."""
    path = _checked(stream, stage_file(number))
    with pq.ParquetFile(path) as file:
        rows = [batch.filter(pc.equal(batch[columns.USER], user)) for batch in file.iter_batches()]
    return as_stage(number, pa.Table.from_batches(rows, columns.STAGE))


def _checked(stream: Stream, name: str) -> Path:
    return intact(stream.directory, name, stream.manifest)


def _has(path: Path, user: str) -> bool:
    return path.suffix == ".parquet" and has_user(path, user)


def _without_name(told: Mapping[str, Any], user: str) -> dict[str, Any]:
    """The contents of a manifest without remarks that name a user as an example."""
    if "remarks" not in told:
        return dict(told)
    kept = [text for text in told["remarks"] if repr(user) not in text]
    return {**told, "remarks": kept}

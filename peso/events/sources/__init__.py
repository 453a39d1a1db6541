"""Sources of events and items: readers of files, and the columns of well-known data sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

from peso.config import DataConfig
from peso.config.data import DATA_SETS, LogFormat
from peso.errors import ConfigError, DataError
from peso.events.sources.files import format_of
from peso.events.sources.tables import ItemTable, Log, Source
from peso.events.sources.user_files import own_items, own_source
from peso.runtime.progress import Observer
from peso.runtime.remote import local, shown

__all__ = ["ItemTable", "Log", "Source", "fetch", "format_at", "open_source", "recognized"]


def fetch(data: DataConfig, observer: Observer) -> None:
    """Fetch the files that have an address (:mod:`peso.runtime.remote`), showing the progress.

    Raises:
        DataError: a file cannot be fetched.
    """
    for path in (data.path, data.items.path if data.items else None):
        if path is not None:
            local(path, observer)


def open_source(data: DataConfig) -> Source:
    """The log and the item table that the configuration names. Only the first lines of files are read.

    Raises:
        DataError: a file or a column is missing, or a file is empty.
        ConfigError: a data set of another distribution that opens to something else.
    """
    if data.path is not None:
        data = data.model_copy(update={"path": local(data.path)})
    if data.format in get_args(LogFormat):
        return own_source(data)
    data_set = DATA_SETS.find(data.format)
    source = data_set.read(data)
    if not isinstance(source, Source):
        raise ConfigError(
            f"data.format {data.format!r}: {data_set.__module__}.{data_set.__qualname__}.open gave "
            f"{type(source).__name__}, not a Source; correct that class"
        )
    if data.min_rating is not None and source.log.rating is None:
        raise ConfigError(f"data.min_rating: {data.format} has no ratings; remove it")
    if data.items is not None:
        source = replace(source, items=own_items(data))
    if data.events is None:
        return source
    source.log.table.require(str(data.events.column), "data.events.column")
    return replace(
        source, log=replace(source.log, kind=str(data.events.column), keep=tuple(data.events.keep))
    )


def format_at(path: str, observer: Observer, columns_given: bool = False) -> str:
    """The ``data.format`` of a path: a published data set by its files, else by the extension of the files.

    Args:
        path: a file or a folder, or their address.
        observer: receives the progress of fetching an address, and a note that names a data set that was
            recognized.
        columns_given: whether the user names columns, so that the files are the user's own.

    Raises:
        ConfigError: the format cannot be recognized.
        DataError: the file is of a format that cannot be read.
    """
    files = local(path, observer)
    if not columns_given and (name := recognized(files, observer)):
        observer.note(
            f"format: {name}, recognized from the files of {shown(path)}; --format FORMAT overrides it"
        )
        return name
    return format_of(files)


def recognized(path: str, observer: Observer | None = None) -> str | None:
    """The name of the published data set at a path, by its files; None if it is none that is known.

    A built-in data set must have one of its ``signs``, so that no other folder is opened.

    Args:
        observer: receives a note if the path has the files of a data set, but cannot be read as it.
    """
    refused = []
    for name, known in DATA_SETS.everything().items() if Path(path).exists() else ():
        signs = [sign for sign in known.signs or () if _has(Path(path), sign)]
        if not (signs or (known.signs is None and Path(path).is_dir())):
            continue
        try:
            known.open(path)
            return name
        except DataError as error:
            if not {*signs} <= {"*.csv", "*.jsonl"}:  # any file can have such a name
                refused.append(f"{name}, but cannot be read as such ({error})")
    if refused and observer is not None:
        observer.note(f"note: the files are named like those of {' or of '.join(refused)}")
    return None


def _has(path: Path, sign: str) -> bool:
    """Whether a file has a name, gzipped or not, or a folder has a file of that name."""
    if path.is_dir():
        return any(any(path.glob(pattern)) for pattern in (sign, f"{sign}.gz"))
    return any(path.match(pattern) for pattern in (sign, f"{sign}.gz"))

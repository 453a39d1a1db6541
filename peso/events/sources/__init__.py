"""Sources of events and items: readers of files, and the columns of well-known data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peso.config import DataConfig
from peso.config.data import DATA_SETS, LOG_FORMATS
from peso.errors import ConfigError, DataError
from peso.events.sources.files import ChoiceError, folders_in, format_of
from peso.events.sources.tables import DataSet, ItemTable, Log, Source
from peso.events.sources.user_files import own_items, own_source
from peso.runtime.progress import Observer
from peso.runtime.remote import local, shown

ANY_FILE = {"*.csv", "*.jsonl", "train.jsonl"}  # signs that the user's own files can have, too

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
    if data.format in LOG_FORMATS:
        return own_source(data)
    data_set = DATA_SETS.find(data.format)
    source = data_set.read(data.model_copy(update={"path": _place(data.path, data_set)}))
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
        place = Path(str(_place(files, DATA_SETS.find(name)))).relative_to(files)
        there = shown(path) if place == Path() else f"{shown(path).rstrip('/')}/{place}"
        observer.note(f"format: {name}, recognized from the files of {there}; --format FORMAT overrides it")
        return name
    return format_of(files)


def recognized(path: str, observer: Observer | None = None) -> str | None:
    """The name of the published data set at a path, by its files; None if it is none that is known.

    A built-in data set must have one of its ``signs``, so that no other folder is opened. A folder without
    them may have the folder of one data set in it, or two levels below it.

    Args:
        observer: receives a note if the path has the files of a data set, but cannot be read as it.

    Raises:
        DataError: there are several data sets, or several variants of one.
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
            if {*signs} <= ANY_FILE:
                continue
            if isinstance(error, ChoiceError):
                raise
            refused.append(f"{name}, but cannot be read as such ({error})")
    if not refused and (below := _below(Path(path), *DATA_SETS.everything().values())):
        _one_of(path, below)
        return next(iter(below.values()))
    if refused and observer is not None:
        observer.note(f"note: the files are named like those of {' or of '.join(refused)}")
    return None


def _place(path: str | None, known: type[DataSet]) -> str | None:
    """The folder of a data set: a path, or the folder below it if only that has the signs of the data set.

    Raises:
        DataError: there are several such folders.
    """
    if path is None or not Path(path).is_dir() or any(_has(Path(path), sign) for sign in known.signs or ()):
        return path
    return _one_of(path, _below(Path(path), known)) or path


def _one_of(path: str, below: Mapping[Path, str]) -> str:
    """The only folder of a data set below a path; empty if there is none."""
    if len(below) > 1:
        raise ChoiceError(path, [f"{folder.relative_to(path)}: {name}" for folder, name in below.items()])
    return str(next(iter(below), ""))


def _below(path: Path, *known: type[DataSet], levels: int = 2) -> dict[Path, str]:
    """The folders of data sets in a folder and, where these are none, in the folders in them, with names."""
    found: dict[Path, str] = {}
    for folder in folders_in(path) if path.is_dir() and levels else ():
        name = next((each.name for each in known if _is_of(each, folder)), None)
        found |= {folder: name} if name else _below(folder, *known, levels=levels - 1)
    return found


def _is_of(known: type[DataSet], folder: Path) -> bool:
    """Whether a folder has a file of a name that only this data set uses, and can be opened."""
    if not any(_has(folder, sign) for sign in {*(known.signs or ())} - ANY_FILE):
        return False
    try:
        known.open(str(folder))
    except ChoiceError:
        return True
    except DataError:
        return False
    return True


def _has(path: Path, sign: str) -> bool:
    """Whether a file has a name, gzipped or not, or a folder has a file of that name."""
    if path.is_dir():
        return any(any(path.glob(pattern)) for pattern in (sign, f"{sign}.gz"))
    return any(path.match(pattern) for pattern in (sign, f"{sign}.gz"))

"""The user's files: CSV, Parquet or JSON lines, with the columns that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peso.config import DataConfig
from peso.config.data import LOG_FORMATS
from peso.errors import ConfigError
from peso.events.sources.files import bare_suffix, find_files, kind_of
from peso.events.sources.tables import (
    PATH,
    FileTable,
    ItemTable,
    Log,
    Source,
    csv_table,
    jsonl_table,
    parquet_table,
    plain,
)
from peso.runtime.remote import local

SEPARATORS = {".tsv": "\t", ".tab": "\t", ".dat": "::"}  # by extension; others have a comma


def own_source(data: DataConfig) -> Source:
    """The log at ``data.path`` and the product table of ``data.items``, if there is one.

    Raises:
        DataError: a file or a column does not exist.
        ConfigError: columns are given both by name and by number, or one column is used for two fields.
    """
    names = {key: value for key, value in data.columns if value is not None}
    events = data.events
    asked = [*names.values(), *([events.column] if events else [])]
    table = _table(data, str(data.path), data.format, data.separator, asked, "data.path")
    return Source(log_of(table, data), own_items(data) if data.items else None)


def log_of(table: FileTable, data: DataConfig) -> Log:
    """The log in a table, with the columns that the configuration names. Raises as :func:`own_source`."""
    names = {key: value for key, value in data.columns if value is not None}
    for key, value in names.items():
        table.require(str(value), f"data.columns.{key}")
    user, item, time = (str(names[key]) for key in ("user", "item", "time"))
    if len({user, item, time}) < 3:
        raise ConfigError(
            f"data.columns uses one column for two fields: user {user!r}, item {item!r}, time {time!r}; "
            "name a column for each"
        )
    rating = str(names["rating"]) if "rating" in names else None
    log = Log(table, user, item, time, rating, data.time_format)
    if data.events:
        table.require(str(data.events.column), "data.events.column")
        log = replace(log, kind=str(data.events.column), keep=tuple(data.events.keep))
    return log


def own_items(data: DataConfig) -> ItemTable:
    """The product table of ``data.items``. Raises the same errors as :func:`own_source`."""
    assert data.items is not None
    given = data.items
    kind = given.format or kind_of(given.path) or data.format
    if kind not in LOG_FORMATS:
        raise ConfigError(
            f"the format of {given.path} cannot be recognized from its extension; set data.items.format"
        )
    fields: dict[str, list[str | int]] = {
        "title": [given.columns.title] if given.columns.title is not None else [],
        "text": list(given.columns.text),
        "category": [given.columns.category] if given.columns.category is not None else [],
    }
    documents = [name for several in fields.values() for name in several]
    asked = [given.columns.item, *documents]
    table = _table(data, local(given.path), kind, given.separator, asked, "data.items.path")
    table.require(str(given.columns.item), "data.items.columns.item")
    for key, several in fields.items():
        for name in several:
            table.require(str(name), f"data.items.columns.{key}")
    return ItemTable(
        table,
        str(given.columns.item),
        plain(table, *map(str, fields["title"])),
        plain(table, *map(str, fields["text"])),
        plain(table, *map(str, fields["category"]), join=PATH),
    )


def _table(
    data: DataConfig, path: str, kind: str, separator: str | None, columns: Sequence[str | int], key: str
) -> FileTable:
    files = find_files(path, kind, key)
    if kind == "parquet":
        return parquet_table(files)
    if kind == "jsonl":
        return jsonl_table(files, [str(name) for name in columns])
    numbered = {isinstance(name, int) for name in columns}
    if len(numbered) > 1:
        raise ConfigError(
            f"the columns of {path} are given partly by name and partly by number; "
            "use names for files with a header and numbers for files without"
        )
    separator = separator or separator_of(files[0])
    # quotes in files with `::` are part of the text, as in MovieLens
    quote = data.quote if len(separator) == 1 else ""
    return csv_table(files, separator, header=not numbered.pop(), encoding=data.encoding, quote=quote)


def separator_of(file: Path) -> str:
    """The separator of a file, by its extension."""
    return SEPARATORS.get(bare_suffix(file), ",")

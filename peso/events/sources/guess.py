"""Guess the meaning of the columns of a user's files for `peso init`, by their names and values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path

import duckdb

from peso.errors import DataError
from peso.events.database import literal
from peso.events.sources.files import HEADER, find_files, first_fields, open_text, require_text
from peso.events.sources.lines import Dialect, Unreadable, delimited_rows, json_rows
from peso.events.sources.tables import FileTable, csv_table, jsonl_table, parquet_table
from peso.events.sources.user_files import separator_of
from peso.events.times import recognize

SAMPLE = 1000  # the number of rows that are examined
SEPARATORS = (",", ";", "\t", "|", "::")
# Words in the names of columns for each role, in the order of preference.
WORDS = {
    "user": "user customer member visitor client buyer shopper reader listener viewer reviewer account u",
    "item": "item product sku asin article movie film song track book isbn game video business content",
    "time": "time timestamp datetime date at ts when created",
    "rating": "rating ratings stars score overall",
    "kind": "event type action behavior behaviour",
    "title": "title name",
    "text": "description text brand features summary about author",
    "category": "category categories genre genres department",
}
NEUTRAL = {"", "id", "ids", "code", "number", "no", "key", "parent", "unix", "event", "review", "main"}
DATES = ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%Y/%m/%d", "%Y%m%d")
CLOCKS = ("", " %H:%M", " %H:%M:%S")
MOST_KINDS = 20  # the maximum number of event types that a column may have


@dataclass(frozen=True)
class Sampled:
    """A table with its first rows as text.

    Attributes:
        table: the table.
        values: for each column, the values of the first rows.
        separator: the separator, if it is not the usual one for the file's extension.
        header: whether the file has a header.
    """

    table: FileTable
    values: dict[str, list[str]] = field(repr=False)
    separator: str | None = None
    header: bool = True

    def columns(self, role: str, taken: Sequence[str] = ()) -> list[str]:
        """The columns whose names indicate a role, the clearest first.

        Args:
            role: a key of ``WORDS``.
            taken: columns that already have a role.
        """
        words = WORDS[role].split()
        found = []
        for place, name in enumerate(self.values):
            parts = set(_words(name))
            hits = [words.index(part) for part in parts if part in words]
            clear = parts <= {*words, *NEUTRAL}
            # `user_city` is not the user; times are also recognized by their values
            if hits and name not in taken and (clear or role not in ("user", "item", "kind")):
                found.append((not clear, min(hits), place, name))
        return [name for *_, name in sorted(found)]


def sample(
    path: str, kind: str, separator: str | None = None, encoding: str = "utf-8", key: str = "data.path"
) -> Sampled:
    """Read the columns and the first rows of a table.

    Args:
        path: a file, a folder or a glob pattern.
        kind: ``csv``, ``jsonl`` or ``parquet``.
        separator: the separator of CSV; None to guess it from the first lines.
        encoding: the encoding of CSV.
        key: the option that gave the path, for messages.

    Raises:
        DataError: there is no file, it cannot be read, or none of its first rows can be read.
    """
    file = find_files(path, kind, key)[0]
    sampled = _sample(file, kind, separator, encoding)
    if not any(sampled.values.values()):
        raise DataError(f"{file} has columns but no rows; download or create the file again")
    return sampled


def _sample(file: Path, kind: str, separator: str | None, encoding: str) -> Sampled:
    if kind == "parquet":
        table = parquet_table([file])
        columns = ", ".join(f"{column.value}::VARCHAR" for column in table.columns.values())
        rows = duckdb.execute(f"SELECT {columns} FROM {table.scan} LIMIT {SAMPLE}").fetchall()
        return Sampled(table, _by_column(table, rows))
    if kind == "jsonl":
        table = jsonl_table([file])
        objects = [row for _, row in islice(json_rows(file), SAMPLE) if isinstance(row, dict)]
        return Sampled(table, _by_column(table, [[o.get(name) for name in table.columns] for o in objects]))
    usual = separator_of(file)
    chosen = separator or _separator(require_text(file), usual, encoding)
    quote = '"' if len(chosen) == 1 else ""
    header = not any(map(_is_moment_or_number, first_fields(file, chosen, quote, encoding)))
    table = csv_table([file], chosen, header, encoding, quote)
    dialect = Dialect(chosen, header, encoding, quote)
    lines = [*islice(delimited_rows(file, dialect, table.width), SAMPLE)]
    places = [int(column.value[1:]) for column in table.columns.values()]  # of two equal names, the last
    rows = [[row[place] for place in places] for _, row in lines if isinstance(row, list)]
    for number, row in lines[:1]:
        if isinstance(row, Unreadable) and not rows:
            raise DataError(f"no row at the beginning of {file} can be read: line {number} {row.reason}")
    return Sampled(table, _by_column(table, rows), None if chosen == usual else chosen, header)


def guess_time(sampled: Sampled, name: str, given: str = "auto") -> str | None:
    """The ``time_format`` of a column; None if its values are not times.

    Args:
        given: the configured format. A pattern is only compared with the values.

    Raises:
        DataError: the values are dates in which day and month cannot be distinguished.
    """
    values = [value for value in sampled.values[name] if value.strip()]
    column = sampled.table.columns[name]
    if "%" in given:
        return given if _all_parse(values, given) else None
    try:
        clock = recognize(values, column.kind, "auto", name)
    except DataError:
        fitting = [date + clock for date in DATES for clock in CLOCKS if _all_parse(values, date + clock)]
        if len(fitting) > 1:
            raise DataError(
                f"the times in column {name!r}, such as {values[0]!r}, can be read as "
                f"{' or '.join(fitting)}; choose one, for example --set data.time_format='{fitting[0]}'"
            ) from None
        return fitting[0] if fitting else None
    if clock.kind == "number" and not all(_is_epoch(value) for value in values):
        return None
    return "auto" if values else None


def guess_log(sampled: Sampled, given: dict[str, str], time_format: str = "auto") -> dict[str, str]:
    """Guess the columns of a log: ``user``, ``item``, ``time`` and, if there are any, ``rating``, ``kind``.

    Args:
        given: the columns that the user named; they are not guessed.
        time_format: the configured format of times.

    Raises:
        DataError: a named column does not exist, or a required column cannot be guessed.
    """
    found = dict(given)
    for role, name in given.items():
        sampled.table.require(name, f"--{role}")
    if "time" not in found:
        moments = [name for name in sampled.values if guess_time(sampled, name, time_format) is not None]
        named = [name for name in sampled.columns("time", [*found.values()]) if name in moments]
        if named or len(moments) == 1:
            found["time"] = (named or moments)[0]
    for role in ("user", "item", "rating", "kind"):
        if role not in found and (names := sampled.columns(role, [*found.values()])):
            found[role] = names[0]
    if not sampled.header:  # user before item, as in every published log without a header
        rest = [name for name in sampled.values if name not in found.values()]
        found |= {role: rest.pop(0) for role in ("user", "item") if role not in found and rest}
    if missing := [role for role in ("user", "item", "time") if role not in found]:
        raise DataError(_which(sampled, missing[0], f"--{missing[0]}"))
    if "kind" in found and "kind" not in given and not 1 < len(kinds(sampled, found["kind"])) <= MOST_KINDS:
        del found["kind"]
    return {role: found[role] for role in ("user", "item", "time", "rating", "kind") if role in found}


def guess_items(
    sampled: Sampled, given: dict[str, list[str]], log: str | None, without_texts: bool = False
) -> dict[str, list[str]]:
    """Guess the columns of a product table: ``item`` and, if there are any, ``title``, ``category`` and
    ``text``.

    Args:
        given: the columns that the user named; they are not guessed.
        log: the item column of the log if the log is also the product table; None if they are two files.
        without_texts: whether semantic IDs can be made without texts.

    Raises:
        DataError: a named column does not exist, the item column cannot be guessed, or there is no column
            with text although texts are needed.
    """
    found = dict(given)
    for role, names in given.items():
        for name in names:
            sampled.table.require(name, f"--{'item-id' if role == 'item' else role}")
    if "item" not in found:
        names = sampled.columns("item") if sampled.header else [*sampled.values]
        found["item"] = [log] if log else names[:1]
    if not found["item"]:
        raise DataError(_which(sampled, "item", "--item-id"))
    for role in ("title", "category", "text"):
        taken = [name for names in found.values() for name in names]
        if role not in found and sampled.header and (names := sampled.columns(role, taken)):
            found[role] = names if role == "text" else names[:1]
    if len(found) == 1 and not without_texts:
        raise DataError(
            f"{sampled.table.files[0]} has no column with titles, texts or categories, which are needed for "
            "semantic IDs. Name the product table (--items FILE) or its columns (--title, --text, "
            "--category), or make semantic IDs from what users do: --set items.behavior={}"
        )
    return found


def _which(sampled: Sampled, role: str, option: str) -> str:
    """The message that asks for a column. It lists all columns with an example of each."""
    there = "; ".join(f"{name} ({examples(sampled, name, 1) or 'empty'})" for name in sampled.values)
    file = sampled.table.files[0]
    return f"{file}: which column is the {role}? Name it with {option}. The columns are {there}"


def examples(sampled: Sampled, name: str, count: int = 3) -> str:
    """The first distinct values of a column, for messages."""
    values = dict.fromkeys(value[:30] for value in sampled.values[name] if value)
    return ", ".join([*values][:count])


def kinds(sampled: Sampled, name: str) -> list[str]:
    """The distinct values of a column in the sampled rows, the most frequent first."""
    return [value for value, _ in Counter(sampled.values[name]).most_common() if value]


def _by_column(table: FileTable, rows: Sequence[Sequence[object]]) -> dict[str, list[str]]:
    """The values of each column as text. Missing values are empty."""
    return {
        name: ["" if row[place] is None else str(row[place]) for row in rows]
        for place, name in enumerate(table.columns)
    }


def _words(name: str) -> list[str]:
    """The words of a column's name, without ``id``. ``customerId``, ``customer_id``, ``customerid`` and
    ``Customer ID`` give the same first word."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    return [word.removesuffix("id") or word for word in words]


def _separator(file: Path, usual: str, encoding: str) -> str:
    """The separator that splits the first lines into the most fields, the same number for each line. A space
    separates only if nothing else does, because texts and times contain spaces."""
    with open_text(file, encoding) as handle:
        lines = [line for _ in range(20) if (line := handle.readline(HEADER)).strip()]

    def fields(separator: str) -> int:
        counts = {line.count(separator) for line in lines}
        return counts.pop() if len(counts) == 1 else 0

    best = max((usual, *SEPARATORS), key=fields)
    return " " if not fields(best) and fields(" ") else best


def _is_moment_or_number(text: str) -> bool:
    value = literal(text)
    sql = f"SELECT try_cast({value} AS DOUBLE) IS NOT NULL OR try_cast({value} AS TIMESTAMPTZ) IS NOT NULL"
    return bool(duckdb.execute(sql).fetchall()[0][0])


def _is_epoch(text: str) -> bool:
    """Whether a text is a Unix time after 1973, in seconds or a smaller unit."""
    try:
        return 1e8 <= float(text) < 1e17
    except ValueError:
        return False


def _all_parse(values: Sequence[str], pattern: str) -> bool:
    try:
        return bool(values) and all(datetime.strptime(value, pattern) for value in values)
    except ValueError:
        return False

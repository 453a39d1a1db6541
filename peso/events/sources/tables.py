"""Files as DuckDB tables: the SQL that scans CSV with any separator, Parquet or JSON lines.

Knows how each kind of file is read, and which columns it has; knows nothing of what the columns mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from peso.errors import DataError
from peso.events.database import identifier, literal
from peso.events.sources.files import first_fields, require_same

FILE = "__file"  # the column that says which file a row comes from, where it is asked for
KEYS_FROM = 1000  # records of JSON lines in which a field has to occur to count as there


@dataclass(frozen=True)
class FileTable:
    """Files of one shape, read as one table.

    ``columns``: name → DuckDB type. ``options``: further arguments of the reader, as SQL.
    """

    files: tuple[Path, ...]
    reader: str
    columns: dict[str, str]
    options: tuple[str, ...] = ()
    lines: bool = field(default=True, kw_only=True)  # of text, which may be unreadable one by one

    def scan(self, skip: bool = False, files: Sequence[Path] | None = None, name_file: bool = False) -> str:
        """The FROM clause.

        Args:
            skip: leave out unreadable lines (of CSV they are counted in ``reject_errors``; of JSON they come
                as rows of nulls).
            files: these only.
            name_file: add the column ``FILE``.
        """
        names = ", ".join(literal(str(file)) for file in files or self.files)
        arguments = [f"[{names}]", *self.options]
        if skip and self.lines:
            arguments.append("ignore_errors = true")
            if self.reader == "read_csv":
                arguments.append("store_rejects = true")
        if name_file:
            arguments.append(f"filename = {literal(FILE)}")
        return f"{self.reader}({', '.join(arguments)})"

    def require(self, name: str, key: str) -> str:
        """The column as it stands in SQL. Raises DataError naming the columns there are, and the key."""
        if name not in self.columns:
            hint = ", or data.separator" if self.reader == "read_csv" and len(self.columns) == 1 else ""
            raise DataError(
                f"{self.files[0]} has no column {name!r}; it has {', '.join(self.columns)}. Set {key}{hint}"
            )
        return identifier(name)


def csv_table(
    files: Sequence[Path],
    separator: str,
    header: bool,
    encoding: str = "utf-8",
    quote: str = '"',
) -> FileTable:
    """Delimited text; every column is read as text. Without a header columns are called 1, 2, ….

    Raises:
        DataError: an unreadable first line, or files whose columns differ.
    """
    first = [(file, first_fields(file, separator, quote, encoding)) for file in files]
    if not header:
        first = [(file, [str(number + 1) for number in range(len(fields))]) for file, fields in first]
    names = require_same(first)
    if any(mark in "".join(names) for mark in ("\0", "\ufffd")):
        raise DataError(
            f"the first line of {files[0]} is no {encoding} text; set data.encoding (utf-8, latin-1, utf-16)"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{files[0]} has two columns of one name ({', '.join(names)}); rename one")
    columns = dict.fromkeys(names, "VARCHAR")
    return FileTable(
        tuple(files),
        "read_csv",
        columns,
        (
            "auto_detect = false",
            f"header = {str(header).lower()}",
            f"delim = {literal(separator)}",
            f"quote = {literal(quote)}",
            f"escape = {literal(quote)}",
            f"encoding = {literal(encoding)}",
            _columns(columns),
        ),
    )


def jsonl_table(files: Sequence[Path], wanted: Sequence[str], documents: Sequence[str] = ()) -> FileTable:
    """JSON lines; ``wanted`` fields are read as text, ``documents`` (texts or lists of texts) as JSON.

    Fields that do not occur in the first records are left out of the columns.
    """
    names = ", ".join(literal(str(file)) for file in files)
    # unreadable lines come as nulls here, and are dealt with when the table is read
    keys = duckdb.execute(
        f"SELECT DISTINCT unnest(json_keys(json)) FROM (SELECT json FROM read_ndjson_objects([{names}], "
        f"ignore_errors = true) LIMIT {KEYS_FROM}) WHERE json_type(json) = 'OBJECT'"
    ).fetchall()
    there = sorted(key for (key,) in keys)
    columns = {name: "JSON" if name in documents else "VARCHAR" for name in there}
    asked = {name: columns[name] for name in [*wanted, *documents] if name in columns}
    options = ("format = 'newline_delimited'", _columns(asked or {"": "VARCHAR"}))
    return FileTable(tuple(files), "read_json", columns, options)


def parquet_table(files: Sequence[Path]) -> FileTable:
    """Parquet files with the types they have.

    Raises:
        DataError: a file that is not Parquet, or files whose columns differ.
    """
    shapes = []
    types: dict[str, str] = {}
    for file in files:
        try:
            rows = duckdb.execute(f"DESCRIBE SELECT * FROM read_parquet({literal(str(file))})").fetchall()
        except duckdb.Error as error:
            raise DataError(
                f"{file} is not readable Parquet ({str(error).splitlines()[0]}); fetch or write it again"
            ) from None
        types = types or {row[0]: row[1] for row in rows}
        shapes.append((file, [row[0] for row in rows]))
    require_same(shapes)
    return FileTable(tuple(files), "read_parquet", types, ("hive_partitioning = false",), lines=False)


def _columns(columns: dict[str, str]) -> str:
    pairs = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in columns.items())
    return f"columns = {{{pairs}}}"

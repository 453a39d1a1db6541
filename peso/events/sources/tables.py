"""Files as DuckDB tables: the SQL that scans CSV with any separator, Parquet or JSON lines."""

from __future__ import annotations

import glob
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from peso.config.data import DATA_SETS, DataConfig
from peso.errors import DataError
from peso.events.database import identifier, literal
from peso.events.sources.files import first_fields, open_text, require_parquet, require_same, require_text
from peso.events.sources.lines import LONGEST, Dialect, Unreadable, dictionary, first_object, json_rows

# SQL: characters that are not an id by themselves: blanks and zero-width characters
BLANKS = literal(
    " \t\n\v\f\r\x85\u00a0\u1680\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
    + "".join(map(chr, range(0x2000, 0x200E)))
)
MISSING = ("nan", "none", "null", "nil", "na", "n/a", "<na>", "undefined")  # texts for missing values
ALIKE = "leading zeros, decimals, spaces or case"  # the differences that :func:`folded` ignores
# Columns with the list of items before a target, the most frequent name first (``format: sequences``).
HISTORIES = ("history_item_id", "history", "item_id_list", "history_items", "history_item_ids", "item_seq")
_SCALARS = ("VARCHAR", "BOOLEAN", "UUID", "BLOB", "ENUM", "DATE", "TIME", "BIT", "CHAR", '"NULL"')
_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "U")


@dataclass(frozen=True)
class Column:
    """A column as SQL, with its DuckDB type."""

    sql: str
    kind: str

    @property
    def is_container(self) -> bool:
        """Whether the values are lists, structs and so on. For JSON this depends on each value."""
        scalar = (*_SCALARS, *_INTEGERS, "FLOAT", "DOUBLE", "DECIMAL", "JSON")
        return self.kind.endswith("]") or self.kind.startswith("UNION") or not self.kind.startswith(scalar)

    @property
    def value(self) -> str:
        """SQL: the value, as text if the file has no types."""
        return f"({self.sql} ->> '$')" if self.kind == "JSON" else self.sql

    @property
    def text(self) -> str:
        """SQL: the value as text. Whole floats become integers; NaN, infinity and blanks become null."""
        return f"CASE WHEN trim({self._text}, {BLANKS}) <> '' THEN {self._text} END"

    @property
    def _text(self) -> str:
        column = self.sql
        if self.kind in ("FLOAT", "DOUBLE"):
            whole = f"coalesce(try_cast({column} AS HUGEINT)::VARCHAR, {column}::VARCHAR)"
            return (
                f"(CASE WHEN isfinite({column}) THEN "
                f"CASE WHEN {column} = trunc({column}) THEN {whole} ELSE {column}::VARCHAR END END)"
            )
        if self.kind.startswith("DECIMAL"):
            return rf"regexp_replace({column}::VARCHAR, '\.0+$', '')"
        if self.kind == "JSON":
            return (
                f"(CASE json_type({column}) WHEN 'OBJECT' THEN NULL WHEN 'ARRAY' THEN NULL "
                f"WHEN 'DOUBLE' THEN CASE WHEN isfinite(try_cast({self.value} AS DOUBLE)) THEN "
                rf"regexp_replace(regexp_extract({self.value}, '^(-?\d.*?)(\.0+)?$', 1), '^-0$', '0') END "
                f"ELSE {self.value} END)"
            )
        return column if self.kind == "VARCHAR" else f"{column}::VARCHAR"


@dataclass(frozen=True)
class FileTable:
    """Files with the same columns, read as one table.

    Attributes:
        kind: ``csv``, ``jsonl``, ``parquet`` or ``arrow``.
        files: the files.
        columns: the columns by the name that they have in the files.
        width: the number of columns, including those without a name.
        scan: the FROM clause that uses DuckDB's reader.
        dialect: the format of delimited text; None for others.
        twice: names that several columns have.
        read_line: reads a line of ``jsonl`` that is not JSON, such as a Python dictionary.
        arrow: the rows of ``arrow``, which a reader registers under the name in ``scan``: those of files in
            Arrow's stream format, or of one file of another kind.
        of: the table of the files, if this one is made from its rows (:func:`reshaped`).
        shape: the SQL that makes the rows; ``{rows}`` is the table of the files with the number of the row.
    """

    kind: str
    files: tuple[Path, ...]
    columns: dict[str, Column]
    width: int
    scan: str
    dialect: Dialect | None = None
    twice: frozenset[str] = frozenset()
    read_line: Callable[[str], dict[str, Any] | Unreadable] | None = None
    arrow: pa.Table | None = None
    of: FileTable | None = None
    shape: str = ""

    def require(self, name: str, key: str) -> Column:
        """The column with this name.

        Args:
            key: the key of the configuration that names it, for the message.

        Raises:
            DataError: there is no such column, or there are two; the message lists the columns and the key.
        """
        if name in self.twice:
            raise DataError(f"{self.files[0]} has two columns with the name {name!r}; rename one of them")
        if name in self.columns and (self.kind != "jsonl" or self.of or self._occurs(name)):
            return self.columns[name]
        names = _json_keys(self.files, self.read_line) if self.kind == "jsonl" else [*self.columns]
        if self.kind == "csv" and names and names[0].startswith(("{", "[")):
            raise DataError(
                f"{self.files[0]} looks like JSON, not like delimited text; write one object per line, and "
                "set --format jsonl (data.format, or data.items.format)"
            )
        section = "data.items" if key.startswith("data.items.") else "data"
        alone = self.kind == "csv" and len(names) == 1 and key.startswith("data.")
        hint = f", or {section}.separator" if alone else ""
        usual = key in ("data.columns.user", "data.columns.item", "data.columns.time") and key.endswith(name)
        if usual and self.kind != "arrow" and (lists := next((n for n in HISTORIES if n in names), None)):
            hint = f"; or, if {lists!r} has lists of items, use --format sequences"
        if not names:
            raise DataError(
                f"{self.files[0]} has no JSON objects; write it as JSON lines, with one object per line"
            )
        there = ", ".join(name if name and name == name.strip() else repr(name) for name in names)
        raise DataError(f"{self.files[0]} has no column {name!r}; it has {there}. Set {key}{hint}")

    def require_published(self, *names: str) -> None:
        """Check that the log of a data set has the columns with which it is published. Raises DataError."""
        for name in names:
            self.require(name, f"data.format ({self.kind} with data.columns reads other files)")

    def id(self, name: str, key: str) -> str:
        """SQL for the ids in a column as text; null for missing ids.

        Raises:
            DataError: see :meth:`require`; or the column has lists or structs.
        """
        column = self.require(name, key)
        if column.is_container:
            raise DataError(
                f"column {name!r} of {self.files[0]} has the type {column.kind}, but ids are text or "
                f"numbers. Set {key} to another column, or write one row per id"
            )
        return column.text

    def _occurs(self, name: str) -> bool:
        if self.read_line:
            return name in _json_keys(self.files, self.read_line)
        # broken lines are null here; they are handled when the table is read
        rows = duckdb.execute(
            f"SELECT 1 FROM {_json_objects(self.files)} WHERE json_exists(json, {_pointer(name)}) LIMIT 1"
        )
        return bool(rows.fetchall()) or name in _json_keys(self.files)


def csv_table(
    files: Sequence[Path], separator: str, header: bool, encoding: str = "utf-8", quote: str = '"'
) -> FileTable:
    """A table of delimited text. Every column is read as text. Without a header the columns are 1, 2, ….

    Raises:
        DataError: a file is not text, a first line is unreadable, or the columns of the files differ.
    """
    first = [(file, first_fields(require_text(file), separator, quote, encoding)) for file in files]
    if not header:
        first = [(file, [str(number + 1) for number in range(len(fields))]) for file, fields in first]
    names = require_same(first)
    places = [f"c{place}" for place in range(len(names))]
    # DuckDB only reads files in which quotes are around whole fields (see peso.events.sources.lines)
    options = (
        _listed(files),
        "auto_detect = false",
        "hive_partitioning = false",
        f"header = {str(header).lower()}",
        f"delim = {literal(separator)}",
        f"quote = {literal(quote)}",
        f"escape = {literal(quote)}",
        "columns = {" + ", ".join(f"'{place}': 'VARCHAR'" for place in places) + "}",
    )
    return FileTable(
        "csv",
        tuple(files),
        {name: Column(place, "VARCHAR") for name, place in zip(names, places, strict=True)},
        len(names),
        f"read_csv({', '.join(options)})",
        Dialect(separator, header, encoding, quote),
        twice=_repeated(names),
    )


def jsonl_table(files: Sequence[Path], wanted: Sequence[str] | None = None) -> FileTable:
    """A table of JSON lines.

    Args:
        wanted: the keys to read from the objects; None for every key that occurs.

    Raises:
        DataError: a file is not text, is a JSON array, or is not UTF-8.
    """
    for file in files:
        with open_text(require_text(file), "utf-8") as handle:
            start = handle.read(1000)
        if start.lstrip()[:1] == "[":
            raise DataError(
                f"{file} is a JSON array; convert it to JSON lines, with one object per line "
                "(for example with `jq -c '.[]' FILE > log.jsonl`)"
            )
        if "\0" in start[:2] or start[:2] in ("\udcff\udcfe", "\udcfe\udcff"):
            raise DataError(f"{file} is not UTF-8 text, as JSON lines must be; convert it to UTF-8")
    names = list(dict.fromkeys(_json_keys(files) if wanted is None else wanted))
    fields = ", ".join(f"found[{place + 1}] AS c{place}" for place in range(len(names)))
    pointers = ", ".join(map(_pointer, names))
    return FileTable(
        "jsonl",
        tuple(files),
        {name: Column(f"c{place}", "JSON") for place, name in enumerate(names)},
        len(names),
        f"(SELECT {fields} FROM (SELECT json_extract(json, [{pointers}]) AS found FROM "
        f"{_json_objects(files, ignore_errors=False)}))",
    )


def dictionary_table(files: Sequence[Path], wanted: Sequence[str]) -> FileTable:
    """A table of lines that are JSON objects or Python dictionaries, as the first line of the first file is.

    Dictionaries are read as literals: nothing in them is executed.

    Raises:
        DataError: as for :func:`jsonl_table`.
    """
    table = jsonl_table(files, wanted)
    return table if first_object(files[0]) is not None else replace(table, read_line=dictionary)


def reshaped(table: FileTable, shape: str, columns: Mapping[str, str]) -> FileTable:
    """A table whose rows are made from those of another one, such as one row for each item of a list.

    Args:
        table: the table of the files.
        shape: a SELECT from ``{rows}``, which has the columns of ``table`` and ``row_of_files``, the number
            of the row. It must return this number too, and its rows in an order that depends on nothing else.
        columns: the names of the other columns that it returns, with their DuckDB types.
    """
    made = {name: Column(identifier(name), kind) for name, kind in columns.items()}
    return replace(table, columns=made, twice=frozenset(), of=table, shape=shape)


def parquet_table(files: Sequence[Path]) -> FileTable:
    """A table of Parquet files. Columns keep their types, unless types differ between files; then they become
    text.

    Raises:
        DataError: a file is not Parquet, or the columns of the files differ.
    """
    shapes, kinds = [], []
    for file in files:
        try:
            names = pq.ParquetFile(require_parquet(file)).schema_arrow.names
            rows = duckdb.execute(f"DESCRIBE SELECT * FROM {_parquet([file])}").fetchall()
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file} is not readable Parquet ({str(error).splitlines()[0]}); download or create it again"
            ) from None
        shapes.append((file, names))
        # DuckDB renames columns whose names differ only in case, and keeps the order
        kinds.append([Column(identifier(row[0]), row[1]) for row in rows])
    names = require_same(shapes)
    if all(columns == kinds[0] for columns in kinds):
        columns, scan = kinds[0], _parquet(files)
    else:
        same = [len({file[place] for file in kinds}) == 1 for place in range(len(names))]
        parts = [
            "SELECT "
            + ", ".join(
                f"{column.sql if alike else column.text} AS c{place}"
                for place, (column, alike) in enumerate(zip(of_file, same, strict=True))
            )
            + f" FROM {_parquet([file])}"
            for file, of_file in zip(files, kinds, strict=True)
        ]
        columns = [
            Column(f"c{place}", kinds[0][place].kind if alike else "VARCHAR")
            for place, alike in enumerate(same)
        ]
        scan = f"({' UNION ALL '.join(parts)})"
    return FileTable(
        "parquet",
        tuple(files),
        dict(zip(names, columns, strict=True)),
        len(names),
        scan,
        twice=_repeated(names),
    )


def _repeated(names: Sequence[str]) -> frozenset[str]:
    return frozenset(name for name, count in Counter(names).items() if count > 1)


def _listed(files: Sequence[Path]) -> str:
    """A list of files as a DuckDB argument, escaped because DuckDB treats names as glob patterns."""
    return f"[{', '.join(literal(glob.escape(str(file))) for file in files)}]"


def _parquet(files: Sequence[Path]) -> str:
    return f"read_parquet({_listed(files)}, hive_partitioning = false)"


def _json_objects(files: Sequence[Path], ignore_errors: bool = True) -> str:
    return (
        f"read_ndjson_objects({_listed(files)}, hive_partitioning = false, "
        f"maximum_object_size = {LONGEST}, ignore_errors = {str(ignore_errors).lower()})"
    )


def _json_keys(files: Sequence[Path], read_line: Callable[[str], Any] | None = None) -> list[str]:
    """Every key that occurs in the objects; with ``read_line``, in the first one of each file."""
    if read_line:
        return sorted({key for file in files for key in first_object(file, read_line) or ()})
    keys = duckdb.execute(
        f"SELECT DISTINCT unnest(json_keys(json)) FROM {_json_objects(files)} "
        "WHERE json_type(json) = 'OBJECT'"
    )
    found = {key for (key,) in keys.fetchall()}
    if not found:  # lines that end in carriage returns are one line for DuckDB
        for file in files:
            found.update(key for _, row in json_rows(file) if isinstance(row, dict) for key in row)
    return sorted(found)


def _pointer(name: str) -> str:
    return literal("/" + name.replace("~", "~0").replace("/", "~1"))


def folded(name: str) -> str:
    """SQL for an id in lower case, without leading zeros, decimals and surrounding spaces.

    Different ids with the same result are most likely two spellings of one id.
    """
    text = f"lower(trim(nfc_normalize({name}), {BLANKS}))"
    return rf"ltrim(regexp_replace({text}, '\.0+$', ''), '0')"


PATH = " > "  # separates the parts of a category path, from broad to narrow
LIST = ", "  # separates texts without an order, such as genres


@dataclass(frozen=True)
class Log:
    """Events: a table and the names of its columns.

    ``time_format`` is as in the configuration. ``kind`` is the column of the event types, and ``keep`` has
    the types that count; it is empty if all do. Without ``timed``, the files have no times, and the column
    ``time`` has numbers that only give the order of the events.
    """

    table: FileTable
    user: str
    item: str
    time: str
    rating: str | None = None
    time_format: str = "auto"
    kind: str | None = None
    keep: tuple[str, ...] = ()
    timed: bool = True


@dataclass(frozen=True)
class ItemTable:
    """Items: a table, the name of its id column (``item``), and for each field the SQL that returns its text
    or null."""

    table: FileTable
    item: str
    title: str = "NULL"
    text: str = "NULL"
    category: str = "NULL"


@dataclass(frozen=True)
class Source:
    """A log and, if the source has one, its item table."""

    log: Log
    items: ItemTable | None = None


class DataSet(ABC):
    """A well-known data set: where its files are, and what their columns mean.

    To add one, write a file with a subclass that has a ``name``, which becomes a value of ``data.format``,
    and a method ``open``.

    Attributes:
        signs: patterns of file names, such as ``*.inter`` or ``raw/*.jsonl``. If no format is given, a file
            with such a name, or a folder with one, is recognized as this data set if ``open`` succeeds. None:
            any folder that ``open`` accepts is recognized. Empty: nothing is.
        takes: further settings of the section `data` that this data set uses, in its method ``read``.
    """

    name: ClassVar[str] = ""
    signs: ClassVar[tuple[str, ...] | None] = None
    takes: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name := cls.__dict__.get("name"):
            DATA_SETS.add(name, cls)

    @staticmethod
    @abstractmethod
    def open(path: str) -> Source:
        """The log and the item table at ``data.path``. Only the first lines of files are read.

        Raises:
            DataError: a file or a column is missing, or a file is empty.
        """

    @classmethod
    def read(cls, data: DataConfig) -> Source:
        """The log and the item table of a configuration: those of ``open``, unless the data set uses further
        settings (``takes``).

        Raises:
            DataError: as for ``open``.
        """
        return cls.open(str(data.path))


def plain(table: FileTable, *names: str, join: str = "\n") -> str:
    """SQL that joins the texts of columns; null if all are null. Lists in a column are joined, too."""
    parts = [f"nullif({_as_text(table.columns[name], join)}, '')" for name in names]
    return f"nullif(concat_ws({literal(join)}, {', '.join(parts)}), '')" if parts else "NULL"


def published_items(
    table: FileTable,
    item: str,
    title: str,
    texts: Sequence[str],
    path: Sequence[str],
    *,
    optional: bool = False,
) -> ItemTable:
    """The item table of a data set, with the columns with which it is published.

    Args:
        path: the columns of the category, from broad to narrow.
        optional: whether the table may lack all columns but ``item``.

    Raises:
        DataError: a column is missing.
    """
    for name in [item] if optional else [item, title, *texts, *path]:
        table.require(name, "data.format")
    return ItemTable(table, item, plain(table, title), plain(table, *texts), plain(table, *path, join=PATH))


def _as_text(column: Column, join: str) -> str:
    if column.kind == "JSON":
        items = f"""from_json({column.sql}, '["VARCHAR"]')"""
        return (
            f"CASE json_type({column.sql}) WHEN 'ARRAY' THEN array_to_string({items}, {literal(join)}) "
            f"WHEN 'OBJECT' THEN {column.value} ELSE {column.text} END"
        )
    if column.kind.endswith("[]"):
        return f"array_to_string({column.sql}::VARCHAR[], {literal(join)})"
    return f"{column.sql}::VARCHAR" if column.is_container else column.text

"""Read all rows of a table of files into a database; rows that are left out are counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import DataError
from peso.events.database import scalar
from peso.events.sources.lines import QuoteCheck, Unreadable, count_plain_rows, delimited_rows, json_rows
from peso.events.sources.tables import FileTable

BATCH = 50_000  # rows
SAMPLE = 100  # all ids are examined only if this number of ids look like decimals
NOT_THE_FILE = (
    duckdb.OutOfMemoryException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
)
T = TypeVar("T")


class Reading:
    """Reads a table with DuckDB if every line is a row, otherwise line by line.

    Args:
        skip: whether to leave out lines that cannot be read instead of refusing the file.
        key: the column by which a line is recognized as a row
            (:class:`peso.events.sources.lines.QuoteCheck`).
        swallowed: the number of such lines inside a quoted field that counts as an error.
        cure: what the user should do about a line that cannot be read.

    Attributes:
        left_out: the number of lines that were left out.
        remarks: sentences about the ids that the user should know.

    Raises:
        DataError: a line cannot be read, or a file is damaged.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        table: FileTable,
        skip: bool,
        key: str | None = None,
        swallowed: int = 3,
        cure: str = "correct the line, or skip such lines with data.on_error: skip",
    ) -> None:
        self.connection, self.table, self.skip, self.cure = connection, table, skip, cure
        self._files = table.of or table  # the table as it is in the files
        self.left_out = 0
        self.remarks: list[str] = []
        plain_csv = table.kind == "csv" and table.of is None
        place = table.columns[key].sql if plain_csv and key in table.columns else None
        self._quote_check = QuoteCheck(int(place[1:]), swallowed) if place else None
        self._from = table.scan
        self._staged = False
        if table.arrow is not None:
            connection.register(table.scan, table.arrow)
        rows = [self._rows(file) for file in table.files]
        self.rows_of_files = [count or 0 for count in rows]
        if None in rows:
            self._stage()

    def create(self, name: str, fields: str) -> int:
        """Run ``CREATE TABLE name AS SELECT fields`` and return the number of rows."""

        def create(relation: str) -> int:
            self.connection.execute(
                f"CREATE OR REPLACE TABLE {name} AS SELECT {fields} FROM {self._shaped(relation)}"
            )
            return scalar(self.connection, f"SELECT count(*) FROM {relation if self.table.of else name}")

        rows = self._attempt(create)
        if not self._staged and rows != sum(self.rows_of_files):
            self._stage()
            rows = create(self._from)
        if rows != sum(self.rows_of_files):
            raise DataError(
                f"{self.table.files[0]} has {sum(self.rows_of_files):,} rows, but {rows:,} were read; "
                "create the file again, if possible as Parquet"
            )
        return scalar(self.connection, f"SELECT count(*) FROM {name}") if self.table.of else rows

    def select(self, fields: str, further: str = "") -> list[tuple[Any, ...]]:
        """Rows of the table. ``further`` is the rest of the SQL statement: WHERE, LIMIT and so on."""
        return self._attempt(
            lambda relation: self.connection.execute(
                f"SELECT {fields} FROM {self._shaped(relation)} {further}"
            ).fetchall()
        )

    def id(self, name: str, key: str) -> str:
        """SQL for the ids in a column as text (:meth:`FileTable.id`), with whole numbers without decimals.

        Ids that are text keep their `.0`, unless every id of the column has one. This is how pandas writes
        whole numbers in a column with missing values.
        """
        text, column = self.table.id(name, key), self.table.columns[name]
        exact = {"FLOAT": 2**24, "DOUBLE": 2**53, "JSON": 2**53}.get(column.kind)
        decimal, number = "true", column.sql
        if column.kind == "JSON":  # whole numbers of any size are read as they are written
            decimal = (
                rf"json_type({column.sql}) = 'DOUBLE' AND NOT regexp_full_match({column.value}, '-?\d+')"
            )
            number = f"try_cast({column.value} AS DOUBLE)"
        beyond = f"WHERE {decimal} AND isfinite({number}) AND abs({number}) > {exact} LIMIT 1"
        if exact and self.select("1", beyond):
            self.remarks.append(
                f"the ids in column {name!r} are decimals above {exact:,}, which are not exact, so different "
                "ids may have been merged. Write them as integers or text"
            )
        if column.kind != "VARCHAR":
            return text
        whole = rf"regexp_full_match({column.sql}, '-?\d+\.0+')"
        sample = self.select(whole, f"WHERE {text} IS NOT NULL LIMIT {SAMPLE}")
        if not sample or not all(matches for (matches,) in sample):
            return text
        if self.select("1", f"WHERE {text} IS NOT NULL AND NOT {whole} LIMIT 1"):
            return text
        self.remarks.append(
            f"the ids in column {name!r} are written as decimals (3.0) and read as integers (3)"
        )
        return f"split_part({text}, '.', 1)"

    def place(self, row: int) -> tuple[Path, int]:
        """The file, and the row in it counted from 1, of a row of the table counted from 0."""
        if self.table.of:
            row = int(self.select("row_of_files", f"LIMIT 1 OFFSET {row}")[0][0]) - 1
        for file, rows in zip(self.table.files, self.rows_of_files, strict=True):
            if row < rows:
                return file, row + 1
            row -= rows
        raise IndexError(row)

    def _shaped(self, relation: str) -> str:
        """SQL: the rows of the table, from the relation with the rows of the files."""
        if not self.table.of:
            return relation
        numbered = f"(SELECT *, row_number() OVER () AS row_of_files FROM {relation})"
        return f"({self.table.shape.replace('{rows}', numbered)})"

    def _rows(self, file: Path) -> int | None:
        if self.table.kind == "parquet":
            return int(pq.ParquetFile(file).metadata.num_rows)
        if self.table.arrow is not None and len(self.table.files) == 1:
            return int(self.table.arrow.num_rows)
        if self.table.kind == "arrow":
            return int(pa.ipc.open_stream(pa.memory_map(str(file))).read_all().num_rows)
        if self.table.read_line:
            return None
        plain_name = file.suffix != ".GZ" and file.suffix.lower() != ".zst"  # DuckDB depends on the extension
        keys = [*self._files.columns] if self.table.kind == "jsonl" else []
        return count_plain_rows(file, self.table.dialect, keys) if plain_name else None

    def _attempt(self, query: Callable[[str], T]) -> T:
        """Run a query with DuckDB's reader. If it fails, read the files line by line and run it again."""
        try:
            return query(self._from)
        except NOT_THE_FILE:
            raise
        except duckdb.Error as error:
            if self._staged or "No space left" in str(error):
                raise
            if self.table.kind in ("parquet", "arrow"):
                raise DataError(
                    f"{self.table.files[0]}{' or another file' * (len(self.table.files) > 1)} is damaged "
                    f"({str(error).splitlines()[0]}); download or create it again"
                ) from None
        self._stage()
        return query(self._from)

    def _stage(self) -> None:
        """Read all files line by line into a table of the database."""
        self._staged = True
        names = [f"c{place}" for place in range(self.table.width)]
        kind = "JSON" if self.table.kind == "jsonl" else "VARCHAR"
        staged = f"lines_of_{scalar(self.connection, 'SELECT count(*) FROM duckdb_tables()')}"
        self.connection.execute(f"CREATE TABLE {staged} ({', '.join(f'{name} {kind}' for name in names)})")
        schema = pa.schema([(name, pa.string()) for name in names])
        self.rows_of_files = []
        for file in self.table.files:
            rows = self._readable(file)
            count = 0
            while batch := list(islice(rows, BATCH)):
                count += len(batch)
                arrays = [pa.array(column, pa.string()) for column in zip(*batch, strict=True)]
                part = pa.Table.from_arrays(arrays, schema=schema)
                self.connection.register("part", part)
                self.connection.execute(f"INSERT INTO {staged} SELECT * FROM part")
                self.connection.unregister("part")
            self.rows_of_files.append(count)
        self._from = staged

    def _readable(self, file: Path) -> Iterator[Sequence[str | None]]:
        rows: Iterator[tuple[int, Any]]
        if self.table.dialect is None:
            rows = json_rows(file, self.table.read_line)
        else:
            rows = delimited_rows(file, self.table.dialect, self.table.width, self._quote_check)
        for number, row in rows:
            if not isinstance(row, Unreadable):
                yield (
                    row if isinstance(row, list) else [_json_text(row, name) for name in self._files.columns]
                )
            elif self.skip:
                self.left_out += 1
            else:
                raise DataError(f"{file}: line {number} {row.reason}; {self.cure}")


def _json_text(record: dict[str, Any], name: str) -> str | None:
    return json.dumps(record[name]) if name in record else None

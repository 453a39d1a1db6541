"""What an engine does: it computes Ibis expressions, and keeps their results as tables.

Expressions are built on tables that have a name and a schema (``ibis.table``). An engine compiles them to its
dialect of SQL. Operations without a common form in SQL are methods: positions in a total order, rows as a
stream, and tables that are computed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from peso.events.database import WORK

if TYPE_CHECKING:
    import ibis.expr.types as ir

# the schema of files of stages, with the position of the file
STAGES = {"user": "string", "previous": "array<int32>", "current": "array<int32>", "stage": "int64"}


class Engine(ABC):
    """Computes the tables of an ingestion.

    Args:
        work: an empty directory for temporary files.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, work: Path) -> None:
        self.connection, self.work = connection, work
        self._tables = 0

    @abstractmethod
    def take(self, name: str, schema: Mapping[str, str]) -> ir.Table:
        """A table of the database in which the log was read. It must not be changed there afterwards."""

    @abstractmethod
    def give(self, table: ir.Table, name: str) -> None:
        """Make a table available to the database in which the log was read, under a new name."""

    @abstractmethod
    def given(self, name: str, rows: pa.Table) -> ir.Table:
        """An Arrow table as a table of the engine."""

    @abstractmethod
    def stages(self, files: Sequence[Path]) -> ir.Table:
        """The rows of files of stages (``peso.events.columns.STAGE``), with the position of their file in
        ``files`` as the column ``stage``."""

    @abstractmethod
    def keep(self, name: str, rows: ir.Table) -> ir.Table:
        """Compute rows once. ``name`` is part of the name of the table."""

    @abstractmethod
    def numbered(self, name: str, rows: ir.Table, number: str) -> ir.Table:
        """Compute rows in a total order once, with the column ``number`` (int64), which counts from 0."""

    @abstractmethod
    def drop(self, *tables: ir.Table) -> None:
        """Free the space of tables that :meth:`take` or :meth:`keep` returned."""

    @abstractmethod
    def rows(self, rows: ir.Table) -> list[tuple[Any, ...]]:
        """Rows as Python values."""

    @abstractmethod
    def batches(
        self, rows: ir.Table, size: int, last_use: Sequence[ir.Table] = ()
    ) -> Iterator[pa.RecordBatch]:
        """Rows in their order, about ``size`` at a time, so that they need not all be in memory.

        No other rows need the tables in ``last_use``. An engine with tables in memory drops them as soon
        as the rows are computed.
        """

    def row(self, rows: ir.Table) -> tuple[Any, ...]:
        """The only row, such as that of an aggregation without groups."""
        (row,) = self.rows(rows)
        return row

    def count(self, rows: ir.Table) -> int:
        """The number of rows."""
        return int(self.row(rows.aggregate(n=rows.count()))[0])

    def close(self) -> None:  # noqa: B027  # not every engine has something to free
        """Free what the engine holds outside of ``connection`` and ``work``."""

    def new_name(self, name: str) -> str:
        """A name that no other table has."""
        self._tables += 1
        return f"{name}_{self._tables}"


@contextmanager
def open_engine(name: str, connection: duckdb.DuckDBPyConnection, directory: Path) -> Iterator[Engine]:
    """The engine that ``data.engine`` names.

    Args:
        name: ``duckdb`` or ``spark``.
        connection: the database in which the log is read (``peso.events.database.temporary_database``).
        directory: the directory of this database.

    Raises:
        ConfigError: what the engine needs is not installed.
    """
    work = directory / WORK / "engine"
    work.mkdir()
    made = import_module(f"peso.events.engines.{name}").make(connection, work)
    try:
        yield made
    finally:
        made.close()


def table(name: str, rows: ir.Table) -> ir.Table:
    """The expression for a table with the columns of ``rows``."""
    import ibis  # slow to load, and few commands ingest

    return ibis.table(rows.schema(), name=name)


def arg_min(value: ir.IntegerColumn, by: ir.IntegerColumn) -> ir.IntegerScalar:
    """The value where ``by`` is smallest. Ibis's own ``argmin`` sorts every group in DuckDB."""
    import ibis

    @ibis.udf.agg.builtin  # type: ignore[untyped-decorator]
    def min_by(value: int, by: int) -> int:  # type: ignore[empty-body]
        """Every engine has this function under this name."""

    return min_by(value, by)

"""The default engine: DuckDB, on one machine. It works in the database in which the log was read, which moves
tables beyond a limit to the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import ibis
import pyarrow as pa

from peso.events.database import identifier, literal
from peso.events.engines.engine import STAGES, Engine, table

if TYPE_CHECKING:
    import ibis.expr.types as ir


class DuckDB(Engine):
    """See :class:`peso.events.engines.engine.Engine`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, work: Path) -> None:
        super().__init__(connection, work)
        self._numbered: dict[str, str] = {}  # the table below each numbered view

    def take(self, name: str, schema: Mapping[str, str]) -> ir.Table:
        return ibis.table(schema, name=name)

    def give(self, table: ir.Table, name: str) -> None:
        self.connection.execute(f"CREATE VIEW {name} AS {_sql(table)}")

    def given(self, name: str, rows: pa.Table) -> ir.Table:
        self.connection.from_arrow(rows).create(name)
        return ibis.table(ibis.Schema.from_pyarrow(rows.schema), name=name)

    def stages(self, files: Sequence[Path]) -> ir.Table:
        parts = " UNION ALL ".join(
            f"SELECT *, {number}::BIGINT AS stage "
            f"FROM read_parquet({literal(str(file))}, hive_partitioning = false)"
            for number, file in enumerate(files)
        )
        name = self.new_name("stages")
        self.connection.execute(f"CREATE VIEW {name} AS {parts}")
        return ibis.table(STAGES, name=name)

    def keep(self, name: str, rows: ir.Table) -> ir.Table:
        name = self.new_name(name)
        self.connection.execute(f"CREATE TABLE {name} AS {_sql(rows)}")
        return table(name, rows)

    def numbered(self, name: str, rows: ir.Table, number: str) -> ir.Table:
        kept = self.keep(name, rows)  # DuckDB keeps the order, and counts the rows
        name = self.new_name(name)
        self.connection.execute(
            f"CREATE VIEW {name} AS SELECT *, rowid AS {identifier(number)} FROM {kept.get_name()}"
        )
        self._numbered[name] = kept.get_name()
        return ibis.table({**kept.schema(), number: "int64"}, name=name)

    def drop(self, *tables: ir.Table) -> None:
        for dropped in tables:
            name = dropped.get_name()
            if name in self._numbered:
                self.connection.execute(f"DROP VIEW {name}")
                name = self._numbered.pop(name)
            self.connection.execute(f"DROP TABLE {name}")

    def rows(self, rows: ir.Table) -> list[tuple[Any, ...]]:
        return self.connection.execute(_sql(rows)).fetchall()

    def batches(
        self, rows: ir.Table, size: int, last_use: Sequence[ir.Table] = ()
    ) -> Iterator[pa.RecordBatch]:
        # a table takes less memory than the result of a sort, and other queries run while it is read
        kept = self.keep("batches", rows)
        self.drop(*last_use)
        with self.connection.cursor() as cursor:
            yield from cursor.sql(f"FROM {kept.get_name()}").to_arrow_reader(size)
        self.drop(kept)


make = DuckDB


def _sql(rows: ir.Table) -> str:
    return str(ibis.to_sql(rows, dialect="duckdb", pretty=False))

"""Spark: on this machine, or on the cluster that Spark's own configuration names.

Every kept table is a directory of Parquet files, so that plans stay short and nothing is computed twice. A
cluster needs a workspace on storage that all of its machines share.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from peso.errors import ConfigError, DataError, FullDisk
from peso.events.database import identifier, literal
from peso.events.engines.engine import STAGES, Engine

if TYPE_CHECKING:
    import ibis.expr.types as ir

JAVA = 17  # what PySpark 4 needs
# where Spark's own configuration (spark-defaults.conf in SPARK_CONF_DIR) says nothing
DEFAULTS = {"spark.app.name": "peso", "spark.ui.enabled": "false", "spark.log.level": "ERROR"}
ROW_BITS = 33  # monotonically_increasing_id has the number of the partition above these bits


class Spark(Engine):
    """See :class:`peso.events.engines.engine.Engine`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, work: Path) -> None:
        super().__init__(connection, work)
        self._own = f"peso_{uuid4().hex[:8]}"  # a session may have other views
        self._session, self._ours = _session(work)
        with _explained():
            self._backend = ibis.pyspark.connect(self._session)

    def close(self) -> None:
        if self._ours:
            _end(self._session)
            return
        for view in self._session.catalog.listTables(pattern=f"{self._own}_*"):
            self._session.catalog.dropTempView(view.name)

    def new_name(self, name: str) -> str:
        return super().new_name(f"{self._own}_{name}")

    def take(self, name: str, schema: Mapping[str, str]) -> ir.Table:
        taken = self.new_name(name)
        self._directory(taken).mkdir()
        columns = ", ".join(map(identifier, schema))
        file = literal(str(self._directory(taken) / "rows.parquet"))
        self.connection.execute(f"COPY (SELECT {columns} FROM {name}) TO {file} (FORMAT parquet)")
        self.connection.execute(f"DROP TABLE {name}")
        return self._view(taken, schema)

    def give(self, table: ir.Table, name: str) -> None:
        kept = self._directory(self.keep(name, table).get_name())
        files = ", ".join(literal(str(file)) for file in _files(kept))
        self.connection.execute(
            f"CREATE VIEW {name} AS SELECT * FROM read_parquet([{files}], hive_partitioning = false)"
        )

    def given(self, name: str, rows: pa.Table) -> ir.Table:
        name = self.new_name(name)
        self._directory(name).mkdir()
        pq.write_table(rows, self._directory(name) / "rows.parquet")
        return self._view(name, ibis.Schema.from_pyarrow(rows.schema))

    def stages(self, files: Sequence[Path]) -> ir.Table:
        name = self.new_name("stages")
        with _explained():
            parts = [
                self._session.read.parquet(_escaped(file)).selectExpr("*", f"{number}L AS stage")
                for number, file in enumerate(files)
            ]
            reduce(lambda first, second: first.union(second), parts).createOrReplaceTempView(name)
        return ibis.table(STAGES, name=name)

    def keep(self, name: str, rows: ir.Table) -> ir.Table:
        name = self.new_name(name)
        frame = self._frame(rows)
        self._write(frame, name)
        return self._view(name, rows.schema(), frame)

    def numbered(self, name: str, rows: ir.Table, number: str) -> ir.Table:
        from pyspark.sql.functions import monotonically_increasing_id

        # partitions are in order, but a row has its number only within its partition
        with_ids, name = self.new_name(name), self.new_name(name)
        frame = self._frame(rows).withColumn("id", monotonically_increasing_id())
        self._write(frame, with_ids)
        self._view(with_ids, {}, frame)
        with _explained():
            counts = self._session.sql(
                f"SELECT shiftright(id, {ROW_BITS}), count(*) FROM {with_ids} GROUP BY 1 ORDER BY 1"
            ).collect()
            before, starts = 0, ["(-1L, 0L)"]  # Spark has no empty VALUES
            for part, count in counts:
                starts.append(f"({part}L, {before}L)")
                before += count
            self._session.sql(
                f"SELECT {', '.join(rows.columns)}, start + (id & {2**ROW_BITS - 1}L) AS {number} "
                f"FROM {with_ids} JOIN VALUES {', '.join(starts)} AS starts(part, start) "
                f"ON shiftright(id, {ROW_BITS}) = part"
            ).createOrReplaceTempView(name)
        return ibis.table({**rows.schema(), number: "int64"}, name=name)

    def drop(self, *tables: ir.Table) -> None:
        for dropped in tables:
            self._session.catalog.dropTempView(dropped.get_name())
            shutil.rmtree(self._directory(dropped.get_name()))

    def rows(self, rows: ir.Table) -> list[tuple[Any, ...]]:
        with _explained():
            return [tuple(row) for row in self._frame(rows).collect()]

    def batches(
        self, rows: ir.Table, size: int, last_use: Sequence[ir.Table] = ()
    ) -> Iterator[pa.RecordBatch]:
        # tables are files, which take no memory: `last_use` goes with the others
        name = self.new_name("batches")
        self._write(self._frame(rows), name)
        for path in _files(self._directory(name)):
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(size)

    def _directory(self, name: str) -> Path:
        return self.work / name

    def _frame(self, rows: ir.Table) -> Any:
        with _explained():
            return self._session.sql(self._backend.compile(rows))

    def _write(self, frame: Any, name: str) -> None:
        with _explained():
            frame.write.parquet(f"file://{self._directory(name).resolve()}")

    def _view(self, name: str, schema: Mapping[str, str], written: Any = None) -> ir.Table:
        """A view of a directory; without the frame ``written`` to it, Spark runs a job to find its schema."""
        with _explained():
            reader = self._session.read if written is None else self._session.read.schema(written.schema)
            reader.parquet(_escaped(self._directory(name))).createOrReplaceTempView(name)
        return ibis.table(schema, name=name)


make = Spark


def _files(directory: Path) -> list[Path]:
    """The files of a table. Spark numbers them in the order of the rows."""
    return sorted(directory.glob("*.parquet"))


def _escaped(path: Path) -> str:
    """A path for Spark's readers, which take it for a pattern."""
    escaped = re.sub(r"([*?{}\[\]\\])", r"\\\1", str(path.resolve()))
    return f"file://{escaped}"


def _session(work: Path) -> tuple[Any, bool]:
    """A session of Spark, and whether it was started here, with temporary files in ``work``.

    Raises:
        ConfigError: PySpark or Java is not installed.
    """
    needed = ("pyspark", "pandas")  # Ibis needs pandas for Spark
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ConfigError(
            f"data.engine: spark needs {' and '.join(missing)}, which is not installed; install it with "
            "pip install 'peso[spark]', or use data.engine: duckdb"
        )
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    if (active := SparkSession.getActiveSession()) is not None:
        return active, False
    _require_java()
    try:
        SparkContext._ensure_initialized()  # only Java reads Spark's own configuration
        conf = SparkConf()
        # without a place for it, Spark creates its warehouse in the current directory
        for key, value in {**DEFAULTS, "spark.sql.warehouse.dir": str(work / "warehouse")}.items():
            conf.setIfMissing(key, value)
        conf.set("spark.ui.showConsoleProgress", "false")  # its bars would disturb those of peso
        return SparkSession.builder.config(conf=conf).getOrCreate(), True
    except PySparkRuntimeError as error:
        raise ConfigError(
            f"data.engine: spark could not start Spark ({str(error).splitlines()[0]}); see the lines above. "
            "Check Java, SPARK_HOME and spark-defaults.conf in SPARK_CONF_DIR, or use data.engine: duckdb"
        ) from None


def _require_java() -> None:
    """Raises ConfigError if there is no Java, or one that is too old."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=os.path.join(home, "bin") if home else None)
    cure = (
        f"install Java {JAVA} (on Debian or Ubuntu: apt-get install openjdk-{JAVA}-jre-headless), set "
        "JAVA_HOME to it, or use data.engine: duckdb"
    )
    if java is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "no Java is installed"
        raise ConfigError(f"data.engine: spark needs Java {JAVA} or newer, but {where}; {cure}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = said.split('"')[1] if said.count('"') > 1 else ""
    major = version.removeprefix("1.").split(".")[0].split("-")[0]
    if not major.isdigit() or int(major) < JAVA:
        raise ConfigError(
            f"data.engine: spark needs Java {JAVA} or newer, but {java} is {version or 'not a Java'}; {cure}"
        )


def _end(session: Any) -> None:
    """End a session and its Java process, which would keep its memory while the model is trained."""
    from pyspark import SparkContext

    session.stop()
    gateway = SparkContext._gateway
    if gateway is None:
        return  # Spark Connect: the process is elsewhere
    SparkContext._gateway = SparkContext._jvm = None
    gateway.shutdown()
    if (process := getattr(gateway, "proc", None)) is not None:
        process.stdin.close()
        process.wait()


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of Spark that a user can fix, as errors of peso."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JError, PySparkException) as error:
        text = str(error)
        if "No space left" in text:
            raise FullDisk(
                "no space left for Spark's files; no partial output is left. Free some space, in the "
                "workspace's file system and in spark.local.dir, and run the command again"
            ) from None
        if "OutOfMemoryError" in text or "Cannot acquire" in text:
            raise DataError(
                "Spark has not enough memory for this log; set spark.driver.memory, or spark.executor.memory "
                "for a cluster, in spark-defaults.conf in SPARK_CONF_DIR"
            ) from None
        raise

"""The temporary DuckDB database in which a log is ingested, or a stream examined: its limits, quoting, and
error messages.

Tables are kept in memory up to a limit. Beyond it they spill to a temporary folder in the directory that is
being written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from peso.errors import DataError, WorkspaceError
from peso.runtime.machine import usable_cores

MEMORY = "1.5GB"  # Python, Arrow and NumPy need about 0.5 GB more
WORK = ".ingest"  # the temporary folder
THREADS = 4  # the maximum, because each thread has its own buffers


@contextmanager
def temporary_database(directory: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to an empty database that spills into ``directory`` and leaves nothing there.

    Raises:
        DataError: DuckDB cannot read an input; the message names the file and line and says what to do.
        WorkspaceError: the disk is full.
    """
    work = directory / WORK
    work.mkdir()
    try:
        with duckdb.connect(":memory:") as connection:
            connection.execute(f"SET memory_limit = '{MEMORY}'")
            connection.execute(f"SET threads = {cores()}")
            connection.execute(f"SET temp_directory = {literal(str(work))}")
            # memory of dropped tables and finished queries goes back to the system while the next query runs
            connection.execute("SET allocator_background_threads = true")
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("SET enable_progress_bar = false")
            yield connection
    except duckdb.Error as error:
        raise _explained(error, directory) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def identifier(name: str) -> str:
    """A column or table name, quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def scalar(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    """The single number that a query returns."""
    return int(connection.execute(query).fetchall()[0][0])


def cores() -> int:
    """The number of threads to use: the available cores, at most ``THREADS``."""
    return min(usable_cores(), THREADS)


def _explained(error: duckdb.Error, directory: Path) -> Exception:
    text = str(error)
    if "No space left" in text or "failed to offload" in text or "max_temp_directory_size" in text:
        return WorkspaceError(
            f"no space left for temporary tables in {directory}; no partial output is left. Free some space "
            "and run the command again."
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return DataError(
            f"not enough memory for this log: {text.splitlines()[0]}. Tables use up to {MEMORY} of "
            "memory, the rest is on disk; this machine, container or shell (ulimit -v) allows less. Free "
            "some memory, or ingest the log in parts: the first one, then the others with --append"
        )
    if isinstance(error, duckdb.IOException | duckdb.InvalidInputException):
        return DataError(
            f"the data cannot be read: {text.splitlines()[0]}; download or create the file again"
        )
    return error

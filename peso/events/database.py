"""The DuckDB that computes an ingestion: its limits, its quoting, and what its complaints mean to a user.

Tables are held in memory up to a limit; what is beyond it spills to a folder beside what is being written,
which is gone afterwards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from peso.errors import DataError, WorkspaceError

MEMORY = "2GB"  # beside it Python, Arrow and NumPy need about 0.5 GB
THREADS = 4  # at most: each thread holds buffers of its own


@contextmanager
def temporary_database(directory: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to an empty database that spills into ``directory`` and leaves nothing there.

    Raises:
        DataError: an input that DuckDB cannot read; names file, line and cure.
        WorkspaceError: the disk is full.
    """
    work = directory / ".ingest"
    work.mkdir()
    try:
        with duckdb.connect(":memory:") as connection:
            connection.execute(f"SET memory_limit = '{MEMORY}'")
            connection.execute(f"SET threads = {cores()}")
            connection.execute(f"SET temp_directory = {literal(str(work))}")
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("SET enable_progress_bar = false")
            yield connection
    except duckdb.Error as error:
        raise _explained(error, directory) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def identifier(name: str) -> str:
    """A column or table name as it stands in SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as it stands in SQL."""
    return "'" + text.replace("'", "''") + "'"


def scalar(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    """The one number that a query gives."""
    return int(connection.execute(query).fetchall()[0][0])


def cores() -> int:
    """How many threads to compute with: the cores at hand, up to ``THREADS``."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, THREADS)


def _explained(error: duckdb.Error, directory: Path) -> Exception:
    text = str(error)
    if "No space left" in text or "failed to offload" in text or "max_temp_directory_size" in text:
        return WorkspaceError(
            f"no space left while ingesting into {directory}; nothing half-written was left behind. "
            "Free some space and start again."
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return DataError(
            f"not enough memory to ingest this log: {text.splitlines()[0]}. Up to {MEMORY} of tables are "
            "held in memory, the rest on disk; this machine, container or shell (ulimit -v) allows less. "
            "Free some, or ingest the log in parts: the first one, then the others with --append"
        )
    if isinstance(error, duckdb.IOException | duckdb.InvalidInputException):
        return DataError(f"the data cannot be read: {text.splitlines()[0]}; fetch or write the file again")
    return error

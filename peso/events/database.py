"""The DuckDB that computes an ingestion: its limits, its quoting, and what its complaints mean to a user.

Knows DuckDB; knows nothing of events. Tables are held in memory up to a limit; what is beyond it spills to a
folder beside what is being written, which is gone afterwards.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import duckdb

from peso.errors import DataError, WorkspaceError

MEMORY = "2GB"  # beside it Python, Arrow and NumPy need about 0.5 GB
THREADS = 4  # at most: each thread holds buffers of its own

_CSV_LINE = re.compile(r"CSV Error on Line: (\d+)")
_CSV_FILE = re.compile(r"^\s*file = (.+)$", re.MULTILINE)
_CSV_TEXT = re.compile(r"Original Line: (.*)")
_CSV_WIDTH = re.compile(r"Expected Number of Columns: (\d+) Found: (\d+)")
_JSON = re.compile(r'Malformed JSON in file "(.+?)", at byte (\d+) in (?:line|record/value) (\d+): (.+)')


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


def rejected_lines(connection: duckdb.DuckDBPyConnection) -> int:
    """Lines that the CSV reader has left out so far. A scan may meet one twice: its sample, its reading."""
    tables = "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'reject_errors'"
    if not scalar(connection, tables):
        return 0
    return scalar(
        connection,
        "SELECT count(*) FROM (SELECT DISTINCT file_path, line FROM reject_errors JOIN reject_scans "
        "USING (scan_id, file_id))",
    )


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
            f"this log does not fit the memory set aside for it ({MEMORY}): {text.splitlines()[0]}"
        )
    if line := _CSV_LINE.search(text):
        return _explained_csv(text, int(line[1]))
    if found := _JSON.search(text):
        file, _, reported, what = found.groups()
        line_number = _json_line(Path(file), int(reported))
        cure = "convert the file to UTF-8" if "UTF-8" in what else "fetch or write the file again"
        return DataError(
            f"{file}: line {line_number} is no valid JSON ({what.strip().rstrip('.')}); {cure}, "
            "or leave such lines out with data.on_error: skip"
        )
    if "GZIP" in text.upper():
        what = "is cut short" if "Unexpected end" in text else "is not gzip, whatever its name says"
        return DataError(f"{text.rpartition(': ')[2].strip()} {what}; fetch the file again")
    if isinstance(error, duckdb.IOException | duckdb.InvalidInputException):
        return DataError(f"the data cannot be read: {text.splitlines()[0]}; fetch or write the file again")
    return error


def _json_line(file: Path, reported: int) -> int:
    """DuckDB counts the line after the broken one in some versions: look which of the two it is."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as handle:
        for number, line in enumerate(islice(handle, max(reported - 2, 0), reported), max(reported - 1, 1)):
            try:
                json.loads(line)
            except ValueError:
                return number
    return reported


def _explained_csv(text: str, line: int) -> DataError:
    found = _CSV_FILE.search(text)
    file = found[1].strip() if found else "the file"
    original = _CSV_TEXT.search(text)
    content = original[1].strip()[:80] if original else ""
    skip = "or leave such lines out with data.on_error: skip"
    if "not utf-8" in text.lower() or "unicode" in text.lower():
        return DataError(
            f"{file}: line {line} is not UTF-8 ({content!r}); if the whole file has another encoding say so "
            f"(data.encoding: latin-1), if encodings are mixed convert it to UTF-8, {skip}"
        )
    if width := _CSV_WIDTH.search(text):
        return DataError(
            f"{file}: line {line} has {width[2]} columns where {width[1]} belong ({content!r}); "
            f"check data.separator, mend the line, {skip}"
        )
    what = text.split("\n")[2] if text.count("\n") > 1 else text
    return DataError(f"{file}: line {line} is no readable CSV ({content!r}: {what}); mend the line, {skip}")

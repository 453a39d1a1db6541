"""Which files a path means, and what columns they have.

Knows names, folders, globs, gzip and first lines; knows nothing of events.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from peso.errors import DataError

ENDINGS = {
    "csv": (".csv", ".tsv", ".tab", ".txt", ".dat", ".data", ".inter"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
}


def find_files(path: str, kind: str) -> list[Path]:
    """The files that ``path`` (a file, a folder or a glob) means, in order of name.

    Args:
        kind: ``csv``, ``jsonl`` or ``parquet``: of a folder the files with an ending of this kind, gzipped
            ones included, are taken.

    Raises:
        DataError: nothing there, or a file without a byte.
    """
    if Path(path).is_dir():
        endings = ENDINGS[kind]
        found = [f for f in Path(path).rglob("*") if f.is_file() and bare_suffix(f) in endings]
        if not found:
            raise DataError(f"the folder {path} holds no {kind} file ({', '.join(endings)}, or with .gz)")
    elif Path(path).is_file():
        found = [Path(path)]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()]
        if not found:
            raise DataError(f"there is no file at {path}; check data.path")
    for file in found:
        require_content(file)
    return sorted(found)


def kind_of(path: str) -> str | None:
    """``csv``, ``jsonl`` or ``parquet`` by the ending of a file (``log.csv.gz``) or glob; else None."""
    suffix = bare_suffix(Path(path))
    return next((kind for kind, endings in ENDINGS.items() if suffix in endings), None)


def require_content(file: Path) -> Path:
    """The file itself. Raises DataError if it is missing or empty."""
    if not file.is_file():
        raise DataError(f"{file} is missing; check data.path, or fetch the data again")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; fetch or write it again, or remove it")
    return file


def first_of(folder: Path, *names: str) -> Path | None:
    """The first of these names that is a file in the folder, gzipped or not."""
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


def bare_suffix(file: Path) -> str:
    """``.csv`` of ``log.csv`` and of ``log.csv.gz``."""
    return (Path(file.stem) if file.suffix == ".gz" else file).suffix.lower()


def first_fields(file: Path, separator: str, quote: str, encoding: str) -> list[str]:
    """The fields of a delimited file's first line.

    Raises:
        DataError: the line is not text in this encoding, or there is none.
    """
    try:
        with open_text(file, encoding, errors="replace") as handle:  # later bytes may be anything
            if quote:
                fields = next(csv.reader(handle, delimiter=separator, quotechar=quote), [])
            else:
                fields = handle.readline().rstrip("\r\n").split(separator)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise DataError(f"the first line of {file} is not readable ({error}); check data.encoding") from None
    if not any(fields):
        raise DataError(f"the first line of {file} is empty; fetch or write the file again")
    return fields


def is_utf8(file: Path) -> bool:
    """Whether all of the file is UTF-8 text."""
    try:
        with open_text(file, "utf-8") as handle:
            while handle.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True


def require_same(tables: Sequence[tuple[Path, list[str]]]) -> list[str]:
    """The columns that all files have. Raises DataError naming the file that differs."""
    (first, columns), *others = tables
    for file, other in others:
        if other != columns:
            raise DataError(
                f"{file} has the columns {', '.join(other)}, but {first} has {', '.join(columns)}; "
                "ingest files of one shape together"
            )
    return columns


@contextmanager
def open_text(file: Path, encoding: str, errors: str = "strict") -> Iterator[IO[str]]:
    """A text file, gzipped or not, with its line ends as they are."""
    name = "utf-8-sig" if encoding == "utf-8" else encoding
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as raw:
        yield io.TextIOWrapper(raw, encoding=name, errors=errors, newline="")

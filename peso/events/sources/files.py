"""Which files a path means, of which kind they are, and how they are opened."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from peso.errors import ConfigError, DataError

ENDINGS = {
    "csv": (".csv", ".tsv", ".tab", ".txt", ".dat", ".data", ".inter"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
}
# First bytes of what is not text, and what to do with it.
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_MAGIC = {
    _GZIP: "is a gzip file: give its name the ending .gz",
    b"PK\x03\x04": "is a zip archive (or a spreadsheet): unpack or export it, and give the text file",
    b"BZh": "is a bzip2 file: unpack it",
    b"\xfd7zXZ": "is an xz file: unpack it",
    b"\x28\xb5\x2f\xfd": "is a zstd file: unpack it",
    _PARQUET: "is a Parquet file: set the format to parquet",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet or document of Office: export the table as CSV",
    b"ARROW1": "is an Arrow (Feather) file: write the table as Parquet",
    b"SQLite format 3": "is an SQLite database: export the table as CSV or Parquet",
}
HEADER = 1 << 20  # characters; a longer first line is not the header of a table


def find_files(path: str, kind: str, key: str = "data.path") -> list[Path]:
    """The files that ``path`` (a file, a folder or a glob) means, in order of name.

    A path that exists is that file or folder, whatever characters its name holds; only where there is none it
    is read as a glob.

    Args:
        kind: ``csv``, ``jsonl`` or ``parquet``: of a folder the files with an ending of this kind, gzipped
            ones included, are taken, except hidden ones (they or a folder above them begin with a dot).
        key: of the configuration, for messages.

    Raises:
        DataError: nothing there, or a file without a byte.
    """
    if Path(path).is_dir():
        endings = ENDINGS[kind]
        found = [file for file in _shown(Path(path)) if bare_suffix(file) in endings]
        if not found:
            raise DataError(f"the folder {path} holds no {kind} file ({', '.join(endings)}, or with .gz)")
    elif Path(path).is_file():
        found = [Path(path)]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if not Path(name).is_dir()]
        if not found:
            raise DataError(f"there is no file at {path}; check {key}")
    for file in found:
        require_content(file)
    return sorted(found)


def kind_of(path: str) -> str | None:
    """``csv``, ``jsonl`` or ``parquet`` by the ending of a file (``log.csv.gz``) or glob; else None."""
    suffix = bare_suffix(Path(path))
    return next((kind for kind, endings in ENDINGS.items() if suffix in endings), None)


def format_of(path: str) -> str:
    """The ``data.format`` of a file by its ending, of a folder by the files in it.

    Raises:
        ConfigError: the ending says nothing, or the folder holds files of no kind or of several.
        DataError: the file begins as one that is not read.
    """
    if not Path(path).is_dir():
        if kind := kind_of(path):
            return kind
        if not Path(path).exists():
            raise ConfigError(f"there is no file or folder at {path}")
        require_text(Path(path))
        known = ", ".join(ending for endings in ENDINGS.values() for ending in endings)
        raise ConfigError(
            f"the ending of {path} does not say what it holds (known are {known}); give --format, "
            "for example --format csv"
        )
    names = [file.name for file in Path(path).iterdir()]
    if any(".all.block_" in name for name in names):
        return "peso-release"
    kinds = {kind for file in _shown(Path(path)) if (kind := kind_of(file.name))}
    if len(kinds) == 1:
        return kinds.pop()
    held = f"files of several kinds ({', '.join(sorted(kinds))})" if kinds else "no file with a known ending"
    raise ConfigError(f"the folder {path} holds {held}; give --format, for example --format csv")


def _shown(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, nor in a hidden folder; links are followed."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(place) / name for name in files if name[0] != "."]
    return found


def _raise(error: OSError) -> None:
    raise error


def require_content(file: Path, key: str = "data.path") -> Path:
    """The file itself, which ``key`` names in the configuration. Raises DataError if missing or empty."""
    if not file.is_file():
        what = "is missing" if not os.path.lexists(file) else "is not a file, or a link to nothing"
        raise DataError(f"{file} {what}; check {key}, or fetch the data again")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; fetch or write it again, or remove it")
    return file


def require_text(file: Path) -> Path:
    """The file itself. Raises DataError if it is evidently not text, packed with gzip or not."""
    start = _first_bytes(file)
    if _is_gzip(file):
        if not start.startswith(_GZIP):
            raise DataError(
                f"{file} is not gzip, whatever its name says; give it its right ending, or fetch it again"
            )
        with open_bytes(file) as unpacked:
            start = unpacked.read(16)
        if start.startswith(_GZIP):
            raise DataError(f"{file} was packed twice with gzip: unpack it once")
    if what := _magic(start):
        raise DataError(f"{file} {what}")
    return file


def require_parquet(file: Path) -> Path:
    """The file itself. Raises DataError if it does not begin as a Parquet file does."""
    start = _first_bytes(file)
    if start.startswith(_GZIP):
        raise DataError(f"{file} is a gzip file: unpack it; a Parquet file is compressed in itself")
    if not start.startswith((_PARQUET, b"PARE")):
        what = _magic(start) or "is not a Parquet file: set the format to what it is, such as csv"
        raise DataError(f"{file} {what}")
    return file


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as raw:
        return raw.read(16)


def _magic(start: bytes) -> str | None:
    return next((what for magic, what in _MAGIC.items() if start.startswith(magic)), None)


def first_of(folder: Path, *names: str) -> Path | None:
    """The first of these names that is a file in the folder, gzipped or not."""
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


def bare_suffix(file: Path) -> str:
    """``.csv`` of ``log.csv`` and of ``log.csv.gz``."""
    return (Path(file.stem) if _is_gzip(file) else file).suffix.lower()


def first_fields(file: Path, separator: str, quote: str, encoding: str) -> list[str]:
    """The fields of a delimited file's first line.

    Raises:
        DataError: the line is not text in this encoding, or there is none.
    """
    with open_text(file, encoding) as handle:
        line = handle.readline(HEADER).rstrip("\n")
    if any(mark in line for mark in ("\0", "\ufffd")) or any("\udc80" <= mark <= "\udcff" for mark in line):
        raise DataError(
            f"the first line of {file} is not {encoding} text; set data.encoding (utf-8, latin-1, utf-16)"
        )
    fields = line.split(separator)
    if quote and quote in line:
        try:
            fields = next(csv.reader([line], delimiter=separator, quotechar=quote, strict=True))
        except csv.Error as error:
            raise DataError(
                f"the first line of {file} has a quote out of place ({error}): {line[:80]!r}"
            ) from None
    if not any(fields):
        raise DataError(f"the first line of {file} is empty; fetch or write the file again")
    return fields


def is_utf8(file: Path) -> bool:
    """Whether all of the file is UTF-8 text."""
    with open_bytes(file) as raw:
        try:
            for _ in io.TextIOWrapper(raw, encoding="utf-8"):
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
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """A file, unpacked if its name ends in .gz; whoever reads it to its end has its checksum verified.

    Raises:
        DataError: gzip data that are cut short or damaged.
    """
    try:
        with gzip.open(file, "rb") if _is_gzip(file) else file.open("rb") as raw:
            yield cast(BinaryIO, raw)
    except EOFError:
        raise DataError(f"{file} is cut short; fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is damaged ({error}); fetch the file again") from None
    except UnicodeError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DataError(f"{file} does not begin as UTF-16 text does ({error}); convert it to UTF-8") from None


@contextmanager
def open_text(file: Path, encoding: str) -> Iterator[IO[str]]:
    """A text file, gzipped or not, whose lines all end in a line feed.

    Bytes that are no text in this encoding come as lone surrogates (UTF-8) or as U+FFFD (UTF-16).
    """
    name = "utf-8-sig" if encoding == "utf-8" else encoding
    with open_bytes(file) as raw:
        yield io.TextIOWrapper(
            raw, encoding=name, errors="replace" if encoding == "utf-16" else "surrogateescape"
        )


def _is_gzip(file: Path) -> bool:
    return file.suffix.lower() == ".gz"

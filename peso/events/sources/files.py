"""Find the files that a path refers to, recognize their formats, and open them."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from peso.config.reading import MARKS, matching
from peso.errors import ConfigError, DataError
from peso.runtime.failures import listed

ENDINGS = {
    "csv": (".csv", ".tsv", ".tab", ".txt", ".dat", ".data", ".inter"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
}
# The first bytes of files that are not text, and what to do with them.
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_MAGIC = {
    _GZIP: "is a gzip file: rename it to end in .gz",
    b"PK\x03\x04": "is a zip archive (or a spreadsheet): unpack or export it, and use the text file",
    b"BZh": "is a bzip2 file: unpack it",
    b"\xfd7zXZ": "is an xz file: unpack it",
    b"\x28\xb5\x2f\xfd": "is a zstd file: unpack it",
    _PARQUET: "is a Parquet file: set the format to parquet",
    b"\xd0\xcf\x11\xe0": "is an Office spreadsheet or document: export the table as CSV",
    b"ARROW1": "is an Arrow (Feather) file: export the table as Parquet",
    b"SQLite format 3": "is an SQLite database: export the table as CSV or Parquet",
}
SHOWN = 12  # names in a message
HEADER = 1 << 20  # characters; a longer first line is not the header of a table


def find_files(path: str, kind: str, key: str = "data.path") -> list[Path]:
    """The files that a path refers to, in the order of their names.

    Args:
        path: a file, a folder or a glob pattern. An existing path is that file or folder even if its name has
            special characters; it is a pattern only if it does not exist.
        kind: ``csv``, ``jsonl`` or ``parquet``. In a folder, all files with an extension of this kind are
            used, including gzipped ones, except hidden files and files in hidden folders.
        key: the key of the configuration, for messages.

    Raises:
        DataError: there are no files, or a file is empty.
    """
    if Path(path).is_dir():
        endings = ENDINGS[kind]
        found = [file for file in _shown(Path(path)) if bare_suffix(file) in endings]
        if not found:
            raise DataError(
                f"the folder {path} has no {kind} file ({', '.join(endings)}, or one of these with .gz); "
                f"check {key} and the format"
            )
    elif Path(path).is_file():
        found = [Path(path)]
    else:
        found = [file for file in matching(path) if not file.is_dir()]
        if not found:
            is_pattern = any(mark in path for mark in MARKS)
            what = f"no file matches {path}" if is_pattern else f"there is no file at {path}"
            raise DataError(f"{what}; check {key}")
    for file in found:
        require_content(file)
    return sorted(found)


def kind_of(path: str) -> str | None:
    """``csv``, ``jsonl`` or ``parquet`` by the extension of a file (``log.csv.gz``) or pattern; else None."""
    suffix = bare_suffix(Path(path))
    return next((kind for kind, endings in ENDINGS.items() if suffix in endings), None)


def format_of(path: str) -> str:
    """The ``data.format`` of a file by its extension, or of a folder by the files in it.

    Raises:
        ConfigError: the extension is not known, or the folder has no files of a known format or files of
            several formats.
        DataError: the file is of a format that cannot be read.
    """
    if not Path(path).is_dir():
        if kind := kind_of(path):
            return kind
        if not Path(path).exists():
            raise ConfigError(f"there is no file or folder at {path}; check the path")
        require_text(Path(path))
        known = ", ".join(ending for endings in ENDINGS.values() for ending in endings)
        raise ConfigError(
            f"the format of {path} cannot be recognized from its extension (known: {known}); set --format, "
            "for example --format csv"
        )
    if any(Path(path).glob("*.all.block_*.json")):
        return "peso-release"
    kinds = {kind for file in _shown(Path(path)) if (kind := kind_of(file.name))}
    if len(kinds) == 1:
        return kinds.pop()
    held = f"files of several formats ({', '.join(sorted(kinds))})" if kinds else "no file of a known format"
    raise ConfigError(f"the folder {path} has {held}; set --format, for example --format csv")


def _shown(folder: Path) -> list[Path]:
    """All files below a folder, except hidden files and files in hidden folders. Links are followed."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder that was visited
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name[0] != "."]
        found += [Path(place) / name for name in files if name[0] != "."]
    return found


def _raise(error: OSError) -> None:
    raise error


def require_content(file: Path, key: str = "data.path") -> Path:
    """Check that a file, which ``key`` names in the configuration, is not empty, and return it.

    Raises:
        DataError: the file is missing or empty.
    """
    if not file.is_file():
        what = "is missing" if not os.path.lexists(file) else "is not a file, or is a broken link"
        raise DataError(f"{file} {what}; check {key}, or download the data again")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; download or create it again, or remove it")
    return file


def require_text(file: Path) -> Path:
    """Check that a file, gzipped or not, looks like text, and return it.

    Raises:
        DataError: the file is of another format.
    """
    start = _first_bytes(file)
    if _is_gzip(file):
        if not start.startswith(_GZIP):
            raise DataError(
                f"{file} is not a gzip file, despite its name; correct its extension, or download it again"
            )
        with open_bytes(file) as unpacked:
            start = unpacked.read(16)
        if start.startswith(_GZIP):
            raise DataError(f"{file} was compressed twice with gzip: decompress it once")
    if what := _magic(start):
        raise DataError(f"{file} {what}")
    return file


def require_parquet(file: Path) -> Path:
    """Check that a file begins like a Parquet file, and return it.

    Raises:
        DataError: the file is of another format.
    """
    start = _first_bytes(file)
    if start.startswith(_GZIP):
        raise DataError(f"{file} is a gzip file: decompress it; Parquet files are already compressed")
    if not start.startswith((_PARQUET, b"PARE")):
        what = _magic(start) or "is not a Parquet file: set the right format, such as csv"
        raise DataError(f"{file} {what}")
    return file


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as raw:
        return raw.read(16)


def _magic(start: bytes) -> str | None:
    return next((what for magic, what in _MAGIC.items() if start.startswith(magic)), None)


def first_of(folder: Path, *names: str) -> Path | None:
    """The first of these names that exists as a file in the folder, gzipped or not; else None."""
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


def find_named(path: str, *names: str) -> Path:
    """The first of these names that exists in a folder, gzipped or not; or the file itself.

    Raises:
        DataError: there is no such file.
    """
    given = Path(path)
    found = first_of(given, *names) if given.is_dir() else given
    if found is None:
        raise DataError(f"{given} has no {names[0]}; give the folder of the unpacked data set")
    return found


class ChoiceError(DataError):
    """A path has several data sets, or variants of one, of which the user must name one."""

    def __init__(self, path: str | Path, variants: Sequence[str], what: str = "the folder of one") -> None:
        super().__init__(
            f"{path} has several data sets, or variants of one ({listed(variants, SHOWN)}); give {what}"
        )


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, in the order of their names, except hidden ones."""
    return sorted(each for each in folder.iterdir() if each.is_dir() and each.name[0] != ".")


def bare_suffix(file: Path) -> str:
    """The extension of a file without ``.gz``: ``.csv`` for ``log.csv`` and for ``log.csv.gz``."""
    return (Path(file.stem) if _is_gzip(file) else file).suffix.lower()


def first_fields(file: Path, separator: str, quote: str, encoding: str) -> list[str]:
    """The fields of a delimited file's first line.

    Raises:
        DataError: the line is empty or is not text in this encoding.
    """
    with open_text(file, encoding) as handle:
        line = handle.readline(HEADER).rstrip("\n")
    if any(mark in line for mark in ("\0", "\ufffd")) or any("\udc80" <= mark <= "\udcff" for mark in line):
        likely = "utf-16" if "\0" in line else "latin-1"  # in UTF-16, every other byte of English is zero
        raise DataError(
            f"the first line of {file} is not {encoding} text; set data.encoding (utf-8, latin-1 or utf-16), "
            f"for example --set data.encoding={likely}"
        )
    fields = line.split(separator)
    if quote and quote in line:
        try:
            fields = next(csv.reader([line], delimiter=separator, quotechar=quote, strict=True))
        except csv.Error as error:
            raise DataError(
                f"the first line of {file} has a misplaced quote ({error}): {line[:80]!r}; correct it, or "
                "set data.quote to none if quotes are part of the text"
            ) from None
    if not any(fields):
        raise DataError(f"the first line of {file} is empty; download or create the file again")
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
    """The columns of all files, which must be the same.

    Raises:
        DataError: the columns of a file differ; the message names it.
    """
    (first, columns), *others = tables
    for file, other in others:
        if other != columns:
            raise DataError(
                f"{file} has the columns {', '.join(other)}, but {first} has {', '.join(columns)}; "
                "ingest only files with the same columns together"
            )
    return columns


@contextmanager
def open_bytes(file: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressed if its name ends in .gz. Reading a gzip file to its end checks its checksum.

    Raises:
        DataError: the gzip data are truncated or damaged.
    """
    try:
        with gzip.open(file, "rb") if _is_gzip(file) else file.open("rb") as raw:
            yield cast(BinaryIO, raw)
    except EOFError:
        raise DataError(f"{file} is truncated; download the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is damaged ({error}); download the file again") from None


@contextmanager
def open_text(file: Path, encoding: str) -> Iterator[IO[str]]:
    """Open a text file, gzipped or not. All line ends are read as line feeds.

    Bytes that are not text in this encoding are read as lone surrogates (UTF-8) or as U+FFFD (UTF-16).

    Raises:
        DataError: UTF-16 without a byte order mark; or as :func:`open_bytes`.
    """
    name = "utf-8-sig" if encoding == "utf-8" else encoding
    with open_bytes(file) as raw:
        if encoding == "utf-16":
            if (begin := raw.read(2)) not in (b"", BOM_UTF16_LE, BOM_UTF16_BE):
                raise DataError(
                    f"{file} does not begin like UTF-16 text: its first bytes are {begin!r}, not a byte "
                    "order mark; set data.encoding to the encoding of the file, or convert it to UTF-8"
                )
            raw.seek(0)
        yield io.TextIOWrapper(
            raw, encoding=name, errors="replace" if encoding == "utf-16" else "surrogateescape"
        )


def _is_gzip(file: Path) -> bool:
    return file.suffix.lower() == ".gz"

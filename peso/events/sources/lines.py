"""Read delimited text and JSON lines one line at a time, in Python.

DuckDB reads plain files many times faster. This module is for all other files: those with quotes, mixed line
ends, other encodings, or unreadable lines, which are reported or counted one by one.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from peso.events.sources.files import open_bytes, open_text

LONGEST = 16 << 20  # the maximum number of characters of a line
LONGEST_SPAN = 1 << 20  # the maximum number of characters of a record on several lines
BLOCK = 1 << 20
ESCAPED_KEY = re.compile(rb'"[^"\\]*+\\[^"]*+"\s*+:')  # for text without escaped quotes and backslashes


@dataclass(frozen=True)
class Dialect:
    """The format of delimited text. ``quote`` is empty if quotes are part of the text."""

    separator: str
    header: bool
    encoding: str = "utf-8"
    quote: str = '"'


@dataclass(frozen=True)
class QuoteCheck:
    """When a quoted field counts as an error, because a missing or misplaced quote makes it include rows.

    A line inside the field looks like a row if it has the right number of fields, and its field number
    ``key`` (the time of a log, the id of a product) has the same format as in the last row. A field with
    ``rows`` or more such lines is an error.
    """

    key: int
    rows: int


@dataclass(frozen=True)
class Unreadable:
    """Why a line cannot be read. ``reason`` completes the sentence "line 3 …"."""

    reason: str


def count_plain_rows(file: Path, dialect: Dialect | None = None, keys: Sequence[str] = ()) -> int | None:
    """The number of rows of a text file without its header, or None if a line may not be exactly one row, or
    has quotes elsewhere than around a whole field.

    Every byte is read, so damaged gzip files are detected.

    Args:
        dialect: the format of delimited text; None for JSON lines.
        keys: for JSON lines, keys that every row may have only once. The result is also None if a line may
            have one of them twice, or a key that is written with escapes.
    """
    if dialect and dialect.encoding != "utf-8":
        return None
    quote = dialect.quote.encode() if dialect else b""
    names = [json.dumps(key, ensure_ascii=False).encode() for key in keys]
    rows, ends = 0, set()
    with open_bytes(file) as handle:
        for block in iter(partial(handle.read, BLOCK), b""):
            rest = handle.readline(LONGEST)
            block += rest
            lines, returns = block.count(b"\n"), block.count(b"\r")
            pairs = block.count(b"\r\n") if returns else 0
            ends |= {b"\r\n"} if pairs else {b"\n"} if lines else set()
            if returns != pairs or pairs not in (0, lines) or len(ends) > 1:
                return None  # line ends of several kinds
            if len(rest) > LONGEST - BLOCK or not _is_utf8(block):
                return None
            if dialect and quote and quote in block and not _quotes_whole_fields(block, dialect):
                return None
            if any(line.count(name) > 1 for line in block.split(b"\n") for name in names):
                return None
            if names and b"\\u" in block and _has_escaped_key(block):
                return None
            rows += lines + (not block.endswith(b"\n"))
            if block.startswith((b"\n", b"\r")) or (b"\n\r\n" if pairs else b"\n\n") in block:
                rows -= block.splitlines().count(b"")
    return rows - (dialect.header if dialect else 0)


def _quotes_whole_fields(lines: bytes, dialect: Dialect) -> bool:
    """Whether every quote begins or ends a field that has no other quote, no line end and some content."""
    if len(dialect.separator.encode() + dialect.quote.encode()) > 2:
        return False
    fields = _fields(dialect.separator, dialect.quote)
    return fields.fullmatch(lines if lines.endswith(b"\n") else lines + b"\n") is not None


@cache
def _fields(separator: str, quote: str) -> re.Pattern[bytes]:
    end, mark = re.escape(separator).encode(), re.escape(quote).encode()
    field = b"(?:%b[^%b\r\n]++%b|[^%b%b\r\n]*+)" % (mark, mark, mark, mark, end)
    return re.compile(b"(?:%b(?:%b|\r?\n))*+" % (field, end))


def delimited_rows(
    file: Path, dialect: Dialect, width: int, check: QuoteCheck | None = None
) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """The rows of delimited text without its header, each with the number of its first line.

    If a record cannot be read, only its first line is lost: reading continues with the next line.

    Args:
        width: the number of columns.
        check: when a quoted field counts as an error; None: never.
    """
    last: list[str] | None = None

    def looks_like_row(line: str) -> bool:
        assert check is not None
        fields = line.split(dialect.separator)
        return len(fields) == width and (last is None or _shape(fields[check.key]) == _shape(last[check.key]))

    header = dialect.header
    with open_text(file, dialect.encoding) as handle:
        lines = _Lines(handle)
        for number, line in lines:
            if not line:
                continue
            row: list[str] | Unreadable | None = _not_text(line, dialect.encoding)
            if row is None and dialect.quote and dialect.quote in line:
                row = _quoted_record(line, lines, dialect, looks_like_row, check.rows if check else None)
            elif row is None:
                row = line.split(dialect.separator)
            if header:
                header = False
                continue
            if isinstance(row, list) and len(row) == width + 1 and not row[-1]:
                row.pop()  # a separator at the end of the line; DuckDB also reads such a row
            if isinstance(row, list) and len(row) != width:
                row = Unreadable(f"has {len(row)} columns instead of {width} ({line[:80]!r})")
            if isinstance(row, list):
                last = row
            yield number, row


def _quoted_record(
    first: str, lines: _Lines, dialect: Dialect, looks_like_row: Callable[[str], bool], limit: int | None
) -> list[str] | Unreadable:
    """The fields of a record with quotes, which may continue on further lines.

    Args:
        first: the first line of the record.
        lines: the lines after it.
        looks_like_row: whether a line looks like a row.
        limit: the number of lines in the record that look like rows at which the record counts as unreadable;
            None for no limit.
    """
    taken: list[tuple[int, str]] = []

    def record() -> Iterator[str]:
        yield first + "\n"
        alike, size = 0, len(first)
        for number, line in lines:
            taken.append((number, line))
            alike += limit is not None and looks_like_row(line)
            if limit is not None and alike >= limit:
                raise csv.Error(f"the quoted field includes line {number}, which looks like a row itself")
            size += len(line)
            if size > LONGEST_SPAN or _not_text(line, dialect.encoding):
                raise csv.Error(f"the quoted field does not end before line {number}")
            yield line + "\n"

    usual = csv.field_size_limit(LONGEST)  # of the whole process
    try:
        fields = csv.reader(record(), delimiter=dialect.separator, quotechar=dialect.quote, strict=True)
        return next(fields)
    except csv.Error as error:
        lines.give_back(taken)
        return Unreadable(f"has a missing or misplaced quote: {error} ({first[:80]!r})")
    finally:
        csv.field_size_limit(usual)


def json_rows(
    file: Path, read_line: Callable[[str], dict[str, Any] | Unreadable] | None = None
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """The objects of JSON lines, each with the number of its line.

    Args:
        read_line: reads a line that is not JSON; None for JSON.
    """
    read_line = read_line or _json_object
    with open_text(file, "utf-8") as handle:
        for number, line in _Lines(handle):
            if line.strip():
                yield number, _not_text(line, "utf-8") or read_line(line)


def first_object(
    file: Path, read_line: Callable[[str], dict[str, Any] | Unreadable] | None = None
) -> dict[str, Any] | None:
    """The object in the first line that is not blank; None if that line cannot be read, or there is none."""
    for _, row in json_rows(file, read_line):
        return row if isinstance(row, dict) else None
    return None


def dictionary(line: str) -> dict[str, Any] | Unreadable:
    """A line that is a Python dictionary of literals, which is evaluated without executing anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # a backslash in a text
            value = ast.literal_eval(line.strip())
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # fails for what JSON cannot hold
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        return Unreadable(f"is neither JSON nor a Python dictionary: {error} ({line[:80]!r})")
    if not isinstance(value, dict):
        return Unreadable(f"is not a dictionary ({line[:80]!r})")
    return value


def _json_object(line: str) -> dict[str, Any] | Unreadable:
    try:
        value = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_Object)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # fails for a lone surrogate
    except (ValueError, RecursionError) as error:
        return Unreadable(f"is not valid JSON: {error} ({line[:80]!r})")
    if not isinstance(value, _Object):
        return Unreadable(f"is not a JSON object ({line[:80]!r})")
    return value if value.twice is None else Unreadable(f"has the key {value.twice!r} twice ({line[:80]!r})")


class _Object(dict[str, Any]):
    """A JSON object. ``twice`` is a key that it has more than once, or None."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        repeated = len(self) < len(pairs)
        self.twice = Counter(key for key, _ in pairs).most_common(1)[0][0] if repeated else None


class _Lines:
    """The lines of a text without their ends, each with its number. Lines can be given back.

    Lines that are too long are cut after ``LONGEST`` + 1 characters.
    """

    def __init__(self, handle: IO[str]) -> None:
        self._handle = handle
        self._number = 0
        self._ahead: deque[tuple[int, str]] = deque()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        if self._ahead:
            return self._ahead.popleft()
        line = self._handle.readline(LONGEST + 1)
        if not line:
            raise StopIteration
        self._number += 1
        ended = line.endswith("\n")
        while not ended and (rest := self._handle.readline(BLOCK)):
            ended = rest.endswith("\n")
        return self._number, line.removesuffix("\n")

    def give_back(self, lines: list[tuple[int, str]]) -> None:
        self._ahead.extendleft(reversed(lines))


def _not_text(line: str, encoding: str) -> Unreadable | None:
    """Why a line is not valid text: it is too long, or has bytes that are not valid in this encoding."""
    if len(line) > LONGEST:
        return Unreadable(
            f"has more than {LONGEST:,} characters ({line[:40]!r}…), which is too long for a row"
        )
    if line.isascii() or encoding == "latin-1":
        return None
    try:
        if encoding != "utf-16" or "\ufffd" not in line:  # see open_text
            line.encode()
            return None
    except UnicodeEncodeError:
        pass
    return Unreadable(
        f"is not {encoding.upper()} ({line[:80]!r}); if the whole file has another encoding, set it (for "
        "CSV, --set data.encoding=latin-1), or convert the file"
    )


def _has_escaped_key(block: bytes) -> bool:
    r"""Whether a key may be written with escapes, such as ``"\u0075ser"`` for ``"user"``."""
    return ESCAPED_KEY.search(block.replace(rb"\\", b"").replace(rb"\"", b"")) is not None


def _is_utf8(block: bytes) -> bool:
    try:
        return block.isascii() or bool(block.decode())
    except UnicodeDecodeError:
        return False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _shape(value: str) -> str:
    """The format of a value: sequences of digits become 0, other words become a."""
    return re.sub(r"\w+", lambda word: "0" if word[0].isdigit() else "a", value)

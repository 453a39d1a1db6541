"""Random logs: rows in the file = rows kept + rows counted out, or a sentence that says what is the matter.

`PESO_FUZZ_SECONDS` (5) is divided among the tests here.
"""

from __future__ import annotations

import gzip
import json
import random
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pytest
from event_logs import data_config
from fuzzing import ALL_SECONDS, at_most, fuzz_settings
from hypothesis import given
from hypothesis import strategies as st

from peso.errors import DataError
from peso.events.ingest import ingest
from peso.events.sources import reading
from peso.events.sources.tables import csv_table, jsonl_table

SECONDS = ALL_SECONDS / 4
T = 1_600_000_000
GOOD = ("plain", "quoted", "comma", "lines", "escaped")
BAD = ("time", "user", "short", "long", "encoding", "quote", "after")


fuzzed, for_seconds = fuzz_settings(SECONDS), partial(at_most, SECONDS)
pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(int(SECONDS * 4) + 300)]


def csv_row(kind: str, number: int) -> bytes:
    user, item, when = f"u{number % 3}", f"i{number % 5}", T + number
    note = {
        "plain": "fine",
        "quoted": '"fine"',
        "comma": '"a, b, ""c"" and d"',
        "lines": '"first line\nsecond, line\n\n""third"""',
        "escaped": '""',
        "quote": '"half',
        "after": '"half" a note',
    }.get(kind, "fine")
    row = f"{user},{item},{when},{note}"
    row = {
        "time": f"{user},{item},soon,fine",
        "user": f",{item},{when},fine",
        "short": f"{user},{item},{when}",
        "long": f"{row},more",
    }.get(kind, row)
    return row.encode() + (b"\xff\xfe" if kind == "encoding" else b"")


def json_row(kind: str, number: int) -> bytes:
    row: dict[str, Any] = {
        "user": f"u{number % 3}",
        "item": number % 5,
        "time": T + number,
        "note": 'x "y"\n',
    }
    row |= {"time": {"time": "soon"}, "user": {"user": None}, "lines": {"user": 7.0}}.get(kind, {})
    if kind == "long":
        row["item"] = ["i1", "i2"]
    text = json.dumps(row).encode()
    return {
        "short": text[:-5],
        "encoding": text.replace(b"u", b"\xff", 1),
        "quote": text + text,
        "after": b"[1]",
        "comma": b"  " + text + b" ",
    }.get(kind, text)


def outcome(content: bytes, kind: str, packed: bool, on_error: str) -> dict[str, Any]:
    """The manifest of what was ingested. Raises DataError."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / (f"log.{kind}.gz" if packed else f"log.{kind}")
        path.write_bytes(gzip.compress(content, 1) if packed else content)
        (Path(folder) / "stream").mkdir()
        return ingest(
            data_config(format=kind, path=str(path), stages=1, on_error=on_error), Path(folder) / "stream"
        )


def accounted(manifest: dict[str, Any]) -> bool:
    """Whether every row that was read is kept or counted out."""
    steps = {step["step"]: step["events"] for step in manifest["funnel"]}
    kept = sum(stage["events"] for stage in manifest["stages"])
    return steps["read"] == steps["readable"] + manifest["skipped"] and steps["duplicates kept once"] == kept


rows = st.lists(st.sampled_from(GOOD * 3 + BAD), min_size=0, max_size=30)


@fuzzed
@given(
    kinds=rows,
    ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=1, max_size=3),
    blank=st.sets(st.integers(0, 30), max_size=3),
    last=st.booleans(),
    packed=st.booleans(),
    kind=st.sampled_from(["csv", "jsonl"]),
)
@for_seconds
def test_every_row_is_kept_or_counted_out(
    kinds: list[str], ends: list[bytes], blank: set[int], last: bool, packed: bool, kind: str
) -> None:
    kinds = ["plain", *kinds, "plain", "plain", "plain"]  # a stage needs a user of three events
    make = csv_row if kind == "csv" else json_row
    lines = [make(name, 3 * place if name in GOOD else place) for place, name in enumerate(kinds)]
    lines = [b"user,item,time,note"] * (kind == "csv") + lines
    content = b""
    for place, line in enumerate(lines):
        end = ends[place % len(ends)]
        content += line + end + end * (place in blank)
    content = content if last else content.rstrip(b"\r\n")
    bad = [name for name in kinds if name in BAD]
    manifest = outcome(content, kind, packed, "skip")
    assert manifest["funnel"][0]["events"] == len(kinds)
    assert manifest["skipped"] == len(bad)
    assert accounted(manifest)
    if bad:
        with pytest.raises(DataError, match=rf"log\.{kind}.*: (line|row) \d+"):
            outcome(content, kind, packed, "fail")
    else:
        assert outcome(content, kind, packed, "fail")["stages"] == manifest["stages"]


@fuzzed
@given(
    kinds=rows,
    seed=st.integers(0, 2**32),
    changes=st.integers(1, 6),
    kind=st.sampled_from(["csv", "jsonl"]),
    on_error=st.sampled_from(["fail", "skip"]),
)
@for_seconds
def test_a_log_with_random_bytes_changed_is_accounted_for_or_refused(
    kinds: list[str], seed: int, changes: int, kind: str, on_error: str
) -> None:
    rng = random.Random(seed)
    make = csv_row if kind == "csv" else json_row
    content = bytearray(b"user,item,time,note\n" if kind == "csv" else b"")
    content += b"".join(make(name, place) + b"\n" for place, name in enumerate(["plain"] * 9 + kinds))
    for _ in range(changes):
        at = rng.randrange(len(content))
        how = rng.randrange(4)
        if how == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del content[at : at + rng.randrange(1, 20)]
        else:
            content[at:at] = rng.choice([b'"', b"\n", b"\r", b",", b"\0", b"{", b"\xe9", b"nan", b"9" * 30])
    try:
        manifest = outcome(bytes(content), kind, False, on_error)
    except DataError:
        return
    assert accounted(manifest)
    text = bytes(content).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = sum(bool(line.strip(b" \t") if kind == "jsonl" else line) for line in text.split(b"\n"))
    if kind == "jsonl" or b'"' not in text:
        assert manifest["funnel"][0]["events"] == lines - (kind == "csv")


def packed_log() -> bytes:
    noise = random.Random(0)
    lines = [f"u{k % 3},i{noise.randrange(10**6)},{T + k}" for k in range(300)]
    return gzip.compress("\n".join(["user,item,time", *lines]).encode(), mtime=0)


PACKED = packed_log()


@fuzzed
@given(place=st.integers(10, len(PACKED) - 1), bit=st.integers(0, 7), cut=st.booleans())
@for_seconds
def test_a_damaged_gzip_file_is_refused(place: int, bit: int, cut: bool) -> None:
    damaged = bytearray(PACKED)
    if cut:
        del damaged[place:]
    else:
        damaged[place] ^= 1 << bit
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv.gz"
        path.write_bytes(damaged)
        (Path(folder) / "stream").mkdir()
        config = data_config(format="csv", path=str(path), stages=1, on_error="skip")
        with pytest.raises(DataError, match=r"log\.csv\.gz"):
            ingest(config, Path(folder) / "stream")


CELLS = ["a", "1", "1.0", "01", "", "nan", "é", "\u2028", "\v", "\x85", " x", "x ", "\t", "\\N", "'q'", "\0"]
VALUES = ["1", "1.0", "1.5", "-0", "-0.0", "1e2", "2.50e3", "1e-2", "123456789012345678901", "1e400", "1e17"]
VALUES += [
    "9007199254740993.0",
    "true",
    "null",
    '"a"',
    '" "',
    r'"\u00e9"',
    r'"\n"',
    "[]",
    '{"a": 1}',
    "5e-324",
]


@fuzzed
@given(
    kind=st.sampled_from(["csv", "jsonl"]),
    cells=st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=4), min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
)
@for_seconds
def test_both_readers_read_alike(kind: str, cells: list[list[int]], end: str) -> None:
    """DuckDB, and Python where DuckDB would not do."""
    if kind == "csv":
        lines = ["x,y,z", *(",".join(CELLS[n % len(CELLS)] for n in row) for row in cells)]
    else:
        pairs = [zip("xyzz", (VALUES[n % len(VALUES)] for n in row), strict=False) for row in cells]
        lines = ["{" + ", ".join(f'"{k}": {v}' for k, v in dict(row).items()) + "}" for row in pairs]
        lines.append('{"x": 1, "y": 2, "z": 3}')
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / f"log.{kind}"
        path.write_text(end.join([*lines, ""]), encoding="utf-8", newline="")
        found = [ids_read(path, kind)]
        patch.setattr(reading, "count_plain_rows", lambda *_: None)
        found.append(ids_read(path, kind))
    assert found[0] == found[1]


def ids_read(path: Path, kind: str) -> tuple[int, list[tuple[str | None, ...]]]:
    """How many lines were left out, and the ids of the rows."""
    table = csv_table([path], ",", header=True) if kind == "csv" else jsonl_table([path], list("xyz"))
    with duckdb.connect() as connection:
        read = reading.Reading(connection, table, skip=True)
        read.create("ids", ", ".join(f"{read.id(name, '')} AS {name}" for name in table.columns))
        return read.left_out, connection.execute("SELECT * FROM ids").fetchall()

"""The time to look up one user's history, with the index in SQLite and with other formats.

    python benchmarks/histories.py [--quick] [--json]

The data are random users with 3 to 39 events in two stages, in random order of their names. Each format is
measured in a separate process: the time of one lookup (mean over random users), and the increase of resident
memory. `index` is peso.events.history_index. `duckdb` is a query over the Parquet files of the stages for
each user. `parquet` is one Parquet file that is sorted by name; its row groups of 5,000 users are found by
their first name, and one is decoded for each lookup. `dictionary` keeps everything in memory, as earlier
versions of peso did. `lookup_ratio` is the ratio of `duckdb` to `index`, and `memory_ratio` that of
`dictionary` to `index`.
"""

from __future__ import annotations

import argparse
import bisect
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peso.events import columns
from peso.events.histories import Ragged, Stage
from peso.events.history_index import HistoryIndex
from peso.events.stream import Stream, stage_file, write_stream

ITEMS = 20_000
Lookup = Callable[[str], int]  # a user to the length of the history


def make_stream(directory: Path, users: int) -> None:
    draw = np.random.default_rng(0)
    names = [f"user-{number:09}" for number in draw.permutation(users)]
    first = _random_lists(draw, draw.integers(3, 40, users))
    again = draw.permutation(users)[: users // 10]
    before = Ragged.of(first[row] for row in again)
    none = Ragged(np.empty(0, np.int32), np.zeros(users + 1, np.int64))
    later = _random_lists(draw, draw.integers(3, 6, len(again)))
    ids = pa.array([f"item-{number}" for number in range(ITEMS)])
    items = pa.Table.from_arrays([ids, *[pa.nulls(ITEMS, pa.string())] * 3], schema=columns.ITEMS)
    directory.mkdir()
    stages = [Stage(0, names, none, first), Stage(1, [names[row] for row in again], before, later)]
    write_stream(directory, items, stages)


def _random_lists(draw: np.random.Generator, lengths: np.ndarray) -> Ragged:
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    return Ragged(draw.integers(0, ITEMS, offsets[-1], dtype=np.int32), offsets)


def with_index(root: Path) -> Lookup:
    index = HistoryIndex.open(Stream.open(root / "stream"), root / "histories.sqlite")

    def lookup(user: str) -> int:
        found = index.of(user)
        assert found is not None
        return len(found.items)

    return lookup


def with_duckdb(root: Path) -> Lookup:
    files = [str(root / "stream" / stage_file(number)) for number in (1, 0)]
    connection = duckdb.connect()
    connection.execute("SET threads = 2")

    def lookup(user: str) -> int:
        for file in files:  # the newest first
            found = connection.execute(
                "SELECT list_concat(previous, current) "
                'FROM read_parquet(?, hive_partitioning = false) WHERE "user" = ?',
                [file, user],
            ).fetchone()
            if found:
                return len(found[0])
        raise KeyError(user)

    return lookup


def with_sorted_parquet(root: Path) -> Lookup:
    file = pq.ParquetFile(root / "sorted.parquet")
    least = [
        file.metadata.row_group(number).column(0).statistics.min for number in range(file.num_row_groups)
    ]

    def lookup(user: str) -> int:
        group = file.read_row_group(bisect.bisect_right(least, user) - 1)
        row = group["user"].to_pylist().index(user)
        return len(group["items"][row])

    return lookup


def with_dictionary(root: Path) -> Lookup:
    stream = Stream.open(root / "stream")
    known: dict[str, np.ndarray] = {}
    for number in range(stream.stages):
        known.update(zip(*stream.stage(number).histories(), strict=True))
    return lambda user: len(known[user])


def sort_parquet(root: Path) -> None:
    users = [
        user
        for part in HistoryIndex.open(Stream.open(root / "stream"), root / "h").parts(5000)
        for user in part
    ]
    users.sort(key=lambda user: user.name)
    table = pa.table({"user": [u.name for u in users], "items": [u.items for u in users]})
    pq.write_table(table, root / "sorted.parquet", row_group_size=5000)


WAYS: dict[str, tuple[Callable[[Path], Lookup], int]] = {  # and how many lookups
    "index": (with_index, 20_000),
    "duckdb": (with_duckdb, 20),
    "parquet": (with_sorted_parquet, 300),
    "dictionary": (with_dictionary, 20_000),
}


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(way: str, root: str, users: int) -> dict[str, float]:
    make, times = WAYS[way]
    before, start = resident(), time.perf_counter()
    lookup = make(Path(root))
    opened = time.perf_counter() - start
    names = [f"user-{number:09}" for number in np.random.default_rng(1).integers(0, users, times)]
    start = time.perf_counter()
    for name in names:
        lookup(name)
    return {
        "open_s": opened,
        "lookup_ms": (time.perf_counter() - start) / times * 1e3,
        "memory_mb": resident() - before,
    }


def alone(root: Path, users: int) -> dict[str, dict[str, float]]:
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for way in WAYS:
        with spawn.Pool(1) as process:
            if way == "index":
                start = time.perf_counter()
                process.apply(with_index_once, (str(root),))
                made = time.perf_counter() - start
        with spawn.Pool(1) as process:
            found[way] = process.apply(measure, (way, str(root), users))
    found["index"]["make_s"] = made
    found["index"]["file_mb"] = (root / "histories.sqlite").stat().st_size / 1e6
    return found


def with_index_once(root: str) -> None:
    with_index(Path(root))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="use 100,000 users instead of a million")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    users = 100_000 if asked.quick else 1_000_000
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_stream(root / "stream", users)
        sort_parquet(root)
        ways = alone(root, users)
    result = {
        "users": users,
        **ways,
        "lookup_ratio": ways["duckdb"]["lookup_ms"] / ways["index"]["lookup_ms"],
        "memory_ratio": ways["dictionary"]["memory_mb"] / ways["index"]["memory_mb"],
    }
    if asked.json:
        json.dump(result, sys.stdout, indent=2)
        return
    print(f"{users:,} users\n\n| | open | one lookup | memory |\n|---|---|---|---|")
    for way, found in ways.items():
        print(
            f"| {way} | {found['open_s']:.2f} s | {found['lookup_ms']:.3f} ms | {found['memory_mb']:.0f} MB |"
        )
    print(
        f"\nthe index is made in {ways['index']['make_s']:.0f} s and has {ways['index']['file_mb']:.0f} MB; "
        f"lookup_ratio {result['lookup_ratio']:.0f}, memory_ratio {result['memory_ratio']:.0f}"
    )


if __name__ == "__main__":
    main()

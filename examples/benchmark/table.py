"""Write a comparison's rows of the benchmark's table.

    python examples/benchmark/table.py runs/benchmark [--to examples/benchmark/table.csv]

One row per stream and strategy: means over stages 1 to 4 and over seeds, and the paired difference from
`single` of the same comparison with its 95 % interval over users and seeds, and p after Holm's correction
over all pairs of the stream. With ``--to``, the streams must be the frozen ones, and a row that the table
already has for the stream and strategy is replaced, unless the new one has fewer seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from streams import FROZEN, describe, differences

import peso
from peso.errors import PesoError
from peso.evaluation.comparison import Comparison
from peso.evaluation.contrasts import holm
from peso.evaluation.run_summary import RunSummary
from peso.runs.compare.results import runs_by_data
from peso.runs.workspace import Workspace

REFERENCE, SEEDS = "single", 3
METRICS = {"ndcg@10": 4, "hit@10": 4, "log_probability": 3}  # and the digits to show
DIFFERENCE = ("minus", "low", "high", "p")
COLUMNS = [
    *("stream", "strategy", "seeds", "cases"),
    *(name for metric in METRICS for name in (metric, *(f"{metric} {part}" for part in DIFFERENCE))),
    *("verdict", "peso"),
]


def verdict(row: dict[str, Any]) -> str:
    """What the row says beside the reference; see docs/how-to/submit-to-the-benchmark.md."""
    if row["strategy"] == REFERENCE:
        return "reference"
    if row["seeds"] < SEEDS:
        return "trial"
    signs = {}
    for metric in METRICS:
        low, high, p = (row[f"{metric} {part}"] for part in ("low", "high", "p"))
        signs[metric] = 0 if p > 0.05 or low <= 0 <= high else 1 if low > 0 else -1
    if signs["ndcg@10"] * signs["log_probability"] < 0:
        return "mixed"
    best = max(signs["ndcg@10"], signs["log_probability"], key=abs)
    return {1: "better", 0: "not different", -1: "worse"}[best]


def rows_of(stream: str, runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """The rows of one stream.

    Raises:
        ValueError: the reference is missing.
    """
    comparison, rows = Comparison(runs, [5, 10]), []
    systems = {system.first.strategy: system for system in comparison.systems}
    if REFERENCE not in systems:
        raise ValueError(f"{stream}: {REFERENCE} is not among {', '.join(systems)}; run it, too")
    reference = systems[REFERENCE]
    for name, system in systems.items():
        row: dict[str, Any] = {"stream": stream, "strategy": name, "seeds": len(system.seeds)}
        row["cases"] = comparison.cases(system)
        p_values = []
        for metric, digits in METRICS.items():
            estimate = comparison.average(system, comparison.metric(metric))
            row[metric] = round(estimate.value, digits)
            if system is reference:
                continue
            found = comparison.contrasts(comparison.metric(metric)).contrast(
                metric, system.name, reference.name
            )
            parts = (found.value, found.low, found.high)
            row |= {f"{metric} {part}": round(x, digits) for part, x in zip(DIFFERENCE, parts, strict=False)}
            p_values.append(found.p)
        # over the metrics alone, so that a row does not depend on which other strategies ran
        for metric, p in zip(METRICS if p_values else (), holm(np.array(p_values)), strict=True):
            row[f"{metric} p"] = round(float(p), 4)
        rows.append(row | {"verdict": verdict(row), "peso": peso.__version__})
    return rows


def unlike_frozen(directory: Path) -> Iterator[str]:
    """What of a comparison's streams is not as in `streams.json`."""
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    rows = pq.read_table(directory / "results.parquet", columns=["data_set", "workspace"]).to_pylist()
    for name, place in {row["data_set"]: row["workspace"] for row in rows if row["workspace"]}.items():
        if name not in frozen:
            yield f"{name} is not a stream of the benchmark"
            continue
        workspace = Workspace.open(place)
        found = describe(workspace.stream, workspace.semantic_ids)
        yield from (f"{name}: {problem}" for problem in differences(found, frozen[name]))


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with the new rows in place of those for the same stream and strategy. An old row stays if it
    has more seeds, and the reference, with which other rows were compared, also if it has as many."""

    def key(row: dict[str, Any]) -> tuple[str, str]:
        return row["stream"], row["strategy"]

    seeds = {key(row): int(row["seeds"]) + (row["strategy"] == REFERENCE) for row in old}
    taken = {key(row): row for row in new if row["seeds"] >= seeds.get(key(row), 0)}
    kept = [row for row in old if key(row) not in taken]
    return sorted([*kept, *taken.values()], key=lambda row: (row["stream"], -float(row["ndcg@10"])))


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory of the comparison (-o, else -w)")
    parser.add_argument("--to", type=Path, help="the table to change; without it, the rows are printed")
    arguments = parser.parse_args()
    try:
        found = runs_by_data(arguments.directory, partial(print, file=sys.stderr))
        rows = [row for stream, runs in found.items() for row in rows_of(stream, runs)]
        if arguments.to is not None:
            if unlike := "; ".join(unlike_frozen(arguments.directory)):
                parser.error(f"the table is of the frozen streams alone, but {unlike}")
            rows = merged(read(arguments.to) if arguments.to.exists() else [], rows)
    except (PesoError, ValueError) as error:
        parser.error(str(error))
    with arguments.to.open("w", encoding="utf-8", newline="") if arguments.to else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

"""Write a comparison's rows of the benchmark's table.

    python examples/benchmark/table.py runs/benchmark [--to examples/benchmark/table.csv]

One row per stream and strategy: means over stages 1 to 4 and over seeds, and the paired difference from
`single` with its 95 % interval over users and seeds, and p after Holm's correction over all pairs of the
stream. Rows of strategies that the table already has for a stream are replaced.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peso
from peso.evaluation.comparison import Comparison
from peso.evaluation.run_summary import RunSummary
from peso.runs.compare.results import runs_by_data

REFERENCE, SEEDS = "single", 3
METRICS = {"ndcg@10": 4, "hit@10": 4, "log_probability": 3}  # and the digits to show
DIFFERENCE = ("minus", "low", "high", "p")
COLUMNS = [
    *("stream", "strategy", "seeds", "cases"),
    *(name for metric in METRICS for name in (metric, *(f"{metric} {part}" for part in DIFFERENCE))),
    *("verdict", "peso"),
]


def verdict(row: dict[str, Any]) -> str:
    """What the row says beside the reference; see README.md."""
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
            row[f"{metric} p"] = round(found.p_adjusted, 4)
        rows.append(row | {"verdict": verdict(row), "peso": peso.__version__})
    return rows


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with the new rows in place of those for the same stream and strategy."""
    keys = {(row["stream"], row["strategy"]) for row in new}
    kept = [row for row in old if (row["stream"], row["strategy"]) not in keys]
    return sorted([*kept, *new], key=lambda row: (row["stream"], -float(row["ndcg@10"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory of the comparison (-w)")
    parser.add_argument("--to", type=Path, help="the table to change; without it, the rows are printed")
    arguments = parser.parse_args()
    found = runs_by_data(arguments.directory, partial(print, file=sys.stderr))
    new = [row for stream, runs in found.items() for row in rows_of(stream, runs)]
    old = []
    if arguments.to is not None and arguments.to.exists():
        with arguments.to.open(encoding="utf-8", newline="") as file:
            old = list(csv.DictReader(file))
    with arguments.to.open("w", encoding="utf-8", newline="") if arguments.to else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged(old, new))


if __name__ == "__main__":
    main()

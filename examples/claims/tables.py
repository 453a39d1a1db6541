"""The results of these comparisons as committed tables, and the documentation's pages from the tables.

    python examples/claims/tables.py collect runs/claims/4 --bed "SmolLM2-135M, first 4 layers"
    python examples/claims/tables.py write

``collect`` reads a finished or unfinished comparison and replaces its bed's rows in ``docs/results/tables/``;
``write`` writes the tables and verdicts of ``docs/results/claims.md`` and ``docs/results.md`` from there. A
test keeps the pages equal to the tables.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peso.evaluation.catalogue import ITEMS, USERS
from peso.evaluation.comparison import Comparison
from peso.evaluation.contrasts import LEVEL, holm
from peso.evaluation.metrics import LOG_PROBABILITY
from peso.evaluation.predictions import DORMANT, NEW, USER_SEGMENTS
from peso.evaluation.run_summary import RunSummary
from peso.runs.compare.results import runs_by_data

DOCS = Path(__file__).parents[2] / "docs"
TABLES = DOCS / "results" / "tables"
REFERENCE, SEEDS = "single", 3
DIFFERENCE = ("value", "low", "high", "p")
METRICS = {"ndcg@5": 4, "ndcg@10": 4, "hit@5": 4, "hit@10": 4, LOG_PROBABILITY: 3}  # and decimals
GROUPS = {"dormant": (USERS, 0), "continuing": (USERS, 1), "new users": (USERS, 2), "new items": (ITEMS, 1)}
STREAMS = {"movietweetings": "MovieTweetings", "video-games": "`Video_Games`"}
SYSTEM_COLUMNS = [
    *("bed", "stream", "strategy", "seeds", "cases"),
    *(name for metric in METRICS for name in (metric, f"{metric} half")),
    *GROUPS,
    "validation",
    *(f"minus single {part}" for part in DIFFERENCE),
    *(f"nats minus single {part}" for part in DIFFERENCE),
    *("forgetting", "nats forgetting"),
]
TEST_COLUMNS = [
    *("bed", "stream", "claim", "system", "other", "metric", "group", "seeds", "cases"),
    *("value", "low", "high", "percent", "percent low", "percent high", "p", "detectable percent"),
]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper as a difference between two systems.

    Attributes:
        name: the key in the table.
        statement: what the paper says, for readers.
        system, other: the strategies whose difference decides it.
        published: the published difference in percent of NDCG@5; None if the paper gives no figure. Its sign
            is the direction of the claim.
        sign: the direction where no figure is published.
        group: a segment of users; None: all cases.
    """

    name: str
    statement: str
    system: str
    other: str
    published: float | None
    sign: int = 1
    group: str | None = None

    @property
    def direction(self) -> int:
        return int(math.copysign(1, self.published)) if self.published is not None else self.sign


# Published figures: Llama-3.2-1B, Tables 1 to 3 of arXiv 2510.25093. NDCG@5 is their metric throughout.
CLAIMS = [
    Claim("anchor", "An anchor on the adapter is better than plain fine-tuning", "peso", "single", 8.7),
    Claim(
        "anchor, published settings",
        "The same at the published weight",
        "peso-paper",
        "single",
        8.7,
    ),
    Claim("dormant users", "It is better for dormant users", "peso", "single", 10.4, group=DORMANT),
    Claim("new users", "It is better for new users", "peso", "single", 5.2, group=NEW),
    Claim("sum, all", "Summing all adapters is worse than one adapter", "sum-all", "single", -26.8),
    Claim(
        "sum, all, a tenth",
        "Also at the paper's rate: all",
        "sum-all-tenth",
        "single-tenth",
        -26.8,
    ),
    Claim("sum, latest", "Summing the latest adapter is worse", "sum-latest", "single", -22.1),
    Claim(
        "sum, latest, a tenth",
        "Also at the paper's rate: the latest",
        "sum-latest-tenth",
        "single-tenth",
        -22.1,
    ),
    Claim("inheritance", "Inheritance repairs the sum of all adapters", "sum-all-inherit", "sum-all", 38.8),
    Claim(
        "inheritance, a tenth",
        "Also at the paper's rate: inheritance",
        "sum-all-inherit-tenth",
        "sum-all-tenth",
        38.8,
    ),
    Claim("softmax-KL", "Softmax-KL is better than L2 (as released)", "peso", "released-l2", None),
    Claim("orthogonality", "Orthogonality hurts (as released)", "released-orthogonal", "single", None, -1),
]


# -- collect -------------------------------------------------------------------------------------------


def system_rows(bed: str, stream: str, comparison: Comparison) -> list[dict[str, Any]]:
    """One row per system: means over stages 1 to 4 and seeds, NDCG@10 and log-probability (nats) minus those
    of `single`, and by how much later stages changed them on the cases of stage 0 (`forgetting`), where the
    last model was tested on these. `validation` is the loss of the weights that were kept, in nats per
    token."""
    rows = []
    ndcg, nats = comparison.metric("ndcg@10"), comparison.metric(LOG_PROBABILITY)
    for system in comparison.systems:
        name = system.first.strategy
        row: dict[str, Any] = {"bed": bed, "stream": stream, "strategy": name, "seeds": len(system.seeds)}
        row["cases"] = comparison.cases(system)
        for metric, digits in METRICS.items():
            found = comparison.average(system, comparison.metric(metric))
            row |= {metric: round(found.value, digits), f"{metric} half": round(found.half_width, digits)}
        for group, (segmentation, number) in GROUPS.items():
            inside = comparison.in_group(system, ndcg, segmentation, number)
            row[group] = None if inside is None else round(inside.value, 4)
        losses = [loss for run in system.runs for loss in validation_losses(run)]
        row["validation"] = round(float(np.mean(losses)), 4) if losses else None
        for metric, begin in ((ndcg, ""), (nats, "nats ")):
            change = comparison.change(system, metric, [(0, max(system.stages), 0)])
            if change is not None:
                row[f"{begin}forgetting"] = round(change.value, METRICS[metric.name])
        reference = _system(comparison, REFERENCE)
        if reference is not None and system is not reference:
            for metric, begin in ((ndcg, ""), (nats, "nats ")):
                pair = comparison.contrasts(metric).contrast(metric.name, system.name, reference.name)
                parts = (pair.value, pair.low, pair.high, pair.p_adjusted)
                row |= {
                    f"{begin}minus single {part}": round(x, METRICS[metric.name] if part != "p" else 4)
                    for part, x in zip(DIFFERENCE, parts, strict=True)
                }
        rows.append(row)
    return rows


def validation_losses(run: RunSummary) -> list[float]:
    """The loss on validation cases of the weights that were kept, for each later stage that trained."""
    result = []
    for number, stage in run.stages.items():
        if number and stage.curve is not None:
            tuned = stage.anchor.get("strategy", {}).get(
                "validation_losses", {}
            )  # of `interpolate`, by share
            result.append(min(map(float, tuned.values() or stage.curve.validation_loss)))
    return result


def claim_rows(bed: str, stream: str, comparison: Comparison) -> list[dict[str, Any]]:
    """One row per claim whose two systems are there, in NDCG@5 and in log-probability. p is corrected over
    the claims about all cases (Holm); a claim about a group of users has an interval instead of p."""
    rows = []
    for metric_name in ("ndcg@5", LOG_PROBABILITY):
        of_metric = [row for claim in CLAIMS if (row := _tested(claim, metric_name, comparison)) is not None]
        plain = [row for row in of_metric if row["group"] is None]
        for row, p in zip(plain, holm(np.array([row["p"] for row in plain])), strict=True):
            row["p"] = round(float(p), 4)
        rows += [{"bed": bed, "stream": stream, **row} for row in of_metric]
    return rows


def rows_by_seed(bed: str, stream: str, runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """The rows of :func:`claim_rows` for each seed by itself; none if there is only one seed."""
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    return [
        {"seed": seed, **row}
        for seed in (seeds if len(seeds) > 1 else [])
        for row in claim_rows(bed, stream, Comparison([run for run in runs if run.seed == seed], [5, 10]))
    ]


def _tested(claim: Claim, metric_name: str, comparison: Comparison) -> dict[str, Any] | None:
    system, other = _system(comparison, claim.system), _system(comparison, claim.other)
    if system is None or other is None:
        return None
    metric = comparison.metric(metric_name)
    row: dict[str, Any] = {"claim": claim.name, "system": claim.system, "other": claim.other}
    row |= {"metric": metric_name, "group": claim.group, "seeds": min(len(system.seeds), len(other.seeds))}
    if claim.group is None:
        found = comparison.contrasts(metric).contrast(metric_name, system.name, other.name)
        row["cases"], row["p"], detectable = comparison.cases(system), found.p, found.detectable
        percents = (found.percent, found.percent_low, found.percent_high)
        base = found.value / found.percent * 100 if found.percent else math.nan
        value, low, high = found.value, found.low, found.high
    else:
        number = USER_SEGMENTS.index(claim.group)
        difference = comparison.difference(system, other, metric, group=number)
        inside = comparison.in_group(other, metric, USERS, number)
        assert inside is not None  # the group has cases, as the difference has
        base, row["cases"], row["p"] = abs(inside.value), difference.cases, None
        value, low, high = difference.value, difference.low, difference.high
        percents = (100 * value / base, 100 * low / base, 100 * high / base)
        detectable = 2.8 * difference.half_width / 1.96
    digits = METRICS[metric_name]
    row |= dict(zip(("value", "low", "high"), (round(x, digits) for x in (value, low, high)), strict=True))
    names = ("percent", "percent low", "percent high")
    row |= dict(zip(names, (round(x, 1) for x in percents), strict=True))
    return row | {"detectable percent": round(100 * detectable / abs(base), 1)}


def _system(comparison: Comparison, strategy: str) -> Any:
    found = [s for s in comparison.systems if s.first.strategy == strategy and not s.first.baseline]
    return found[0] if found else None


# -- verdicts ------------------------------------------------------------------------------------------


def verdict(claim: Claim, row: dict[str, Any]) -> str:
    """What one row of tests says about a claim.

    *confirmed* or *the opposite*: the difference is significant, in the claimed direction or against it.
    *refuted*: it is not, and the interval excludes the published figure and is not wholly on the claimed
    side.
    *undecided* otherwise, so also if only the correction of p makes a difference not significant.
    """
    low, high = float(row["percent low"]), float(row["percent high"])
    apart = low > 0 or high < 0
    on_its_side = min(claim.direction * low, claim.direction * high) > 0
    if row["p"] not in (None, ""):
        apart = apart and float(row["p"]) <= LEVEL
    if apart:
        agrees = claim.direction * float(row["value"]) > 0
        said = "confirmed" if agrees else "the opposite"
        published = claim.published
        if agrees and published is not None and not low <= published <= high:
            said += ", smaller" if abs(float(row["percent"])) < abs(published) else ", larger"
    elif claim.published is not None and not low <= claim.published <= high and not on_its_side:
        said = "refuted"
    else:
        said = "undecided"
    return said if int(row["seeds"]) >= SEEDS else f"{said} (trial)"


# -- pages ---------------------------------------------------------------------------------------------


def tables_of_systems(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: one table per bed and stream, the best NDCG@10 first."""
    parts = []
    for bed, stream in dict.fromkeys((row["bed"], row["stream"]) for row in rows):
        found = [row for row in rows if (row["bed"], row["stream"]) == (bed, stream)]
        cases = int(found[0]["cases"])
        head = ["strategy (seeds)", "validation loss", "NDCG@10", "minus `single`", "p"]
        head += ["NDCG@5", "Hit@5", "Hit@10", "log-probability", "minus `single`"]
        forgetting = any(row.get("forgetting") for row in found)
        lines = [[*head, *GROUPS, *(["stage 0's cases"] if forgetting else [])]]
        for row in sorted(found, key=lambda row: -float(row["ndcg@10"])):
            lines.append(
                [
                    f"{row['strategy']} ({row['seeds']})",
                    row["validation"] and f"{float(row['validation']):.4f}",
                    _plus_minus(row, "ndcg@10"),
                    _difference(row, "minus single", 4),
                    row["minus single p"] and _p(float(row["minus single p"])),
                    *(f"{float(row[metric]):.4f}" for metric in ("ndcg@5", "hit@5", "hit@10")),
                    _plus_minus(row, LOG_PROBABILITY),
                    _difference(row, "nats minus single", 3),
                    *(row[group] and f"{float(row[group]):.4f}" for group in GROUPS),
                    *([row["forgetting"] and _signed(float(row["forgetting"]), 4)] if forgetting else []),
                ]
            )
        parts.append(f"{bed}, {STREAMS[stream]}, {cases:,} cases:\n\n{_markdown(lines)}")
    return "\n\n".join(parts)


def table_of_claims(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: one row per claim, with a column for each stream: from the bed with the most seeds."""
    lines = [["claim", "published", *STREAMS.values()]]
    for claim in CLAIMS:
        found = [row for row in rows if row["claim"] == claim.name]
        if not found:
            continue
        published = "" if claim.published is None else f"{_signed(claim.published, 1)} %"
        cells = [_measured(claim, [row for row in found if row["stream"] == stream]) for stream in STREAMS]
        lines.append([f"{claim.statement}: `{claim.system}` − `{claim.other}`", published, *cells])
    return _markdown(lines)


def _measured(claim: Claim, rows: Sequence[dict[str, str]]) -> str:
    """The verdict, the differences in NDCG@5 and in nats, and what the data could have shown."""
    if not rows:
        return "not run"
    most = max(rows, key=lambda row: int(row["seeds"]))
    of = {row["metric"]: row for row in rows if row["bed"] == most["bed"]}
    ndcg, nats = of["ndcg@5"], of[LOG_PROBABILITY]
    percent, low, high = (_signed(float(ndcg[f"percent{x}"]), 1) for x in ("", " low", " high"))
    value, of_low, of_high = (_signed(float(nats[x]), 3) for x in ("value", "low", "high"))
    return (
        f"**{verdict(claim, ndcg)}**: {percent} % ({low} to {high}), {value} nats ({of_low} to {of_high}); "
        f"could show {float(ndcg['detectable percent']):.0f} %; seeds {ndcg['seeds']}, "
        f"cases {int(ndcg['cases']):,}"
    )


def rendered(text: str, name: str, content: str) -> str:
    """A page with the part between ``<!-- name -->`` and ``<!-- end of name -->`` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end, 1)[1]}"


def pages(tables: Path = TABLES) -> dict[Path, str]:
    """The pages with their parts written from the tables."""
    systems, tests = _read(tables / "claims_systems.csv"), _read(tables / "claims_tests.csv")
    found = {}
    for page, parts in {
        DOCS / "results" / "claims.md": {"systems": tables_of_systems(systems)},
        DOCS / "results.md": {"claims": table_of_claims(tests)},
    }.items():
        text = page.read_text(encoding="utf-8")
        for name, content in parts.items():
            text = rendered(text, name, content)
        found[page] = text
    return found


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|" + "---|" * (head.count(" | ") + 1), *rest])


def _difference(row: dict[str, str], name: str, digits: int) -> str:
    """A difference with its interval; empty if there is none."""
    if not row[f"{name} value"]:
        return ""
    value, low, high = (float(row[f"{name} {part}"]) for part in ("value", "low", "high"))
    if math.isnan(low):  # no case differs
        return "the same answers"
    return f"{_signed(value, digits)} ({_signed(low, digits)} to {_signed(high, digits)})"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _plus_minus(row: dict[str, str], metric: str) -> str:
    value, half = (f"{float(row[x]):.{METRICS[metric]}f}" for x in (metric, f"{metric} half"))
    return f"{value} ± {half}".replace("-", "−")


# -- files ---------------------------------------------------------------------------------------------


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, columns: Sequence[str], bed: str, new: Sequence[dict[str, Any]]) -> None:
    """Replace the rows of the bed's streams that there are new rows for."""
    replaced = {(bed, row["stream"]) for row in new}
    kept = (
        [row for row in _read(path) if (row["bed"], row["stream"]) not in replaced] if path.exists() else []
    )
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])


def collect(directory: Path, bed: str, tables: Path = TABLES) -> None:
    """Write a comparison's rows into the tables: those of all seeds together, and, if there are several, the
    tests of each seed by itself."""
    systems, tests, alone = (list[dict[str, Any]]() for _ in range(3))
    for stream, runs in runs_by_data(directory, print).items():
        comparison = Comparison(runs, [5, 10])
        systems += system_rows(bed, stream, comparison)
        tests += claim_rows(bed, stream, comparison)
        alone += rows_by_seed(bed, stream, runs)
    _write(tables / "claims_systems.csv", SYSTEM_COLUMNS, bed, systems)
    _write(tables / "claims_tests.csv", TEST_COLUMNS, bed, tests)
    _write(tables / "claims_seeds.csv", ["seed", *TEST_COLUMNS], bed, alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    collecting = actions.add_parser("collect", help="write a comparison's rows into the tables")
    collecting.add_argument("directory", type=Path, help="directory of the comparison (-w)")
    collecting.add_argument("--bed", required=True, help="the backbone, as the tables should call it")
    actions.add_parser("write", help="write the pages from the tables")
    arguments = parser.parse_args()
    if arguments.action == "collect":
        collect(arguments.directory, arguments.bed)
    else:
        for page, text in pages().items():
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

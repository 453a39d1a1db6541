"""Section: which differences are significant, how large they are, and what could have been detected."""

from __future__ import annotations

from itertools import combinations

from peso.evaluation.comparison import Comparison
from peso.evaluation.contrasts import Contrast
from peso.evaluation.metrics import Metric
from peso.evaluation.report.findings import listed
from peso.evaluation.report.sections.section import CODES_AND_ITEMS, Section, file_name, section
from peso.evaluation.report.tables import Cell, Quantity, Table
from peso.evaluation.run_summary import System

COLUMNS = ("Difference", "In percent", "p", "p, corrected", "Detectable from")


@section(place=30)
def significance(comparison: Comparison) -> Section | None:
    """Which differences are significant."""
    if len(comparison.systems) < 2 or not comparison.same_cases:
        return None
    compared = [metric for metric in comparison.metrics if len(comparison.rivals(metric)) > 1]
    first = [metric for metric in comparison.headline if metric in compared]
    others = [metric for metric in compared if metric not in first]
    text = (
        "Differences are computed case by case. p comes from permutations of users; Holm's correction "
        "covers all pairs in one metric. Intervals (95 %) come from resampling users. “Detectable from”: the "
        "smallest true difference that a test on these data finds four times in five, before the correction."
    )
    return Section(
        "significance",
        "Significance",
        [text, *([CODES_AND_ITEMS] if comparison.codes_and_items else []), *_about_seeds(comparison)],
        tables=[_to_best(comparison, metric) for metric in first],
        folded=[
            *(_to_best(comparison, metric) for metric in others),
            *(_all_pairs(comparison, metric) for metric in first if len(comparison.rivals(metric)) > 2),
        ],
    )


def _about_seeds(comparison: Comparison) -> list[str]:
    several = [system for system in comparison.systems if len(system.runs) > 1]
    alone = [f"“{system.label}”" for system in comparison.systems if system.one_seed]
    sentences = []
    if several:
        sentences.append(
            "Where systems were run with several seeds, means are over seeds, and p and intervals cover "
            "other users and other seeds."
        )
    if alone:
        who = listed(alone) if len(alone) <= 5 else f"{len(alone)} systems"
        sentences.append(
            f"There is a single seed of {who}, so p and intervals cover other users only. Another training "
            "seed can change results as much."
        )
    return sentences


def _to_best(comparison: Comparison, metric: Metric) -> Table:
    standing = comparison.standing(metric)
    rows = [
        [system.label, *_cells(_contrast(comparison, metric, system, standing.best), metric)]
        for system in standing.tied + standing.behind
    ]
    return Table(
        f"{file_name(metric)}-to-best",
        f"{metric.label}: distance to the best, {standing.best.label}",
        ["Strategy", *COLUMNS],
        rows,
    )


def _all_pairs(comparison: Comparison, metric: Metric) -> Table:
    rows = [
        [f"{one.label} − {other.label}", *_cells(_contrast(comparison, metric, one, other), metric)]
        for one, other in combinations(comparison.rivals(metric), 2)
    ]
    return Table(
        f"{file_name(metric)}-pairs", f"{metric.label}: all pairs", ["Difference of", *COLUMNS], rows
    )


def _contrast(comparison: Comparison, metric: Metric, one: System, other: System) -> Contrast:
    return comparison.contrasts(metric).contrast(metric.name, one.name, other.name)


def _cells(found: Contrast, metric: Metric) -> list[Cell]:
    return [
        Quantity(found.value, decimals=metric.decimals, bounds=(found.low, found.high)),
        Quantity(found.percent, decimals=1, bounds=(found.percent_low, found.percent_high))
        if found.percent == found.percent
        else None,
        Quantity(found.p, decimals=4, chance=True),
        Quantity(found.p_adjusted, decimals=4, chance=True),
        Quantity(found.detectable, decimals=metric.decimals),
    ]

"""Section: is the new model better, for whom, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from peso.evaluation.comparison import Comparison
from peso.evaluation.metrics import Metric
from peso.evaluation.predictions import USER_SEGMENTS
from peso.evaluation.report.findings import cautions, findings, stage_range
from peso.evaluation.report.plots import Ranking
from peso.evaluation.report.sections.section import (
    CODES_AND_ITEMS,
    MARKS,
    Listing,
    Section,
    file_name,
    marks,
    quantity,
    section,
)
from peso.evaluation.report.tables import Cell, Quantity, Table

READING = (
    "r is the rank of the true semantic ID in the list; items that share an ID count as one. Hit@k is the "
    "share of cases with r ≤ k; NDCG@k the mean of 1/log₂(1 + r) where r ≤ k, else 0; MRR@k the mean of 1/r "
    "where r ≤ k, else 0. Log-probability is the mean natural logarithm of the probability given to the true "
    "semantic ID, in nats. It uses every case, not only the few hits, so it shows small differences sooner.",
    "Differences are computed case by case, so two systems can differ significantly although their own "
    "intervals overlap. All cases of one user are treated as one unit. No interval is given where all cases "
    "have the same value, such as no hit at all.",
)


@section(place=10)
def summary(comparison: Comparison) -> Section:
    """Is the new model better, for whom, and by how much."""
    ranked = [metric for metric in comparison.headline if len(comparison.rivals(metric)) > 1]
    several = len(comparison.systems) > 1
    return Section(
        "summary",
        "Summary",
        findings(comparison),
        plots=[_ranking(comparison, metric) for metric in ranked] if several else [],
        tables=[_last_update(comparison), averages_table(comparison)],
        notes=[*cautions(comparison), *READING],
    )


def _ranking(comparison: Comparison, metric: Metric) -> Ranking:
    means = {system.name: comparison.average(system, metric) for system in comparison.rivals(metric)}
    systems = sorted(comparison.rivals(metric), key=lambda system: -means[system.name].value)
    verdicts = marks(comparison, comparison.standing(metric))
    return Ranking(
        f"{file_name(metric)}-ranking",
        f"{metric.label}, mean of {stage_range(comparison.averaged)}",
        f"{metric.label} of each system, best first; see the table.",
        [system.label for system in systems],
        np.array([means[system.name].value for system in systems]),
        np.array([means[system.name].half_width for system in systems]),
        [verdicts[system.name] for system in systems],
    )


def _last_update(comparison: Comparison) -> Table:
    """What the newest stage changed for each kind of user. The table has no rows if the previous model was
    not tested."""
    system, stage = comparison.subject, comparison.averaged[-1]
    rows: list[list[Cell]] = []
    for who, group in [
        ("All users", None),
        *((f"{name.capitalize()} users", n) for n, name in enumerate(USER_SEGMENTS)),
    ]:
        found = [comparison.last_change(system, metric, group) for metric in comparison.headline]
        changes = [one for one in found if one is not None]
        if changes:
            cells = [quantity(c, metric) for c, metric in zip(changes, comparison.headline, strict=True)]
            rows.append([who, *cells, Quantity(changes[0].cases)])
    return Table(
        "last-update",
        f"{system.label}: what stage {stage} changed (after stage {stage} minus after stage {stage - 1})",
        ["Users", *(metric.label for metric in comparison.headline), "Cases"],
        rows,
        f"± half width of the 95 % interval on the cases of stage {stage}. New users were never seen before, "
        "continuing users were seen in the previous stage, dormant users only earlier.",
    )


def averages_table(comparison: Comparison) -> Table:
    """Every metric of every system, averaged over the later stages. Unfinished runs are at the end."""
    ordered = [*comparison.headline, *(m for m in comparison.metrics if m not in comparison.headline)]
    standings = {metric.name: marks(comparison, comparison.standing(metric)) for metric in ordered}
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        cells = [
            quantity(comparison.average(system, metric), metric, standings[metric.name][system.name])
            for metric in ordered
        ]
        seeds = Quantity(len(system.runs)) if system.first.seed is not None else None
        rows.append([system.label, *cells, seeds])
    for run in comparison.unfinished:
        rows.append([f"{run.name} (unfinished)", *([None] * len(ordered)), None])
    notes = [MARKS] if len(comparison.systems) > 1 else ["± half width of the 95 % interval."]
    if comparison.codes_and_items:
        notes.append(CODES_AND_ITEMS)
    return Table(
        "averages",
        f"Mean of {stage_range(comparison.averaged)}"
        + (", each stage with equal weight" if len(comparison.averaged) > 1 else ""),
        ["Strategy", *(metric.label for metric in ordered), "Seeds"],
        rows,
        " ".join(notes),
    )


@section(place=1000)
def origin(comparison: Comparison) -> Section | None:
    """The resolved configurations, where they differ, and the chain of manifests of every run."""
    systems = [system for system in comparison.systems if system.first.configuration]
    flat = {s.name: dict(_flat(yaml.safe_load(s.first.configuration))) for s in systems}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    # a key without an entry is one that is written only if it is not at its default
    values = {key: [flat[system.name].get(key, "not set") for system in systems] for key in keys}
    manifests = [
        Listing(
            f"Manifests of {system.label}{f', seed {run.seed}' * (len(system.runs) > 1)}",
            yaml.safe_dump_all(map(dict, run.manifests), sort_keys=False, allow_unicode=True),
        )
        for system in comparison.systems
        for run in system.runs
        if run.manifests
    ]
    if not systems and not manifests:
        return None
    chain = (
        "Each step wrote a manifest with the sha256 of the files that it read and wrote, and with the "
        "previous step, so the chain leads from the data to the results above. Oldest first."
    )
    return Section(
        "origin",
        "Configuration and provenance",
        [chain] if manifests else [],
        tables=[
            Table(
                "configuration-differences",
                "Where the configurations differ",
                ["Key", *(system.label for system in systems)],
                [[key, *found] for key, found in values.items() if len(set(found)) > 1],
            )
        ],
        listings=[
            *(Listing(f"Configuration of {system.label}", system.first.configuration) for system in systems),
            *manifests,
        ],
    )


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}.{key}".lstrip("."))]
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    return [(path, text.removesuffix("...\n").strip())]

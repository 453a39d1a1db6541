"""Section: the variety and popularity of the recommended lists."""

from __future__ import annotations

from dataclasses import fields

from peso.evaluation.catalogue import ListFigures
from peso.evaluation.comparison import Comparison
from peso.evaluation.report.findings import stage_range
from peso.evaluation.report.sections.section import Section, section
from peso.evaluation.report.tables import Quantity, Table
from peso.evaluation.run_summary import System

HEADS = ("Coverage", "Gini index", "Novelty, bits", "Popularity percentile", "ID diversity")
DECIMALS = (4, 3, 2, 3, 3)


@section(place=80)
def lists(comparison: Comparison) -> Section | None:
    """Variety, novelty and popularity of what is recommended."""
    if comparison.catalogue is None:
        return None
    k = comparison.ks[-1]
    stages = comparison.averaged
    return Section(
        "lists",
        "Variety and popularity of the lists",
        [
            f"The first {k} items of every list. Coverage is the share of the catalog that is recommended to "
            "at least one user. The Gini index is 0 if all items are recommended equally often and near 1 if "
            "few are. Novelty is the mean of −log₂ of an item's share of past events. The popularity "
            "percentile is 1 for the most popular item. ID diversity is the mean distance between two items "
            "of a list: 0 if their semantic IDs are the same, 1 if they differ from the first level on."
        ],
        tables=[
            Table(
                "lists",
                f"Lists of {k}, mean of {stage_range(stages)}",
                ["Strategy", *HEADS],
                [_row(comparison, system, stages) for system in comparison.systems],
                "± half width of the 95 % interval. Coverage and the Gini index are computed over all lists "
                "and have no interval.",
            )
        ],
        folded=[
            Table(
                "lists-by-stage",
                f"Lists of {k}, stage by stage",
                ["Strategy", "Stage", *HEADS],
                [
                    [row[0], Quantity(stage), *row[1:]]
                    for system in comparison.systems
                    for stage in stages
                    for row in [_row(comparison, system, [stage])]
                ],
            )
        ],
    )


def _row(comparison: Comparison, system: System, stages: list[int]) -> list[Quantity | str | None]:
    means = [comparison.list_mean(system, figure.name, stages) for figure in fields(ListFigures)]
    return [system.label, *(Quantity.of(mean, d) for mean, d in zip(means, DECIMALS, strict=True))]

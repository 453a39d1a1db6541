"""Section: which updates passed the gate, and the values that its decisions are based on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.sections.section import Section, section
from peso.evaluation.report.tables import Cell, Quantity, Table

DIGITS = 4
FIGURES = ("champion", "challenger", "difference", "low", "margin")


@section(place=15)
def gate(comparison: Comparison) -> Section | None:
    """The verdict of the gate on each stage, with all conditions."""
    judged = [system for system in comparison.systems if system.first.verdicts]
    if not judged:
        return None
    several, says, rows = len(judged) > 1, list[str](), list[list[Cell]]()
    for system in judged:
        for stage, verdict in sorted(system.first.verdicts.items()):
            who = f"{system.label}, stage {stage}" if several else f"Stage {stage}"
            says.append(
                f"{who} was compared with stage {verdict['champion']}, which was serving: "
                f"{verdict['decision']}. {verdict['says']}."
            )
            rows += [
                [
                    system.label if several else None,
                    Quantity(stage),
                    Quantity(verdict["champion"]),
                    *_row(condition),
                ]
                for condition in [*verdict["conditions"], *_reported(verdict)]
            ]
    heads = ["Strategy", "Stage", "Against", "Condition", "Outcome", "Cases"]
    return Section(
        "gate",
        "The gate",
        [
            "An update is promoted only if it is not worse than the stage that serves by more than a margin. "
            "Both answer the same cases. A condition is met if the lower bound of the difference (one-sided, "
            "at the confidence of the gate) is at least the negative margin. It is undecided if the cases "
            "show neither that it is met nor that it is missed.",
            *says,
        ],
        tables=[
            Table(
                "gate",
                "Conditions of the gate",
                [*heads, "Champion", "Challenger", "Difference", "At least", "Margin", "Chance if equal"],
                rows,
                "Chance if equal: the probability that an equally good model meets the condition with this "
                "number of cases. Test cases are only reported, unless the gate is configured to decide on "
                "them. Earlier test cases are those of the stage that was serving.",
            )
        ],
    )


def _reported(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Comparisons that are only reported, as further rows."""
    metric = verdict["settings"]["metric"]
    return [
        {"name": f"{metric} on {cases}", "outcome": "reported", "blocks": False, "figures": verdict[key]}
        for key, cases in (("test", "test cases"), ("earlier", "earlier test cases"))
    ]


def _row(condition: Mapping[str, Any]) -> list[Cell]:
    """The cells of a condition. One without a paired comparison (coverage, anchor) has only values."""
    figures, outcome = condition["figures"], condition["outcome"]
    if outcome not in ("passed", "reported") and not condition["blocks"]:
        outcome += " (not required)"
    paired = "cases" in figures
    digits = DIGITS if paired else 0
    values = [
        None if (value := figures.get(key)) is None else Quantity(float(value), decimals=digits)
        for key in FIGURES
    ]
    chance = figures.get("chance_if_equal")
    return [
        condition["name"],
        outcome,
        Quantity(figures["cases"]) if paired else None,
        *values,
        None if chance is None else Quantity(chance, decimals=2),
    ]

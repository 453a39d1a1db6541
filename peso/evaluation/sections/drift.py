"""Section: how the stream drifts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.plots import Plot, Series
from peso.evaluation.report.tables import Cell, Quantity, Table
from peso.evaluation.sections.section import Section, distinct, labelled

Stage = Mapping[str, Any]
Line = tuple[str, Callable[[Stage], float | None]]  # what a line is called, and its height at a stage

STATES = ("new", "continuing", "returning")
COUNTED = (*STATES, "dormant")


def drift(comparison: Comparison) -> Section | None:
    """How the stream drifts: who and what is new, who came back, how far tastes moved."""
    streams = distinct(comparison, lambda run: list(run.drift))
    if not streams:
        return None
    return Section(
        "drift",
        "Drift of the stream",
        [
            "New: never seen before. Continuing: seen in the stage before. Returning: seen earlier, but not "
            "in the stage before. Dormant: known, but not seen in the stage. The Jensen-Shannon (JS) "
            "divergence compares the events of a stage with those of the stage before, by item and by first "
            "code of the semantic ID, in bits: 0 for equal shares, 1 for nothing in common. A target is new "
            "if no user had its item before the stage."
        ],
        plots=[
            _plot("drift-users", "Users, %", [(state, _share("users", state)) for state in STATES], streams),
            _plot("drift-items", "Items, %", [(state, _share("items", state)) for state in STATES], streams),
            _plot(
                "drift-divergence",
                "Divergence from the stage before, bits",
                [
                    ("of items", lambda stage: stage["item_divergence"]),
                    ("of first codes", lambda stage: stage["code_divergence"]),
                ],
                streams,
                first_colour=len(STATES),
            ),
            _plot(
                "drift-new-targets",
                "Targets that are new items, %",
                [("new targets", lambda stage: _percent(stage["new_item_targets"]))],
                streams,
                first_colour=len(STATES) + 2,
            ),
        ],
        tables=[_users(label, place, stages) for place, (label, stages) in enumerate(streams)]
        + [_items(label, place, stages) for place, (label, stages) in enumerate(streams)],
    )


def _share(what: str, state: str) -> Callable[[Stage], float]:
    return lambda stage: 100 * stage[f"{state}_{what}"] / stage[what]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _plot(
    name: str,
    title: str,
    lines: Sequence[Line],
    streams: Sequence[tuple[str, Sequence[Stage]]],
    first_colour: int = 0,
) -> Plot:
    """Stage 0, in which all is new, is left to the tables. A line has its colour in all plots of the section,
    which share a legend."""
    streams = [(label, stages[1:] or stages) for label, stages in streams]
    series = [
        Series(
            labelled(called, label),
            first_colour + number + 2 * len(STATES) * place,
            np.array([stage["stage"] for stage in stages], dtype=np.float64),
            np.array([np.nan if (y := height(stage)) is None else y for stage in stages], dtype=np.float64),
        )
        for place, (label, stages) in enumerate(streams)
        for number, (called, height) in enumerate(lines)
    ]
    numbers = sorted({stage["stage"] for _, stages in streams for stage in stages})
    return Plot(
        name,
        title,
        f"{title}, stage by stage; see the tables.",
        series,
        "stage",
        [(number, str(number)) for number in numbers],
    )


def _users(label: str, place: int, stages: Sequence[Stage]) -> Table:
    lengths = list(stages[0]["history_lengths"])
    return Table(
        f"drift-users{_number(place)}",
        labelled("Users of each stage", label),
        [
            "Stage",
            "Events",
            "Users",
            *map(str.capitalize, COUNTED),
            *(f"History, {name}" for name in lengths),
        ],
        [
            [
                f"Stage {stage['stage']}",
                *map(Quantity, (stage["events"], stage["users"], *(stage[f"{s}_users"] for s in COUNTED))),
                *(Quantity(stage["history_lengths"][name], decimals=1) for name in lengths),
            ]
            for stage in stages
        ],
        "History: how many items the users of the stage bring into it, mean and quantiles.",
    )


def _items(label: str, place: int, stages: Sequence[Stage]) -> Table:
    return Table(
        f"drift-items{_number(place)}",
        labelled("Items of each stage", label),
        [
            "Stage",
            "Items",
            *map(str.capitalize, COUNTED),
            "JS of items",
            "JS of first codes",
            "New targets, %",
        ],
        [
            [
                f"Stage {stage['stage']}",
                *map(Quantity, (stage["items"], *(stage[f"{s}_items"] for s in COUNTED))),
                _measured(stage["item_divergence"], 3),
                _measured(stage["code_divergence"], 3),
                _measured(_percent(stage["new_item_targets"]), 1),
            ]
            for stage in stages
        ],
    )


def _measured(value: float | None, decimals: int) -> Cell:
    return None if value is None else Quantity(value, decimals=decimals)


def _number(place: int) -> str:
    return f"-{place + 1}" if place else ""

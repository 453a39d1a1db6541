"""Section: how the stream drifts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.plots import Plot, Series
from peso.evaluation.report.sections.section import Section, distinct, labelled, section
from peso.evaluation.report.tables import Cell, Quantity, Table
from peso.items import quality
from peso.items.semantic_ids import token_name

Stage = Mapping[str, Any]
Line = tuple[str, Callable[[Stage], float | None]]  # the label of a line, and its value at a stage

STATES = ("new", "continuing", "returning")
COUNTED = (*STATES, "dormant")


@section(place=120)
def drift(comparison: Comparison) -> Section | None:
    """How the stream drifts: new and returning users and items, and how far tastes moved."""
    streams = distinct(comparison, lambda run: list(run.drift))
    if not streams:
        return None
    return Section(
        "drift",
        "Drift of the stream",
        [
            "New: never seen before. Continuing: seen in the previous stage. Returning: seen earlier, but "
            "not in the previous stage. Dormant: known, but not seen in the stage. The Jensen-Shannon (JS) "
            "divergence compares the events of a stage with those of the previous stage, by item and by "
            "first code of the semantic ID, in bits: 0 for equal shares, 1 for nothing in common. A target "
            "is new if no user had its item before the stage."
        ],
        plots=[
            _plot("drift-users", "Users, %", [(state, _share("users", state)) for state in STATES], streams),
            _plot("drift-items", "Items, %", [(state, _share("items", state)) for state in STATES], streams),
            _plot(
                "drift-divergence",
                "Divergence from the previous stage, bits",
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


def _share(what: str, state: str) -> Callable[[Stage], float | None]:
    """The percentage of a stage's users or items in a state; None if the stage is empty."""
    return lambda stage: 100 * stage[f"{state}_{what}"] / stage[what] if stage[what] else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _plot(
    name: str,
    title: str,
    lines: Sequence[Line],
    streams: Sequence[tuple[str, Sequence[Stage]]],
    first_colour: int = 0,
) -> Plot:
    """A plot without stage 0, in which everything is new; only the tables show it. A line has the same color
    in all plots of the section, which share a legend."""
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
                *(_measured(stage["history_lengths"][name], 1) for name in lengths),
            ]
            for stage in stages
        ],
        "History: the number of items that users had before the stage, mean and quantiles.",
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


Index = tuple[str, Mapping[str, Any]]  # a label, the manifest of an index
LINES = ("codes", "used", "perplexity")


@section(place=130)
def semantic_ids(comparison: Comparison) -> Section | None:
    """The quality of the semantic IDs, and how well they fit items that were added later."""
    indices = distinct(comparison, lambda run: dict(run.semantic_ids))
    if not indices:
        return None
    measured = [(label, index) for label, index in indices if "quality" in index]
    fitted = [(label, index) for label, index in indices if index.get("fitness", {}).get("stages")]
    warnings = [
        f"{labelled('Refit due', label)}: {warning}."
        for label, index in indices
        for warning in index.get("fitness", {}).get("warnings", [])
    ]
    plots = [_levels_plot(measured)] if measured else []
    if fitted:
        plots.append(_fitness_plot("semantic-ids-error", "Error of items added later", "error", fitted))
        plots.append(
            _fitness_plot("semantic-ids-taken", "Items whose nearest ID is taken, %", "wanted_taken", fitted)
        )
    return Section(
        "semantic-ids",
        "Semantic IDs",
        [
            *warnings,
            "A collision is an ID that several items share. Perplexity is the number of equally frequent "
            "codes that would be as diverse. The error is the mean squared distance between an item's vector "
            "and its reconstruction from the codes, relative to a reconstruction without codes: 1 means that "
            "the codes do not help.",
        ],
        plots=plots,
        tables=[
            _figures(indices),
            *([_levels(measured)] if measured else []),
            *(_sample(label, place, index) for place, (label, index) in enumerate(measured)),
        ],
        folded=[_fitness(fitted)] if fitted else [],
    )


def _figures(indices: Sequence[Index]) -> Table:
    columns = [dict(quality.figures(index)) for _, index in indices]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return Table(
        "semantic-ids",
        "Statistics of the index",
        ["Figure", *(label or "Value" for label, _ in indices)],
        [[name[0].upper() + name[1:], *(_cell(column.get(name)) for column in columns)] for name in names],
    )


def _levels(indices: Sequence[Index]) -> Table:
    return Table(
        "semantic-ids-levels",
        "Codes of each level",
        ["Level", *map(str.capitalize, LINES)],
        [
            [labelled(_letter(place), label), *(_cell(level[line]) for line in LINES)]
            for label, index in indices
            for place, level in enumerate(index["quality"]["levels"])
        ],
    )


def _sample(label: str, place: int, index: Mapping[str, Any]) -> Table:
    sample = index["quality"]["sample"]
    return Table(
        f"semantic-ids-sample{f'-{place + 1}' if place else ''}",
        labelled(quality.sample_title(sample), label),
        ["Item", "Title"],
        [[entry["item"], entry["title"]] for entry in sample["items"]],
        "These items share the most common prefix of two codes.",
    )


def _fitness(indices: Sequence[Index]) -> Table:
    return Table(
        "semantic-ids-fitness",
        "How well the frozen codes fit",
        ["Items", "Number", "Error", "Nearest ID is taken", "Share an ID"],
        [
            [labelled(name.capitalize(), label), *map(_cell, figures)]
            for label, index in indices
            for name, *figures in quality.fitness_rows(index["fitness"])
        ],
        "Codes fit the items they were trained on best: compare with the items held out.",
    )


def _levels_plot(indices: Sequence[Index]) -> Plot:
    levels = max(len(index["quality"]["levels"]) for _, index in indices)
    return Plot(
        "semantic-ids-levels",
        "Codes of each level, codes in use and their perplexity",
        "Codes, codes in use and perplexity of each level; see the table.",
        [
            Series(
                labelled(line, label),
                number + 5 * place,
                np.arange(len(index["quality"]["levels"]), dtype=np.float64),
                np.array([level[line] for level in index["quality"]["levels"]], dtype=np.float64),
            )
            for place, (label, index) in enumerate(indices)
            for number, line in enumerate(LINES)
        ],
        "level",
        [(place, _letter(place)) for place in range(levels)],
    )


def _fitness_plot(name: str, title: str, key: str, indices: Sequence[Index]) -> Plot:
    """The new items of each stage, and the items held out of stage 0 as a reference line."""
    series, numbers = [], set[int]()
    for place, (label, index) in enumerate(indices):
        stages, held_out = index["fitness"]["stages"], index["fitness"].get("held_out")
        x = np.array([stage["stage"] for stage in stages], dtype=np.float64)
        y = np.array([_height(stage, key) for stage in stages])
        series.append(Series(labelled("new items", label), len(LINES) + 5 * place, x, y))
        if held_out is not None:
            level = np.full(len(x), _height(held_out, key))
            called = labelled("held out of stage 0", label)
            series.append(Series(called, len(LINES) + 1 + 5 * place, x, level, dashed=True))
        numbers |= {stage["stage"] for stage in stages}
    ticks = [(number, str(number)) for number in sorted(numbers)]
    return Plot(name, title, f"{title}, stage by stage; see the table.", series, "stage", ticks)


def _height(group: Mapping[str, Any], key: str) -> float:
    if key == "error":
        return np.nan if group[key] is None else float(group[key])
    return 100 * group[key] / group["items"]


def _letter(level: int) -> str:
    return token_name(level, 0)[1]


def _cell(value: float | None) -> Cell:
    """A number as a cell: integers are counts; the others are shares, errors and so on, with 3 decimals."""
    return None if value is None else Quantity(value, decimals=0 if isinstance(value, int) else 3)

"""Section: how strongly the anchor restrains the updates, and where the adapters moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.plots import HeatMap, Plot, Series
from peso.evaluation.report.sections.section import Section, section
from peso.evaluation.report.tables import Cell, Quantity, Table
from peso.evaluation.run_summary import System

FEW = 6  # at most this number of systems have a map
RATIOS = {
    "gradient_ratios": ("anchor-gradient", "Gradient of the penalty over that of the loss"),
    "pull_ratios": ("anchor-pull", "Decoupled pull over the optimizer's step"),
}


@section(place=100)
def anchor(comparison: Comparison) -> Section | None:
    """Ratios over time, the distance moved by each module, and one sentence per stage."""
    moved = [system for system in comparison.systems if _stages(system)]
    if not moved:
        return None
    text = (
        "An anchor in the loss acts through its gradient; below 1 % of the loss's gradient it disappears in "
        "the noise between two batches. A decoupled anchor shrinks the displacement after each step; what "
        "counts is the share of a displacement present at the start of the stage that is gone at its end. "
        "If there are several seeds, only the first is shown."
    )
    plots: list[Plot | HeatMap] = [
        plot for key in RATIOS if (plot := _over_time(comparison, moved, key)) is not None
    ]
    maps = [_map(system) for system in moved[:FEW]]
    largest = float(max(np.nanmax(one.values) for one in maps))
    return Section(
        "anchor",
        "How strongly the anchor restrains the updates",
        [text, *_sentences(moved)],
        plots=plots + [replace(one, scale=(0.0, largest)) for one in maps],
        tables=[_table(moved)],
    )


def _stages(system: System) -> dict[int, Mapping[str, Any]]:
    """The anchor's data for each stage where an adapter moved."""
    return {stage: s.anchor for stage, s in sorted(system.first.stages.items()) if s.anchor.get("moved")}


def _sentences(systems: Sequence[System]) -> list[str]:
    """One paragraph per system, about the stages that had an anchor."""
    found = []
    for system in systems:
        says = [text for told in _stages(system).values() if (text := told.get("says"))]
        if says:
            found.append(f"{system.label}: {'; '.join(says)}.")
    return found


def _over_time(comparison: Comparison, systems: Sequence[System], key: str) -> Plot | None:
    name, title = RATIOS[key]
    places = {stage: place for place, stage in enumerate(s for s in comparison.stages if s)}
    lines = []
    for system in systems:
        x: list[float] = []
        y: list[float] = []
        for stage, told in _stages(system).items():
            ratios = told.get(key)
            if ratios and stage in places:
                x += [places[stage] + (part + 0.5) / len(ratios) for part in range(len(ratios))]
                x.append(places[stage] + 1.0)
                y += [*ratios, np.nan]  # no line from one stage into the next
        if y:
            values = np.array(y)
            number = comparison.systems.index(system)
            lines.append(Series(system.label, number, np.array(x), np.where(values > 0, values, np.nan)))
    if not lines:
        return None
    return Plot(
        name,
        title,
        f"{title}, by quarter of each stage.",
        lines,
        "stage",
        [(place + 0.5, str(stage)) for stage, place in places.items()],
        points=False,
        logarithmic=True,
        boundaries=range(len(places) + 1),
    )


def _map(system: System) -> HeatMap:
    """The distance moved by layer and target module, averaged over the stages."""
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    sums: dict[tuple[str, str], list[float]] = {}
    for told in _stages(system).values():
        for module, figures in told["moved"]["modules"].items():
            place = layer, target = _place(module)
            rows.setdefault(layer, len(rows))
            columns.setdefault(target, len(columns))
            sums.setdefault(place, []).append(figures["distance"])
    values = np.full((len(rows), len(columns)), np.nan)
    for (layer, target), distances in sums.items():
        values[rows[layer], columns[target]] = np.mean(distances)
    largest = float(np.nanmax(values))
    decimals = max(0, 1 - int(np.floor(np.log10(largest)))) if largest > 0 else 1
    return HeatMap(
        f"anchor-moved-{system.name}",
        f"Distance moved by module, {system.label}",
        "Mean distance that the adapter of each module moved in a stage, by layer and target module.",
        values,
        list(rows),
        [target.removesuffix("_proj") for target in columns],
        "layer",
        "module",
        decimals,
    )


def _place(module: str) -> tuple[str, str]:
    """The layer and the target of a module.

    >>> _place("model.layers.3.mlp.up_proj"), _place("tensor 0")
    (('3', 'up_proj'), ('', 'tensor 0'))
    """
    parts = module.split(".")
    return next((part for part in parts if part.isdigit()), ""), parts[-1]


COLUMNS = {
    "Gradient ratio": ("gradient_ratio", 4),
    "Pull ratio": ("pull_ratio", 4),
    "Taken back": ("taken_back", 3),
}


def _table(systems: Sequence[System]) -> Table:
    rows: list[list[Cell]] = []
    for system in systems:
        for stage, told in _stages(system).items():
            strategy, moved = told.get("strategy", {}), told["moved"]
            rows.append(
                [
                    system.label,
                    Quantity(stage),
                    *(_cell(told.get(key), decimals) for key, decimals in COLUMNS.values()),
                    _cell(moved["distance"], 3),
                    _short(moved["kl"]),
                    _short(moved["second_order"]),
                    _short(strategy.get("weight")),
                    _short(strategy.get("strength")),
                    _short(strategy.get("rho")),
                    _short(strategy.get("rho_standard_error")),
                ]
            )
    titles = ["Distance", "KL", "½ Var", "Weight", "Strength", "ρ̄", "± ρ̄"]
    return Table(
        "anchor",
        "Effect of the anchor, stage by stage",
        ["Strategy", "Stage", *COLUMNS, *titles],
        rows,
        "Gradient ratio: gradient of the penalty over that of the loss. Pull ratio: decoupled pull over the "
        "optimizer's step. Both are means over the stage. Taken back: share of an initial displacement that "
        "is gone at the end. KL: softmax-KL to the anchor, summed over groups at temperature 1. ½ Var: its "
        "approximation for small displacements. ρ̄: the weight in the loss that corresponds to strength 1. "
        "± ρ̄: the standard error of ρ̄.",
    )


def _cell(value: float | None, decimals: int) -> Quantity | None:
    return None if value is None else Quantity(value, decimals=decimals)


def _short(value: float | None) -> str | None:
    """Three significant digits, for numbers of any size."""
    return None if value is None else f"{value:.3g}"

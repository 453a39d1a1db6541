"""Section: loss and gradient norms during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.findings import stage_range
from peso.evaluation.report.plots import Plot, Series
from peso.evaluation.report.sections.section import Section, section
from peso.evaluation.report.tables import Cell, Quantity, Table
from peso.evaluation.run_summary import TrainingCurve

CURVE_POINTS = 60  # the number of points of a stage's curve; each is the mean of an equal share of the steps


@dataclass(frozen=True)
class Panel:
    """The contents of one plot. ``columns`` has pairs of attributes of a TrainingCurve (steps, values); the
    second pair is drawn dashed."""

    name: str
    title: str
    columns: Sequence[tuple[str, str]]
    logarithmic: bool = False


PANELS = (
    Panel("loss", "Loss (validation dashed)", [("steps", "loss"), ("validation_steps", "validation_loss")]),
    Panel("gradient-norm", "Gradient norm of the loss", [("steps", "gradient_norm")], logarithmic=True),
    Panel(
        "penalty-gradient-norm",
        "Gradient norm of the penalty",
        [("steps", "penalty_gradient_norm")],
        logarithmic=True,
    ),
)


@section(place=90)
def training(comparison: Comparison) -> Section | None:
    """Loss and gradient norms during training."""
    curves = {
        system.name: {
            stage: trained.curve
            for stage, trained in system.first.stages.items()
            if trained.curve is not None and len(trained.curve.steps)
        }
        for system in comparison.systems
    }
    if not any(curves.values()):
        return None
    plots = [_plot(comparison, curves, panel) for panel in PANELS]
    drawn = [plot for plot in plots if any(np.isfinite(series.y).any() for series in plot.series)]
    paragraph = (
        "All stages have the same width, regardless of their number of steps. Each line connects the means "
        f"of at most {CURVE_POINTS} equal parts of a stage."
    )
    if drawn == plots:
        paragraph += " If the penalty's gradient is far below the loss's, the anchor has little effect."
    if any(len(system.runs) > 1 for system in comparison.systems):
        paragraph += " If there are several seeds, only the first is shown."
    return Section("training", "Training", [paragraph], plots=drawn, tables=[_rates(comparison)])


def _rates(comparison: Comparison) -> Table:
    """The learning rates that trials chose, for the first seed."""
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        for stage in system.stages:
            for choice in system.first.stages[stage].trials:
                last = {(t["learning_rate"], t["rows"]): t for t in choice["trials"]}
                tried = [
                    f"{rate:g}{'' if scale == 1 else f' (rows × {scale:g})'}: "
                    + ("not finite" if trial["loss"] is None else f"{trial['loss']:.4f}")
                    + f" after {trial['steps']:,}"
                    for (rate, scale), trial in last.items()
                ]
                chosen = [f"{choice['learning_rate']:g}", f"{choice['rows']:g}"]
                rows.append(
                    [system.label, Quantity(stage), choice["phase"] or None, *chosen, "; ".join(tried)]
                )
    return Table(
        "learning-rates",
        "Learning rates chosen by trials",
        [
            "Strategy",
            "Stage",
            "Phase",
            "Learning rate",
            "Rows ×",
            "Tried: lowest validation loss after steps",
        ],
        rows,
        "Validation losses in nats per item, for each candidate after its last round. If the lowest or the "
        "highest candidate is chosen, try others beyond it (training.later.trials.scales).",
    )


def _plot(comparison: Comparison, curves: Mapping[str, Mapping[int, TrainingCurve]], panel: Panel) -> Plot:
    stages = comparison.stages
    lines = []
    for (steps, values), dashed in zip(panel.columns, (False, True), strict=False):
        for number, system in enumerate(comparison.systems):
            pieces = [
                thinned(getattr(curve, steps), getattr(curve, values), float(curve.steps[-1]), place)
                for place, stage in enumerate(stages)
                if (curve := curves[system.name].get(stage)) is not None
            ]
            if pieces:
                x, y = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
                # without a penalty the value is 0, which a logarithmic scale cannot show
                y = np.where(y > 0, y, np.nan) if panel.logarithmic else y
                lines.append(Series(system.label, number, x, y, dashed=dashed))
    return Plot(
        panel.name,
        panel.title,
        f"{panel.title} of each strategy during the training of {stage_range(stages)}.",
        lines,
        "stage",
        [(place + 0.5, str(stage)) for place, stage in enumerate(stages)],
        points=False,
        logarithmic=panel.logarithmic,
        boundaries=range(len(stages) + 1),
    )


def thinned(steps: np.ndarray, values: np.ndarray, last: float, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal parts of a stage's steps.

    A nan at the end keeps the line from continuing into the next stage.

    Args:
        steps: int (n,), the number of each step, counted from 1.
        values: float (n,), the value at each step.
        last: the number of the stage's last step.
        place: the position of the stage on the x axis.

    Returns: x, which is ``place`` plus the completed share of the stage, and the means.

    >>> x, y = thinned(np.array([1, 2, 3, 4]), np.array([4.0, 3.0, 2.0, 1.0]), last=4, place=2)
    >>> x.tolist(), y.tolist()
    ([2.25, 2.5, 2.75, 3.0, 3.0], [4.0, 3.0, 2.0, 1.0, nan])
    """
    span = np.minimum((steps - 1) * CURVE_POINTS // last, CURVE_POINTS - 1).astype(np.int64)
    counts = np.bincount(span, minlength=CURVE_POINTS)
    step, value = (
        np.bincount(span, weights=weights, minlength=CURVE_POINTS)[counts > 0] / counts[counts > 0]
        for weights in (steps, values)
    )
    return np.append(place + step / last, place + 1.0), np.append(value, np.nan)

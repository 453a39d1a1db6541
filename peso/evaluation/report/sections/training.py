"""Section: loss and gradients along the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.findings import stage_range
from peso.evaluation.report.plots import Plot, Series
from peso.evaluation.report.sections.section import Section, section
from peso.evaluation.run_summary import TrainingCurve

CURVE_POINTS = 60  # a stage's curve is drawn through the means of so many equal spans


@dataclass(frozen=True)
class Panel:
    """What one plot shows: columns of a TrainingCurve (steps, values), the second pair dashed."""

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
    """Loss and gradients along the stages."""
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
        "Every stage is drawn equally wide, however many steps it took. A line joins the means of at most "
        f"{CURVE_POINTS} equal spans."
    )
    if drawn == plots:
        paragraph += " If the penalty's gradient is far below the loss's, the anchor has little effect."
    if any(len(system.runs) > 1 for system in comparison.systems):
        paragraph += " Of several seeds the first is shown."
    return Section("training", "Training", [paragraph], plots=drawn)


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
                # a logarithmic scale has no place for the zero of "no penalty"
                y = np.where(y > 0, y, np.nan) if panel.logarithmic else y
                lines.append(Series(system.label, number, x, y, dashed=dashed))
    return Plot(
        panel.name,
        panel.title,
        f"{panel.title} of each strategy along the training of {stage_range(stages)}.",
        lines,
        "stage",
        [(place + 0.5, str(stage)) for place, stage in enumerate(stages)],
        points=False,
        logarithmic=panel.logarithmic,
        boundaries=range(len(stages) + 1),
    )


def thinned(steps: np.ndarray, values: np.ndarray, last: float, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal spans of a stage's steps, at ``place`` + the share of the stage that was done.

    A nan at the end keeps a line from running on into the next stage.

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

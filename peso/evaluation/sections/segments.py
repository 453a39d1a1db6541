"""Section: dormant, continuing and new users; known and new items."""

from __future__ import annotations

from peso.evaluation.comparison import Comparison
from peso.evaluation.findings import stage_range
from peso.evaluation.metrics import Metric
from peso.evaluation.plots import Plot
from peso.evaluation.sections.section import Section, file_name, quantity, series
from peso.evaluation.segments import ITEM_SEGMENTS, USER_SEGMENTS
from peso.evaluation.tables import Table

SEGMENTS = [
    *(("user_segment", segment, f"{segment} users") for segment in USER_SEGMENTS),
    *(("item_segment", segment, f"{segment} items") for segment in ITEM_SEGMENTS),
]


def segments(comparison: Comparison) -> Section:
    """Dormant, continuing and new users; known and new items."""
    return Section(
        "segments",
        "Who and what",
        [
            "A dormant user was seen in an earlier stage but not in the last one, a continuing user in the "
            "last one, a new user never. A known item occurred before the stage, a new one did not. Every "
            f"case of {stage_range(comparison.averaged)} counts the same here."
        ],
        plots=[_segment_plot(comparison, metric) for metric in comparison.headline],
        tables=[_segment_table(comparison, metric) for metric in comparison.headline],
    )


def _segment_table(comparison: Comparison, metric: Metric) -> Table:
    """Case counts stand in the heads of the columns where they are the same for all runs."""
    estimates = {
        (run.name, column, segment): comparison.in_segment(run, metric, column, segment)
        for run in comparison.runs
        for column, segment, _ in SEGMENTS
    }
    heads, counts_differ = [], False
    for column, segment, title in SEGMENTS:
        counts = {
            found.cases if (found := estimates[run.name, column, segment]) else 0 for run in comparison.runs
        }
        counts_differ |= len(counts) > 1
        heads.append(
            f"{title} (n = {counts.pop():,})".capitalize() if len(counts) == 1 else title.capitalize()
        )
    return Table(
        f"{file_name(metric)}-by-segment",
        f"{metric.label} by segment",
        ["Strategy", *heads],
        [
            [
                comparison.labels[run.name],
                *(quantity(estimates[run.name, column, segment], metric) for column, segment, _ in SEGMENTS),
            ]
            for run in comparison.runs
        ],
        "The runs have different numbers of cases in some segments." if counts_differ else "",
    )


def _segment_plot(comparison: Comparison, metric: Metric) -> Plot:
    places = list(range(len(USER_SEGMENTS)))
    return Plot(
        f"{file_name(metric)}-by-user-segment",
        f"{metric.label} by user",
        f"{metric.label} of each strategy for {', '.join(USER_SEGMENTS)} users; see the table.",
        [
            series(
                comparison,
                number,
                [comparison.in_segment(run, metric, "user_segment", segment) for segment in USER_SEGMENTS],
                places,
            )
            for number, run in enumerate(comparison.runs)
        ],
        "users",
        [(place, segment) for place, segment in zip(places, USER_SEGMENTS, strict=True)],
        connected=False,
    )

"""The sections of a report, one file each: a function from a comparison to texts, tables and plots.

A new section is a new file and its name in :data:`SECTIONS`, which is also the order on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.sections.anchor import anchor
from peso.evaluation.report.sections.cost import cost
from peso.evaluation.report.sections.drift import drift, semantic_ids
from peso.evaluation.report.sections.lists import lists
from peso.evaluation.report.sections.recommendations import recommendations
from peso.evaluation.report.sections.section import Section
from peso.evaluation.report.sections.segments import segments
from peso.evaluation.report.sections.significance import significance
from peso.evaluation.report.sections.stages import by_stage
from peso.evaluation.report.sections.summary import origin, summary
from peso.evaluation.report.sections.sweep import sweep
from peso.evaluation.report.sections.training import training
from peso.evaluation.report.sections.transfer import transfer

SECTIONS: Sequence[Callable[[Comparison], Section | None]] = (
    summary,
    recommendations,
    significance,
    by_stage,
    segments,
    transfer,
    sweep,
    lists,
    training,
    anchor,
    cost,
    drift,
    semantic_ids,
    origin,
)


def sections_of(comparison: Comparison) -> list[Section]:
    """The sections that have something to show, without empty tables and columns."""
    return [
        found.without_empty_tables() for section in SECTIONS if (found := section(comparison)) is not None
    ]

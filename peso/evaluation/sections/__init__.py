"""The sections of a report, one file each: a function from a comparison to texts, tables and plots.

A new section is a new file and its name in :data:`SECTIONS`, which is also the order on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peso.evaluation.comparison import Comparison
from peso.evaluation.sections.anchor import anchor
from peso.evaluation.sections.cost import cost
from peso.evaluation.sections.drift import drift
from peso.evaluation.sections.lists import lists
from peso.evaluation.sections.origin import origin
from peso.evaluation.sections.recommendations import recommendations
from peso.evaluation.sections.section import Section
from peso.evaluation.sections.segments import segments
from peso.evaluation.sections.semantic_ids import semantic_ids
from peso.evaluation.sections.significance import significance
from peso.evaluation.sections.stages import by_stage
from peso.evaluation.sections.summary import summary
from peso.evaluation.sections.sweep import sweep
from peso.evaluation.sections.training import training
from peso.evaluation.sections.transfer import transfer

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

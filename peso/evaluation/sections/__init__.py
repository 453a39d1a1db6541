"""The sections of a report, one file each: a function from a comparison to texts, tables and plots.

A new section is a new file and its name in :data:`SECTIONS`, which is also the order on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peso.evaluation.comparison import Comparison
from peso.evaluation.sections.anchor import anchor
from peso.evaluation.sections.cost import cost
from peso.evaluation.sections.drift import drift
from peso.evaluation.sections.levels import levels
from peso.evaluation.sections.lists import lists
from peso.evaluation.sections.origin import configuration, provenance
from peso.evaluation.sections.reading import reading
from peso.evaluation.sections.section import Section
from peso.evaluation.sections.segments import segments
from peso.evaluation.sections.semantic_ids import semantic_ids
from peso.evaluation.sections.significance import significance
from peso.evaluation.sections.stages import by_stage
from peso.evaluation.sections.summary import summary
from peso.evaluation.sections.sweep import sweep
from peso.evaluation.sections.training import training
from peso.evaluation.sections.transfer import transfer

SECTIONS: Sequence[Callable[[Comparison], Section]] = (
    summary,
    significance,
    by_stage,
    levels,
    segments,
    transfer,
    sweep,
    lists,
    training,
    anchor,
    cost,
    drift,
    semantic_ids,
    configuration,
    provenance,
    reading,
)

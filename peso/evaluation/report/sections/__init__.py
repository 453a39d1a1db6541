"""The sections of a report. Each is a function from a comparison to texts, tables and plots.

To add a section, write a new file with a function that is registered with
:func:`~peso.evaluation.report.sections.section.section`. Other distributions can offer sections as entry
points ``peso.report_sections``.
"""

from __future__ import annotations

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.sections.section import PLACES, SECTIONS, Section

OF_OTHERS = 999  # the place of sections that do not name one: just before the provenance


def sections_of(comparison: Comparison) -> list[Section]:
    """The sections that have content, without empty tables and columns.

    Raises:
        ConfigError: a section of an installed distribution cannot be imported.
    """
    makers = sorted(
        set(SECTIONS.everything().values()),
        key=lambda make: (PLACES.get(make.__name__, OF_OTHERS), make.__name__),
    )
    return [found.without_empty_tables() for make in makers if (found := make(comparison)) is not None]

"""The sections of a report, one file each: a function from a comparison to texts, tables and plots.

A new section is a new file with a function that :func:`~peso.evaluation.report.sections.section.section`
registers; a distribution offers one as an entry point ``peso.report_sections``.
"""

from __future__ import annotations

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.sections.section import PLACES, SECTIONS, Section

OF_OTHERS = 999  # where a section stands that names no place: before the origin of the report


def sections_of(comparison: Comparison) -> list[Section]:
    """The sections that have something to show, without empty tables and columns.

    Raises:
        ConfigError: the section of an installed distribution cannot be imported.
    """
    makers = sorted(
        set(SECTIONS.everything().values()),
        key=lambda make: (PLACES.get(make.__name__, OF_OTHERS), make.__name__),
    )
    return [found.without_empty_tables() for make in makers if (found := make(comparison)) is not None]

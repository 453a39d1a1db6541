"""Write a report: one self-contained page, and its tables and plots as separate files.

The same input gives the same bytes: nothing on the page depends on when or where it was made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from peso.evaluation.comparison import Comparison
from peso.evaluation.report import PAGE, PLOTS, TABLES, refuse_foreign
from peso.evaluation.report.plots import Drawing, files, svg_element
from peso.evaluation.report.sections import sections_of
from peso.evaluation.report.sections.section import Section
from peso.evaluation.report.tables import Table, to_csv, to_latex, to_markdown
from peso.evaluation.run_summary import RunSummary
from peso.runtime.failures import printable
from peso.runtime.files import commit_directory

T = TypeVar("T", Drawing, Table)


def write_report(
    directory: Path,
    runs: Sequence[RunSummary],
    title: str,
    ks: Sequence[int] = (5, 10),
    columns: Sequence[str] = (),
    paired: bool = False,
) -> Path:
    """Write ``index.html``, ``tables/`` (CSV, Markdown, LaTeX) and ``plots/`` (SVG, PNG).

    An older report in the directory is replaced only when the new one is complete. Runs are compared within
    each data set and backbone; the comparisons follow one another on the page.

    Args:
        directory: the directory of the report.
        ks: the list lengths k of Hit@k and NDCG@k.
        columns: columns of the item or user table. Each adds a way to split the cases.
        paired: whether to refuse runs that answered different cases. Otherwise they are shown side by side
            without a comparison.

    Returns: the path of the page.

    Raises:
        WorkspaceError: the directory has files that are not part of a report, two runs have the same name, no
            stage is evaluated in all runs, or runs of one system (with ``paired``, any runs) answered
            different cases.
        ConfigError: a k is larger than the stored lists, or a column is unknown.
    """
    refuse_foreign(directory)
    comparisons = {place: Comparison(group, ks, columns) for place, group in by_place(runs).items()}
    if paired:
        for comparison in comparisons.values():
            comparison.require_same_cases()
    sections = [
        _placed(section, place if len(comparisons) > 1 else "")
        for place, comparison in comparisons.items()
        for section in sections_of(comparison)
    ]
    with commit_directory(directory) as aside:
        for section in sections:
            _write_files(aside, section)
        (aside / PAGE).write_text(render_page(sections, title), encoding="utf-8")
    return directory / PAGE


def by_place(runs: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    """Group runs by data set and backbone. Only runs of the same group can be compared."""
    places: dict[str, list[RunSummary]] = {}
    for run in runs:
        label = " · ".join(part for part in (run.data_set, run.backbone) if part)
        places.setdefault(label, []).append(run)
    return places


def _placed(section: Section, place: str) -> Section:
    """The section with a title, an address and file names that are unique to the place.

    File names, which are also addresses, may contain names of runs and columns. Other characters than those
    that are safe in both are replaced.
    """
    prefix = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-") + "-" if place else ""

    def named(part: T) -> T:
        return replace(part, name=re.sub(r"[^\w.=+,\[\]-]+", "-", prefix + part.name))

    return replace(
        section,
        anchor=prefix + section.anchor,
        title=f"{section.title} · {place}" if place else section.title,
        plots=[named(plot) for plot in section.plots],
        tables=[named(table) for table in section.tables],
        folded=[named(table) for table in section.folded],
    )


def render_page(sections: Sequence[Section], title: str) -> str:
    """The page as HTML. Styles and plots are embedded; there are no scripts."""
    environment = Environment(
        loader=PackageLoader("peso.evaluation.report.page"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2")
    return printable(page.render(sections=sections, title=title, svg=_svg, text=_text)) + "\n"


def _svg(plot: Drawing) -> Markup:
    return Markup(svg_element(plot))


def _text(text: str) -> Markup:
    """The text escaped for HTML, with text between backticks formatted as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _write_files(directory: Path, section: Section) -> None:
    for table in (*section.tables, *section.folded):
        for ending, render in (("csv", to_csv), ("md", to_markdown), ("tex", to_latex)):
            path = directory / TABLES / f"{table.name}.{ending}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(render(table), encoding="utf-8", newline="")
    for plot in section.plots:
        (directory / PLOTS).mkdir(exist_ok=True)
        for ending, content in files(plot).items():
            # not Path.with_suffix, which would replace what follows the dot in strength=0.3
            (directory / PLOTS / f"{plot.name}{ending}").write_bytes(content)

"""The report: one self-contained page, and its tables and plots as files beside it.

The same input gives the same bytes: nothing on the page depends on when or where it was made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from peso.evaluation.comparison import Comparison
from peso.evaluation.report import PAGE, PLOTS, TABLES, refuse_foreign
from peso.evaluation.report.plots import Drawing, files, svg_element
from peso.evaluation.report.sections import sections_of
from peso.evaluation.report.sections.section import Section
from peso.evaluation.report.tables import to_csv, to_latex, to_markdown
from peso.evaluation.run_summary import RunSummary
from peso.runtime.failures import printable
from peso.runtime.files import commit_directory


def write_report(
    directory: Path,
    runs: Sequence[RunSummary],
    title: str,
    ks: Sequence[int] = (5, 10),
    columns: Sequence[str] = (),
    paired: bool = False,
) -> Path:
    """Write ``index.html``, ``tables/`` (CSV, Markdown, LaTeX) and ``plots/`` (SVG, PNG).

    The directory appears whole; an older report in its place stays until then. Runs on several data sets or
    backbones are compared within each, one after another on the page.

    Args:
        ks: the list lengths of Hit@k and NDCG@k.
        columns: of the item or user table, each a further way to split the cases.
        paired: refuse runs that answered different cases, instead of setting them side by side uncompared.

    Returns: the path of the page.

    Raises:
        WorkspaceError: the directory holds what is not a report, two runs have one name, no stage is
            evaluated in all runs, or runs of one system (with ``paired``, any) answered different cases.
        ConfigError: a k beyond the stored lists, or an unknown column.
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
    """Runs by data set and backbone, which only runs of the same can be compared on."""
    places: dict[str, list[RunSummary]] = {}
    for run in runs:
        label = " · ".join(part for part in (run.data_set, run.backbone) if part)
        places.setdefault(label, []).append(run)
    return places


def _placed(section: Section, place: str) -> Section:
    """The section with a title, an address and file names of its own."""
    if not place:
        return section
    prefix = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")
    return replace(
        section,
        anchor=f"{prefix}-{section.anchor}",
        title=f"{section.title} · {place}",
        plots=[replace(plot, name=f"{prefix}-{plot.name}") for plot in section.plots],
        tables=[replace(table, name=f"{prefix}-{table.name}") for table in section.tables],
        folded=[replace(table, name=f"{prefix}-{table.name}") for table in section.folded],
    )


def render_page(sections: Sequence[Section], title: str) -> str:
    """The page as HTML: styles and plots are in it, scripts it has none."""
    environment = Environment(
        loader=PackageLoader("peso.evaluation.report.page"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2")
    return printable(page.render(sections=sections, title=title, svg=_svg, text=_text)) + "\n"


def _svg(plot: Drawing) -> Markup:
    return Markup(svg_element(plot))


def _text(text: str) -> Markup:
    """Escaped; what stands between backticks is set as code."""
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
            # not Path.with_suffix: what follows the dot of strength=0.3 would make way for the ending
            (directory / PLOTS / f"{plot.name}{ending}").write_bytes(content)

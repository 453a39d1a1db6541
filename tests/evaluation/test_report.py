"""The report: what it claims, what it shows, and that one file is all it needs."""

from __future__ import annotations

import csv
import doctest
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import pytest
from html_page import Page
from reports import catalogue, example_runs, run

import peso.evaluation
from peso.errors import WorkspaceError
from peso.evaluation.comparison import Comparison
from peso.evaluation.report import page as report
from peso.evaluation.report.page import write_report
from peso.evaluation.report.tables import Quantity, Table, to_latex, to_markdown

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def nothing_is_drawn() -> None:
    """Here everything is."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("w") / "report"
    write_report(directory, example_runs(), "Example")
    return directory


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return (written / "index.html").read_text(encoding="utf-8")


def test_docstring_examples() -> None:
    attempted = 0
    for found in pkgutil.walk_packages(peso.evaluation.__path__, "peso.evaluation."):
        result = doctest.testmod(importlib.import_module(found.name))
        assert not result.failed, found.name
        attempted += result.attempted
    assert attempted > 20


# -- the page ----------------------------------------------------------------------------------------


def test_page_needs_no_other_file_and_no_network(page: str) -> None:
    parsed = Page(page)
    assert all(address.startswith("#") or address == "data:," for address in parsed.addresses)
    assert "script" not in parsed.tags
    assert not re.search(r"@import|@font-face|url\((?!#)", page)
    assert "default-src 'none'" in page  # the browser sees to it, too
    assert len(page.encode()) < 1_000_000


def test_page_is_well_formed_and_its_references_lead_somewhere(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = {address[1:] for address in parsed.addresses if address.startswith("#")}
    assert targets | parsed.references | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(parsed.ids)


def test_page_has_every_section_plot_and_table(page: str, written: Path) -> None:
    parsed = Page(page)
    assert parsed.headings == [
        "Summary",
        "Recommendations",
        "Significance",
        "Stage by stage",
        "By kind of user and item",
        "Forgetting and transfer",
        "Variety and popularity of the lists",
        "Training",
        "How strongly the anchor restrains the updates",
        "Cost",
        "Drift of the stream",
        "Semantic IDs",
        "Configuration and provenance",
    ]
    assert page.count("<svg xmlns") == len(list((written / "plots").glob("*.svg"))) == 28
    assert page.count("<table>") == len(list((written / "tables").glob("*.csv")))
    for text in ("learning_rate: 0.001", "strategy.weight", "adapter_model.safetensors", "Dormant users"):
        assert text in parsed.text
    assert "0.0004 (rows × 3): 6.2000 after 60; 1e+30: not finite after 20" in parsed.text
    for text in ("Moka Pot", "Refit due: stage 4", "12 items under <a_4><b_9>, the first 2 of them"):
        assert text in parsed.text


def test_every_table_and_plot_lies_beside_the_page_in_every_format(written: Path) -> None:
    names = {path.stem for path in (written / "tables").glob("*.csv")}
    assert {"averages", "ndcg-10-by-stage", "hit-10-by-segment", "cost", "learning-rates"} <= names
    assert {"ndcg-10-to-best", "hit-10-pairs", "lists", "ndcg-10-transfer", "hit-10-by-popularity"} <= names
    for name in names:
        assert (written / "tables" / f"{name}.md").read_text().startswith("**")
        assert r"\toprule" in (written / "tables" / f"{name}.tex").read_text()
    for path in (written / "plots").glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_same_runs_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "again", example_runs(), "Example")
    for path in written.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(written)).read_bytes() == path.read_bytes(), path


def test_csv_holds_the_estimates_in_full(written: Path) -> None:
    comparison = Comparison(example_runs(), [5, 10])
    with (written / "tables" / "averages.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for system, row in zip(comparison.systems, rows, strict=True):
        for metric in comparison.metrics:
            estimate = comparison.average(system, metric)
            assert float(row[metric.label]) == estimate.value
            assert float(row[f"{metric.label} high"]) == pytest.approx(estimate.high)


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    """Neither markup, nor a formula, nor a command."""
    nasty = r"<script>alert(1)</script> & $\frac{ | _x_ \input{a}"
    runs = [
        replace(run("_a", nasty, 0.2), configuration=f"key: '{nasty}'", manifests=[{nasty: "</pre>"}]),
        run("b", "_hidden", 0.3, seed=1),
    ]
    page = write_report(tmp_path / "r", runs, nasty).read_text(encoding="utf-8")
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.text.count(nasty) > 5
    for path in (tmp_path / "r" / "plots").glob("*.svg"):
        ET.parse(path)
    latex = (tmp_path / "r" / "tables" / "averages.tex").read_text()
    assert r"\textless{}script\textgreater{}" in latex
    assert r"\input" not in latex
    markdown = (tmp_path / "r" / "tables" / "averages.md").read_text()
    assert r"\<script\>" in markdown
    cells = [re.split(r"(?<!\\)\|", line) for line in markdown.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in cells}) == 1


def test_a_column_with_any_name_gives_files_in_the_directory_of_tables(tmp_path: Path) -> None:
    column = "../../age / region (now)"
    users = replace(catalogue(), user_columns={column: {"u1": "x"}})
    runs = [replace(run("a", "a", 0.2), catalogue=users)]
    page = write_report(tmp_path / "r", runs, "T", columns=[column]).read_text(encoding="utf-8")
    assert (tmp_path / "r" / "tables" / "ndcg-10-by-column-..-..-age-region-now-.csv").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"r"}
    assert not [path for path in (tmp_path / "r" / "tables").iterdir() if path.is_dir()]
    ids = re.findall(r' id="([^"]*)"', page)
    assert not [one for one in ids if re.search(r"[\s()]", one)]
    assert f"NDCG@10 by {column}" in unescape(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_the_window_and_logs_no_error(page: str, tmp_path: Path, width: int, scheme: str) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip(
            "no Chromium on this machine; `apt-get install chromium` to look at the page in a browser"
        )
    frame = tmp_path / "frame.html"
    # a frame: a browser window is never narrower than 500, and the page has no script to measure itself
    frame.write_text(
        f"""<!doctype html><meta name="color-scheme" content="light dark">
        <iframe width="{width}" height="900" style="border: 0" srcdoc="{escape(page)}"></iframe>
        <script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {{
            const page = frame.contentDocument, box = element => element.getBoundingClientRect();
            page.querySelectorAll("details").forEach(details => details.open = true);
            const scrolls = ".scroll > *, nav > *, svg";
            const inside = [...page.querySelectorAll("body *")].filter(e => !e.closest(scrolls));
            const texts = [...page.querySelectorAll(".plots svg text")];
            const style = element => frame.contentWindow.getComputedStyle(element);
            document.documentElement.dataset.measured = JSON.stringify({{
                window: frame.contentWindow.innerWidth,
                page: page.documentElement.scrollWidth,
                wide: inside.filter(e => box(e).right > {width} + 1).map(e => e.outerHTML.slice(0, 80)),
                small: texts.filter(e => box(e).height < 10).map(e => e.textContent),
                boxes: page.querySelectorAll(".scroll").length,
                ground: style(page.body).backgroundColor,
                text: style(texts[0]).fill}});
        }};
        </script>""",
        encoding="utf-8",
    )
    finished = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,900",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=1200,
        check=True,
    )
    found = re.search(r'data-measured="([^"]*)"', finished.stdout)
    assert found, finished.stderr[-2000:]
    measured = json.loads(unescape(found[1]))
    assert measured["window"] == width
    assert measured["boxes"] > 10  # everything was there when it was measured
    assert measured["wide"] == []
    assert measured["page"] <= width
    assert measured["small"] == []
    # the scheme was followed, and the labels of the plots can be read in it
    assert (_luminance(measured["ground"]) < 0.5) == (scheme == "dark")
    assert _contrast(measured["ground"], measured["text"]) > 4.5
    assert "CONSOLE" not in finished.stderr


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of a CSS colour ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


# -- writing it --------------------------------------------------------------------------------------


def test_names_that_differ_after_a_dot_keep_their_plots_apart(tmp_path: Path) -> None:
    runs = [run(f"peso[strength={value}]", f"peso ({value})", 0.5, penalty=1e-3) for value in (0.3, 0.03)]
    write_report(tmp_path / "r", runs, "Sweep")
    found = {path.name for path in (tmp_path / "r" / "plots").glob("anchor-moved-*")}
    names = [f"anchor-moved-peso[strength={value}]" for value in (0.3, 0.03)]
    assert found == {f"{name}.{ending}" for name in names for ending in ("svg", "png")}


def test_a_new_report_replaces_the_old_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "files", lambda plot: {".svg": b"<svg></svg>"})
    monkeypatch.setattr(report, "svg_element", lambda plot: "<svg></svg>")
    write_report(tmp_path / "r", [run("a", "a", 0.1)], "Old", ks=[3])
    assert (tmp_path / "r" / "tables" / "ndcg-3-by-stage.csv").exists()
    write_report(tmp_path / "r", [run("a", "a", 0.1)], "New")
    assert "New" in (tmp_path / "r" / "index.html").read_text(encoding="utf-8")
    assert not (tmp_path / "r" / "tables" / "ndcg-3-by-stage.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_failed_report_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "files", lambda plot: {".svg": b"<svg></svg>"})
    monkeypatch.setattr(report, "svg_element", lambda plot: "<svg></svg>")
    write_report(tmp_path / "r", [run("a", "a", 0.1)], "Old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "files", full)
    with pytest.raises(WorkspaceError, match="no space left"):
        write_report(tmp_path / "r", [run("a", "a", 0.1)], "New")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_directory_with_other_things_in_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WorkspaceError, match=r"notes\.txt"):
        write_report(tmp_path, [run("a", "a", 0.1)], "New")
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -- tables ------------------------------------------------------------------------------------------


def test_marks_show_in_every_format() -> None:
    table = Table(
        "t", "T", ["run", "x"], [["a", Quantity(1.5, 0.5, 1, "best")], ["b", Quantity(1.4, 0.5, 1, "tied")]]
    )
    assert "**1.5 ± 0.5**" in to_markdown(table)
    assert "1.4 ± 0.5 ≈" in to_markdown(table)
    assert r"$\mathbf{1.5} \pm 0.5$" in to_latex(table)
    assert r"$1.4 \pm 0.5$~$\approx$" in to_latex(table)

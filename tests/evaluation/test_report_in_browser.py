"""The report in a real Chromium: no script error, no request, nothing wider than the window, all legible."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CONTRAST, STICKS_OUT, Browser
from reports import CASES, example_runs, many_runs

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.page import render_page
from peso.evaluation.report.sections import sections_of

pytestmark = [pytest.mark.browser, pytest.mark.slow]  # its pages are drawn, which takes long
WINDOWS = {"desktop": (1280, 900, False), "phone": (390, 844, True), "small phone": (320, 568, True)}
DRAWN = """
[...document.querySelectorAll('.plots svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])
"""


@pytest.fixture(autouse=True, scope="module")
def nothing_is_drawn() -> None:
    """Here everything is."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    runs = {"example": example_runs(), "crowded": many_runs(seeds=1, cases=CASES)}
    for name, some in runs.items():
        sections = sections_of(Comparison(some, [5, 10]))
        title = name if name == "example" else "averyveryverylongnamewithoutanyblank" * 3
        (root / f"{name}.html").write_text(render_page(sections, title), encoding="utf-8")
    return {name: root / f"{name}.html" for name in runs}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["example", "crowded"])
def test_the_page_is_sound(
    browser: Browser, pages: dict[str, Path], name: str, window: str, scheme: str
) -> None:
    width, height, phone = WINDOWS[window]
    browser.problems.clear()
    browser.open(pages[name], width, height, scheme, phone=phone)
    browser.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
    assert browser.evaluate("innerWidth") == width  # a phone zooms out where something is too wide
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(STICKS_OUT) == []
    dark = browser.evaluate(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
    assert dark is True
    ratio, where = browser.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    assert all(across > 200 and down > 30 for across, down in browser.evaluate(DRAWN))
    assert browser.evaluate("document.querySelectorAll('.plots svg').length") > 20
    assert browser.problems == []


def test_the_results_begin_on_the_first_screen_of_a_phone(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["example"], 390, 844, "light", phone=True)
    assert browser.evaluate("document.querySelector('nav').getBoundingClientRect().height") < 50
    top = browser.evaluate("document.querySelector('main p').getBoundingClientRect().top")
    assert top < 844 / 2


def test_the_test_sees_what_it_is_there_for(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><script>nothing.at.all()</script>"
        "<img src='https://example.org/x.png'><p style='width:2000px;color:#ccc;background:#fff'>wide</p>"
    )
    browser.problems.clear()
    browser.open(page, 390, 844, "light", phone=True)
    assert browser.evaluate(STICKS_OUT)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
    assert browser.evaluate(CONTRAST)[0] < 4.5
    assert any("script error" in problem for problem in browser.problems)
    assert any("example.org" in problem for problem in browser.problems)

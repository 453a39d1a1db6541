"""The report in a real Chromium: no script error, no request, nothing wider than the window, all legible."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium, find_chromium
from reports import CASES, example_runs, many_runs

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.page import render_page
from peso.evaluation.report.sections import sections_of

pytestmark = pytest.mark.browser
WINDOWS = {"desktop": (1280, 900, False), "phone": (390, 844, True), "small phone": (320, 568, True)}
# What sticks out of the window, boxes that scroll by themselves and what is in them left out
STICKS_OUT = """
[...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !element.closest('.scroll, pre, svg');
}).map(element => element.outerHTML.slice(0, 80))
"""
# Contrast of the text with what lies behind it (WCAG 2, relative luminance), the worst of the page
CONTRAST = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((parts(colour)[3] ?? 1) > 0.99) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  let worst = [21, ''];
  for (const element of document.querySelectorAll('h1, h2, p, a, th, td, span, figcaption, summary, li')) {
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 80)];
  }
  return worst;
})()
"""
DRAWN = """
[...document.querySelectorAll('.plots svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        missing = "no Chromium: install the Debian package chromium, or name one in $PESO_BROWSER"
        if os.environ.get("PESO_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    with chromium(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    runs = {"example": example_runs(), "crowded": many_runs(seeds=1, cases=CASES)}
    for name, some in runs.items():
        sections = sections_of(Comparison(some, [5, 10]))
        title = name if name == "example" else "averyveryverylongnamewithoutanyblank" * 3
        (root / f"{name}.html").write_text(render_page(sections, title), encoding="utf-8")
    return {name: root / f"{name}.html" for name in runs}


@pytest.mark.slow
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


@pytest.mark.slow
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

"""A page of a report, taken apart."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from peso.evaluation.comparison import Comparison
from peso.evaluation.report.page import render_page
from peso.evaluation.report.sections import sections_of
from peso.evaluation.run_summary import RunSummary

BOOLEAN = {"open", "defer", "hidden", "required", "checked"}
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a page is made of; refuses tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.references: set[str] = set()
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert value is not None or name in BOOLEAN
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.addresses.append(str(value))
            if name.startswith("on"):
                pytest.fail(f"an event handler: {name}")
            if name == "aria-labelledby":
                self.references.add(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def page_of(*runs: RunSummary) -> Page:
    return Page(render_page(sections_of(Comparison(runs, [5, 10])), "Title"))

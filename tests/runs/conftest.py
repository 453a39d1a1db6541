"""Reports of the tests of runs have no drawings, which take most of the time; tests/evaluation draws them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def _nothing_is_drawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peso.evaluation.report.page.files", lambda plot: {})
        patch.setattr("peso.evaluation.report.page.svg_element", lambda plot: "<svg></svg>")
        yield

"""Tests of reports draw their plots."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_is_drawn() -> None:
    pass

"""How a strategy is called in reports, `peso status` and model cards."""

from __future__ import annotations

from typing import Any

import pytest

from peso.config import load_config
from peso.runs.report import strategy_label


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"name": "peso"}, "peso"),
        ({"name": "peso", "strength": 2}, "peso (strength 2)"),
        ({"name": "peso", "weight": 2.0}, "peso (weight 2, coupling loss)"),
        ({"name": "peso", "proximal": "orthogonal"}, "peso (proximal orthogonal, coupling loss)"),
    ],
)
def test_a_label_has_the_options_that_are_set(options: dict[str, Any], label: str) -> None:
    assert strategy_label(load_config({"data": "simulate", "strategy": options})) == label

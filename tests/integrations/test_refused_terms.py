"""What is not a proximal term, or not one for a callback, is refused when the callback is made."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

import peso
from peso.errors import ConfigError


@pytest.mark.parametrize(
    ("trainer", "package"), [("transformers", "transformers"), ("lightning", "pytorch_lightning")]
)
@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("l2", "needs a proximal term, not 'l2'; give an object, such as peso"),
        (peso.L2, "needs a proximal term, not the class L2"),
        (None, "needs a proximal term, not None"),
        (peso.OutputKL(weight=1.0), "OutputKL watches forward passes"),
    ],
)
def test_a_wrong_term_is_refused_at_once(trainer: str, package: str, term: Any, message: str) -> None:
    pytest.importorskip(package)
    callback = import_module(f"peso.integrations.{trainer}").ProximalCallback
    with pytest.raises(ConfigError, match=message):
        callback(term)
    with pytest.raises(ConfigError, match="total_learning_rate 'all' must be a finite number above 0"):
        callback(peso.L2(weight=1.0), total_learning_rate="all")

"""Settings by the size of the log: valid, and larger logs get larger models."""

from __future__ import annotations

import pytest

from peso.config import load_config
from peso.config.recipe import EXACT_ITEMS, from_scratch


@pytest.mark.parametrize("events", [1, 500, 20_000, 199_999, 200_000, 5_000_000, 10**10])
@pytest.mark.parametrize("items", [1, EXACT_ITEMS, EXACT_ITEMS + 1, 10**8])
def test_every_log_gets_a_valid_configuration_and_its_reason(events: int, items: int) -> None:
    sections, reason = from_scratch(events, items)
    config = load_config({"data": {"simulate": {}}, **sections})
    assert config.head.reads
    assert 32 <= config.training.batch_size <= 256
    assert (config.head.negatives is None) == (items <= EXACT_ITEMS)
    assert f"{events:,} training targets" in reason
    assert f"{config.backbone.layers} layers {config.backbone.width} wide" in reason


def test_a_larger_log_gets_a_model_that_is_no_smaller() -> None:
    sizes = [from_scratch(10**power, 100)[0] for power in range(9)]
    for key in ("width", "layers"):
        values = [sections["backbone"][key] for sections in sizes]
        assert values == sorted(values)
        assert values[0] < values[-1]

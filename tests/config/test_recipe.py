"""Settings by the size of the log: valid, and larger logs get larger models."""

from __future__ import annotations

import pytest
import yaml

from peso.config import dump_config, load_config
from peso.config.reading import as_tree, given
from peso.config.recipe import EXACT_ITEMS, from_scratch, with_given
from peso.errors import ConfigError


@pytest.mark.parametrize("events", [1, 500, 20_000, 199_999, 200_000, 5_000_000, 10**10])
@pytest.mark.parametrize("items", [1, EXACT_ITEMS, EXACT_ITEMS + 1, 10**8])
def test_every_log_gets_a_valid_configuration_and_its_reason(events: int, items: int) -> None:
    sections, reason = from_scratch(events, items)
    config = load_config({"data": {"simulate": {}}, **sections})
    assert config.head.reads
    assert config.head.arrivals
    assert 32 <= config.training.batch_size <= 256
    assert (config.head.negatives is None) == (items <= EXACT_ITEMS)
    assert f"{events:,} training targets" in reason
    assert f"{config.backbone.layers} layers {config.backbone.width} wide" in reason


def test_with_codes_alone_the_reason_says_nothing_about_a_softmax_over_items() -> None:
    for items in (EXACT_ITEMS, EXACT_ITEMS + 1):
        whole, reason = from_scratch(1000, items)
        sections, short = from_scratch(1000, items, "codes")
        assert sections == whole
        assert reason.startswith(short)
        assert "softmax" not in short
        assert "negatives" not in short
        assert from_scratch(1000, items, "items")[1] == reason


def test_a_larger_log_gets_a_model_that_is_no_smaller() -> None:
    sizes = [from_scratch(10**power, 100)[0] for power in range(9)]
    for key in ("width", "layers"):
        values = [sections["backbone"][key] for sections in sizes]
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_given_keys_win_and_what_follows_from_them_follows():
    sections, _ = from_scratch(1000, 100)
    kept = {"backbone": {"name": "auto", "width": 256}, "training": {"later": {"epochs": 1}}}
    found = with_given(sections, kept)
    assert found["backbone"] == {"name": "scratch", "width": 256, "layers": 2}
    assert found["training"]["learning_rate"] == pytest.approx(1e-3)
    assert found["training"]["later"] == {"learning_rate": "auto", "epochs": 1, "patience": 2}
    assert sections == from_scratch(1000, 100)[0]  # which is not changed
    assert with_given(sections, {"head": {"name": "codes"}})["head"] == {"name": "codes"}
    scaled = with_given(sections, {"training": {"later_learning_rate_scale": 0.5}})
    assert "learning_rate" not in scaled["training"]["later"]


def test_before_the_choice_a_configuration_keeps_apart_what_was_given():
    at_defaults = {"epochs": 4, "patience": None, "later": {"batch_size": None}}
    config = load_config({"data": "simulate", "backbone": "auto", "head": "codes", "training": at_defaults})
    assert given(config) == {
        "backbone": {"name": "auto"},
        "head": {"name": "codes"},
        "training": at_defaults,
    }
    again = load_config(yaml.safe_load(dump_config(config)))
    assert as_tree(again) == as_tree(config)
    assert given(again) == given(config)


def test_auto_has_no_weights_to_start_from():
    with pytest.raises(ConfigError, match=r"auto has nothing to choose; set backbone\.name=scratch"):
        load_config({"data": "simulate", "backbone": {"name": "auto", "pretrained": "runs/other"}})
    with pytest.raises(ConfigError, match=r"backbone\.width 100 is not a multiple"):
        load_config({"data": "simulate", "backbone": {"name": "auto", "width": 100}})

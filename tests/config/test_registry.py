"""Parts that distributions offer by entry points: found by name, imported late, refused with a reason."""

from __future__ import annotations

import sys

import pytest
from plugins import Install

from peso.config import BASELINES, STRATEGIES, load_config
from peso.config.data import DATA_SETS
from peso.config.reading import valid_keys
from peso.errors import ConfigError
from peso.training.strategies.strategy import make_strategy

MODULE = """
from pydantic import Field
from peso.training.strategies.strategy import Strategy

class Halfway(Strategy):
    class Options(Strategy.Options):
        share: float = Field(0.5, ge=0, le=1)

class NoStrategy: ...
"""


def strategy(**options: object) -> object:
    return load_config({"data": "simulate", "strategy": options}).strategy


def test_a_part_is_found_by_the_name_of_its_entry_point_and_its_options_are_typed(install: Install) -> None:
    install("halves", MODULE, "peso.strategies halfway = halves:Halfway")
    assert strategy(name="halfway").model_dump() == {"name": "halfway", "share": 0.5}
    made = make_strategy(strategy(name="halfway", share=0.25))
    assert (type(made).__name__, made.name, made.options.share) == ("Halfway", "halfway", 0.25)
    with pytest.raises(ConfigError, match=r"'halfway' has no option 'shares'.*'strategy\.share'"):
        strategy(name="halfway", shares=0.25)
    with pytest.raises(ConfigError, match=r"strategy\.share.*less than or equal to 1"):
        strategy(name="halfway", share=2.0)


def test_it_is_imported_when_a_configuration_names_it_and_not_before(install: Install) -> None:
    install("halves", MODULE, "peso.strategies halfway = halves:Halfway")
    strategy(name="single")
    with pytest.raises(ConfigError, match=r"known names are .*'halfway'.*'single'"):
        strategy(name="halfwy")
    assert "halves" not in sys.modules
    strategy(name="halfway")
    assert "halves" in sys.modules


def test_a_built_in_part_cannot_be_replaced(install: Install) -> None:
    install("halves", MODULE, "peso.strategies peso = halves:Halfway")
    assert "proximal" in strategy(name="peso").model_dump()
    assert "halves" not in sys.modules


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "halfway = halves:Nothing",
            "cannot be imported.*no attribute 'Nothing'.*distribution halves",
        ),
        ("halfway = halves:NoStrategy", r"halves, is not a subclass of peso\.training\.strategies.*Strategy"),
        ("halfway = halves:Field", "is not a subclass"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_distribution(
    install: Install, entry: str, message: str
) -> None:
    install("halves", MODULE, f"peso.strategies {entry}")
    with pytest.raises(ConfigError, match=message):
        strategy(name="halfway")


def test_a_module_that_fails_is_refused_with_its_reason(install: Install) -> None:
    install("halves", "1 / 0", "peso.strategies halfway = halves:Halfway")
    with pytest.raises(ConfigError, match=r"ZeroDivisionError.*correct or uninstall"):
        strategy(name="halfway")


def test_two_distributions_with_one_name_are_refused(install: Install) -> None:
    install("halves", MODULE, "peso.strategies halfway = halves:Halfway")
    install("parts", MODULE, "peso.strategies halfway = parts:Halfway")
    with pytest.raises(ConfigError, match=r"provided by several distributions \(halves, parts\)"):
        strategy(name="halfway")


def test_every_built_in_name_is_a_part_of_that_name() -> None:
    for registry in (STRATEGIES, BASELINES, DATA_SETS):
        assert set(registry.built_in()) == {
            name for name, part in registry.everything().items() if part.__module__.startswith("peso.")
        }
        assert all(registry.find(name).name == name for name in registry.built_in())


def test_the_list_of_all_keys_ends_although_a_hybrid_takes_baselines() -> None:
    keys = valid_keys()
    assert {"baselines.partners", "baselines.candidates", "baselines.regularisation"} <= set(keys)
    assert not any(key.startswith("baselines.partners.partners") for key in keys)

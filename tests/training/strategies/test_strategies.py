"""The hooks of each strategy, and that a configuration makes the strategy it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import peso
from peso.adapters.groups import find_groups
from peso.config import load_config, strategy_options
from peso.errors import ConfigError, TrainingError
from peso.model.backbone import small_llama
from peso.training.strategies import strategy as strategy_module
from peso.training.strategies.none import NoUpdates
from peso.training.strategies.peso import Peso
from peso.training.strategies.single import SingleAdapter
from peso.training.strategies.strategy import StageContext, Strategy, make_strategy, strategies


def stage(number: int) -> StageContext:
    torch.manual_seed(0)
    backbone = small_llama(32, 1, 0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return StageContext(number, peft.get_peft_model(backbone, config), total_steps=10)


def move(context: StageContext, step: float = 1e-2) -> None:
    with torch.no_grad():
        for number, group in enumerate(find_groups(context.backbone)):
            group.tensor.add_(
                torch.linspace(-step, step * (number + 1), group.tensor.numel()).view_as(group.tensor)
            )


NAMES = sorted(set(strategies()) - {"custom"})


def test_every_file_of_the_folder_is_a_strategy_of_that_name() -> None:
    files = {path.stem for path in Path(strategy_module.__file__).parent.glob("*.py")}
    assert set(strategies()) == files - {"__init__", "strategy"}
    assert all(kind.name == name for name, kind in strategies().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_yaml_and_a_call_in_python_have_one_set_of_defaults(name: str) -> None:
    kind = strategies()[name]
    made = make_strategy(load_config({"data": "simulate", "strategy": name}).strategy)
    assert type(made) is kind
    assert made.options == kind().options == strategy_options(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [("average", {"share": 0.3}), ("lsat", {"fusion": "arithmetic"}), ("peso", {"weight": 2.0})],
)
def test_options_in_yaml_are_arguments_in_python(name: str, options: dict[str, Any]) -> None:
    config = load_config({"data": "simulate", "strategy": {"name": name, **options}})
    assert make_strategy(config.strategy).options == strategies()[name](**options).options
    assert config.strategy.model_dump().items() >= options.items()


def test_an_impossible_option_is_refused_in_python_too() -> None:
    with pytest.raises(ConfigError, match="share"):
        strategies()["average"](share=2.0)
    with pytest.raises(ConfigError, match="shares"):
        strategies()["average"](shares=0.5)


def test_options_reach_the_term() -> None:
    strategy = make_strategy(Peso.Options(name="peso", weight=7.0, reduction="sum"))
    assert isinstance(strategy, Peso)
    assert (strategy.term.weight, strategy.term.reduction) == (7.0, "sum")


def test_none_learns_the_base_stage_only_and_the_others_all() -> None:
    learnt = {
        kind: [kind().learns(number) for number in range(4)] for kind in (NoUpdates, SingleAdapter, Peso)
    }
    assert learnt[NoUpdates] == [True, False, False, False]
    assert learnt[SingleAdapter] == learnt[Peso] == [True] * 4


@pytest.mark.parametrize("strategy", [NoUpdates(), SingleAdapter()])
def test_strategies_without_an_anchor_add_nothing(strategy: Strategy) -> None:
    context = stage(1)
    strategy.begin(context)
    move(context)
    assert strategy.penalty(context) is None


def test_peso_adds_nothing_at_the_base_stage_even_without_an_adapter() -> None:
    strategy = Peso()
    plain = StageContext(0, small_llama(32, 1, 0), total_steps=10)
    strategy.begin(plain)
    assert strategy.penalty(plain) is None


def test_peso_is_the_released_term_around_what_the_stage_inherits() -> None:
    strategy, context = Peso(weight=2.0, reduction="mean"), stage(1)
    before = [group.snapshot().tensor for group in find_groups(context.backbone)]
    strategy.begin(context)
    penalty = strategy.penalty(context)
    assert penalty is not None
    assert penalty.item() == 0
    move(context)
    penalty = strategy.penalty(context)
    assert penalty is not None
    after = [group.tensor for group in find_groups(context.backbone)]
    modules = 2  # q and v of one layer
    expected = 2.0 / modules * peso.SoftmaxKL.value(after, before).item()
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    assert penalty.requires_grad


def test_peso_anchors_anew_at_every_stage() -> None:
    strategy, context = Peso(weight=2.0), stage(1)
    strategy.begin(context)
    move(context)
    strategy.end(context)
    later = StageContext(2, context.backbone, total_steps=10)
    strategy.begin(later)
    penalty = strategy.penalty(later)
    assert penalty is not None
    assert penalty.item() == 0


def test_peso_on_a_backbone_without_an_adapter_says_so() -> None:
    with pytest.raises(TrainingError, match="no LoRA adapter found"):
        Peso().begin(StageContext(1, small_llama(32, 1, 0), total_steps=10))

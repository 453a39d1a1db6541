"""The hooks of each strategy, and that a configuration makes the strategy it names."""

from __future__ import annotations

import peft
import pytest
import torch
from pydantic import TypeAdapter

import peso
from peso.adapters.groups import find_groups
from peso.config import NoneConfig, PesoConfig, SingleConfig, StrategyConfig
from peso.errors import TrainingError
from peso.model.backbone import small_llama
from peso.training.strategies.none import NoUpdates
from peso.training.strategies.peso import Peso
from peso.training.strategies.single import SingleAdapter
from peso.training.strategies.strategy import StageContext, Strategy, make_strategy


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


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (NoneConfig(name="none"), NoUpdates),
        (SingleConfig(name="single"), SingleAdapter),
        (PesoConfig(name="peso"), Peso),
    ],
)
def test_every_configuration_makes_the_strategy_it_names(config: StrategyConfig, kind: type) -> None:
    assert type(make_strategy(config)) is kind


def test_no_configuration_is_without_its_strategy() -> None:
    """A strategy added to the configuration alone fails here, not in a user's run."""
    schema = TypeAdapter(StrategyConfig).json_schema()
    for definition in schema["$defs"].values():
        name = definition["properties"]["name"]["const"]
        options = {"module": "peso.training.strategies.single.SingleAdapter"} if name == "custom" else {}
        made = make_strategy(TypeAdapter(StrategyConfig).validate_python({"name": name, **options}))
        assert isinstance(made, Strategy)


def test_options_reach_the_term() -> None:
    strategy = make_strategy(PesoConfig(name="peso", weight=7.0, reduction="sum"))
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

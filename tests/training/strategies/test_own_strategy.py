"""The strategy of docs/how-to/add-a-strategy.md, as it stands there, and what a broken one gets."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from strategy_runs import Runs, check_same_results, factors, state

from peso.config import STRATEGIES, load_config
from peso.errors import ConfigError, TrainingError
from peso.runs import pipeline
from peso.runs.workspace import Workspace
from peso.training.strategies.strategy import StageContext, Strategy, make_strategy

DOC = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "add-a-strategy.md"


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The module of the page where Python finds it; its configuration."""
    text = DOC.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    name = re.match(r"# (\w+)\.py\n", code)[1]
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    (configured,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    yield yaml.safe_load(configured)["strategy"]
    STRATEGIES._known.pop(name, None)


def with_strength(documented: dict[str, Any], strength: float) -> dict[str, Any]:
    return documented | {"arguments": {"strength": strength}}


def distance_to_base(workspace: Workspace, stage: int) -> float:
    base = factors(workspace, 0)
    squares = [
        float((now - then).square().sum())
        for module, pair in factors(workspace, stage).items()
        for now, then in zip(pair, base[module], strict=True)
    ]
    return math.sqrt(sum(squares))


@pytest.mark.slow
def test_the_documented_strategy_does_what_its_page_says(runs: Runs, documented: dict[str, Any]) -> None:
    pair = runs(with_strength(documented, 0.0)), runs("single")
    for stage in (1, 2, 3):
        free, single = (factors(each, stage) for each in pair)
        assert all(torch.equal(free[m][k], single[m][k]) for m in free for k in (0, 1))
    held = runs(with_strength(documented, 2.0))
    for stage in (1, 2, 3):
        distance = distance_to_base(held, stage)
        assert 0 < distance < distance_to_base(runs("single"), stage)
        metrics = held.stage(stage).metrics
        assert metrics["training"]["strategy"]["distance_to_base"] == pytest.approx(distance, rel=1e-5)
        for module, (a, b) in factors(held, 0).items():
            assert torch.equal(state(held, stage)[f"base.{module}.lora_A"], a)
            assert torch.equal(state(held, stage)[f"base.{module}.lora_B"], b)


def test_the_page_names_every_hook_and_member() -> None:
    members = {name for name in vars(Strategy) if not name.startswith("_")}
    assert set(re.findall(r"^\| `(\w+)", DOC.read_text(encoding="utf-8"), re.MULTILINE)) == members


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": "back_to_base.Nothing"}, "cannot be imported"),
        ({"module": "no_such_module.Strategy"}, "cannot be imported.*No module named 'no_such_module'"),
        ({"arguments": {"strengths": 1.0}}, "cannot be created.*strengths"),
        ({"arguments": {"strength": -1.0}}, "cannot be created.*greater than or equal to 0"),
        (
            {"module": "fractions.Fraction", "arguments": {}},
            "is not a subclass of peso.training",
        ),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(
    documented: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    config = load_config({"data": {"format": "simulate"}, "strategy": {**documented, **changes}})
    with pytest.raises(ConfigError, match=message):
        make_strategy(config.strategy)


def test_it_is_refused_before_anything_is_learnt(runs: Runs, tmp_path: Path) -> None:
    workspace = runs.start(tmp_path / "broken", {"name": "custom", "module": "no_such_module.Strategy"})
    with pytest.raises(ConfigError, match="no_such_module"):
        pipeline.run(workspace)
    assert workspace.finished_stages == []


class HoldsWhatIsFrozen(Strategy):
    """Freezes A and penalises it."""

    def begin(self, context: StageContext) -> None:
        self._frozen = [p for n, p in context.backbone.named_parameters() if ".lora_A." in n]
        for p in self._frozen:
            p.requires_grad_(False)

    def penalty(self, context: StageContext) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in self._frozen]).sum()


def test_a_frozen_parameter_that_is_asked_to_move_stops_the_run(runs: Runs, tmp_path: Path) -> None:
    own = {"name": "custom", "module": f"{__name__}.HoldsWhatIsFrozen"}
    workspace = runs.start(tmp_path / "frozen", own)
    with pytest.raises(TrainingError, match=r"does not depend on any trained parameter.*requires_grad"):
        pipeline.run(workspace, base=runs("none").root)
    assert workspace.finished_stages == [0]
    assert not workspace.stage(1).directory.exists()


class Poison(Strategy):
    """A gradient that is no number, in the second step."""

    def __init__(self) -> None:
        self._steps = 0

    def penalty(self, context: StageContext) -> torch.Tensor:
        self._steps += 1
        value = next(p for n, p in context.backbone.named_parameters() if "lora_B" in n).sum()
        return value * (math.nan if self._steps == 2 else 0.0)


def test_a_gradient_that_is_no_number_keeps_the_last_good_state(runs: Runs, tmp_path: Path) -> None:
    own = {"name": "custom", "module": f"{__name__}.Poison"}
    workspace = runs.start(tmp_path / "poisoned", own)
    with pytest.raises(TrainingError, match=r"step 2: .*gradient is not finite in backbone\..*lora_B"):
        pipeline.run(workspace, base=runs("none").root)
    assert workspace.finished_stages == [0]
    assert not workspace.stage(1).directory.exists()
    check_same_results(workspace, runs("none"), 0)


class PullsEverything(Strategy):
    """A penalty whose gradient is 3 in every value that is learnt, rows of the vocabulary included."""

    def penalty(self, context: StageContext) -> torch.Tensor:
        return 3 * torch.stack([p.sum() for p in context.trainable().values()]).sum()


def test_both_gradients_are_measured_over_the_adapter(runs: Runs) -> None:
    """Or their ratio would be one of unlike things."""
    workspace = runs({"name": "custom", "module": f"{__name__}.PullsEverything"})
    values = sum(a.numel() + b.numel() for a, b in factors(workspace, 1).values())
    lines = (workspace.stage(1).directory / "log.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert steps
    for record in steps:
        assert record["penalty_gradient_norm"] == pytest.approx(3 * math.sqrt(values), rel=1e-5)


class LooksAhead(Strategy):
    """Trains on what has not happened yet."""

    def choose(self, context: StageContext) -> Any:
        return context.examples.of(context.number + 1)


def test_a_strategy_that_looks_ahead_is_stopped(runs: Runs, tmp_path: Path) -> None:
    own = {"name": "custom", "module": f"{__name__}.LooksAhead"}
    workspace = runs.start(tmp_path / "ahead", own)
    with pytest.raises(TrainingError, match="stage 2 cannot be read while stage 1 is being trained"):
        pipeline.run(workspace, base=runs("none").root)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("sum_loar", "sum_lora"),
        ({"name": "sum_lora", "histroy": "all"}, "histroy.*history"),
        ({"name": "sum_lora", "history": "last"}, "history.*latest"),
        ({"name": "replay", "budget": 0}, "budget"),
        ({"name": "inf_lora", "threshold": 1.5}, "threshold"),
        ({"name": "lsat", "long_share": -0.1}, "long_share"),
        ({"name": "lsat", "fusion": "weights"}, "fusion.*outputs"),
        ({"name": "retrain", "budget": 5}, "budget"),
    ],
)
def test_an_unknown_name_or_option_is_refused_with_the_nearest(strategy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){message}"):
        load_config({"data": {"format": "simulate"}, "strategy": strategy})

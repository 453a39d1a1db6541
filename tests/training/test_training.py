"""The training loop: it learns, keeps the best epoch, follows its schedule and adds the penalty."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_path import cases_of, random_sequences, separate_loss, with_adapter
from torch import Tensor, nn
from transformers import LlamaConfig, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from peso.adapters.lora import adapter_parameters
from peso.config import TrainingConfig
from peso.errors import TrainingError
from peso.events.histories import Cases, TargetSequence
from peso.model.generative import GenerativeModel
from peso.model.item_head import ItemHead
from peso.model.layout import PromptLayout
from peso.runtime.device import Precision, reproducible
from peso.training import plan as plan_module
from peso.training.likelihood import tokens_of_target, validation_loss
from peso.training.loop import train_stage
from peso.training.optimizer import make_optimizer
from peso.training.plan import StagePlan
from peso.training.step import backward
from peso.training.strategies.strategy import StageContext, Strategy
from peso.training.task import Progress, StageResult, StageTask

SEQUENCES = random_sequences(0, count=12, longest=8)


def train(
    model: GenerativeModel,
    directory: Path,
    sequences: list[TargetSequence] = SEQUENCES,
    validation: Cases | None = None,
    strategy: Strategy | None = None,
    learning_rate: float = 1e-2,
    stage: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> StageResult:
    defaults = {"epochs": 3, "batch_size": 8, "device": "cpu"}
    return train_stage(
        model,
        StageTask(
            sequences,
            cases_of(sequences, model.layout.window) if validation is None else validation,
            TrainingConfig(**{**defaults, **settings}),
            stage=stage,
            learning_rate=learning_rate,
            strategy=Strategy() if strategy is None else strategy,
            seed=7,
            directory=directory / "checkpoint",
            log=directory / "log.jsonl",
            on_progress=on_progress,
        ),
    )


def records(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of the log: those of steps, those of epochs."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "validation_loss" in x]


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.slow
def test_learns_a_small_data_set_by_heart(
    make_model: Callable[..., GenerativeModel], tmp_path: Path, branches: bool
) -> None:
    model = make_model("stream", "semantic", items=12, sizes=(12, 2), window=8)
    if branches:  # an instruction of a few words: a random model is slow to look past many
        model.layout = PromptLayout("short", (0,), (5,), (6, 7), (1,), 8)
    items = np.arange(8, dtype=np.int32)
    sequences = [TargetSequence(f"u{i}", (items * (i + 1) + i) % 12, 1) for i in range(3)]
    result = train(with_adapter(model), tmp_path, sequences, epochs=60, temperature=1.0)
    assert result.training_losses[0] > 1
    assert result.validation_losses[-1] < 0.05


def test_the_loss_of_a_step_is_that_of_separate_examples(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    """Loss, gradient norm over the adapter, and count of targets of the first step, from the log."""
    model = with_adapter(make_model("instruct", "full"))
    expected = separate_loss(model, SEQUENCES, temperature=0.8)
    norm = torch.stack(
        [g.norm() for g in torch.autograd.grad(expected, list(adapter_parameters(model.backbone).values()))]
    ).norm()
    train(model, tmp_path, epochs=1, batch_size=1000)
    (step,), _ = records(tmp_path)
    assert step["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert step["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert step["targets"] == sum(sequence.targets for sequence in SEQUENCES)
    assert step["penalty"] == step["penalty_gradient_norm"] == 0


def test_a_batch_in_many_passes_has_the_gradient_of_one(
    make_model: Callable[..., GenerativeModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(make_model("instruct", "full"))
    plan = StagePlan(SEQUENCES, 20, TrainingConfig(batch_size=1000, epochs=1), 0, 0)
    precision = Precision.of("float32", "cpu")
    found = []
    for tokens in (100_000, 1):
        monkeypatch.setattr(plan_module, "budget", lambda _, tokens=tokens: (tokens, tokens))
        passes = plan.batch(0, model)
        count = plan.targets(0) * tokens_of_target(model)
        loss = sum(map(float, backward(model, passes, count, 0.8, precision)))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((len(passes), loss, torch.cat([g.flatten() for g in gradients])))
        model.zero_grad()
    (few, loss, gradient), (many, other_loss, other) = found
    assert few == 1 < 5 < many
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert (gradient - other).norm() < 1e-5 * gradient.norm()


def test_the_best_epoch_is_put_back(make_model: Callable[..., GenerativeModel], tmp_path: Path) -> None:
    """Validation on what training contradicts: the first epoch is the best, later ones are thrown away."""
    model = with_adapter(make_model("stream", "semantic"))
    contradicting = Cases(
        ["u"] * 4,
        [s.items[:2] for s in SEQUENCES if len(s.items) > 4][:4],
        np.array([49, 48, 47, 46], dtype=np.int32),
    )
    result = train(model, tmp_path, validation=contradicting, epochs=8, schedule="constant")
    assert result.best_epoch < 8
    assert result.validation_losses[result.best_epoch - 1] == min(result.validation_losses)
    model.eval()
    again = validation_loss(model, contradicting, 0.8)
    assert again == pytest.approx(min(result.validation_losses), abs=1e-6)
    assert again < result.validation_losses[-1] - 1e-3
    _, epochs = records(tmp_path)
    assert [x["validation_loss"] for x in epochs] == result.validation_losses
    assert [x["training_loss"] for x in epochs] == result.training_losses


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_follow_the_schedule(
    make_model: Callable[..., GenerativeModel], tmp_path: Path, schedule: str
) -> None:
    model = with_adapter(make_model())
    train(model, tmp_path, schedule=schedule, warmup=0.2, learning_rate=0.5e-3)
    rates = [step["learning_rate"] for step in records(tmp_path)[0]]
    total, warm = len(rates), math.ceil(0.2 * len(rates))
    assert warm > 1
    for i, rate in enumerate(rates):
        share = (i - warm) / (total - warm)
        after = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}
        assert rate == pytest.approx(0.5e-3 * (i / warm if i < warm else after[schedule]))


def test_rows_learn_at_a_rate_of_their_own(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    """AdamW's first step is the rate in every coordinate with a gradient, whatever the gradient."""

    def moves(scale: float, decay: float = 0.0) -> dict[str, Tensor]:
        model = with_adapter(make_model("stream", "semantic"))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = {"epochs": 1, "max_steps": 1, "warmup": 0.0, "weight_decay": decay}
        train(model, tmp_path / f"{scale} {decay}", rows_learning_rate_scale=scale, **settings)
        return {name: p.detach() - before[name] for name, p in model.named_parameters() if p.requires_grad}

    plain, fast = moves(1.0), moves(3.0)
    assert any("lora_" in name for name in plain)
    for name, moved in plain.items():
        factor = 3.0 if name.startswith("vocabulary.") else 1.0
        assert torch.allclose(fast[name], factor * moved, atol=1e-6), name
        assert moved.abs().max() == pytest.approx(1e-2, rel=1e-3), name
    assert {s["learning_rate"] for s in records(tmp_path / "3.0 0.0")[0]} == {1e-2}  # the adapter's
    decayed = moves(3.0, decay=0.5)  # decay is at each one's own rate too
    start = dict(with_adapter(make_model("stream", "semantic")).named_parameters())
    for name, rate in (("vocabulary.input_rows", 3e-2), (next(n for n in plain if "lora_A" in n), 1e-2)):
        assert torch.allclose(decayed[name] - fast[name], -rate * 0.5 * start[name], atol=1e-6), name


def test_the_item_head_learns_at_a_rate_of_its_own(make_model: Callable[..., GenerativeModel]) -> None:
    model = with_adapter(make_model("stream", "semantic"))
    model.vocabulary.item_head = ItemHead(model.semantic_ids, model.vocabulary.input_rows.shape[1])
    settings = TrainingConfig(rows_learning_rate_scale=0.5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = make_optimizer(trained, settings, 1e-2, head_scale=0.1).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in trained.items():
        expected = 5e-4 if ".item_head." in name else 5e-3 if name.startswith("vocabulary.") else 1e-2
        assert rates[id(p)] == pytest.approx(expected), name
    assert len(rates) == len(trained)


def test_transformers_gives_the_same_schedule(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    for name, make in (
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ):
        train(with_adapter(make_model()), tmp_path / name, schedule=name, warmup=0.1)
        ours = [step["learning_rate"] for step in records(tmp_path / name)[0]]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
        schedule = make(optimizer, math.ceil(0.1 * len(ours)), len(ours))
        theirs = []
        for _ in ours:
            theirs.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert ours == pytest.approx(theirs)


class Pull(Strategy):
    """A penalty with a known gradient, and a record of the calls."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.calls: list[Any] = []

    def begin(self, context: StageContext) -> None:
        self.calls.append(("begin", context.number, context.total_steps))

    def penalty(self, context: StageContext) -> Tensor:
        parameters = adapter_parameters(context.backbone).values()
        return self.weight * torch.stack([p.sum() for p in parameters]).sum()

    def after_step(self, context: StageContext, learning_rate: float) -> None:
        self.calls.append(learning_rate)

    def end(self, context: StageContext) -> None:
        self.calls.append(("end", context.number))


def test_a_penalty_is_added_to_the_gradient_of_the_loss(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    model = with_adapter(make_model())
    adapter = list(adapter_parameters(model.backbone).values())
    before = sum(float(p.detach().double().sum()) for p in adapter)
    strategy = Pull(weight=1e6)  # its gradient is 1e6 everywhere and drowns the loss's
    result = train(model, tmp_path, strategy=strategy, epochs=1, schedule="constant", warmup=0)
    steps, _ = records(tmp_path)
    assert steps[0]["penalty"] == pytest.approx(1e6 * before, rel=1e-4)
    count = sum(p.numel() for p in adapter)
    assert steps[0]["penalty_gradient_norm"] == pytest.approx(1e6 * math.sqrt(count), rel=1e-4)
    assert steps[0]["gradient_norm"] < 100  # that of the loss alone
    # Adam moves every value against the penalty by about the learning rate a step
    moved = before - sum(float(p.detach().double().sum()) for p in adapter)
    assert moved == pytest.approx(count * 1e-2 * result.steps, rel=0.1)
    assert strategy.calls == [("begin", 1, result.steps), *[1e-2] * result.steps, ("end", 1)]


def test_only_what_requires_a_gradient_moves(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    model = with_adapter(make_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tmp_path)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in moved if "lora_" not in name} == {
        "vocabulary.input_rows",
        "vocabulary.output_rows",
    }


def test_a_backbone_can_be_trained_whole(make_model: Callable[..., GenerativeModel], tmp_path: Path) -> None:
    """What stage 0 of ``scratch`` does: no adapter, so no gradient norm over it."""
    model = make_model("stream", "level")
    before = validation_loss(model, cases_of(SEQUENCES, 20), 0.8)
    result = train(model, tmp_path, stage=0, epochs=4)
    assert min(result.validation_losses) < before - 0.1
    assert all(step["gradient_norm"] is None for step in records(tmp_path)[0])


@pytest.mark.slow
def test_training_is_a_function_of_its_seed(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    """The caller's random state plays no part and is left as it was."""
    finals = []
    for number in range(2):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        model = with_adapter(make_model("instruct"), dropout=0.2)
        train(model, tmp_path / str(number))
        assert torch.equal(torch.get_rng_state(), state)
        finals.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    for name, value in finals[0].items():
        assert torch.equal(value, finals[1][name]), name


def test_dropout_is_drawn_anew_at_every_step(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    """Nothing moves at a learning rate of (nearly) zero, so losses of one batch differ by dropout alone."""
    losses = []
    for dropout in (0.0, 0.5):
        model = with_adapter(make_model(), dropout=dropout)
        train(model, tmp_path / str(dropout), batch_size=1000, learning_rate=1e-12)
        losses.append([step["loss"] for step in records(tmp_path / str(dropout))[0]])
    assert np.ptp(losses[0]) < 1e-5
    assert np.ptp(losses[1]) > 1e-3


def test_max_steps_ends_the_stage_and_its_schedule(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    model = with_adapter(make_model())
    full = len(StagePlan(SEQUENCES, 20, TrainingConfig(batch_size=8, epochs=3), 7, 1))
    result = train(model, tmp_path, max_steps=full - 1, schedule="linear", on_progress=seen.append)
    assert result.steps == full - 1
    assert len(result.validation_losses) == 3  # the last, incomplete epoch is validated too
    assert [p.step for p in seen] == list(range(1, full))
    assert {p.steps for p in seen} == {full - 1}
    assert seen[-1].seconds_left == 0
    steps, _ = records(tmp_path)
    assert steps[-1]["learning_rate"] == pytest.approx(1e-2 / (full - 2))  # the next would be zero


def test_validation_can_be_sampled(make_model: Callable[..., GenerativeModel], tmp_path: Path) -> None:
    results = [
        train(with_adapter(make_model()), tmp_path / str(n), epochs=1, validation_cases=n)
        for n in (3, len(SEQUENCES), 10**6)
    ]
    sampled, all_of_them, more = (r.validation_losses for r in results)
    assert all_of_them == more
    assert sampled != all_of_them


def test_a_gradient_that_is_not_finite_stops_training_and_says_where(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    model = with_adapter(make_model())

    class Poison(Strategy):
        def after_step(self, context: StageContext, learning_rate: float) -> None:
            model.vocabulary.output_rows.data[0, 0] = math.nan
            self.kept = {name: p.detach().clone() for name, p in model.named_parameters()}

    poison = Poison()
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan.*learning_rate"):
        train(model, tmp_path, strategy=poison)
    assert len(records(tmp_path)[0]) == 1
    for name, p in model.named_parameters():  # step 2 was not taken
        torch.testing.assert_close(p, poison.kept[name], equal_nan=True, rtol=0, atol=0)


def test_an_infinite_penalty_names_the_parameter(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"step 1: .* in backbone\..*lora_A"):
        train(with_adapter(make_model()), tmp_path, strategy=Pull(math.inf))


def test_nothing_to_train_is_an_error(make_model: Callable[..., GenerativeModel], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no training targets"):
        train(with_adapter(make_model()), tmp_path, sequences=[])
    with pytest.raises(TrainingError, match="no validation case"):
        train(with_adapter(make_model()), tmp_path, validation=Cases([], [], np.empty(0, np.int32)))
    with pytest.raises(TrainingError, match="requires a gradient"):
        train(make_model().requires_grad_(False), tmp_path)


def test_the_outcome_does_not_depend_on_the_model_mode(
    make_model: Callable[..., GenerativeModel], tmp_path: Path
) -> None:
    model = with_adapter(make_model()).eval()
    train(model, tmp_path, epochs=1)
    assert not model.training


def test_passes_are_as_large_as_a_gpu_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1 B shape on 80 GB takes 20,000 tokens in one pass, on 16 GB a few thousand."""
    one_b = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
    small = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2)

    def tokens(config: LlamaConfig, gigabytes: int, dtype: torch.dtype = torch.bfloat16) -> int:
        properties = SimpleNamespace(total_memory=gigabytes * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        causal_lm = SimpleNamespace(config=config)
        model = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, causal_lm=causal_lm)
        return plan_module.budget(model)[1]

    assert 20_000 < tokens(one_b, 80) < 25_000
    assert 4_000 < tokens(one_b, 16) < 5_000
    assert tokens(one_b, 80, torch.float32) == pytest.approx(tokens(one_b, 80) / 2, abs=1)
    assert tokens(small, 80) == plan_module.ELSEWHERE[1]


def test_a_gpu_is_held_to_sums_in_a_fixed_order_for_as_long_as_it_learns() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with reproducible(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with suppress(KeyError), reproducible(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory

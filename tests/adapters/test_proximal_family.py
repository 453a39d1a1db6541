"""Groupings of the softmax-KL term, and the terms beside it, against their formulas."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

import peso
from peso.adapters.groups import PAST, find_groups
from peso.adapters.proximal import diagonal_fisher
from peso.adapters.proximal.metrics import WIDEST
from peso.errors import ConfigError, TrainingError
from peso.model.backbone import small_llama

TARGETS = ["q_proj", "v_proj", "up_proj"]
IDS = torch.arange(24).view(2, 12)


def adapted(
    rank: int = 4, dtype: torch.dtype = torch.float32, targets: list[str] = TARGETS
) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=targets, lora_alpha=2 * rank)
    model = peft.get_peft_model(small_llama(32, 2, 0), config).to(dtype)
    with torch.no_grad():
        for group in find_groups(model):
            group.tensor.normal_(0, 0.02)
    return model


def move(model: nn.Module, step: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in find_groups(model):
            noise = torch.randn(group.tensor.shape, generator=generator, dtype=torch.float64)
            group.tensor.add_((noise * step).to(group.tensor.dtype))


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [group.tensor for group in find_groups(model)]


def regrouped(groups, grouping: str) -> list[torch.Tensor]:
    """The values of each group of the penalty, in float64, written with plain indexing."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for group in groups:
        by_module.setdefault(group.module, {})[group.factor] = group.tensor.double()
    modules = list(by_module.values())
    if grouping == "factor":
        return [matrix.flatten() for factors in modules for matrix in factors.values()]
    if grouping == "module":
        return [torch.cat([matrix.flatten() for matrix in factors.values()]) for factors in modules]
    if grouping == "all":
        return [torch.cat([matrix.flatten() for factors in modules for matrix in factors.values()])]
    return [
        torch.cat([factors["A"][rank], factors["B"][:, rank]]) if "A" in factors else factors[""].flatten()
        for factors in modules
        for rank in range(len(factors["A"]) if "A" in factors else 1)
    ]


def plain_kl(current, anchor, temperature: float | str) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for v, a in zip(current, anchor, strict=True):
        tau = max(float(a.std(correction=0)), 1e-2) if temperature == "auto" else temperature
        log_s, log_p = torch.log_softmax(v / tau, -1), torch.log_softmax(a / tau, -1)
        total = total + (log_s.exp() * (log_s - log_p)).sum()
    return total


# --- groupings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, "auto"])
@pytest.mark.parametrize("grouping", ["factor", "module", "rank", "all"])
@pytest.mark.parametrize("rows", [False, True])
def test_value_and_gradient_are_exact_in_every_grouping(
    grouping: str, temperature: float | str, dtype: torch.dtype, rows: bool
) -> None:
    """To 1e-5 in float32 (gradients in norm), the rows of a vocabulary beside the adapter or not."""
    model = adapted(dtype=dtype)
    vocabulary = torch.randn(9, 32, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
    source = [model, vocabulary] if rows else model
    before = [group.snapshot() for group in find_groups(source)]
    term = peso.SoftmaxKL(1.0, "sum", temperature, groups=grouping)
    term.anchor(source)
    move(model)
    with torch.no_grad():
        vocabulary.mul_(1.01)
    after = find_groups(source)
    reference = plain_kl(regrouped(after, grouping), regrouped(before, grouping), temperature)
    value = term(source)
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    tensors = [group.tensor for group in after]
    wanted = torch.autograd.grad(reference, tensors)
    for found, true in zip(torch.autograd.grad(value, tensors), wanted, strict=True):
        assert found.shape == true.shape
        tolerance = max(1e-5, torch.finfo(dtype).eps)
        # float32 rounding of the reference's own gradient, which autograd hands on in the parameter's dtype
        assert (found.double() - true.double()).norm() <= tolerance * true.double().norm()


@pytest.mark.parametrize("grouping", ["factor", "module", "rank", "all"])
def test_the_decoupled_form_acts_on_the_same_groups(grouping: str) -> None:
    model = adapted(dtype=torch.float64)
    before = [group.snapshot() for group in find_groups(model)]
    term = peso.SoftmaxKL(strength=0.7, coupling="decoupled", groups=grouping, temperature=0.05)
    term.anchor(model)
    move(model)
    start = regrouped([group.snapshot() for group in find_groups(model)], grouping)
    term.after_step(model, 0.5, 1.0)
    for a, v, new in zip(
        regrouped(before, grouping), start, regrouped(find_groups(model), grouping), strict=True
    ):
        p = torch.softmax(a / 0.05, -1)
        mu = (p * (v - a)).sum()
        wanted = a + mu + (v - a - mu) * torch.exp(-0.35 * len(p) * p)
        torch.testing.assert_close(new.detach(), wanted, rtol=0, atol=1e-12)


def test_mean_divides_by_the_modules_in_every_grouping() -> None:
    model = adapted()
    for grouping in ("factor", "module", "rank", "all"):
        sums, means = (peso.SoftmaxKL(3.0, how, groups=grouping) for how in ("sum", "mean"))
        for term in (sums, means):
            term.anchor(model)
        copied = copy.deepcopy(model)
        move(copied)
        assert means(copied).item() == pytest.approx(sums(copied).item() / 6, rel=1e-6)


def test_per_rank_kl_is_softmax_kl_by_rank() -> None:
    model = adapted()
    ours, same = peso.PerRankKL(2.0), peso.SoftmaxKL(2.0, groups="rank")
    for term in (ours, same):
        term.anchor(model)
    move(model)
    assert torch.equal(ours(model), same(model))
    assert pickle.loads(pickle.dumps(ours))(model).item() == same(model).item()
    with pytest.raises(TrainingError, match="plain tensors have no ranks"):
        peso.PerRankKL().anchor([torch.zeros(3)])


def test_embedding_adapters_have_ranks_too() -> None:
    model = adapted(targets=["embed_tokens"])
    before = [group.snapshot() for group in find_groups(model)]
    term = peso.PerRankKL(1.0, "sum")
    term.anchor(model)
    move(model)
    reference = plain_kl(regrouped(find_groups(model), "rank"), regrouped(before, "rank"), 1.0)
    assert term(model).item() == pytest.approx(reference.item(), rel=1e-5)


def test_an_automatic_temperature_has_a_floor_and_never_lets_a_weight_vanish() -> None:
    fresh = [torch.zeros(500, dtype=torch.float64), torch.full((300,), 7.0, dtype=torch.float64)]
    moved = [values + torch.linspace(0, 1e-3, len(values)).double() for values in fresh]
    found = peso.SoftmaxKL.value(moved, fresh, "auto")
    assert found.item() == pytest.approx(peso.SoftmaxKL.value(moved, fresh, 1e-2).item(), rel=1e-12)
    outlier = [torch.zeros(20_000)]
    outlier[0][0] = 3.0  # its standard deviation is 0.02, at which e⁻¹⁴¹ would be the others' weight
    moved = [outlier[0] + torch.linspace(0, 1e-3, 20_000)]
    assert peso.SoftmaxKL.value(moved, outlier, "auto").item() == pytest.approx(
        peso.SoftmaxKL.value(moved, outlier, 3.0 / WIDEST).item(), rel=1e-4
    )
    with pytest.raises(ConfigError, match="'automatic' must be a finite number above 0, or 'auto'"):
        peso.SoftmaxKL(temperature="automatic")


# --- several adapters -----------------------------------------------------------------------------------


def test_the_frozen_past_beside_the_trained_adapter_is_not_meant() -> None:
    model = adapted()
    names = [group.name for group in find_groups(model)]
    model.add_adapter(PAST, peft.LoraConfig(r=7, target_modules=TARGETS))
    model.base_model.set_adapter(["default", PAST])
    first = find_groups(model)[0]
    assert (first.name, first.tensor.shape[0]) == (names[0], 4)
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", PAST, "third"])
    with pytest.raises(TrainingError, match=r"2 adapters are active \(default, third\)"):
        find_groups(model)
    model.set_adapter(PAST)  # alone it is meant
    assert find_groups(model)[0].tensor.shape[0] == 7


# --- l2 and fisher --------------------------------------------------------------------------------------


def test_l2_is_half_the_squared_distance() -> None:
    model = adapted()
    before = [group.snapshot().tensor.double() for group in find_groups(model)]
    term = peso.L2(weight=3.0)
    term.anchor(model)
    move(model)
    after = parameters(model)
    distances = [v.double() - a for v, a in zip(after, before, strict=True)]
    assert term(model).item() == pytest.approx(
        1.5 * float(sum(d.square().sum() for d in distances)), rel=1e-6
    )
    for found, d in zip(torch.autograd.grad(term(model), after), distances, strict=True):
        torch.testing.assert_close(found.double(), 3 * d, rtol=1e-6, atol=1e-12)


def target_losses(model: nn.Module, count: int = 6):
    for number in range(count):
        ids = (torch.arange(12) * (number + 1) % 50).view(1, 12)
        yield model(input_ids=ids, labels=ids).loss


def test_fisher_is_the_mean_of_squared_gradients() -> None:
    model = adapted(dtype=torch.float64)
    values = diagonal_fisher(parameters(model), target_losses(model))
    squares = [torch.zeros_like(p) for p in parameters(model)]
    for loss in target_losses(model):
        model.zero_grad()
        loss.backward()
        for total, p in zip(squares, parameters(model), strict=True):
            total += torch.as_tensor(p.grad) ** 2 / 6
    for found, true in zip(values, squares, strict=True):
        torch.testing.assert_close(found, true)


def test_fisher_weighs_each_value_and_its_decoupled_form_pulls_in_proportion() -> None:
    model = adapted(dtype=torch.float64)
    term = peso.Fisher(weight=5.0)
    fisher = term.estimate(model, target_losses(model))
    term.anchor(model, fisher=fisher)
    again = peso.Fisher(weight=5.0)
    again.anchor(model, target_losses(model))
    before = [p.detach().clone() for p in parameters(model)]
    assert term.metric_trace() == pytest.approx(float(sum(f.sum() for f in fisher.values())))
    move(model)
    after = parameters(model)
    moves = [(v - a).detach() for v, a in zip(after, before, strict=True)]
    wanted = 2.5 * sum((f * d**2).sum() for f, d in zip(fisher.values(), moves, strict=True))
    assert term(model).item() == again(model).item() == pytest.approx(float(wanted))
    for found, f, d in zip(torch.autograd.grad(term(model), after), fisher.values(), moves, strict=True):
        torch.testing.assert_close(found, 5 * f * d)

    decoupled = peso.Fisher(strength=2.0, coupling="decoupled")
    for parameter, value in zip(after, before, strict=True):
        parameter.data.copy_(value)
    decoupled.anchor(model, fisher=fisher)
    move(model)
    decoupled.after_step(model, 0.25, 1.0)
    mean = torch.cat([f.flatten() for f in fisher.values()]).mean()
    for v, a, f, d in zip(parameters(model), before, fisher.values(), moves, strict=True):
        torch.testing.assert_close((v - a).detach(), d * torch.exp(-0.5 * f / mean), rtol=1e-7, atol=1e-14)
    model.float()  # anchor and information follow a change of precision
    assert pickle.loads(pickle.dumps(term))(model).item() == pytest.approx(again(model).item(), rel=1e-6)


def test_fisher_without_information_or_with_another_s_is_an_error() -> None:
    model, term = adapted(), peso.Fisher(weight=1.0)
    with pytest.raises(TrainingError, match=r"needs data of the last stage: call anchor\(model, losses\)"):
        term.anchor(model)
    with pytest.raises(TrainingError, match="no losses to estimate"):
        term.anchor(model, [])
    fisher = term.estimate(model, target_losses(model))
    with pytest.raises(TrainingError, match=r"belongs to other groups: .*has shape \(8, 32\).*has \(4, 32\)"):
        term.anchor(adapted(rank=8), fisher=fisher)
    with pytest.raises(TrainingError, match="is missing"):
        term.anchor([torch.zeros(3)], fisher=fisher)
    with pytest.raises(TrainingError, match="0 everywhere"):
        term.anchor(model, fisher={name: torch.zeros_like(value) for name, value in fisher.items()})
    with pytest.raises(TrainingError, match="not finite"):
        term.anchor(model, [loss * float("nan") for loss in target_losses(model)])


# --- orthogonal -----------------------------------------------------------------------------------------


def test_orthogonal_is_the_squared_overlap_with_the_anchor_s_unit_rows() -> None:
    model = adapted(dtype=torch.float64)
    term = peso.Orthogonal(weight=0.5)
    term.anchor(model)
    before = [group.snapshot().tensor for group in find_groups(model) if group.factor == "A"]
    move(model, 0.01)
    factors = [group.tensor for group in find_groups(model) if group.factor == "A"]
    wanted = torch.zeros((), dtype=torch.float64)
    for a, old in zip(factors, before, strict=True):
        unit = old / old.norm(dim=1, keepdim=True)
        wanted = wanted + 0.5 * torch.linalg.matrix_norm(a @ unit.T) ** 2
    assert term(model).item() == pytest.approx(wanted.item())
    for found, true in zip(
        torch.autograd.grad(term(model), factors), torch.autograd.grad(wanted, factors), strict=True
    ):
        torch.testing.assert_close(found, true)
    assert pickle.loads(pickle.dumps(term))(model).item() == term(model).item()


def test_the_trace_of_orthogonal_is_that_of_its_quadratic_form() -> None:
    model = adapted(rank=2, dtype=torch.float64, targets=["q_proj"])
    term = peso.Orthogonal(weight=1.0)
    term.anchor(model)
    factors = [group.tensor.detach() for group in find_groups(model) if group.factor == "A"]
    trace = 0.0
    for factor in factors:
        for other in factors:
            other.zero_()
        for index in range(factor.numel()):  # ½·eᵀHe summed over unit vectors e
            factor.view(-1)[index] = 1.0
            trace += 2 * term(model).item()
            factor.view(-1)[index] = 0.0
    assert term.metric_trace() == pytest.approx(trace)


def test_orthogonal_pushes_away_from_the_anchor_and_is_0_at_a_right_angle() -> None:
    model = adapted(rank=1, dtype=torch.float64, targets=["q_proj"])
    term = peso.Orthogonal(weight=1.0)
    term.anchor(model)
    assert term(model).item() > 0
    for group in find_groups(model):
        if group.factor == "A":
            with torch.no_grad():
                old = group.tensor.clone()
                other = torch.randn_like(old)
                group.tensor.copy_(other - (other @ old.T) / (old @ old.T) * old)
    assert term(model).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("term", [peso.Orthogonal, peso.OutputKL])
def test_what_is_no_distance_of_values_has_no_decoupled_form(term: type) -> None:
    with pytest.raises(ConfigError, match=f"{term.__name__} has no decoupled form"):
        term(coupling="decoupled")
    with pytest.raises(TrainingError, match="no anchor yet"):
        term()(adapted())
    with pytest.raises(TrainingError, match="plain tensors have no"):
        term().anchor([torch.zeros(3)])


# --- output_kl ------------------------------------------------------------------------------------------


def plain_output_kl(model, before: dict, scaling: float, mask=None) -> torch.Tensor:
    """The formula, from inputs that are recorded apart."""
    inputs, handles = {}, []
    layers = {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    for name, layer in layers.items():
        handles.append(
            layer.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0]}))
        )
    with torch.no_grad():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    total = torch.zeros((), dtype=torch.float64)
    for name, layer in layers.items():
        x = inputs[name] if mask is None else inputs[name][mask]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        old_a, old_b = before[name]
        log_s = torch.log_softmax(scaling * x @ a.T @ b.T, -1)
        log_p = torch.log_softmax(scaling * x @ old_a.T @ old_b.T, -1)
        total = total + (log_s.exp() * (log_s - log_p)).sum(-1).mean()
    return total


def factors_of(model) -> dict:
    return {
        name: (m.lora_A["default"].weight.detach().clone(), m.lora_B["default"].weight.detach().clone())
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }


@pytest.mark.parametrize("masked", [False, True])
def test_output_kl_is_the_kl_of_the_adapter_s_outputs_on_the_batch(masked: bool) -> None:
    model = adapted(dtype=torch.float64).eval()
    mask = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) > 0.4 if masked else None
    term = peso.OutputKL(weight=3.0)
    term.anchor(model)
    before = factors_of(model)
    with torch.no_grad():
        for p in parameters(model):
            p.mul_(20)  # outputs far enough apart that the KL is no quadratic
    with term.watch(model, mask):
        model(input_ids=IDS)
    value = term(model)
    reference = 3 * plain_output_kl(model, before, 2.0, mask)
    assert value.item() == pytest.approx(reference.item(), rel=1e-9)
    wanted = torch.autograd.grad(reference, parameters(model))
    for found, true in zip(torch.autograd.grad(value, parameters(model)), wanted, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-7, atol=1e-12)


def test_output_kl_is_exact_for_small_steps_in_float32() -> None:
    model = adapted().eval()
    term = peso.OutputKL(weight=1.0)
    term.anchor(model)
    before = {name: (a.double(), b.double()) for name, (a, b) in factors_of(model).items()}
    move(model, 1e-5)
    with term.watch(model):
        model(input_ids=IDS)
    found = term(model).item()
    reference = plain_output_kl(model.double(), before, 2.0).item()
    assert 0 < reference < 1e-9
    assert found == pytest.approx(reference, rel=1e-4)


def test_output_kl_sees_passes_with_gradients_inside_watch_alone() -> None:
    model = adapted()
    term = peso.OutputKL(weight=1.0)
    term.anchor(model)
    model(input_ids=IDS)
    with term.watch(model), torch.no_grad():
        model(input_ids=IDS)
    with pytest.raises(TrainingError, match="no forward pass with gradients was watched"):
        term(model)
    move(model)
    with term.watch(model):
        model(input_ids=IDS[:1])
        model(input_ids=IDS[1:])
    in_parts = term(model).item()
    term.attach(model)
    model(input_ids=IDS)
    assert term(model).item() == pytest.approx(in_parts, rel=1e-5)
    term.detach()
    model(input_ids=IDS)
    with pytest.raises(TrainingError, match="no forward pass"):
        term(model)


def test_output_kl_is_zero_at_the_anchor_and_does_not_change_the_pass() -> None:
    model = adapted()
    term = peso.OutputKL(weight=1e6)
    term.anchor(model)
    plain = model(input_ids=IDS).logits
    with term.watch(model):
        watched = model(input_ids=IDS).logits
    assert torch.equal(plain, watched)
    value = term(model)
    assert value.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(value, parameters(model)))


def test_the_trace_of_output_kl_is_that_of_its_hessian_on_the_tokens_seen() -> None:
    model = adapted(rank=2, dtype=torch.float64, targets=["v_proj"]).eval()
    with torch.no_grad():
        for p in parameters(model):
            p.mul_(20)
    term = peso.OutputKL(strength=1.0)
    term.anchor(model)
    calibration = term.calibrate(model, (model(input_ids=IDS, labels=IDS).loss for _ in range(2)))
    assert calibration.examples == 2
    assert term.weight == calibration.rho > 0
    trace, step, inside = 0.0, 1e-3, find_groups(model)
    for group in inside[:2]:  # the first module: its input does not depend on what is moved
        flat = group.tensor.data.view(-1)
        for index in range(len(flat)):
            slopes = []
            for sign in (1, -1):
                flat[index] += sign * step
                with term.watch(model):
                    model(input_ids=IDS)
                slope = torch.autograd.grad(term.value_at(model, 1.0), group.tensor)[0]
                slopes.append(float(slope.view(-1)[index]))
                flat[index] -= sign * step
            trace += (slopes[0] - slopes[1]) / (2 * step)
    with torch.no_grad():
        for group in inside[2:]:
            group.tensor.zero_()  # where A and B are both 0, no direction changes the output to first order
    alone = peso.OutputKL(strength=1.0)
    alone.anchor(model)
    alone.calibrate(model, (model(input_ids=IDS, labels=IDS).loss for _ in range(2)))
    assert alone.metric_trace() == pytest.approx(trace, rel=1e-5)


def test_output_kl_must_see_the_passes_it_is_calibrated_on() -> None:
    model = adapted()
    term = peso.OutputKL(strength=1.0)
    term.anchor(model)
    with pytest.raises(TrainingError, match="depends on the data"):
        term.metric_trace()
    losses = [model(input_ids=IDS, labels=IDS).loss for _ in range(2)]
    with pytest.raises(TrainingError, match="pass an iterator to calibrate"):
        term.calibrate(model, losses)
    with pytest.raises(TrainingError, match="strength 1 has no weight yet"):
        term(model)


def test_output_kl_is_for_linear_layers() -> None:
    with pytest.raises(TrainingError, match=r"needs linear layers, but model\.embed_tokens is not linear"):
        peso.OutputKL().anchor(adapted(targets=["embed_tokens"]))


def test_output_kl_works_under_autocast_and_follows_the_precision() -> None:
    model = adapted()
    term = peso.OutputKL(weight=1.0)
    term.anchor(model)
    move(model)
    with term.watch(model):
        model(input_ids=IDS)
    plain = term(model).item()
    with term.watch(model), torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=IDS)
    assert term(model).item() == pytest.approx(plain, rel=0.05)  # the inputs are bfloat16's
    copied = pickle.loads(pickle.dumps(term))
    with copied.watch(model.double()):
        model(input_ids=IDS)
    assert copied(model).dtype == torch.float64


@pytest.mark.parametrize("name", ["SoftmaxKL", "PerRankKL", "L2", "Fisher", "OutputKL"])
def test_every_term_holds_a_loop_that_is_not_ours(name: str) -> None:
    """Plain PyTorch on a PEFT model: the larger the weight, the nearer to the anchor in the term's sense."""
    reached = []
    for weight in (0.0, 1.0, 10.0):
        model = adapted()
        scale = {"SoftmaxKL": 1e2, "PerRankKL": 1e2, "L2": 1.0, "Fisher": 1e3, "OutputKL": 10.0}[name]
        term = getattr(peso, name)(weight=weight * scale, reduction="sum")
        measure = getattr(peso, name)(weight=1.0, reduction="sum")
        for each in (term, measure):
            each.anchor(model, target_losses(model) if each.needs_losses else None)
        optimizer = torch.optim.SGD(parameters(model), lr=0.05)
        for step in range(6):
            for each in (term, measure):
                each.attach(model)
            loss = model(input_ids=IDS, labels=IDS).loss + term(model)
            distance = float(measure(model).detach())
            for each in (term, measure):
                each.detach()
            if step < 5:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        reached.append(distance)
    assert reached[0] > reached[1] > reached[2] > 0

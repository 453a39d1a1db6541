"""The term on real PEFT models and plain tensors: what it reads, what it refuses, what it does to a loop."""

from __future__ import annotations

import pickle

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peso
from peso.adapters.anchor_report import anchor_finding, anchor_report, gradient_ratio, gradient_ratios
from peso.adapters.groups import CPU_VALUES, check_same_groups, find_groups, shapes
from peso.errors import ConfigError, TrainingError
from peso.model.backbone import small_llama

TARGETS = ["q_proj", "v_proj", "up_proj"]


def adapted(
    rank: int = 4, targets: list[str] = TARGETS, layers: int = 2, name: str = "default", seed: int = 0
):
    """A tiny Llama with an adapter whose B is not zero, as after a first stage."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, target_modules=targets)
    model = peft.get_peft_model(small_llama(32, layers, seed), config, adapter_name=name)
    with torch.no_grad():
        for group in find_groups(model):
            group.tensor.normal_(0, 0.02)
    return model


def move(model: nn.Module, step: float = 1e-3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in find_groups(model):
            group.tensor.add_(torch.randn(group.tensor.shape, generator=generator) * step)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


# --- which groups ---------------------------------------------------------------------------------------


def test_groups_are_a_and_b_of_each_module_in_the_models_order() -> None:
    groups = find_groups(adapted(layers=1))
    assert [(group.module, group.factor) for group in groups] == [
        (f"model.layers.0.{module}", factor)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
        for factor in "AB"
    ]
    assert [tuple(group.tensor.shape) for group in groups[:2]] == [(4, 32), (32, 4)]


def test_groups_are_the_parameters_themselves_all_of_them() -> None:
    model = adapted()
    assert [id(group.tensor) for group in find_groups(model)] == [id(p) for p in lora_parameters(model)]


def test_an_adapter_of_any_name_and_of_several_the_active_one() -> None:
    model = adapted(name="games")
    model.add_adapter("books", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(find_groups(model)) == 12
    model.set_adapter("books")
    assert {group.module.split(".")[-1] for group in find_groups(model)} == {"q_proj"}
    assert len(find_groups(model, adapter="games")) == 12
    model.base_model.set_adapter(["games", "books"])
    with pytest.raises(TrainingError, match=r"2 adapters are active \(books, games\).*adapter=name"):
        find_groups(model)
    assert len(find_groups(model, adapter="books")) == 4
    with pytest.raises(TrainingError, match="no LoRA adapter 'music'; it has books, games"):
        find_groups(model, adapter="music")


def test_embedding_adapters_are_groups_too() -> None:
    groups = find_groups(adapted(targets=["embed_tokens"], layers=1))
    assert [(group.name, tuple(group.tensor.shape)) for group in groups] == [
        ("model.embed_tokens.lora_A", (4, 258)),
        ("model.embed_tokens.lora_B", (32, 4)),
    ]


def test_an_anchor_taken_before_wrapping_fits_after_it() -> None:
    model = adapted()
    names = shapes(find_groups(model))
    assert shapes(find_groups(nn.ModuleDict({"module": model}))) == names  # what DDP names it
    assert shapes(find_groups(torch.compile(model))) == names
    assert shapes(find_groups(model.base_model.model)) == names


def test_no_adapter_is_an_error_with_its_cure() -> None:
    with pytest.raises(TrainingError, match=r"no LoRA adapter found in LlamaForCausalLM.*get_peft_model"):
        peso.SoftmaxKL().anchor(small_llama(32, 1, 0))


def test_a_call_before_the_anchor_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"no anchor yet: call anchor\(model\)"):
        peso.SoftmaxKL()(adapted())


def test_an_anchor_of_another_rank_or_other_modules_is_an_error() -> None:
    term = peso.SoftmaxKL()
    term.anchor(adapted(rank=4))
    with pytest.raises(
        TrainingError, match=r"q_proj.lora_A has shape \(4, 32\), but the model's has \(8, 32\)"
    ):
        term(adapted(rank=8))
    with pytest.raises(TrainingError, match=r"other modules.*only in the anchor: .*up_proj\.lora_A …"):
        term(adapted(targets=["q_proj", "v_proj"]))
    with pytest.raises(
        TrainingError, match=r"it has 12 groups, but the model has 18; only in the model: .*layers\.2"
    ):
        term(adapted(layers=3))


def test_modules_in_another_order_are_an_error() -> None:
    groups = find_groups(adapted())
    with pytest.raises(TrainingError, match="another order"):
        check_same_groups(dict(reversed(shapes(groups).items())), groups)


def test_an_empty_tensor_is_an_error() -> None:
    with pytest.raises(TrainingError, match="tensor 1 has no values"):
        peso.SoftmaxKL().anchor([torch.zeros(3), torch.zeros(0)])


@pytest.mark.parametrize("source", [torch.zeros(3, 4), [], {"a": torch.zeros(3)}])
def test_what_is_neither_model_nor_list_of_tensors_is_refused(source: object) -> None:
    with pytest.raises(TypeError, match="a model or a list of models and tensors"):
        peso.SoftmaxKL().anchor(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight -1.0"),
        ({"weight": float("nan")}, "weight nan"),
        ({"reduction": "average"}, "'average' is not one of"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": float("inf")}, "temperature inf must be a finite number"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        peso.SoftmaxKL(**arguments)


# --- value and gradient ---------------------------------------------------------------------------------


def groups_of_sizes(sizes: list[int], dtype: torch.dtype, seed: int = 0, step: float = 1e-3):
    generator = torch.Generator().manual_seed(seed)
    anchor = [torch.randn(size, generator=generator).mul(0.02).to(dtype) for size in sizes]
    current = [
        (a.float() + torch.randn(a.shape, generator=generator) * step).to(dtype).requires_grad_()
        for a in anchor
    ]
    return current, anchor


def plain_kl(current: torch.Tensor, anchor: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The formula as it is written, in float64."""
    log_s = torch.log_softmax(current.double().flatten() / temperature, -1)
    log_p = torch.log_softmax(anchor.double().flatten() / temperature, -1)
    return (log_s.exp() * (log_s - log_p)).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_value_and_gradients_are_those_of_the_formula(dtype: torch.dtype, temperature: float) -> None:
    current, anchor = groups_of_sizes([1_000, 1_500, 1_000, 3, 1_500, 1], dtype)
    value = peso.SoftmaxKL.value(current, anchor, temperature)
    reference = sum(plain_kl(v, a, temperature) for v, a in zip(current, anchor, strict=True))
    assert value.shape == ()
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    ours = torch.autograd.grad(value, current)
    for found, true in zip(ours, torch.autograd.grad(reference, current), strict=True):
        assert found.dtype == dtype
        # a gradient has its parameter's dtype, so that of a bfloat16 parameter is the exact one, rounded
        torch.testing.assert_close(found, true, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-9)


def test_groups_that_do_not_fit_into_one_stack() -> None:
    sizes = [50_000, CPU_VALUES + 1, 50_000, 50_000, 50_000, 50_000, CPU_VALUES + 1]
    current, anchor = groups_of_sizes(sizes, torch.float32)
    value = peso.SoftmaxKL.value(current, anchor)
    alone = [peso.SoftmaxKL.value([v], [a]) for v, a in zip(current, anchor, strict=True)]
    assert value.item() == pytest.approx(sum(kl.item() for kl in alone), rel=1e-6)
    for together, kl, parameter in zip(torch.autograd.grad(value, current), alone, current, strict=True):
        torch.testing.assert_close(together, torch.autograd.grad(kl, parameter)[0], rtol=1e-5, atol=1e-12)


def test_gradcheck() -> None:
    current = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (12,), (2, 5))
    ]
    anchor = [torch.randn(tensor.shape, dtype=torch.float64) for tensor in current]
    assert torch.autograd.gradcheck(lambda *v: peso.SoftmaxKL.value(v, anchor, 0.7), current)


def test_exactly_zero_at_the_anchor() -> None:
    model = adapted()
    term = peso.SoftmaxKL(weight=1e6)
    term.anchor(model)
    loss = term(model)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, lora_parameters(model))
    assert not any(gradient.any() for gradient in gradients)


def test_grouping_by_size_does_not_mix_groups_up() -> None:
    model = adapted()
    term = peso.SoftmaxKL(weight=3.0, reduction="sum")
    before = [group.snapshot() for group in find_groups(model)]
    term.anchor(model)
    move(model)
    after = find_groups(model)
    reference = 3 * sum(plain_kl(v.tensor, a.tensor) for v, a in zip(after, before, strict=True))
    loss = term(model)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    parameters = [group.tensor for group in after]
    for found, true in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(reference, parameters), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-10)


def test_mean_divides_by_modules_not_by_groups() -> None:
    model = adapted()  # 2 layers × 3 targets = 6 modules, 12 groups
    terms = {reduction: peso.SoftmaxKL(2.0, reduction) for reduction in ("sum", "mean")}
    for term in terms.values():
        term.anchor(model)
    move(model)
    losses = {reduction: term(model).item() for reduction, term in terms.items()}
    assert losses["mean"] == pytest.approx(losses["sum"] / 6, rel=1e-6)


def test_of_plain_tensors_each_is_a_module() -> None:
    current, anchor = groups_of_sizes([1_000] * 3, torch.float32)
    term = peso.SoftmaxKL(2.0, "mean")
    term.anchor(anchor)
    assert term(current).item() == pytest.approx(
        2 / 3 * peso.SoftmaxKL.value(current, anchor).item(), rel=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(weights=st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), step=st.floats(1e-6, 1e-1))
def test_proportional_to_the_weight_and_never_negative(weights: tuple[float, float], step: float) -> None:
    current, anchor = groups_of_sizes([500, 700], torch.float32, step=step)
    value = peso.SoftmaxKL.value(current, anchor).item()
    assert value >= 0
    for weight in weights:
        term = peso.SoftmaxKL(weight, "sum")
        term.anchor(anchor)
        assert term(current).item() == pytest.approx(weight * value, rel=1e-5, abs=1e-30)


def test_the_term_keeps_its_precision_under_autocast() -> None:
    current, anchor = groups_of_sizes([16_384], torch.float32, step=1e-5)
    outside = peso.SoftmaxKL.value(current, anchor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = peso.SoftmaxKL.value(current, anchor)
    assert torch.equal(outside, inside)


# --- in a loop ------------------------------------------------------------------------------------------


def test_the_anchor_stays_where_it_was_when_the_parameters_move() -> None:
    model = adapted()
    term = peso.SoftmaxKL()
    term.anchor(model)
    move(model)
    first = term(model)
    move(model, seed=1)  # twice the same step: four times the value, to first order
    assert term(model).item() == pytest.approx(4 * first.item(), rel=0.01)
    term.anchor(model)
    assert term(model).item() == 0


def test_gradients_add_up_over_a_kept_graph_and_follow_the_outer_scale() -> None:
    current, anchor = groups_of_sizes([1_000, 1_000], torch.float32)
    value = peso.SoftmaxKL.value(current, anchor)
    once = torch.autograd.grad(value, current, retain_graph=True)
    for gradient, thrice in zip(once, torch.autograd.grad(3 * value, current), strict=True):
        torch.testing.assert_close(thrice, 3 * gradient)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    current, anchor = groups_of_sizes([1_000], torch.float32)
    value = peso.SoftmaxKL.value(current, anchor)
    with pytest.raises(TrainingError, match="only a first derivative"):
        torch.autograd.grad(value, current, create_graph=True)


def test_nothing_is_kept_for_backward_where_no_gradient_is_wanted() -> None:
    current, anchor = groups_of_sizes([1_000], torch.float32)
    with torch.no_grad():
        assert not peso.SoftmaxKL.value(current, anchor).requires_grad
    frozen = peso.SoftmaxKL.value([tensor.detach() for tensor in current], anchor)
    assert not frozen.requires_grad
    assert float(frozen) == peso.SoftmaxKL.value(current, anchor).item()


def test_the_anchor_follows_a_change_of_precision() -> None:
    model = adapted().bfloat16()
    term = peso.SoftmaxKL(reduction="sum")
    term.anchor(model)
    move(model)
    in_bfloat16 = term(model).item()
    model.double()  # the same values
    assert term(model).dtype == torch.float64
    assert term(model).item() == pytest.approx(in_bfloat16, rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to move to")
def test_the_anchor_follows_to_another_device() -> None:
    model = adapted()
    term = peso.SoftmaxKL(reduction="sum")
    term.anchor(model)
    move(model)
    here = term(model).item()
    there = term(model.cuda())
    assert there.device.type == "cuda"
    assert float(there) == pytest.approx(here, rel=1e-5)


def test_a_pickled_term_keeps_its_anchor() -> None:
    model = adapted()
    term = peso.SoftmaxKL(weight=5.0, reduction="sum", temperature=0.5)
    term.anchor(model)
    move(model)
    assert float(pickle.loads(pickle.dumps(term))(model)) == term(model).item()


def test_a_loop_that_is_not_ours_stays_nearer_the_larger_the_weight() -> None:
    """Plain PyTorch, a PEFT model, one line of ours."""
    distances = []
    for weight in (0.0, 1e2, 1e3):
        model = adapted()
        before = [group.snapshot() for group in find_groups(model)]
        term = peso.SoftmaxKL(weight, "sum")
        term.anchor(model)
        optimizer = torch.optim.SGD(lora_parameters(model), lr=0.05)
        ids = torch.arange(24).view(2, 12)
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids).loss + term(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        distances.append(anchor_report(before, find_groups(model))["distance"])
    assert distances[0] > distances[1] > distances[2] > 0


# --- the report -----------------------------------------------------------------------------------------


def test_the_report_measures_what_the_formulas_say() -> None:
    model = adapted()
    before = [group.snapshot() for group in find_groups(model)]
    move(model)
    after = find_groups(model)
    for temperature in (1.0, 0.02):
        report = anchor_report(before, after, temperature)
        pairs = [(v.tensor.detach().double(), a.tensor.double()) for v, a in zip(after, before, strict=True)]
        assert report["distance"] == pytest.approx(
            float(sum((v - a).square().sum() for v, a in pairs)) ** 0.5
        )
        assert report["kl"] == pytest.approx(float(sum(plain_kl(v, a, temperature) for v, a in pairs)))
        variances = 0.0
        for v, a in pairs:
            p, step = torch.softmax(a.flatten() / temperature, -1), (v - a).flatten() / temperature
            variances += float((p * step.square()).sum() - (p * step).sum() ** 2)
        assert report["second_order"] == pytest.approx(variances / 2, rel=1e-5)
        assert list(report["modules"]) == list(dict.fromkeys(group.module for group in after))
        assert sum(module["kl"] for module in report["modules"].values()) == pytest.approx(report["kl"])
        assert sum(m["distance"] ** 2 for m in report["modules"].values()) == pytest.approx(
            report["distance"] ** 2
        )


def test_the_report_of_what_did_not_move_is_zero_and_of_another_rank_an_error() -> None:
    model = adapted()
    before = [group.snapshot() for group in find_groups(model)]
    report = anchor_report(before, find_groups(model))
    assert (report["distance"], report["kl"], report["second_order"]) == (0, 0, 0)
    with pytest.raises(TrainingError, match="rank or the backbone is different"):
        anchor_report(before, find_groups(adapted(rank=2)))


def test_the_ratio_over_time_is_the_ratio_of_each_part() -> None:
    steps = [{"gradient_norm": 2.0, "penalty_gradient_norm": float(step)} for step in range(10)]
    others = [{"validation_loss": 3.0}, {"gradient_norm": 1.0, "penalty_gradient_norm": None}]
    records = [*steps[:7], *others, *steps[7:]]
    quarters = gradient_ratios(records)
    assert quarters == [gradient_ratio(part) for part in (steps[:2], steps[2:5], steps[5:7], steps[7:])]
    assert gradient_ratios(records, parts=1) == [gradient_ratio(records)]
    assert gradient_ratios(steps[1:3]) == [0.5, 1.0]  # fewer steps than parts
    assert gradient_ratios(others) is gradient_ratios([]) is None
    assert gradient_ratios([{"gradient_norm": 2.0, "penalty_gradient_norm": 0.0}] * 8) is None


@pytest.mark.parametrize(("rho", "shown"), [(4.43e4, "3.1e4"), (1.0, "0.7"), (2e-6, "1.4e-6"), (50, "35")])
def test_the_finding_says_which_weight_a_strength_would_be(rho: float, shown: str) -> None:
    sentence = str(anchor_finding(2, 0.0003, rho))
    assert sentence.startswith("stage 2: the penalty's gradient was 0.03 % of the loss's on average")
    assert sentence.endswith(
        f"the anchor had no measurable effect at this weight; strength 0.7 would be weight {shown}"
    )
    assert anchor_finding(2, 0.02, rho) is None


def test_the_report_takes_the_automatic_temperature() -> None:
    model = adapted()
    before = [group.snapshot() for group in find_groups(model)]
    move(model)
    report = anchor_report(before, find_groups(model), "auto")
    value = peso.SoftmaxKL.value(lora_parameters(model), [group.tensor for group in before], "auto")
    assert report["kl"] == pytest.approx(value.item(), rel=1e-6)
    assert report["second_order"] == pytest.approx(report["kl"], rel=0.05)

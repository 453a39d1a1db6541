"""What answers gives what the model that learnt would give, without its adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from strategy_runs import Runs
from torch import Tensor, nn

from peso.adapters.lora import add_adapter
from peso.decoding import search
from peso.model.generative import GenerativeModel
from peso.model.inference import LowRankBeside, PackedLinear, for_inference

IDS = torch.tensor([[0, 70, 71, 260, 268, 261, 270, 259]])  # words and codes
STRATEGIES: dict[str, Any] = {
    "single": "single",
    "several, frozen": {"name": "sum_lora", "history": "all"},
    "several, two": {"name": "sum_lora", "history": "latest", "inherit": True},
    "with magnitudes": "sd_lora",
    "two models": "lsat",
    "none": "full",
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    hidden = model.hidden(IDS, None, torch.arange(IDS.shape[1])[None])[0]
    return torch.cat([model.word_logits(hidden), model.semantic_logits(hidden)], dim=-1)


@pytest.mark.parametrize(
    "name", [name if name == "single" else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
def test_a_stage_of_any_strategy_answers_the_same(name: str, runs: Runs) -> None:
    workspace = runs(STRATEGIES[name])
    model, answering = workspace.stage(3).model(), workspace.stage(3).answering_model()
    torch.testing.assert_close(logits(answering), logits(model), atol=1e-5, rtol=0)
    assert not any(isinstance(module, LoraLayer) for module in answering.modules())
    assert any(isinstance(module, LoraLayer) for module in model.modules()) == (name != "none")
    histories = [np.array(history) for history in ([], [3], [5, 1, 2, 9, 30])]
    ours, theirs = search(answering, histories, beams=8), search(model, histories, beams=8)
    assert np.array_equal(ours.leaves, theirs.leaves)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)


def test_the_model_that_learnt_stays_as_it_was_and_shares_the_rest(runs: Runs) -> None:
    model = runs("single").stage(3).model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
    expected = logits(model)
    answering = for_inference(model)
    own = [name for name, tensor in answering.state_dict().items() if tensor.data_ptr() not in shared]
    assert own
    assert all(name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")) for name in own)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(1)
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    torch.testing.assert_close(logits(answering), expected, atol=1e-5, rtol=0)
    for name, tensor in model.state_dict().items():
        assert "lora_B" in name or torch.equal(tensor, before[name])


def adapted(make_model: Callable[..., GenerativeModel], size: float) -> GenerativeModel:
    model = make_model()
    model.backbone = add_adapter(model.causal_lm, 4, 6, 0.3, ["q_proj", "down_proj"], seed=0)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=size)
    return model.eval()


def in_bfloat16(model: GenerativeModel) -> GenerativeModel:
    for name, p in model.named_parameters():
        if "lora_" not in name and "vocabulary" not in name:
            p.data = p.data.bfloat16()
    return model


def test_in_bfloat16_an_update_below_the_last_digit_still_acts(
    make_model: Callable[..., GenerativeModel],
) -> None:
    model = in_bfloat16(adapted(make_model, 2e-5))
    name, layer = next((n, m) for n, m in model.causal_lm.named_modules() if isinstance(m, LoraLayer))
    weight, added = layer.get_base_layer().weight, layer.get_delta_weight("default")
    weight.data.fill_(0.03)  # whose last digit is 1.2e-4
    assert torch.equal((weight.float() + added).bfloat16(), weight)  # merging would have lost it
    plain = for_inference(model).causal_lm.get_submodule(name)
    assert isinstance(plain, LowRankBeside)
    x = torch.randn(5, 3, weight.shape[1]).bfloat16()
    with torch.no_grad():
        plain.base.weight.zero_()  # what is left is the adapter's
        torch.testing.assert_close(plain(x).float(), x.float() @ added.t(), rtol=0.02, atol=1e-6)
    assert plain(x).abs().max() > 0


def test_bfloat16_is_as_near_to_float32_as_by_peft(make_model: Callable[..., GenerativeModel]) -> None:
    exact = logits(adapted(make_model, 0.2))
    rounded = in_bfloat16(adapted(make_model, 0.2))
    by_peft, ours = logits(rounded), logits(for_inference(rounded))
    assert (ours - exact).norm() < 1.5 * (by_peft - exact).norm()
    assert (by_peft - exact).norm() > 0


def test_norms_are_one_operation_where_that_computes_the_same(
    make_model: Callable[..., GenerativeModel],
) -> None:
    model = make_model()
    first, last = model.causal_lm.model.layers[0], model.causal_lm.model.norm
    with torch.no_grad():
        for norm in (first.input_layernorm, first.post_attention_layernorm, last):
            norm.weight.normal_(1, 0.3)
    # as some families have it; what counts is what is computed
    other = first.post_attention_layernorm
    other.forward = lambda x: (1 + other.weight) * torch.nn.functional.rms_norm(x, x.shape[-1:])
    answering = for_inference(model)
    plain = answering.causal_lm.model
    assert type(plain.layers[0].input_layernorm) is type(plain.norm) is nn.RMSNorm
    assert plain.norm.weight is last.weight
    assert type(plain.layers[0].post_attention_layernorm) is type(other)
    torch.testing.assert_close(logits(answering), logits(model), atol=1e-5, rtol=1e-5)
    rounded = for_inference(in_bfloat16(make_model())).causal_lm.model
    assert all(type(layer.input_layernorm) is nn.RMSNorm for layer in rounded.layers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_more_than_a_product_is_left_to_peft(
    dtype: torch.dtype, make_model: Callable[..., GenerativeModel]
) -> None:
    """Merged by it in float32, computed by it in bfloat16."""
    model = make_model()
    wanted = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=True)
    model.backbone = get_peft_model(model.causal_lm, wanted)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    model = (in_bfloat16(model) if dtype == torch.bfloat16 else model).eval()
    answering = for_inference(model)
    left = any(isinstance(module, LoraLayer) for module in answering.modules())
    assert left == (dtype == torch.bfloat16)
    near = 0.05 if left else 1e-4
    torch.testing.assert_close(logits(answering), logits(model), atol=near * 10, rtol=near)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_packed_layers_answer_the_same(make_model: Callable[..., GenerativeModel], precision) -> None:
    model = adapted(make_model, 0.1)
    model = in_bfloat16(model) if precision == torch.bfloat16 else model
    plain, packed = for_inference(model), for_inference(model, packed=True)
    kinds = [type(module) for module in packed.modules()]
    if PackedLinear not in kinds:
        pytest.skip("this build of PyTorch, or this processor, has no packed layers")
    assert nn.Linear not in {type(module) for module in packed.causal_lm.get_decoder().modules()}
    near = 1e-5 if precision == torch.float32 else 5e-2
    torch.testing.assert_close(logits(packed), logits(plain), atol=near, rtol=near)
    histories = [np.array([3, 1, 4, 1, 5]), np.array([], dtype=np.int64), np.array([9, 2])]
    found, expected = search(packed, histories), search(plain, histories)
    np.testing.assert_allclose(found.scores, expected.scores, atol=near * 10)

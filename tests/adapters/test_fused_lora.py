"""The fused LoRA layer computes what PEFT's does, values and gradients, with the same random draws."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peso.adapters.fused import FusedLinear, fast_dropout, fused_lora
from peso.adapters.lora import Magnitudes, Past


class Two(nn.Module):
    """Two linear layers with something between them; the second has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, bias=False)
        self.second = nn.Linear(40, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dropout: float, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["first", "second"])
    model = get_peft_model(Two(), config).to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model


def learnt(model: Any, seed: int = 1) -> dict[str, Tensor]:
    """Output and gradients of one pass, drawn from a seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    x = torch.linspace(-2, 2, 3 * 5 * 24).view(3, 5, 24).to(dtype).requires_grad_()
    y = model(x)
    (y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_draws_are_those_of_peft(dropout: float, training: bool) -> None:
    model = adapted(dropout).train(training)
    with fast_dropout(model):
        expected = learnt(model)
        with fused_lora(model):
            found = learnt(model)
    assert found.keys() == expected.keys()
    assert len(found) == 6
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    if dropout and training:
        with fast_dropout(model):
            assert not torch.allclose(learnt(model, seed=2)["y"], expected["y"])


def test_on_other_devices_dropout_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch that GPUs take, on the CPU, where ``nn.Dropout`` draws the same numbers as it."""
    monkeypatch.setattr("peso.adapters.fused._bits", lambda rows: False)
    model = adapted(0.3).train()
    expected = learnt(model)
    with fused_lora(model):
        found = learnt(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_what_is_frozen_gets_no_gradient() -> None:
    model = adapted(0.0)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    with fused_lora(model):
        found = learnt(model)
    assert not any("lora_A" in name for name in found)
    assert sum("lora_B" in name for name in found) == 2


def test_bfloat16_products_keep_float32_gradients() -> None:
    model = adapted(0.0, torch.float32)
    reference = learnt(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), disable_input_dtype_casting(model), fused_lora(model):
        found = learnt(model)
    assert found["y"].dtype == torch.bfloat16
    for name, value in found.items():
        if "lora" in name:
            assert value.dtype == torch.float32
            assert (
                torch.nn.functional.cosine_similarity(value.flatten(), reference[name].flatten(), 0) > 0.999
            )


def with_another(model: Any, **config: Any) -> Any:
    """A second adapter acts beside the first, frozen."""
    added = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False, **config)
    model.add_adapter("more", added)
    model.to(next(model.parameters()).dtype).base_model.set_adapter(["default", "more"])
    for name, p in model.named_parameters():
        p.requires_grad_(".default." in name)
    return model


@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_frozen_adapter_beside_the_trained_one_is_computed_with_it(
    dropout: float, magnitudes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_another(adapted(dropout)).train()
    if magnitudes:  # the rows of A are products with something that learns
        for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
            scales = Magnitudes(Past({}, {}, (1, 1), torch.tensor([0.7, 1.3])), trainable=True).double()
            parametrize.register_parametrization(layer.lora_A["more"], "weight", scales, unsafe=True)
    with fast_dropout(model):
        expected = learnt(model)
        monkeypatch.setattr(Linear, "forward", lambda *_: pytest.fail("by PEFT"))
        with fused_lora(model):
            found = learnt(model)
    assert found.keys() == expected.keys()
    assert sum("magnitudes" in name for name in found) == 2 * magnitudes
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_adapters_that_both_learn_or_drop_and_disabled_ones_stay_with_peft() -> None:
    model = adapted(0.0)
    with fused_lora(model):
        alone = learnt(model)["y"]
        with model.disable_adapter(), torch.no_grad():
            x = torch.linspace(-2, 2, 360).view(3, 5, 24).double()
            torch.manual_seed(0)
            assert torch.equal(model(x), Two().double()(x))  # what it was made from
            assert not torch.allclose(model(x), alone)
    both = with_another(adapted(0.0)).requires_grad_(True)
    dropping = with_another(adapted(0.0), lora_dropout=0.4).train()
    for several in (both, dropping):
        for layer in (m for m in several.modules() if hasattr(m, "lora_A")):
            layer.base_layer.requires_grad_(False)
        expected = learnt(several)
        with fused_lora(several):
            found = learnt(several)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
        assert not torch.allclose(expected["y"], alone)


def test_afterwards_the_layers_are_as_before() -> None:
    model = adapted(0.1)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    before = [type(layer) for layer in layers]
    with fused_lora(model):
        assert all(isinstance(layer, FusedLinear) for layer in layers)
    assert [type(layer) for layer in layers] == before
    with suppress(KeyError), fused_lora(model):
        raise KeyError
    assert [type(layer) for layer in layers] == before

"""A model prepared for inference: adapters are merged into the weights, or cost one extra product per layer.

PEFT computes an adapter in half a dozen operations per linear layer, and Transformers computes a norm in
eight. A single request has small operations, so launching them dominates. Inference needs nothing that only
training uses, and PyTorch has a norm in one operation.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from peso.adapters.groups import lora_layers
from peso.model.ensemble import Ensemble
from peso.model.generative import GenerativeModel

# formats whose rounding loses nothing of an update that was learned in float32
_EXACT = (torch.float32, torch.float64)


@torch.no_grad()
def for_inference(model: GenerativeModel | Ensemble) -> Any:
    """The same model to answer with: a copy without adapters that gives the same logits but for rounding.

    In float32 PEFT adds the active adapters to the weights, W + scale · B A. In bfloat16 that sum would lose
    whatever is smaller than the last digit of W, which is much of an update: there x → W x + (scale · B)(A x)
    is kept, in two small products in the precision of W. Layers that are adapted otherwise stay PEFT's. Norms
    that divide by the root of the mean square are :class:`torch.nn.RMSNorm`.

    What is not adapted is shared with ``model``, whose own weights and adapters stay as they are: so the copy
    needs the memory of the adapted float32 weights once more, and later changes of adapters do not show in
    it. In evaluation mode.
    """
    if isinstance(model, Ensemble):
        first, second = (for_inference(member) for member in model.members)
        return Ensemble(first, second, model.shares[0]).eval()
    layers = lora_layers(model.causal_lm)
    exact = model.dtype in _EXACT
    own = (
        {id(p) for layer in layers.values() for p in layer.get_base_layer().parameters()} if exact else set()
    )
    shared: list[Any] = [
        x for x in (*model.causal_lm.parameters(), *model.causal_lm.buffers()) if id(x) not in own
    ]
    # one configuration, so that who changes how attention is computed changes it for both of an ensemble
    shared += [module.config for module in model.backbone.modules() if hasattr(module, "config")]
    backbone: Any = deepcopy(model.backbone, {id(each): each for each in shared})
    if layers and exact:
        answering = backbone.merge_and_unload()
    else:
        answering = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
        for name, layer in layers.items():
            if (beside := _beside(layer)) is not None:
                answering.set_submodule(name, beside)
    for name, module in list(answering.named_modules()):
        if (norm := _norm(module)) is not None:
            answering.set_submodule(name, norm)
    return GenerativeModel(
        answering,
        model.tokenizer,
        model.vocabulary,
        model.layout,
        model.semantic_ids,
        model.loss_vocabulary,
    ).eval()


def _beside(layer: LoraLayer) -> nn.Module | None:
    """A LoRA layer as two products beside its weight; None where it is not a matter of B A alone."""
    base = layer.get_base_layer()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    special = layer.merged or layer.disable_adapters or layer.lora_variant
    if special or not names or type(base) is not nn.Linear or any(layer.lora_bias[name] for name in names):
        return None
    down = torch.cat([layer.lora_A[name].weight for name in names])
    up = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], dim=1)
    return LowRankBeside(base, down.to(base.weight.dtype), up.to(base.weight.dtype))


def _norm(module: nn.Module) -> nn.Module | None:
    """PyTorch's own norm with the weight of one of Transformers'; None where that computes something else."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or epsilon is None or weight.dim() != 1:
        return None
    plain = nn.RMSNorm(weight.shape, eps=epsilon, device="meta")
    plain.weight = weight
    # families differ in what a layer of this form computes: it is tried
    tried = torch.linspace(-2, 3, 3 * weight.numel(), dtype=weight.dtype, device=weight.device).view(3, -1)
    expected, found = module(tried), plain(tried)
    near = 1e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
    same = found.dtype == expected.dtype and torch.allclose(found, expected, rtol=near, atol=near)
    return plain if same else None


class LowRankBeside(nn.Module):
    """x (…, in) → W x + b + U D x (…, out). down: D (rank, in); up: U (out, rank)."""

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x, self.base.weight, self.base.bias)
        inner = F.linear(x, self.down).flatten(0, -2)
        y.view(-1, y.shape[-1]).addmm_(inner, self.up.t())
        return y

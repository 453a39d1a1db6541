"""Prepare a model for inference: merge adapters into the weights, or compute them with two small products per
layer.

PEFT uses about six operations per linear layer for an adapter, and Transformers uses eight for a norm. For a
single request, the operations are so small that launching them dominates. Inference does not need what only
training uses, and PyTorch has a norm as a single operation.
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
from peso.model.plain_decoder import plain
from peso.model.tree_attention import REFUSES

# number formats in which no part of an update that was trained in float32 is lost
_EXACT = (torch.float32, torch.float64)


@torch.no_grad()
def for_inference(model: GenerativeModel | Ensemble, *, packed: bool = False) -> Any:
    """A copy of a model for inference, in evaluation mode, that gives the same logits up to rounding.

    In float32, PEFT adds the active adapters to the weights, W + scale · B A. In bfloat16, this sum would
    lose much of an update, so x → W x + (scale · B)(A x) is computed instead, with two small products in the
    precision of W. Layers with other kinds of adapters remain PEFT layers. Norms that divide by the root mean
    square become :class:`torch.nn.RMSNorm`.

    The vectors of an item head are computed once (:meth:`~peso.model.item_head.ItemHead.fixed`).

    Weights without adapters are shared with ``model``, which does not change. So the copy needs additional
    memory for the adapted float32 weights and the items' vectors, and later changes of the adapters do not
    affect it.

    Args:
        packed: on a CPU, store the weights of linear layers as oneDNN reads them (:class:`PackedLinear`),
            and compute a decoder of the Llama shape with fewer operations
            (:class:`~peso.model.plain_decoder.PlainDecoder`). This needs the memory of the weights again,
            unless ``model`` is deleted. The result cannot be copied or saved.
    """
    if isinstance(model, Ensemble):
        first, second = (for_inference(member, packed=packed) for member in model.members)
        return Ensemble(first, second, model.shares[0]).eval()
    layers = lora_layers(model.causal_lm)
    exact = model.dtype in _EXACT
    own = (
        {id(p) for layer in layers.values() for p in layer.get_base_layer().parameters()} if exact else set()
    )
    shared: list[Any] = [
        x for x in (*model.causal_lm.parameters(), *model.causal_lm.buffers()) if id(x) not in own
    ]
    # share the configuration, so that a change of the attention implementation applies to both of an ensemble
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
    if packed and model.device.type == "cpu":
        _pack(answering)
    return model.on(answering, model.vocabulary.fixed()).eval()


def _beside(layer: LoraLayer) -> nn.Module | None:
    """A LoRA layer as two products in addition to its weight; None if the layer is not a plain LoRA layer."""
    base = layer.get_base_layer()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    special = layer.merged or layer.disable_adapters or layer.lora_variant
    if special or not names or type(base) is not nn.Linear or any(layer.lora_bias[name] for name in names):
        return None
    down = torch.cat([layer.lora_A[name].weight for name in names])
    up = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], dim=1)
    return LowRankBeside(base, down.to(base.weight.dtype), up.to(base.weight.dtype))


def _norm(module: nn.Module) -> nn.Module | None:
    """PyTorch's norm with the weight of a Transformers norm; None if the module computes something else."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or epsilon is None or weight.dim() != 1:
        return None
    plain = nn.RMSNorm(weight.shape, eps=epsilon, device="meta")
    plain.weight = weight
    # model families differ in what such a layer computes, so compare the results
    tried = torch.linspace(-2, 3, 3 * weight.numel(), dtype=weight.dtype, device=weight.device).view(3, -1)
    expected, found = module(tried), plain(tried)
    near = 1e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
    same = found.dtype == expected.dtype and torch.allclose(found, expected, rtol=near, atol=near)
    return plain if same else None


def _pack(causal_lm: Any) -> None:
    """Replace the decoder of a causal LM by a :class:`PlainDecoder` with packed products, or, if it computes
    something else, its linear layers that can be packed."""
    decoder = causal_lm.get_decoder()
    if (ours := plain(decoder, _packed)) is not None:
        name = next(name for name, module in causal_lm.named_modules() if module is decoder)
        causal_lm.set_submodule(name, ours)
        setattr(causal_lm, REFUSES, True)  # it has no attention along trees
        return
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.Linear:
            decoder.set_submodule(name, _packed(module))


def _packed(linear: nn.Linear) -> nn.Module:
    """A linear layer with packed weights; itself if it cannot be packed, which is tested with an example."""
    tried = torch.linspace(-1, 1, 3 * linear.in_features, dtype=linear.weight.dtype).view(3, -1)
    try:
        new = PackedLinear(linear)
        same = torch.allclose(new(tried).float(), linear(tried).float(), rtol=1e-2, atol=1e-3)
    except (AttributeError, RuntimeError):  # not available in this build of PyTorch or on this processor
        return linear
    return new if same else linear


class PackedLinear(nn.Module):
    """x (…, in) → W x + b, with W stored in the memory layout of oneDNN.

    PyTorch computes float32 products with MKL, which reads W in its usual layout. With W packed by oneDNN,
    the layers of SmolLM2-135M took 0.4 to 0.5 of the time for 4 to 1,280 rows, on one core of an AMD EPYC
    (``benchmarks/packed_layers.py``).
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class LowRankBeside(nn.Module):
    """x (…, in) → W x + b + U D x (…, out), where ``down`` is D (rank, in) and ``up`` is U (out, rank)."""

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        inner = F.linear(x, self.down).flatten(0, -2)
        y.view(-1, y.shape[-1]).addmm_(inner, self.up.t())
        return y

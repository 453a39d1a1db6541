"""A decoder of the Llama shape for inference on a CPU, with about half the operations of Transformers'.

For a few tokens, a pass is a hundred small operations on weights that are read once. Here each layer has four
matrix products (query, key and value are one, gate and up are one), rotates queries and keys together, and
stacks the queries that share a key head (:mod:`peso.model.shared_keys`) under a mask that is prepared once
for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast

# Parts of a layer, under the names of Transformers. A layer with further parts computes something else.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FORWARD = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LIMITS = ("clip_qkv", "attn_logit_softcapping")  # of a configuration; small values do not reach them
_TRIED = 6  # the number of tokens with which the result is compared


class PlainDecoder(nn.Module):
    """The layers of a decoder with fewer operations. Create it with :func:`plain`, which checks the result.

    Args:
        decoder: a decoder of the Llama shape.
        linear: a function that is applied to every linear layer, for example to pack its weights.
    """

    def __init__(self, decoder: Any, linear: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.config = decoder.config
        self.embed_tokens = decoder.embed_tokens
        self.rotary_emb = decoder.rotary_emb
        self.norm = decoder.norm
        self.layers = nn.ModuleList(_Layer(layer, linear) for layer in decoder.layers)

    def get_decoder(self) -> PlainDecoder:
        """The decoder itself. A causal LM of Transformers calls this method of its inner model."""
        return self

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> BaseModelOutputWithPast:
        """The last hidden states, as of a Transformers decoder.

        Args:
            inputs_embeds: (rows, length, width).
            attention_mask: an additive mask, (rows or 1, 1, length, keys); None for causal attention without
                a cache.
            position_ids: (rows, length).
            past_key_values: a cache, which is extended if ``use_cache``.
        """
        cos, sin = self.rotary_emb(inputs_embeds, position_ids=position_ids)  # (rows, length, head width)
        half = sin.shape[-1] // 2
        # x → x · cos + (-x₂, x₁) · sin for the halves x₁, x₂ of x, where (x₂, x₁) is x rolled by a half
        turn = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).unsqueeze(1)
        cos = cos.unsqueeze(1)
        mask = attention_mask
        if mask is None:
            length = inputs_embeds.shape[1]
            mask = torch.full((length, length), -torch.inf, dtype=inputs_embeds.dtype).triu_(1)[None, None]
        first: Any = self.layers[0]
        mask = mask.repeat(1, 1, first.group, 1)
        hidden = inputs_embeds
        cache = past_key_values if use_cache else None
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, cos, turn, mask, cache, number)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class _Layer(nn.Module):
    def __init__(self, layer: Any, linear: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        attention, forward = layer.self_attn, layer.mlp
        self.width: int = attention.head_dim
        self.heads = attention.q_proj.out_features // self.width
        self.key_heads = attention.k_proj.out_features // self.width
        self.group = self.heads // self.key_heads
        self.scaling: float = attention.scaling
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = linear(_joined(attention.q_proj, attention.k_proj, attention.v_proj))
        self.out = linear(attention.o_proj)
        self.gate_up = linear(_joined(forward.gate_proj, forward.up_proj))
        self.down = linear(forward.down_proj)
        self.activation = forward.act_fn

    def forward(
        self, hidden: Tensor, cos: Tensor, turn: Tensor, mask: Tensor, cache: Any, number: int
    ) -> Tensor:
        rows, length, _ = hidden.shape
        rotated = self.heads + self.key_heads
        mixed = self.qkv(self.before(hidden)).view(rows, length, -1, self.width).transpose(1, 2)
        turning = mixed[:, :rotated]  # (rows, heads + key heads, length, width)
        turning = torch.addcmul(turning * cos, turning.roll(self.width // 2, -1), turn)
        key, value = turning[:, self.heads :], mixed[:, rotated:]
        if cache is not None:
            key, value = cache.update(key, value, number)
        query = turning[:, : self.heads].reshape(rows, self.key_heads, self.group * length, self.width)
        seen = F.scaled_dot_product_attention(query, key, value, mask, scale=self.scaling)
        seen = seen.reshape(rows, self.heads, length, self.width).transpose(1, 2).reshape(rows, length, -1)
        hidden = hidden + self.out(seen)
        gate, up = self.gate_up(self.between(hidden)).chunk(2, -1)
        return hidden + self.down(self.activation(gate).mul_(up))


def _joined(*parts: nn.Linear) -> nn.Linear:
    """One linear layer whose output is the concatenated outputs of several layers with the same input."""
    first = parts[0]
    joined = nn.Linear(first.in_features, 1, bias=first.bias is not None, device="meta")
    joined.out_features = sum(part.out_features for part in parts)
    joined.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
    if first.bias is not None:
        bias = torch.cat([part.bias.detach() for part in parts])
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined


@torch.no_grad()
def plain(decoder: Any, linear: Callable[[nn.Linear], nn.Module]) -> PlainDecoder | None:
    """The decoder as a :class:`PlainDecoder`; None if that gives another result on a few tokens.

    Args:
        decoder: a decoder of Transformers.
    """
    config = decoder.config
    limited = any(getattr(config, name, None) for name in _LIMITS)
    if limited or not all(_has_shape(layer) for layer in getattr(decoder, "layers", [None])):
        return None
    try:
        return _tried(decoder, linear)
    except (AttributeError, TypeError, RuntimeError):  # other names or arguments
        return None


def _tried(decoder: Any, linear: Callable[[nn.Linear], nn.Module]) -> PlainDecoder | None:
    """The :class:`PlainDecoder` if it gives the same result on a few tokens, otherwise None."""
    ours = PlainDecoder(decoder, linear)
    weight = decoder.embed_tokens.weight
    embedded = weight[torch.arange(2 * _TRIED, device=weight.device) % len(weight)].view(2, _TRIED, -1)
    blind = torch.ones(_TRIED, _TRIED, dtype=torch.bool).triu(1)
    blind[_TRIED - 1, 1] = True  # not only causal
    mask = torch.zeros(1, 1, _TRIED, _TRIED, dtype=weight.dtype).masked_fill(blind, -torch.inf)
    positions = torch.arange(_TRIED).mul(3).expand(2, -1)  # with gaps
    inputs = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": positions}
    expected = decoder(**inputs, use_cache=False).last_hidden_state.float()
    found = ours(**inputs).last_hidden_state.float()
    near = 1e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    same = bool((found - expected).abs().max() <= near * expected.abs().max())
    return ours if same else None


def _has_shape(layer: Any) -> bool:
    """Whether a layer consists of exactly the parts of a Llama layer, with plain products."""
    attention, forward = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or forward is None:
        return False
    if {name for name, _ in layer.named_children()} != {"self_attn", "mlp", *_NORMS}:
        return False
    if {name for name, _ in attention.named_children()} != set(_ATTENTION):
        return False
    if {name for name, _ in forward.named_children()} != {*_FORWARD, "act_fn"}:
        return False
    products = [getattr(attention, name) for name in _ATTENTION] + [getattr(forward, n) for n in _FORWARD]
    if not all(type(product) is nn.Linear for product in products):
        return False
    # joined products have a bias together or not at all
    joined = products[:3], products[4:6]
    alike = all(len({product.bias is None for product in part}) == 1 for part in joined)
    return alike and hasattr(attention, "head_dim") and hasattr(attention, "scaling")

"""A decoder with fewer operations computes what Transformers' does, or is not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_families import COMMON, SERVES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from peso.model.plain_decoder import plain

PLAIN = ("llama", "qwen2", "mistral")


def decoder(family: str, **more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        configuration = CONFIG_MAPPING[family](**{**COMMON, **SERVES[family], **more})
        model = AutoModelForCausalLM.from_config(configuration)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return model.eval().get_decoder()


@torch.no_grad()
def states(decoder: Any) -> torch.Tensor:
    """Of a prompt for two users, and of two branches after it."""
    torch.manual_seed(1)
    embedded, cache = torch.randn(2, 9, 32), DynamicCache()
    mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    mask[1, :, 3:, 1] = -torch.inf  # the second user's second place is padding
    position = torch.arange(7).expand(2, -1)
    common = {"past_key_values": cache, "use_cache": True}
    prompt = decoder(inputs_embeds=embedded[:, :7], attention_mask=mask, position_ids=position, **common)
    beside = torch.zeros(2, 1, 2, 9)
    beside[..., 0, 8] = beside[..., 1, 7] = -torch.inf
    position = torch.full((2, 2), 7)
    after = decoder(inputs_embeds=embedded[:, 7:], attention_mask=beside, position_ids=position, **common)
    return torch.cat([prompt.last_hidden_state, after.last_hidden_state], dim=1)


@pytest.mark.parametrize("family", SERVES)
def test_every_family_gets_its_own_result(family: str) -> None:
    theirs = decoder(family)
    ours = plain(theirs, lambda linear: linear)
    assert (ours is not None) or family not in PLAIN
    if ours is not None:
        torch.testing.assert_close(states(ours), states(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [{"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}])
def test_biases_and_heads_without_groups_are_part_of_it(change: dict[str, Any]) -> None:
    theirs = decoder("llama", **change)
    ours = plain(theirs, lambda linear: linear)
    assert ours is not None
    torch.testing.assert_close(states(ours), states(theirs), atol=1e-4, rtol=1e-4)


def test_a_layer_that_computes_something_else_is_left_alone() -> None:
    theirs = decoder("llama")
    theirs.layers[1].mlp.act_fn = torch.nn.Tanh()
    assert plain(theirs, lambda linear: linear) is not None  # whatever the activation is, it is the layer's
    theirs.layers[1].forward = lambda hidden, **_: 2 * hidden
    assert plain(theirs, lambda linear: linear) is None
    theirs = decoder("llama")
    theirs.config.clip_qkv = 1e3  # small values do not show it
    assert plain(theirs, lambda linear: linear) is None

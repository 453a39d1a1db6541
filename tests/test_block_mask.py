"""Attention in blocks sees what the dense mask of a tree says. On a CPU FlexAttention runs uncompiled: the
same rule and the same road through the model, without the kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plain_path import random_sequences, with_adapter
from test_shared_history import gradients, packed_batch, packed_loss
from test_tree_attention import LAYOUTS, trees
from torch.nn.attention import flex_attention
from transformers.modeling_utils import AttentionInterface

from peso.model import block_mask as blocks
from peso.model import generative
from peso.model.generative import GenerativeModel
from peso.training.acceleration import gradient_checkpointing


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_the_rule_is_that_of_the_dense_mask_and_blocks_nobody_sees_are_left_out(layout: str) -> None:
    chunks = [(0, 1), (3, 9), (12, 2), (19, 8), (1, 2), (20, 16)]
    for tree in trees(LAYOUTS[layout], chunks, 900):
        rows, length = tree.sequence.shape
        mask = blocks.block_mask(tree)
        assert torch.equal(
            flex_attention.create_mask(mask.mask_mod, rows, None, length, length, "cpu"), tree.dense()
        )
        padded = torch.nn.functional.pad(tree.dense(), (0, -length % 128, 0, -length % 128))
        seen = padded.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).any(dim=5).any(dim=3)
        assert torch.equal(mask.to_dense().bool(), seen)
        assert layout == "stream" or not seen.all()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks suit every backbone that learns, and how often attention was computed in them."""
    calls: list[int] = []
    plain = blocks.blocks_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, blocks.NAME, counted)
    monkeypatch.setattr(blocks, "suits_blocks", lambda causal_lm: causal_lm.training)
    monkeypatch.setattr(generative, "serves", lambda causal_lm: False)
    # its arithmetic is there on a CPU, and its gradient; only the kernel is not
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    return calls


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_gradients_are_those_under_the_dense_mask(
    make_model: Callable[..., GenerativeModel], everywhere: list[int], again: bool
) -> None:
    model = with_adapter(make_model("instruct"))
    config = model.causal_lm.get_decoder().config
    packed = packed_batch(model, random_sequences(seed=3, count=6, longest=9), 500, 2000)[0]
    with gradient_checkpointing(model, again), torch.compiler.set_stance("force_eager"):
        found = gradients(model, packed_loss(model, [packed]))
    assert len(everywhere) == 2 * len(model.causal_lm.model.layers) if again else everywhere
    assert config._attn_implementation == "sdpa"
    model.eval()  # blocks are for learning
    everywhere.clear()
    expected = gradients(model, packed_loss(model, [packed]))
    assert not everywhere
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_on_a_cpu_uncompiled_or_with_dropout_in_attention_blocks_do_not_suit(
    make_model: Callable[..., GenerativeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    causal_lm = with_adapter(make_model()).causal_lm
    assert not blocks.suits_blocks(causal_lm)
    monkeypatch.setattr(type(causal_lm), "device", torch.device("cuda"))
    assert not blocks.suits_blocks(causal_lm), "nothing is compiled"
    for layer in causal_lm.model.layers:
        layer.compile(backend="eager")
    assert blocks.in_blocks(causal_lm)
    causal_lm.config.attention_dropout = 0.1
    assert not blocks.suits_blocks(causal_lm)
    causal_lm.config.attention_dropout = 0.0
    causal_lm.model.gradient_checkpointing = True
    assert not blocks.in_blocks(causal_lm), "nobody keeps the attention until the gradient is taken"
    causal_lm.eval()
    assert not blocks.suits_blocks(causal_lm)

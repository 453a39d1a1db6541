"""Attention along a tree is attention under the dense mask, for less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_families import SERVES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_losses import gradients, packed_batch, packed_loss
from plain_path import random_sequences, with_adapter
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peso.model.backbone import load_backbone
from peso.model.generative import GenerativeModel
from peso.model.layout import PromptLayout
from peso.model.tree_attention import TreePlaces, serves, tree_attention
from peso.model.visibility import PADDING, Tree, additive
from peso.model.vocabulary import SemanticVocabulary
from peso.training.acceleration import gradient_checkpointing
from peso.training.batches import lay_out, pack

LAYOUTS = {
    "stream": PromptLayout("stream", (90,), (), (), (), 20),
    "instruct": PromptLayout("instruct", tuple(range(31)), (80, 81), tuple(range(22)), (60,), 20),
}
# what attends otherwise (a cap, a bias, a sink) or not through Transformers' interface keeps the dense mask
DENSE_ONLY = {"gemma2", "gpt_oss", "gptj", "falcon", "stablelm", "nemotron"}


def trees(layout: PromptLayout, chunks: list[tuple[int, int]], row_tokens: int) -> list[Tree]:
    """Of packed histories with so many items before the targets and so many targets."""
    pieces = [
        lay_out(layout, np.zeros((before + targets, 4), dtype=np.int64), before, predict_end=True)
        for before, targets in chunks
    ]
    return [packed.visible for packed in pack(pieces, layout.prefix, row_tokens, 4 * row_tokens)]


chunks_ = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 16)), min_size=1, max_size=8)


@pytest.mark.slow
@given(st.sampled_from(sorted(LAYOUTS)), chunks_, st.integers(1, 1500))
@settings(deadline=None, max_examples=50)
def test_the_tiles_of_a_tree_say_what_its_dense_mask_says(
    layout: str, chunks: list[tuple[int, int]], row_tokens: int
) -> None:
    for tree in trees(LAYOUTS[layout], chunks, row_tokens):
        rows, length = tree.sequence.shape
        seen = torch.zeros(rows * length, rows * length, dtype=torch.int64)
        asked = torch.zeros(rows * length, dtype=torch.int64)
        for tile in tree.tiles:
            n, q, k = tile.visible.nonzero(as_tuple=True)
            real = tile.queries[n, q] >= 0
            assert (tile.keys[n, k] >= 0).all()
            seen.index_put_((tile.queries[n, q][real], tile.keys[n, k][real]), torch.tensor(1), True)
            asked += tile.queries[tile.queries >= 0].bincount(minlength=len(asked))
        expected = torch.block_diag(*tree.dense().squeeze(1).int())
        words = (tree.sequence != PADDING).flatten()
        assert torch.equal(seen[words], expected.long()[words])
        assert (asked[words] == 1).all()


def test_tiles_cost_a_fraction_of_the_rows() -> None:
    """Three users with a short, a middling and a long history."""
    (tree,) = trees(LAYOUTS["instruct"], [(2, 6), (9, 5), (4, 5)], 2000)
    length = tree.sequence.numel()
    assert sum(tile.visible.numel() for tile in tree.tiles) < length**2 / 3
    (small,) = trees(LAYOUTS["stream"], [(2, 6)], 2000)
    assert len(small.tiles) == 1, "what is small anyway is one tile"


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_answers_and_gradients_are_those_of_transformers_under_the_dense_mask(
    layout: str, heads: tuple[int, int]
) -> None:
    most = {"stream": 120, "instruct": 350}[layout]
    tree = trees(LAYOUTS[layout], [(0, 1), (3, 9), (12, 2), (19, 8), (1, 2)], most)[0]
    assert len(tree.sequence) > 1, "several rows"
    assert (tree.sequence == PADDING).any(), "which are filled up"
    generator = torch.Generator().manual_seed(0)
    shape = (*tree.sequence.shape, sum(heads) + heads[1], 8)
    states = torch.randn(shape, generator=generator).transpose(1, 2)
    query, key, value = (x.requires_grad_() for x in states.split([heads[0], heads[1], heads[1]], dim=1))
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]
    words = (tree.sequence != PADDING)[:, :, None, None]
    mask = additive(tree.dense(), torch.float32)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    ours, _ = tree_attention(module, query, key, value, None, scaling=0.3, peso_tree=TreePlaces(tree))
    torch.testing.assert_close(ours * words, theirs * words)
    above = torch.randn(ours.shape, generator=generator) * words
    for one, other in zip(
        torch.autograd.grad(ours, (query, key, value), above),
        torch.autograd.grad(theirs, (query, key, value), above),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def as_model(causal_lm: torch.nn.Module, plain: GenerativeModel) -> GenerativeModel:
    width = causal_lm.get_input_embeddings().weight.shape[1]
    vocabulary = SemanticVocabulary(len(plain.tokenizer), plain.semantic_ids.sizes, width)
    return GenerativeModel(
        causal_lm, plain.tokenizer, vocabulary, plain.layout, plain.semantic_ids, "full"
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", SERVES)
def test_families_attend_along_trees_or_say_that_they_do_not(
    make_model: Callable[..., GenerativeModel], family: str, tmp_path: Path
) -> None:
    causal_lm, _ = load_backbone(build(family, SERVES[family], tmp_path))
    before = causal_lm.get_decoder().config._attn_implementation
    assert serves(causal_lm) is (family not in DENSE_ONLY)
    model = as_model(causal_lm, make_model())
    tree = trees(LAYOUTS["instruct"], [(2, 3), (0, 1)], 400)[0]
    length = tree.sequence.shape[1]
    ids = torch.arange(length)[None] % 256
    positions = torch.arange(length)[None] % 50
    with torch.no_grad():
        found = model.hidden(ids, tree, positions)
        expected = model.hidden(ids, tree.dense(), positions)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert causal_lm.get_decoder().config._attn_implementation == before


def test_a_family_where_trees_give_something_else_is_found_out_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that do not hand the tree on: they would read the mask, which is no number."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def forgetful(self, *args, peso_tree=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", forgetful)
    causal_lm, _ = load_backbone(build("llama", {}, tmp_path))
    assert not serves(causal_lm)


def test_layers_that_are_computed_again_attend_as_before(make_model: Callable[..., GenerativeModel]) -> None:
    sequences = random_sequences(seed=3, count=6, longest=9)
    model = with_adapter(make_model("instruct"))
    packed = packed_batch(model, sequences, 2000, 2000)[0]
    assert len(packed.visible.tiles) > 1
    expected = gradients(model, packed_loss(model, [packed]))
    with gradient_checkpointing(model, True):
        assert serves(model.causal_lm)
        found = gradients(model, packed_loss(model, [packed]))
    model.causal_lm.activation_checkpointing_enable()
    assert not serves(model.causal_lm), "nobody keeps the attention until the gradient is taken"
    dense = gradients(model, packed_loss(model, [packed]))
    for name, gradient in expected.items():
        for other in (found[name], dense[name]):
            assert (other - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_compiled_backbone_and_one_with_dropout_of_its_own_keep_to_the_mask(
    make_model: Callable[..., GenerativeModel],
) -> None:
    model = with_adapter(make_model("instruct"))
    (packed,) = packed_batch(model, random_sequences(seed=3, count=3, longest=9), 2000, 2000)
    with torch.no_grad():
        expected = packed_loss(model, [packed])
        for layer in model.causal_lm.model.layers:
            layer.self_attn.attention_dropout = 1e-9  # drops nothing
        torch.testing.assert_close(packed_loss(model, [packed]), expected)
    model.causal_lm.get_decoder()._compiled_call_impl = print
    assert not serves(model.causal_lm)

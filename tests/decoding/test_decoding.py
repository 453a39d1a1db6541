"""The search gives what Transformers' own does, what an exhaustive one would, and k items if there are k."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers_reference import ExpertWay, UsualWay, assert_same_ranking

from peso.decoding import beam_search, search
from peso.decoding.prompt import alike
from peso.errors import BackboneError, ConfigError, DataError
from peso.events.histories import Cases
from peso.items.semantic_ids import SemanticIds
from peso.model import shared_keys
from peso.model.generative import GenerativeModel
from peso.model.head import token_log_probabilities
from peso.model.layout import make_layout
from peso.model.vocabulary import SemanticVocabulary
from peso.training.likelihood import target_level_log_probabilities

LAYOUTS = ("stream", "instruct")
LOSS_VOCABULARIES = ("full", "semantic", "level")
MakeModel = Callable[..., GenerativeModel]


def random_histories(model: GenerativeModel, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    items = len(model.semantic_ids.item_ids)
    return [generator.integers(0, items, length).astype(np.int32) for length in lengths]


def with_catalogue(model: GenerativeModel, codes: np.ndarray) -> GenerativeModel:
    """The same weights over another catalogue."""
    ids = SemanticIds([f"item{i}" for i in range(len(codes))], codes, model.semantic_ids.sizes)
    return GenerativeModel(
        model.backbone, model.tokenizer, model.vocabulary, model.layout, ids, model.loss_vocabulary
    ).eval()


@torch.no_grad()
def exhaustive(model: GenerativeModel, history: np.ndarray) -> np.ndarray:
    """float32 (items,): log-probability of every item after one history, each as a sequence of its own."""
    tokens = torch.from_numpy(model.item_token_ids(np.arange(len(model.semantic_ids.item_ids))))
    prompt = torch.from_numpy(model.layout.prompt(model.item_token_ids(history)))
    ids = torch.cat([prompt.expand(len(tokens), -1), tokens], dim=1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = model.hidden(ids, None, positions)[:, len(prompt) - 1 : -1]
    each = token_log_probabilities(model, hidden.flatten(0, 1), tokens.flatten())
    return each.view(tokens.shape).sum(1).numpy()


# --- the same as Transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss_vocabulary", LOSS_VOCABULARIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_top_ten_equal_transformers_generate(
    make_model: MakeModel, layout: str, loss_vocabulary: str
) -> None:
    # more semantic IDs than beams on every level, so that the search must prune
    model = make_model(layout, loss_vocabulary, items=400, sizes=(16, 12, 14), seed=1)
    histories = random_histories(model, [0, 1, 5, 20])
    expected = UsualWay(model).in_batches(histories, beams=10, batch_size=1)
    found = search(model, histories, beams=10)
    assert found.scores.dtype == np.float32
    assert_same_ranking(expected, (found.leaves, found.scores))


def test_a_backbone_whose_query_heads_share_key_heads(make_model: MakeModel, monkeypatch: Any) -> None:
    plain = make_model("instruct", items=400, sizes=(16, 12, 14))
    config = copy.deepcopy(plain.causal_lm.config)
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    torch.manual_seed(0)
    causal_lm = LlamaForCausalLM(config)
    model = GenerativeModel(
        causal_lm, plain.tokenizer, plain.vocabulary, plain.layout, plain.semantic_ids, "full"
    ).eval()
    histories = random_histories(model, [2, 9])
    expected = UsualWay(model).in_batches(histories, beams=10, batch_size=1)
    stacked = []
    monkeypatch.setattr(shared_keys.F, "scaled_dot_product_attention", record(shared_keys.F, stacked))
    found = search(model, histories, beams=10)
    assert_same_ranking(expected, (found.leaves, found.scores))
    assert {shape[1] for shape in stacked} == {2}, "queries go in two heads, the keys are not repeated"
    assert config._attn_implementation == "sdpa"


def record(module: Any, shapes: list[torch.Size]) -> Callable[..., torch.Tensor]:
    plain = module.scaled_dot_product_attention

    def recorded(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        shapes.append(query.shape)
        return plain(query, *rest, **options)

    return recorded


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_attention_with_shared_keys_equals_transformers(heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads[0], 7, 8, generator=generator)
    key, value = torch.randn(2, 3, heads[1], 11, 8, generator=generator)
    mask = torch.where(
        torch.rand(3, 1, 7, 11, generator=generator) < 0.5, 0.0, torch.finfo(torch.float32).min
    )
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]
    for masks in (mask, mask[:1], None):
        ours, _ = shared_keys.shared_keys_attention(module, query, key, value, masks, scaling=0.3)
        theirs, _ = sdpa_attention_forward(module, query, key, value, masks, scaling=0.3)
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def smollm2() -> Callable[[int | None], tuple[Any, Any]]:
    """smollm2(layers) → model and tokenizer, which are loaded and checked once for all tests in a row."""
    from peso.model.backbone import load_backbone
    from peso.runtime import assets

    if assets.find("smollm2-135m") is None:
        pytest.skip("SmolLM2-135M is not in the cache: `peso pull smollm2-135m`")
    return lru_cache(maxsize=1)(lambda layers: load_backbone("smollm2-135m", layers=layers))


def slow_model(loaded: tuple[Any, Any], layout: str, loss_vocabulary: str) -> GenerativeModel:
    causal_lm, tokenizer = loaded
    sizes = (64, 64, 64, 64)
    vocabulary = SemanticVocabulary(len(tokenizer), sizes, causal_lm.config.hidden_size)
    embedding = causal_lm.get_input_embeddings().weight
    vocabulary.initialise(embedding, embedding, seed=0)
    codes = np.random.default_rng(0).integers(0, 64, (3000, 4)).astype(np.int32)
    ids = SemanticIds([f"item{i}" for i in range(len(codes))], codes, sizes)
    layout_ = make_layout(layout, tokenizer, 20)
    return GenerativeModel(causal_lm, tokenizer, vocabulary, layout_, ids, loss_vocabulary).eval()


@pytest.mark.slow
@pytest.mark.parametrize("loss_vocabulary", LOSS_VOCABULARIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_top_ten_equal_generate_on_some_layers_of_smollm2(
    smollm2: Callable[..., Any], layout: str, loss_vocabulary: str
) -> None:
    check_smollm2(slow_model(smollm2(4), layout, loss_vocabulary), [2, 11, 20])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_top_ten_equal_generate_on_smollm2(smollm2: Callable[..., Any], layout: str) -> None:
    check_smollm2(slow_model(smollm2(None), layout, "full"), [3, 9])


def check_smollm2(model: GenerativeModel, lengths: list[int]) -> None:
    histories = random_histories(model, lengths)
    expected = UsualWay(model).in_batches(histories, beams=10, batch_size=1)
    found = search(model, histories, beams=10)
    assert_same_ranking(expected, (found.leaves, found.scores))


# --- the same as an exhaustive search -------------------------------------------------------------------


@pytest.mark.parametrize("loss_vocabulary", LOSS_VOCABULARIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_enough_beams_every_item_gets_its_own_score(
    make_model: MakeModel, layout: str, loss_vocabulary: str
) -> None:
    model = make_model(layout, loss_vocabulary)
    trie = model.semantic_ids.trie
    assert trie.leaves < len(trie.items), "the catalogue has shared IDs"
    for history in random_histories(model, [0, 2, 9]):
        found = search(model, [history], beams=trie.leaves)
        assert sorted(found.leaves[0]) == list(range(trie.leaves))
        assert (np.diff(found.scores[0]) <= 0).all()
        expected = exhaustive(model, history)[trie.items[trie.item_starts[:-1]]]
        np.testing.assert_allclose(found.scores[0], expected[found.leaves[0]], rtol=0, atol=1e-4)


SIZES = (3, 2, 3)
small_catalogues = st.lists(
    st.tuples(*[st.integers(0, size - 1) for size in SIZES]), min_size=1, max_size=25
).map(lambda rows: np.array(rows, dtype=np.int32))


@pytest.mark.parametrize("beams", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 300))])
@pytest.mark.parametrize("loss_vocabulary", LOSS_VOCABULARIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_are_scored_beside_and_change_nothing(
    make_model: MakeModel, layout: str, loss_vocabulary: str, beams: int
) -> None:
    """Also those that the search throws away on the first level, or may not find at all."""
    model = make_model(layout, loss_vocabulary, items=400, sizes=(16, 12, 14), seed=1)
    histories = random_histories(model, [0, 1, 5, 20, 5])
    alone = search(model, histories, beams=beams, batch_size=3)
    best = model.semantic_ids.trie.items[model.semantic_ids.trie.item_starts[alone.leaves[:2, 0]]]
    targets = np.concatenate([best, [7, 123, 399]])
    assert alone.targets is None
    expected = target_level_log_probabilities(model, Cases(["u"] * 5, histories, targets))
    for exclude in (None, [targets[n : n + 1] for n in range(5)]):
        found = search(model, histories, beams=beams, batch_size=3, exclude=exclude, targets=targets)
        assert found.targets is not None
        assert found.targets.dtype == np.float32
        np.testing.assert_allclose(found.targets, expected, rtol=0, atol=2e-5)
        plain = search(model, histories, beams=beams, batch_size=3, exclude=exclude)
        assert_same_ranking((plain.leaves, plain.scores), (found.leaves, found.scores), 1e-5)
    np.testing.assert_allclose(expected.sum(1)[:2], alone.scores[:2, 0], rtol=0, atol=2e-5)


@pytest.mark.slow
@given(codes=small_catalogues, data=st.data())
@settings(max_examples=120, deadline=None)
def test_k_items_come_back_whenever_k_exist(
    make_model: MakeModel, codes: np.ndarray, data: st.DataObject
) -> None:
    model = with_catalogue(make_model(sizes=SIZES, loss_vocabulary="level"), codes)
    names = model.semantic_ids.item_ids
    some = st.lists(st.sampled_from(names), max_size=len(names))
    histories = data.draw(st.lists(some, min_size=1, max_size=3), label="histories")
    each = st.lists(some, min_size=len(histories), max_size=len(histories))
    allow = data.draw(st.none() | some | each, label="allow")
    deny = data.draw(st.none() | some | each, label="deny")
    exclude_seen = data.draw(st.booleans(), label="exclude_seen")

    def of(lists: Any, user: int, default: list[str]) -> list[str]:
        shared = all(isinstance(entry, str) for entry in lists or [])
        return default if lists is None else lists if shared else lists[user]

    valid = [
        set(of(allow, user, names)) - set(of(deny, user, [])) - (set(history) if exclude_seen else set())
        for user, history in enumerate(histories)
    ]
    options = {"allow": allow, "deny": deny, "exclude_seen": exclude_seen}
    k = data.draw(st.integers(1, len(names)), label="k")
    beams = data.draw(st.none() | st.integers(k, 30), label="beams")
    for user, ranked in enumerate(beam_search(model, histories, k=k, beams=beams, **options)):
        items = [item for item, _ in ranked]
        assert len(set(items)) == len(items) == min(k, len(valid[user]))
        assert set(items) <= valid[user]
    # with room for every ID, the ranking is that of all items scored one by one, ties in row order
    for user, ranked in enumerate(beam_search(model, histories, k=k, beams=25, **options)):
        history = model.semantic_ids.rows(histories[user])[-model.layout.window :]
        score = dict(zip(names, exhaustive(model, history).tolist(), strict=True))
        best = sorted((score[item] for item in valid[user]), reverse=True)[:k]
        np.testing.assert_allclose([value for _, value in ranked], best, rtol=0, atol=1e-4)
        np.testing.assert_allclose([score[item] for item, _ in ranked], best, rtol=0, atol=1e-4)


def test_filters_change_what_comes_back_and_nothing_else(make_model: MakeModel) -> None:
    model = make_model(items=50)
    history = [["item3", "item7"]]
    full = beam_search(model, history, k=50, beams=50)[0]
    out = [item for item, _ in full[:20]]
    denied = beam_search(model, history, k=30, beams=50, deny=out)[0]
    allowed = beam_search(model, history, k=30, beams=50, allow=[item for item, _ in full[20:]])[0]
    for ranked in (denied, allowed):
        assert [item for item, _ in ranked] == [item for item, _ in full[20:]]
        np.testing.assert_allclose(
            [score for _, score in ranked], [score for _, score in full[20:]], atol=1e-5
        )


def test_items_of_one_id_come_in_the_order_of_the_catalogue(make_model: MakeModel) -> None:
    codes = np.array([[1, 1, 1], [0, 0, 0], [1, 1, 1], [2, 1, 2], [1, 1, 1]], dtype=np.int32)
    model = with_catalogue(make_model(sizes=SIZES), codes)
    ranked = [item for item, _ in beam_search(model, [[]], k=5)[0]]
    assert [item for item in ranked if item in ("item0", "item2", "item4")] == ["item0", "item2", "item4"]
    # a filter may take the first of them without taking the ID
    rest = [item for item, _ in beam_search(model, [["item0"]], k=4, exclude_seen=True)[0]]
    assert [item for item in rest if item in ("item2", "item4")] == ["item2", "item4"]


# --- batches, order, ties -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_different_lengths_equal_one_by_one(make_model: MakeModel, layout: str) -> None:
    model = make_model(layout, items=400, sizes=(16, 12, 14), window=8)
    histories = random_histories(model, [3, 0, 8, 1, 30, 5, 5, 2, 0])
    exclude = random_histories(model, [4] * len(histories), seed=1)
    apart = [search(model, [h], exclude=[e]) for h, e in zip(histories, exclude, strict=True)]
    expected = (np.concatenate([b.leaves for b in apart]), np.concatenate([b.scores for b in apart]))
    for batch_size in (1, 2, 4, 64):
        found = search(model, histories, exclude=exclude, batch_size=batch_size)
        assert_same_ranking(expected, (found.leaves, found.scores), tolerance=1e-5)
    order = np.random.default_rng(2).permutation(len(histories))
    moved = search(model, [histories[i] for i in order], exclude=[exclude[i] for i in order], batch_size=4)
    assert_same_ranking(
        (expected[0][order], expected[1][order]), (moved.leaves, moved.scores), tolerance=1e-5
    )


def test_two_runs_are_identical(make_model: MakeModel) -> None:
    model = make_model("instruct", items=400, sizes=(16, 12, 14))
    histories = random_histories(model, [3, 0, 8, 1])
    first, second = search(model, histories), search(model, histories)
    assert (first.leaves == second.leaves).all()
    assert (first.scores == second.scores).all()


@pytest.mark.parametrize("beams", [1, 7, 40])
def test_equal_scores_are_ordered_by_semantic_id(make_model: MakeModel, beams: int) -> None:
    model = make_model("stream", "level", items=300, sizes=(5, 6, 7))
    model.vocabulary.output_rows.data.zero_()  # every code as likely as the next
    found = search(model, random_histories(model, [2, 4]), beams=beams)
    assert (found.leaves == np.arange(beams)).all()
    np.testing.assert_allclose(found.scores, -np.log(5 * 6 * 7), rtol=1e-6)


def test_only_the_window_is_read(make_model: MakeModel) -> None:
    model = make_model(window=4)
    history = random_histories(model, [11])[0]
    long, short = search(model, [history]), search(model, [history[-4:]])
    assert (long.leaves == short.leaves).all()
    assert (long.scores == short.scores).all()


def test_hundreds_of_beams(make_model: MakeModel) -> None:
    model = make_model(items=2000, sizes=(16, 16, 16))
    histories, trie = random_histories(model, [2] * 12), model.semantic_ids.trie
    found = search(model, histories, beams=500)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert all(len(set(leaves)) == 500 and min(leaves) >= 0 for leaves in found.leaves.tolist())
    of_leaves = exhaustive(model, histories[3])[trie.items[trie.item_starts[:-1]]]
    np.testing.assert_allclose(found.scores[3], of_leaves[found.leaves[3]], rtol=0, atol=1e-4)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8).map(lambda s: sorted(s, reverse=True)),
    pass_tokens=st.integers(0, 40),
)
@settings(max_examples=200, deadline=None)
def test_prompts_are_padded_together_at_the_least_cost(sizes: list[int], pass_tokens: int) -> None:
    def cost(runs: list[slice]) -> int:
        return sum(len(sizes[run]) * sizes[run][0] + pass_tokens for run in runs)

    found = alike(sizes, pass_tokens)
    assert [i for run in found for i in range(run.start, run.stop)] == list(range(len(sizes)))
    every = []
    for cuts in product([False, True], repeat=len(sizes) - 1):
        bounds = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(sizes)]
        every.append([slice(*pair) for pair in pairwise(bounds)])
    assert cost(found) == min(map(cost, every))


# --- what is computed -----------------------------------------------------------------------------------


def test_a_prompt_is_computed_once_and_nothing_after_the_last_code(
    make_model: MakeModel, monkeypatch: Any
) -> None:
    model = make_model("instruct", items=400, sizes=(16, 12, 14))
    passes = []
    plain = GenerativeModel.hidden

    def counted(self: GenerativeModel, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(tuple(ids.shape))
        return plain(self, ids, *rest)

    monkeypatch.setattr(GenerativeModel, "hidden", counted)
    search(model, random_histories(model, [6, 6, 6]), beams=10)
    opening = len(model.layout.prefix) - 1
    prompt = len(model.layout.prompt(np.zeros((6, 3), dtype=np.int64)))
    assert passes == [(1, opening), (3, prompt - opening), (3, 10), (3, 10)]
    passes.clear()
    search(model, random_histories(model, [6, 6, 6]), beams=10, targets=np.array([3, 9, 3]))
    assert passes == [(1, opening), (3, prompt - opening), (3, 11), (3, 11)]  # a target is one beam more


def test_scores_are_float32_on_a_bfloat16_backbone(make_model: MakeModel) -> None:
    model = make_model(items=400, sizes=(16, 12, 14))
    histories = random_histories(model, [3, 9])
    expected = search(model, histories)
    model.backbone.to(torch.bfloat16)
    found = search(model, histories)
    assert found.scores.dtype == np.float32
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.3)


def test_a_model_in_training_is_searched_without_dropout_and_left_in_training(make_model: MakeModel) -> None:
    model = make_model()
    histories = random_histories(model, [5])
    expected = search(model, histories)
    for layer in model.causal_lm.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    found = search(model, histories)
    assert model.training
    assert (found.scores == expected.scores).all()


def test_progress_counts_users(make_model: MakeModel) -> None:
    model, done = make_model(), []
    search(model, random_histories(model, [1] * 5), batch_size=2, on_progress=done.append)
    assert done == [2, 4, 5]


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"histories": [["item1", "nosuch"]]}, DataError, "'nosuch'"),
        ({"histories": ["item1"]}, DataError, "not the single string 'item1'"),
        ({"k": 51}, DataError, "k = 51 is more than the 50 items of the catalog; use a smaller k"),
        ({"allow": ["item1", "other"]}, DataError, "'other'"),
        ({"allow": "item1"}, DataError, "not the single string"),
        ({"deny": [["item1"], ["item2"]]}, DataError, "deny has 2 lists for 1 histories"),
        ({"k": 0}, ConfigError, "k is 0"),
        ({"k": 5, "beams": 4}, ConfigError, "4 beams cannot give 5 items"),
    ],
)
def test_bad_arguments_are_named(
    make_model: MakeModel, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        beam_search(make_model(), **{"histories": [["item1", "item2"]], **arguments})


def test_a_broken_model_is_no_recommendation(make_model: MakeModel) -> None:
    model = make_model()
    model.vocabulary.output_rows.data.fill_(torch.nan)
    with pytest.raises(BackboneError, match="not finite"):
        search(model, random_histories(model, [3]))


def test_no_histories_no_answers(make_model: MakeModel) -> None:
    assert beam_search(make_model(), []) == []
    found = search(make_model(), [], targets=np.array([], dtype=np.int64))
    assert found.targets is not None
    assert found.targets.shape == (0, 3)


def test_targets_must_be_one_a_history_and_something_to_find(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="targets has 2 entries for 1 histories"):
        search(model, random_histories(model, [3]), targets=np.array([1, 2]))
    with pytest.raises(ValueError, match="no items are allowed"):
        search(model, random_histories(model, [3]), allow=np.array([], dtype=np.int64), targets=np.array([1]))


@pytest.mark.parametrize("way", [UsualWay, ExpertWay])
def test_the_baselines_of_the_benchmark_answer_alike(make_model: MakeModel, way: type[UsualWay]) -> None:
    """In whatever order and batches; among few items, where `generate` runs out of valid beams too."""
    model = make_model("instruct", "full", items=30)
    histories = [np.arange(n, dtype=np.int64) for n in (3, 1, 7, 5, 2)]
    found = search(model, histories, beams=6)
    assert_same_ranking(way(model).in_batches(histories, 6, 2), (found.leaves, found.scores))

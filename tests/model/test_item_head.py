"""The item head: its scores, its loss, and what it says of items that it has not met."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_families import SERVES
from backbone_families import build as build_family
from torch import nn

from peso.config import AdapterConfig, BackboneConfig, HeadConfig, PromptConfig
from peso.errors import DataError
from peso.items.semantic_ids import SemanticIds
from peso.model import item_head as module
from peso.model.build import build_model, load_stage_weights, save_stage_weights
from peso.model.item_head import ItemHead, groups_of

WIDTH, ITEMS, SIZES = 16, 40, (5, 6)


def catalogue(items: int = ITEMS) -> SemanticIds:
    codes = np.stack([np.arange(items) % SIZES[0], np.arange(items) // SIZES[0] % SIZES[1]], axis=1)
    contents = np.random.default_rng(0).normal(size=(items, 9), scale=1 / 3).astype(np.float32)
    return SemanticIds([f"i{n}" for n in range(items)], codes.astype(np.int32), SIZES, contents)


@pytest.fixture(params=[False, True], ids=["codes", "codes and contents"])
def head(request: pytest.FixtureRequest) -> ItemHead:
    made = ItemHead(catalogue(), WIDTH, contents=request.param)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return made


def states(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(2)) * 5


def plain(head: ItemHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same loss, one item and one level after the other, in float64."""
    ids = catalogue()
    p = {name: value.double() for name, value in head.named_parameters()}
    scores = []
    for row in range(ITEMS):
        vector, bias = p["rows"][row], p["bias"][row]
        for token in ids.token_numbers[row]:
            vector, bias = vector + p["code_rows"][token], bias + p["code_bias"][token]
        if "projection" in p:
            vector = vector + p["projection"] @ torch.from_numpy(ids.contents[row]).double()
        h = hidden.double()
        h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        scores.append((h @ p["query"].T) @ vector + bias)
    return -nn.functional.cross_entropy(torch.stack(scores, dim=1), targets, reduction="none")


def test_loss_and_gradients_are_those_of_the_formula(head: ItemHead) -> None:
    hidden, targets = states(7).requires_grad_(True), torch.arange(7) * 5
    found = head.log_probabilities(hidden, targets)
    gradients = torch.autograd.grad(found.sum(), [hidden, *head.parameters()])
    other = states(7).requires_grad_(True)
    expected = plain(head, other, targets)
    wanted = torch.autograd.grad(expected.sum(), [other, *head.parameters()])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for one, two in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, two.to(one.dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        head(states(7)).log_softmax(-1).gather(1, targets[:, None])[:, 0], found, rtol=1e-5, atol=1e-5
    )


def test_the_sampled_loss_approaches_the_exact_one(head: ItemHead) -> None:
    hidden, targets = states(6), torch.arange(6)
    head.compete(np.arange(1, ITEMS + 1))
    exact = head.log_probabilities(hidden, targets)
    torch.manual_seed(0)
    first = head._sampled(head.queries(hidden), targets, 20_000)
    torch.testing.assert_close(first, exact, rtol=0, atol=0.05)
    torch.manual_seed(0)
    assert torch.equal(head._sampled(head.queries(hidden), targets, 20_000), first)


def test_negatives_are_for_training_and_a_validation_does_not_depend_on_chance(
    head: ItemHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, targets = states(6), torch.arange(6)
    exact = head.log_probabilities(hidden, targets)
    head.negatives = 5
    assert not torch.equal(head.log_probabilities(hidden, targets), exact)
    head.eval()
    state = torch.get_rng_state()
    assert torch.equal(head.log_probabilities(hidden, targets), exact)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr("peso.model.item_head.SCORES_AT_ONCE", 2 * ITEMS)  # two rows at once
    torch.testing.assert_close(head.log_probabilities(hidden, targets), exact)
    head.train()
    head.negatives = ITEMS  # as many as there are items
    assert torch.equal(head.log_probabilities(hidden, targets), exact)


@pytest.mark.parametrize("negatives", [None, 30])
def test_prepared_gradients_are_those_of_each_pass_added_up(head: ItemHead, negatives: int | None) -> None:
    """Of the loss and of the vectors that are read, over two passes."""
    head.negatives = negatives
    numbers = head.tokens[torch.tensor([3, 7, 7, 20])].flatten()
    reads = ItemHead(catalogue(), WIDTH, reads=True)

    def gradients(prepared: bool) -> dict[str, torch.Tensor]:
        result = {}
        for name, each in ("", head), ("reads.", reads):
            each.zero_grad()
            if prepared:
                each.expect_gradients()
            for seed in (0, 1):
                torch.manual_seed(seed)
                loss = each.log_probabilities(states(5), torch.arange(5) * 7).sum()
                (loss + (each.inputs(numbers).square().sum() if each.reads else 0)).backward()
            result |= {name + key: p.grad for key, p in each.named_parameters() if p.grad is not None}
        return result

    reads.initialise(0)
    plain, prepared = gradients(False), gradients(True)
    assert plain.keys() == prepared.keys()
    for name, gradient in plain.items():
        assert not prepared[name].is_sparse
        torch.testing.assert_close(prepared[name], gradient)


@pytest.mark.parametrize("exact", [True, False])
def test_items_without_an_event_learn_nothing_of_their_own(
    head: ItemHead, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(module, "EXACT", 0)
    counts = np.ones(ITEMS)
    counts[30:] = 0
    head.compete(counts)
    torch.manual_seed(0)
    head.log_probabilities(states(5), torch.arange(5)).sum().backward()
    assert head.rows.grad is not None
    assert head.bias.grad is not None
    assert not head.rows.grad[30:].any()
    assert not head.bias.grad[30:].any()
    assert head.rows.grad[:30].any()


def test_a_target_that_training_has_not_met_has_a_loss(head: ItemHead) -> None:
    """It competes with the items that compete; for those nothing changes."""
    counts = np.ones(ITEMS)
    counts[30:] = 0
    head.compete(counts)
    unmet, met = head.log_probabilities(states(2), torch.tensor([35, 3]))
    scores = head(states(2))
    rivals = torch.cat([scores[0, :30], scores[0, 35:36]])
    torch.testing.assert_close(unmet, scores[0, 35] - rivals.logsumexp(-1))
    torch.testing.assert_close(met, scores[1, 3] - scores[1, :30].logsumexp(-1))


def test_a_fresh_item_is_scored_by_its_codes() -> None:
    """An item without an event is scored as one with the same codes and no row of its own."""
    ids = catalogue(ITEMS - 1)
    twins = SemanticIds([*ids.item_ids, "new"], np.concatenate([ids.codes, ids.codes[3:4]]), SIZES)
    head = ItemHead(twins, WIDTH)
    head.initialise(0)
    scores = head(states(4))
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[:, -1], scores[:, 3])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    head.compete(np.append(np.ones(ITEMS - 1), 0))
    for _ in range(30):
        optimizer.zero_grad()
        (-head.log_probabilities(states(4), torch.tensor([3, 8, 13, 18])).mean()).backward()
        optimizer.step()
    learned = head(states(4))
    assert learned[0, -1] > learned[0].median()  # what the codes of item 3 were worth to the first state
    assert learned[0, -1] < learned[0, 3]


def test_a_fresh_item_is_also_scored_by_its_contents() -> None:
    """Of two items without an event that have the same codes, the one whose contents are those of a target
    is better after training."""
    ids = catalogue(ITEMS - 2)
    rows = [*range(ITEMS - 2), 3, 3]
    contents = ids.contents[rows].copy()
    contents[-1] *= -1
    names = [*ids.item_ids, "alike", "unlike"]
    head = ItemHead(SemanticIds(names, ids.codes[rows], SIZES, contents), WIDTH, contents=True)
    head.initialise(0)
    torch.testing.assert_close(head(states(1))[0, -2], head(states(1))[0, -1])  # before it is trained
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    head.compete(np.append(np.ones(ITEMS - 2), [0, 0]))
    for _ in range(30):
        optimizer.zero_grad()
        (-head.log_probabilities(states(1), torch.tensor([3])).mean()).backward()
        optimizer.step()
    learned = head(states(1))[0]
    assert learned[3] > learned[-2] > learned[-1]


def test_contents_that_semantic_ids_lack_are_refused() -> None:
    bare = SemanticIds(["a"], np.zeros((1, 2), np.int32), SIZES)
    with pytest.raises(DataError, match=r"peso tokenize.*head\.contents=false"):
        ItemHead(bare, WIDTH, contents=True)


def test_a_fixed_head_keeps_its_vectors(head: ItemHead) -> None:
    scores, fixed = head(states(3)), head.fixed()
    torch.testing.assert_close(fixed(states(3)), scores, rtol=0, atol=0)
    with torch.no_grad():
        head.rows.add_(1)
    assert not torch.equal(head(states(3)), scores)
    torch.testing.assert_close(fixed(states(3)), scores, rtol=0, atol=0)


def test_it_is_kept_with_the_vocabulary_and_grows_with_the_catalogue(tmp_path: Path) -> None:
    def model(items: int, seed: int):
        return build_model(
            BackboneConfig(name="tiny", layers=1),
            PromptConfig(),
            AdapterConfig(rank=2),
            "semantic",
            catalogue(items),
            seed=seed,
            head=HeadConfig(name="items", contents=True),
        )

    first = model(ITEMS, seed=0)
    made = first.vocabulary.item_head
    with torch.no_grad():
        made.rows.normal_()
        made.projection.normal_()
        made.shares.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    save_stage_weights(first, tmp_path, whole_backbone=False)
    same, larger = model(ITEMS, seed=1), model(ITEMS + 3, seed=1)
    for other in (same, larger):
        load_stage_weights(other, tmp_path)
        assert torch.equal(other.vocabulary.item_head.rows[:ITEMS], made.rows)
        assert torch.equal(other.vocabulary.item_head.shares, made.shares)
        assert torch.equal(other.vocabulary.item_head.projection, made.projection)
    assert not larger.vocabulary.item_head.rows[ITEMS:].any()
    hidden = torch.randn(2, 32)
    torch.testing.assert_close(same.item_log_probabilities(hidden), first.item_log_probabilities(hidden))


@pytest.mark.parametrize("layout", ["stream", "instruct"])
def test_an_item_is_read_by_its_vector_at_its_last_code(layout: str) -> None:
    ids = catalogue()  # items 30 to 39 have the semantic IDs of items 0 to 9
    model = build_model(
        BackboneConfig(name="tiny", layers=1),
        PromptConfig(layout=layout),
        AdapterConfig(rank=2),
        "semantic",
        ids,
        seed=0,
        head=HeadConfig(name="items", contents=True),
    )
    head = model.vocabulary.item_head
    with torch.no_grad():
        head.rows.normal_()
        head.projection.normal_()
    history = np.array([3, 17, 35])
    tokens = torch.from_numpy(model.layout.prompt(model.item_token_ids(history)))
    found = model.embed(tokens[None])[0]
    head.reads = False
    added = found - model.embed(tokens[None])[0]
    last = [place for place, id in enumerate(tokens.tolist()) if id >= model.vocabulary.first_id + SIZES[0]]
    expected = torch.zeros_like(added)
    expected[last] = head.input_scale * head.vectors()[[3, 17, 5]]  # 5: the first that has the ID of 35
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)
    spread = (head.input_scale * head.code_rows).std() / model.causal_lm.get_input_embeddings().weight.std()
    assert spread.item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("family", "targets"), [("gemma", "q_proj"), ("gpt2", "c_attn"), ("qwen3", "v_proj")]
)
def test_it_learns_on_frozen_backbones_of_other_families(family: str, targets: str, tmp_path: Path) -> None:
    model = build_model(
        BackboneConfig(name=build_family(family, SERVES[family], tmp_path)),
        PromptConfig(),
        AdapterConfig(rank=2, targets=[targets]),
        "semantic",
        catalogue(ITEMS - 10),
        seed=0,
        head=HeadConfig(name="items"),
    )
    head, targets_of = model.vocabulary.item_head, torch.tensor([4, 9])
    tokens = torch.from_numpy(model.item_token_ids(np.array([3, 17, 25, 8]))).reshape(2, -1)
    places = torch.arange(tokens.shape[1]).expand(2, -1)
    trained = [*model.vocabulary.parameters()]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = -head.log_probabilities(model.hidden(tokens, None, places)[:, -1], targets_of).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    own = dict(head.named_parameters())
    assert all(
        own[name].grad.any() for name in ("rows", "code_rows", "query", "bias", "code_bias", "input_scale")
    )
    assert losses[-1] < losses[0] - 1


def test_codes_that_are_no_item_are_read_as_codes_alone() -> None:
    head = ItemHead(catalogue(ITEMS - 12), WIDTH, reads=True)
    head.initialise(0)
    first = SIZES[0]
    cut, turned, unknown, words = [first], [first, 0], [4, first + 5], [-7, first]
    for numbers in (cut, turned, unknown, words, [0, -3, first]):
        assert not head.inputs(torch.tensor([numbers])).any()
    assert head.inputs(torch.tensor([[0, first]])).any()


def test_groups_of_history_lengths() -> None:
    assert groups_of(torch.tensor([0, 2, 3, 5, 6, 10, 11, 400])).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]

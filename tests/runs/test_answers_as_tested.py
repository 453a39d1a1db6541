"""A model answers as it was tested: with the same width of search, and by the current rule for seen items."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peso.config import load_config
from peso.runs import pipeline
from peso.runs.card import card_of
from peso.runs.recommender import Recommender
from peso.runs.workspace import Workspace
from peso.serving.messages import Request
from peso.serving.snapshot import Question, Snapshot

pytestmark = pytest.mark.slow

BEAMS = 17
TREE = {
    "data": {"simulate": {"users": 60, "items": 40, "stages": 1}},
    "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
    "backbone": {"name": "tiny", "layers": 1},
    "head": {"name": "items"},
    "strategy": "single",
    "training": {"epochs": 1, "max_steps": 3},
    "decoding": {"beams": BEAMS},
    "evaluation": {"enabled": False},
    "baselines": [],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("answers") / "w"
    with Workspace.hold(root, load_config(TREE)) as made:
        pipeline.run(made)
    return made


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of beams of all searches."""
    import peso.decoding

    found, search = list[int](), peso.decoding.beam_search

    def recording(*arguments: Any, **options: Any) -> Any:
        found.append(options["beams"])
        return search(*arguments, **options)

    monkeypatch.setattr(peso.decoding, "beam_search", recording)
    return found


def test_recommendations_search_as_wide_as_tests(workspace: Workspace, widths: list[int]) -> None:
    recommender = Recommender(workspace)
    item = recommender.semantic_ids.item_ids[0]
    for k in (1, BEAMS + 3):
        recommender.search([[item]], k, exclude_seen=True)
    assert widths == [BEAMS, BEAMS + 3]


def test_a_server_searches_as_wide_as_tests(workspace: Workspace, widths: list[int]) -> None:
    stage = workspace.stage(0)
    snapshot = replace(Snapshot.of(stage), model=stage.answering_model())
    item = snapshot.semantic_ids.item_ids[0]
    for k in (1, BEAMS + 3):
        snapshot.answer([Question(Request(history=[item], k=k), [item])])
    assert widths == [BEAMS, BEAMS + 3]


def test_counts_follow_the_rule_for_seen_items_as_it_is_now(workspace: Workspace) -> None:
    for rule, kept in {"keep": True, "leave-out": False}.items():
        config = load_config({**TREE, "decoding": {"beams": BEAMS, "repeats": rule}})
        changed = workspace.with_config(config).stage(0)
        for model in (changed.model(), changed.answering_model()):
            assert model.transitions is not None
            assert model.transitions.repeats is kept


@pytest.mark.parametrize(("rule", "leaves_out"), [("keep", False), ("leave-out", True)])
def test_the_code_of_the_card_follows_the_rule_for_seen_items(
    workspace: Workspace, rule: str, leaves_out: bool
) -> None:
    config = load_config({**TREE, "decoding": {"beams": BEAMS, "repeats": rule}})
    card = card_of(workspace.with_config(config).stage(0), "merged")
    assert ("beam_search(model" in card, "exclude_seen=True" in card) == (True, leaves_out)


def test_the_card_says_what_the_head_is_worth_without_the_codes(workspace: Workspace) -> None:
    stage = workspace.stage(0)
    by_share = stage.training["item_head"]["ndcg@10"]
    card = card_of(stage, "merged")
    assert f"NDCG@10 is {by_share['1.0']:.4f} as here" in card
    assert f"{max(by_share.values()):.4f} with the codes" in card

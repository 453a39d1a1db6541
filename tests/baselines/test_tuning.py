"""Options that are left open: what decides, what may not, and that the choice lasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalogs import setting
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peso.baselines.baseline import BaselineAnswers, Setting
from peso.baselines.ease import Ease
from peso.baselines.item_graph import ItemGraph
from peso.baselines.item_knn import ItemKnn
from peso.baselines.tuning import MOST_TRIALS, Counted, target_ranks
from peso.config.baselines import BASELINES, read_baseline
from peso.evaluation.metrics import ndcg
from peso.evaluation.predictions import semantic_id_ranks
from peso.events.histories import Cases, Ragged, Stage
from peso.items.semantic_ids import SemanticIds
from peso.runtime.progress import Silent

ITEMS, WINDOW = 15, 5
COUNTED = pytest.mark.parametrize("kind", [Ease, ItemKnn, ItemGraph])


def walks(number: int, seed: int = 0, last: int | None = None, users: int = 40) -> Stage:
    """Users who mostly go on to a next item; ``last``: what all of them end with instead."""
    generator = np.random.default_rng([seed, number])
    rows = []
    for _ in range(users):
        steps = generator.choice([1, 2, 7], p=[0.7, 0.2, 0.1], size=7)
        row = (generator.integers(ITEMS) + np.cumsum(steps)) % ITEMS
        rows.append([*row[:-1], row[-1] if last is None else last])
    return Stage(number, [f"u{n}" for n in range(users)], Ragged.of([[]] * users), Ragged.of(rows))


def mean_ndcg(model: Counted, stages: list[Stage]) -> float:
    """Of the validation targets, by the ranking that answers give."""
    trie, cases = model.setting.trie, stages[-1].validation_cases(WINDOW)
    answers = BaselineAnswers(model, trie).answer(cases, model.setting.depth, lambda done: None)
    ranks = semantic_id_ranks(answers.leaves, trie.leaf_of[cases.targets])
    return float(ndcg(ranks, model.setting.depth).mean())


@COUNTED
def test_the_setting_with_the_best_ranking_of_validation_targets_is_taken(kind: type[Counted]) -> None:
    stages = [walks(0), walks(1)]
    model = kind(setting(ITEMS, WINDOW), repeats="keep")
    figures = model.learn(stages, Silent())
    found = []
    for choice in kind.SETTINGS:
        alone = kind(setting(ITEMS, WINDOW), repeats="keep", **choice)
        assert alone.learn(stages, Silent())["tried"] == []  # nothing is open
        found.append(mean_ndcg(alone, stages))
    assert [trial["ndcg"] for trial in figures["tried"]] == pytest.approx(found)
    assert figures["chosen"] == kind.SETTINGS[int(np.argmax(found))]
    assert mean_ndcg(model, stages) == pytest.approx(max(found))
    assert len(set(found)) > 1


@COUNTED
def test_what_is_held_back_for_the_test_decides_nothing(kind: type[Counted]) -> None:
    first, second = (kind(setting(ITEMS, WINDOW)) for _ in range(2))
    assert first.learn([walks(0)], Silent()) == second.learn([walks(0, last=3)], Silent())


def test_every_baseline_that_is_tuned_has_the_same_budget() -> None:
    tuned = [part for part in BASELINES.everything().values() if hasattr(part, "SETTINGS")]
    assert len(tuned) >= 3
    for part in tuned:
        assert len(part.SETTINGS) == MOST_TRIALS
        open_options = {name for name, value in part.Options(name=part.name).given().items() if value is None}
        for choice in part.SETTINGS:
            assert choice.keys() <= open_options
            part.Options(name=part.name, **choice)  # within the bounds


def test_given_options_hold_in_every_trial() -> None:
    model = ItemKnn(setting(ITEMS, WINDOW), neighbours=3)
    figures = model.learn([walks(0)], Silent())
    assert {trial["neighbours"] for trial in figures["tried"]} == {3}
    assert [trial["shrinkage"] for trial in figures["tried"]] == [10.0, 1.0, 100.0, 0.0]  # each once
    assert ItemKnn(setting(ITEMS, WINDOW), trials=1).learn([walks(0)], Silent())["tried"] == []


@COUNTED
def test_a_choice_is_kept_and_not_made_again(
    kind: type[Counted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [walks(0), walks(1)]
    model, again = kind(setting(ITEMS, WINDOW)), kind(setting(ITEMS, WINDOW))
    model.learn(stages, Silent())
    model.chosen = dict(kind.SETTINGS[-1])
    model.fit(model.counts(stages), model.chosen)
    model.save(tmp_path)
    monkeypatch.setattr(kind, "validation", None)  # whoever chooses would need it
    again.restore(tmp_path, stages)
    cases = stages[-1].test_cases(WINDOW)
    np.testing.assert_array_equal(model.scores(cases), again.scores(cases))


@given(
    hnp.arrays(np.float32, (4, 9), elements=st.sampled_from([0.0, 1.0, 2.0, -np.inf])),
    hnp.arrays(np.int32, 4, elements=st.integers(0, 8)),
)
def test_ranks_are_places_in_a_stable_sort(scores: np.ndarray, targets: np.ndarray) -> None:
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [list(row).index(target) + 1 for row, target in zip(order, targets, strict=True)]
    assert target_ranks(scores, targets).tolist() == expected


def test_items_that_a_user_has_had_take_no_place_from_a_target() -> None:
    model: Any = ItemKnn(setting(ITEMS, WINDOW))
    stages = [walks(0)]
    cases = Cases(["u"], [np.array([0, 1, 2])], np.array([3]))
    model.scores = lambda some: np.array([[5.0, 4.0, 3.0, 2.0] + [0.0] * 11], dtype=np.float32)
    validation = model.validation(stages)
    validation.cases = cases
    validation.repeats = False
    assert validation.ndcg_of(model) == 1.0
    validation.repeats = True
    assert validation.ndcg_of(model) == pytest.approx(1 / np.log2(5))


@COUNTED
def test_a_shared_id_of_items_without_evidence_does_not_outrank_evidence(kind: type[Counted]) -> None:
    """The probability of an ID is that of its items together, so flat probabilities would put it first."""
    codes = np.array([0, 1, 2, 3, *np.repeat(np.arange(4, 100), 2)], dtype=np.int32)[:, None]
    trie = SemanticIds([str(item) for item in range(len(codes))], codes, (100,)).trie
    rows = [[0, 1, 2, 2], [0, 1, 3, 3]]  # the last two are held back
    stage = Stage(0, ["a", "b"], Ragged.of([[], []]), Ragged.of(rows))
    model = kind(Setting(trie, WINDOW), trials=1)
    model.learn([stage], Silent())
    asked = Cases(["c"], [np.array([0], dtype=np.int32)], np.array([1], dtype=np.int32))
    found = BaselineAnswers(model, trie, repeats=False).answer(asked, 1, lambda done: None)
    assert found.leaves.tolist() == [[1]]


FORMER = [  # as version 0.1.0 recorded them: all options, since it chose none
    {"name": "ease", "repeats": "auto", "items": 5000, "regularisation": 50.0},
    {"name": "item-knn", "repeats": "auto", "neighbours": 100, "shrinkage": 10.0},
    {
        "name": "sasrec",
        "repeats": "auto",
        "width": 64,
        "epochs": 20,
        "patience": 2,
        "batch_size": 64,
        "learning_rate": 0.001,
        "later_learning_rate_scale": 1.0,
        "weight_decay": 0.01,
        "dropout": 0.2,
        "layers": 2,
        "heads": 2,
    },
    {
        "name": "hybrid",
        "candidates": 50,
        "weight": None,
        "two_tower": {
            "name": "two-tower",
            "repeats": "auto",
            "width": 64,
            "epochs": 20,
            "patience": 2,
            "batch_size": 256,
            "learning_rate": 0.001,
            "later_learning_rate_scale": 1.0,
            "weight_decay": 0.01,
            "dropout": 0.2,
            "user_dropout": 0.5,
        },
    },
]


@pytest.mark.parametrize("options", FORMER, ids=[options["name"] for options in FORMER])
def test_options_of_an_earlier_version_keep_their_digest_and_nothing_is_tuned(
    options: dict[str, Any],
) -> None:
    config = read_baseline(options)
    assert config.model_dump(mode="json") == options
    for each in config.fused or [config]:  # nothing is chosen
        assert len(BASELINES.find(each.name).of(each, setting(ITEMS, WINDOW)).settings()) == 1

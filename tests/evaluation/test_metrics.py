"""Metrics against ranx and against their definitions; intervals against their textbook cases."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peso.errors import ConfigError
from peso.evaluation import intervals, metrics
from peso.evaluation.intervals import Estimate, Panel
from peso.evaluation.metrics import average_metrics, default_metrics, stage_metrics
from peso.evaluation.predictions import Predictions, item_ranks

CATALOGUE = 30
DEPTH = 10


def predictions(lists: list[list[int]], targets: list[int], users: list[str] | None = None) -> Predictions:
    """Every item has an ID of its own."""
    n = len(lists)
    ranks = item_ranks([np.array(items) for items in lists], np.array(targets))
    return Predictions(
        users=users or [f"u{i}" for i in range(n)],
        targets=[f"i{target}" for target in targets],
        items=[[f"i{item}" for item in items] for items in lists],
        scores=[-np.arange(len(items), dtype=np.float32) for items in lists],
        rank_semantic_id=ranks,
        rank_item=ranks,
        target_log_probability=np.linspace(-9, -3, n).astype(np.float32),
        user_segment=["new"] * n,
        item_segment=["new"] * n,
        history_length=np.full(n, 3, dtype=np.int32),
        depth=DEPTH,
    )


@st.composite
def rankings(draw: st.DrawFn, least: int = 1) -> Predictions:
    n = draw(st.integers(least, 25))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lists = [generator.permutation(CATALOGUE)[:DEPTH].tolist() for _ in range(n)]
    # half of the targets lie in the list, so that ranks of all sizes occur
    targets = [int(generator.choice(items if generator.random() < 0.5 else CATALOGUE)) for items in lists]
    return predictions(lists, targets)


@pytest.mark.parametrize("documented", [metrics, intervals], ids=lambda m: m.__name__)
def test_docstring_examples(documented: object) -> None:
    failed, attempted = doctest.testmod(documented)  # type: ignore[arg-type]
    assert attempted
    assert not failed


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(rankings())
def test_metrics_equal_ranx(case: Predictions) -> None:
    ranx = pytest.importorskip("ranx")
    qrels = ranx.Qrels({user: {target: 1} for user, target in zip(case.users, case.targets, strict=True)})
    run = ranx.Run(
        {
            user: dict(zip(items, scores.tolist(), strict=True))
            for user, items, scores in zip(case.users, case.items, case.scores, strict=True)
        }
    )
    theirs = {"hit@5": "hit_rate@5", "hit@10": "hit_rate@10", "ndcg@5": "ndcg@5", "ndcg@10": "ndcg@10"} | {
        "mrr@10": "mrr@10"
    }
    expected = ranx.evaluate(qrels, run, list(theirs.values()))
    ours = stage_metrics(case, default_metrics([5, 10]))
    for name, their_name in theirs.items():
        assert ours[name].value == pytest.approx(float(expected[their_name]), abs=1e-12)


@given(rankings())
def test_metrics_equal_a_walk_through_the_lists(case: Predictions) -> None:
    for ranking in ("semantic_id", "item"):
        ours = stage_metrics(case, default_metrics([1, 5, 10], ranking=ranking))
        for k in (1, 5, 10):
            gains = [
                sum(1 / math.log2(i + 2) for i, item in enumerate(items[:k]) if item == target)
                for items, target in zip(case.items, case.targets, strict=True)
            ]
            assert ours[f"ndcg@{k}"].value == pytest.approx(np.mean(gains))
            hits = [target in items[:k] for items, target in zip(case.items, case.targets, strict=True)]
            assert ours[f"hit@{k}"].value == pytest.approx(np.mean(hits))


def test_the_two_rankings_read_their_own_column() -> None:
    by_item = np.array([2], dtype=np.int32)
    case = replace(predictions([[3, 2]], [3]), rank_item=by_item)
    assert stage_metrics(case, [metrics.hit_at(1)])["hit@1"].value == 1
    assert stage_metrics(case, [metrics.hit_at(1, "item")])["hit@1"].value == 0
    assert stage_metrics(case, [metrics.mrr_at(10, "item")])["mrr@10"].value == 0.5


def test_log_probability_is_the_mean_of_the_column() -> None:
    case = predictions([[1], [2], [3]], [1, 1, 1])
    assert stage_metrics(case, default_metrics([5]))["log_probability"].value == pytest.approx(-6)


def test_levels_sum_to_the_log_probability_and_baselines_have_none() -> None:
    by_level = np.array([[-1.0, -2.0], [-3.0, -1.0], [-2.0, -6.0]], dtype=np.float32)
    case = replace(
        predictions([[1], [2], [3]], [1, 1, 1]),
        target_level_log_probabilities=by_level,
        target_log_probability=by_level.sum(axis=1),
    )
    found = stage_metrics(case, [metrics.log_probability(), *metrics.level_metrics(case)])
    assert {name: e.value for name, e in found.items()} == {
        "log_probability": -5.0,
        "log_probability_level_1": -2.0,
        "log_probability_level_2": -3.0,
    }
    baseline = predictions([[1]], [1])
    assert metrics.level_metrics(baseline) == []
    with pytest.raises(ConfigError, match="level 1"):
        stage_metrics(baseline, [metrics.level_log_probability_at(1)])


def test_a_k_beyond_the_stored_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.k: 11 .* 10 semantic IDs.*decoding\.beams"):
        stage_metrics(predictions([[1]], [1]), default_metrics([11]))


@given(st.lists(rankings(), min_size=1, max_size=4))
def test_micro_is_the_mean_of_all_cases_and_macro_the_mean_of_the_stages(stages: list[Predictions]) -> None:
    chosen = default_metrics([5, 10])
    each = [stage_metrics(stage, chosen) for stage in stages]
    macro, micro = (average_metrics(stages, chosen, average=kind) for kind in ("macro", "micro"))
    for name in macro:
        means = [stage[name].value for stage in each]
        counts = [stage[name].cases for stage in each]
        assert macro[name].value == pytest.approx(np.mean(means))
        assert micro[name].value == pytest.approx(np.average(means, weights=counts))
        assert macro[name].cases == micro[name].cases == sum(counts)


def mean_of_cases(values: np.ndarray, users: np.ndarray) -> Estimate:
    return Estimate.of(values, Panel.of([users], "micro"))


def mean_of_stages(values: list[np.ndarray], users: list[np.ndarray]) -> Estimate:
    return Estimate.of(np.concatenate(values), Panel.of(users))


def test_with_one_case_a_user_the_interval_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(size=40)
    estimate = mean_of_cases(values, np.arange(40))
    error = 1.959963984540054 * values.std(ddof=1) / math.sqrt(40)
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - error, values.mean() + error))


def test_repeating_every_case_under_its_user_does_not_narrow_the_interval() -> None:
    values, users = np.random.default_rng(1).normal(size=30), np.arange(30)
    once = mean_of_cases(values, users)
    twice = mean_of_cases(np.tile(values, 2), np.tile(users, 2))
    assert twice.half_width == pytest.approx(once.half_width)
    assert mean_of_cases(np.tile(values, 2), np.arange(60)).half_width < 0.8 * once.half_width


def test_independent_stages_add_their_squared_errors() -> None:
    generator = np.random.default_rng(2)
    values = [generator.normal(size=n) for n in (400, 900)]
    users = [np.arange(400), np.arange(400, 1300)]
    apart = [mean_of_cases(x, u).half_width for x, u in zip(values, users, strict=True)]
    assert mean_of_stages(values, users).half_width == pytest.approx(math.hypot(*apart) / 2, rel=2e-3)


def test_opposite_outcomes_of_the_same_users_cancel_between_stages() -> None:
    """What one stage gains from a draw of users the other loses: chance in the users moves nothing."""
    values, users = np.random.default_rng(3).normal(size=50), np.arange(50)
    assert mean_of_stages([values, 1 - values], [users, users]).value == pytest.approx(0.5)
    together = mean_of_stages([values, 1 - values], [users, users])
    apart = mean_of_stages([values, 1 - values], [users, users + 50])
    assert not together.has_interval or together.half_width < 1e-6 * apart.half_width


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Hit rates and sizes like those of the released stream: 2 % of 1,500 cases, users in 1 to 3 stages."""
    generator = np.random.default_rng(4)
    truth, covered, trials = 0.02, 0, 2000
    for _ in range(trials):
        taste = generator.beta(0.5, 24.5, size=600)  # mean 0.02; users differ, so their cases hang together
        stages = [generator.choice(600, size=500, replace=False) for _ in range(3)]
        values = [(generator.random(500) < taste[users]).astype(float) for users in stages]
        estimate = mean_of_stages(values, stages)
        covered += estimate.low <= truth <= estimate.high
    assert 0.92 <= covered / trials <= 0.97


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.1] * 7, [1.0]])
def test_cases_without_spread_have_no_interval(values: list[float]) -> None:
    estimate = mean_of_cases(np.array(values), np.arange(len(values)))
    assert not estimate.has_interval
    assert not estimate.excludes_zero
    mean = pytest.approx(values[0])
    assert estimate.as_json() == {"value": mean, "low": None, "high": None, "cases": len(values)}


def test_a_mean_of_nothing_is_refused() -> None:
    for users in ([], [np.empty(0)]):
        with pytest.raises(ValueError, match="at least one stage, and every stage needs cases"):
            Panel.of(users)
    with pytest.raises(ValueError, match="every stage needs cases"):
        average_metrics([], default_metrics([5]))

"""The gate on made-up answers: what it lets pass, refuses, and leaves undecided."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peso.config import GateConfig, load_config
from peso.errors import ConfigError, WorkspaceError
from peso.evaluation.predictions import Predictions
from peso.evaluation.verdict import FEW, Pair, compare, decide, metric_of

SIMULATED = {"data": {"simulate": {"users": 100, "items": 60, "stages": 2}}}


def answers(ranks: np.ndarray, log_probability: np.ndarray | None = None, item: str = "i") -> Predictions:
    """Cases with these ranks; a third of the users is new, a third dormant, a fifth of the targets new."""
    n = len(ranks)
    if log_probability is None:
        log_probability = np.full(n, -5.0)
    return Predictions(
        users=[f"u{row}" for row in range(n)],
        targets=["t"] * n,
        items=[[f"{item}{row % 7}"] for row in range(n)],
        scores=[np.zeros(1, np.float32)] * n,
        rank_semantic_id=ranks.astype(np.int32),
        rank_item=ranks.astype(np.int32),
        target_log_probability=log_probability.astype(np.float32),
        user_segment=[("new", "dormant", "continuing")[row % 3] for row in range(n)],
        item_segment=["new" if row % 5 == 0 else "known" for row in range(n)],
        history_length=np.full(n, 5, np.int32),
        depth=10,
    )


def hits(n: int, share: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(int)


def flip(ranks: np.ndarray, lost: int, won: int, rows: np.ndarray | None = None) -> np.ndarray:
    """The same ranks, but some of the hits lost and some of the misses won, among some rows."""
    rows = np.arange(len(ranks)) if rows is None else rows
    changed = ranks.copy()
    changed[rows[ranks[rows] > 0][:lost]] = 0
    changed[rows[ranks[rows] == 0][:won]] = 1
    return changed


def judged(champion: np.ndarray, challenger: np.ndarray, earlier: Pair | None = None, **settings: object):
    gate = GateConfig.model_validate({"metric": "hit@10", **settings})
    return decide(gate, Pair(answers(champion), answers(challenger)), earlier, 10)


CHAMPION = hits(2000, 0.2)


def test_a_better_challenger_passes_and_a_worse_one_is_refused() -> None:
    assert judged(CHAMPION, flip(CHAMPION, 0, 40)).decision == "passed"
    worse = judged(CHAMPION, flip(CHAMPION, 100, 0))
    assert worse.decision == "refused"
    assert "hit@10" in worse.says
    assert "beyond the margin" in worse.says


def test_an_equally_good_challenger_passes_only_where_the_cases_show_it() -> None:
    """The same number of hits won and lost: the more of them, the less is known."""
    few, many = flip(CHAMPION, 5, 5), flip(CHAMPION, 150, 150)
    assert few.mean() == many.mean() == CHAMPION.mean()
    assert judged(CHAMPION, few).decision == "passed"
    undecided = judged(CHAMPION, many)
    assert undecided.decision == "undecided"
    assert "inconclusive" in undecided.says
    assert judged(CHAMPION, many, delta=0.3).decision == "passed"
    assert judged(CHAMPION, many, confidence=0.5).decision == "passed"


def test_the_bound_is_that_of_the_paired_t_test() -> None:
    from scipy import stats

    challenger = flip(CHAMPION, 60, 30)
    found = compare(
        Pair(answers(CHAMPION), answers(challenger)), metric_of(GateConfig(metric="hit@10")), 0.1, 0.9
    )
    difference = (challenger > 0).astype(float) - (CHAMPION > 0)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["low"] == pytest.approx(difference.mean() - stats.norm.ppf(0.9) * error)
    assert found["high"] == pytest.approx(difference.mean() + stats.norm.ppf(0.9) * error)
    assert found["margin"] == pytest.approx(0.1 * CHAMPION.mean())


def test_the_gate_keeps_its_promise() -> None:
    """Of challengers that are worse by the margin exactly, one in ten passes at 90 % confidence; the chance
    that it states for an equal one is how often that passes."""
    generator, passed, equal, stated = np.random.default_rng(1), 0, 0, []
    metric = metric_of(GateConfig(metric="hit@10"))
    n, share, delta, rounds = 600, 0.2, 0.1, 200
    for _ in range(rounds):
        # both answer at random with these probabilities, half of the hits in common
        shared, own = generator.random(n) < share / 2, generator.random((2, n))
        one = shared | (own[0] < (share / 2) / (1 - share / 2))
        target = share * (1 - delta)
        worse = shared | (own[1] < (target - share / 2) / (1 - share / 2))
        same = shared | (own[1] < (share / 2) / (1 - share / 2))
        base = answers(one.astype(int))
        found = compare(Pair(base, answers(worse.astype(int))), metric, delta, 0.9)
        passed += found["low"] >= -found["margin"]
        found = compare(Pair(base, answers(same.astype(int))), metric, delta, 0.9)
        equal += found["low"] >= -found["margin"]
        stated.append(found["chance_if_equal"])
    assert passed / rounds == pytest.approx(0.1, abs=0.05)
    assert equal / rounds == pytest.approx(np.mean(stated), abs=0.07)


def test_what_neither_model_hits_says_nothing() -> None:
    none = np.zeros(500, int)
    verdict = judged(none, none)
    assert verdict.decision == "undecided"
    assert "neither model has a hit" in verdict.says
    assert judged(CHAMPION, CHAMPION).decision == "passed"  # no case differs
    assert judged(CHAMPION[:20], CHAMPION[:20]).decision == "undecided"
    assert f"fewer than {FEW}" in judged(CHAMPION[:20], CHAMPION[:20]).says


def test_a_group_is_judged_by_its_own_cases() -> None:
    """All in all better, for new users worse: refused only where new users are asked for."""
    new, others = (np.flatnonzero((np.arange(2000) % 3 == 0) == wanted) for wanted in (True, False))
    challenger = flip(flip(CHAMPION, 60, 0, new), 0, 200, others)
    assert judged(CHAMPION, challenger).decision == "passed"
    verdict = judged(CHAMPION, challenger, segments={"new_users": 0.1})
    assert verdict.decision == "refused"
    assert verdict.says.startswith("hit@10 of new users")
    assert verdict.conditions[1].figures["cases"] == len(new)
    for name in ("dormant_users", "continuing_users"):
        assert judged(CHAMPION, challenger, segments={name: 0.1}).decision == "passed"


def test_what_a_guard_has_to_show() -> None:
    """A group whose cases do not tell does no harm to a challenger unless a proof is asked for."""
    new = np.flatnonzero(np.arange(2000) % 5 == 0)
    challenger = flip(flip(CHAMPION, 30, 30, new), 0, 100)
    assert judged(CHAMPION, challenger, segments={"new_items": 0.05}).decision == "passed"
    verdict = judged(CHAMPION, challenger, segments={"new_items": 0.05}, guards="proof")
    assert verdict.decision == "undecided"
    assert verdict.says.startswith("hit@10 of new items")


def test_a_group_without_cases() -> None:
    first = replace(answers(CHAMPION), user_segment=["new"] * len(CHAMPION))
    for guards, decision in (("no-harm", "passed"), ("proof", "undecided")):
        gate = GateConfig.model_validate(
            {"metric": "hit@10", "segments": {"dormant_users": 0.1}, "guards": guards}
        )
        verdict = decide(gate, Pair(first, first), None, 10)
        assert verdict.decision == decision
        assert "no cases" in verdict.conditions[1].says


def test_forgetting_is_judged_on_earlier_cases() -> None:
    better = flip(CHAMPION, 0, 100)
    forgetful = Pair(answers(CHAMPION), answers(flip(CHAMPION, 200, 0)))
    assert judged(CHAMPION, better, forgetful, forgetting=0.1).decision == "refused"
    assert judged(CHAMPION, better, forgetful).decision == "passed"  # the world may have moved on
    faithful = Pair(answers(CHAMPION), answers(CHAMPION))
    assert judged(CHAMPION, better, faithful, forgetting=0.1).decision == "passed"


def test_coverage_is_relative_to_the_champion() -> None:
    champion = answers(CHAMPION)  # seven distinct items
    narrow = replace(champion, items=[[f"i{row % 5}"] for row in range(len(CHAMPION))])
    for least, decision in ((0.8, "refused"), (5 / 7, "passed"), (None, "passed")):
        gate = GateConfig.model_validate({"metric": "hit@10", "coverage": least})
        assert decide(gate, Pair(champion, narrow), None, 10).decision == decision


@pytest.mark.parametrize(
    ("asked", "anchor", "decision"),
    [
        ("any", (False, "anchor: no measurable effect"), "passed"),
        ("held", (False, "anchor: no measurable effect"), "refused"),
        ("held", (True, "anchor: held"), "passed"),
        ("held", None, "passed"),
    ],
)
def test_the_anchor_matters_only_where_it_is_asked_for(asked: str, anchor, decision: str) -> None:
    gate = GateConfig.model_validate({"metric": "hit@10", "anchor": asked})
    pair = Pair(answers(CHAMPION), answers(CHAMPION))
    assert decide(gate, pair, None, 10, anchor).decision == decision


def test_the_margin_of_the_log_probability_is_a_share_of_the_probability() -> None:
    generator = np.random.default_rng(2)
    before = generator.normal(-6, 1, 3000)
    pair = Pair(answers(CHAMPION[:3000], before[:2000]), answers(CHAMPION[:3000], before[:2000] - 0.04))
    metric = metric_of(GateConfig(metric="log_probability"))
    assert compare(pair, metric, 0.05, 0.95)["margin"] == pytest.approx(-math.log(0.95))
    gate = GateConfig(metric="log_probability", coverage=None)
    assert decide(gate, pair, None, 10).decision == "passed"  # exp(−0.04) is 0.961
    assert decide(gate.model_copy(update={"delta": 0.03}), pair, None, 10).decision == "refused"


@given(st.lists(st.integers(0, 10), min_size=FEW, max_size=80), st.integers(0, 2**32 - 1))
def test_to_ask_for_less_never_turns_a_pass_into_a_refusal(ranks: list[int], seed: int) -> None:
    champion = np.array(ranks)
    challenger = np.random.default_rng(seed).permutation(champion)
    order = ["refused", "undecided", "passed"]
    outcomes = [order.index(judged(champion, challenger, delta=d).decision) for d in (0.0, 0.1, 0.5, 0.99)]
    assert outcomes == sorted(outcomes)


def test_answers_to_different_cases_are_not_compared() -> None:
    with pytest.raises(WorkspaceError, match="answered different cases"):
        Pair(answers(CHAMPION), answers(CHAMPION[1:]))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("gate.metric=auc", r"gate\.metric: a metric must be hit@K, ndcg@K, mrr@K"),
        ("gate.metric=ndcg@0", r"gate\.metric: a metric must be"),
        ("gate.metric=ndcg@50", r"gate\.metric ndcg@50 needs 50 items, but decoding\.beams is 10"),
        (
            "gate.segments.vip_users=0.1",
            "unknown groups of the gate: vip_users; known groups are new_users, dormant_users, .*known_items",
        ),
        ("gate.delta=1", r"gate\.delta"),
        ("gate.confidence=0.2", r"gate\.confidence"),
        ("evaluation.enabled=false", r"gate\.enabled needs tests"),
        ("gate.gamma=1", r"gate\.gamma"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_with_the_configuration(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(SIMULATED, ["gate.enabled=true", override])

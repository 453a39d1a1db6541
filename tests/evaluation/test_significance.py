"""Significance against SciPy, against its definitions, and by simulation of systems that are alike."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peso.evaluation import contrasts, intervals
from peso.evaluation.contrasts import (
    Contrasts,
    SystemValues,
    holm,
    sign_flips,
    user_resamples,
)
from peso.evaluation.intervals import Estimate, Panel, Spread

# The stages of the released Video_Games stream: cases, and users among whom one in ten comes back.
SIZES, USERS = (1035, 1091, 1949, 1791), 60_000


def one_stage(users: int) -> Panel:
    return Panel.of([np.arange(users)])


def pair(one: np.ndarray, other: np.ndarray, panel: Panel, draws: int = 10_000) -> Contrasts:
    """Two systems, float (seeds, cases) each, in one metric."""
    systems = [
        SystemValues(name, range(len(values)), {"m": values}) for name, values in (("a", one), ("b", other))
    ]
    return Contrasts(systems, panel, draws)


@pytest.mark.parametrize("documented", [contrasts, intervals], ids=lambda m: m.__name__)
def test_docstring_examples(documented: object) -> None:
    assert not doctest.testmod(documented).failed  # type: ignore[arg-type]


# -- shares and influence ----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.sampled_from(["macro", "micro"]))
def test_shares_add_up_to_the_mean_and_influence_to_its_variance(sizes: list[int], average: str) -> None:
    generator = np.random.default_rng(sum(sizes))
    users = [generator.choice(40, size=n, replace=False) for n in sizes]
    values = [generator.normal(size=n) for n in sizes]
    found = Panel.of(users, average)  # type: ignore[arg-type]
    joined = np.concatenate(values)
    mean = np.mean([stage.mean() for stage in values]) if average == "macro" else joined.mean()
    assert found.shares(joined).sum() == pytest.approx(mean)
    influence = found.influence(joined)
    assert influence.sum() == pytest.approx(0, abs=1e-12)
    # by hand: c_i (x_i − m of its group), summed over the cases of each user
    by_user = dict.fromkeys(np.concatenate(users).tolist(), 0.0)
    for who, stage in zip(users, values, strict=True):
        weight = 1 / (len(values) * len(stage)) if average == "macro" else 1 / len(joined)
        middle = stage.mean() if average == "macro" else mean
        for user, value in zip(who.tolist(), stage, strict=True):
            by_user[user] += weight * (value - middle)
    squares = sum(z * z for z in by_user.values()) * len(by_user) / max(1, len(by_user) - 1)
    estimate = Estimate.of(joined, found)
    assert estimate.value == pytest.approx(mean)
    if estimate.has_interval:
        assert estimate.half_width == pytest.approx(1.959963984540054 * math.sqrt(squares))


def test_several_rows_are_taken_at_once() -> None:
    found = Panel.of([np.array([3, 1, 2]), np.array([1, 9])])
    rows = np.random.default_rng(0).normal(size=(2, 4, 5))
    for function in (found.shares, found.influence):
        assert np.allclose(function(rows)[1, 2], function(rows[1, 2]))


def test_a_panel_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="every stage needs cases"):
        Panel.of([np.arange(3), np.arange(0)])


# -- against SciPy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["log-probability", "hit"])
@pytest.mark.slow
def test_permutation_equals_scipy(kind: str) -> None:
    generator = np.random.default_rng(5)
    if kind == "hit":
        one, other = (generator.random((2, 600)) < np.array([[0.06], [0.03]])).astype(float)
    else:
        one, other = generator.normal(size=(2, 60)) + np.array([[0.2], [0.0]])
    theirs = stats.permutation_test(
        (one, other),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    ours = pair(one[None], other[None], one_stage(len(one)), 20_000).p("m", "a", "b")
    assert 0.001 < ours < 0.5  # else there is nothing to compare
    assert ours == pytest.approx(theirs.pvalue, abs=4 * math.sqrt(2 * ours / 20_000))


def test_permutation_equals_all_permutations() -> None:
    """With users in several stages: all cases of one user change sides together."""
    users = [np.array([0, 1, 2, 3, 4, 5, 6]), np.array([4, 5, 6, 7, 8, 9]), np.array([0, 9])]
    found = Panel.of(users)
    one, other = np.random.default_rng(8).normal(size=(2, 15)) + np.array([[0.7], [0.0]])
    shares = found.shares(one - other)
    all_signs = np.array(list(itertools.product([-1, 1], repeat=10)))
    exact = np.mean(np.abs(all_signs @ shares) >= abs(shares.sum()) - 1e-12)
    ours = pair(one[None], other[None], found, 40_000).p("m", "a", "b")
    assert ours == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))


def test_permutation_agrees_with_wilcoxon_where_both_apply() -> None:
    """Symmetric differences: the two tests order data alike."""
    generator = np.random.default_rng(0)
    ours, theirs = [], []
    for shift in np.linspace(0, 0.3, 12):
        one = generator.normal(size=200) + shift
        ours.append(pair(one[None], np.zeros((1, 200)), one_stage(200)).p("m", "a", "b"))
        theirs.append(stats.wilcoxon(one).pvalue)
    assert stats.spearmanr(ours, theirs).statistic > 0.9


@pytest.mark.slow
def test_bootstrap_interval_equals_scipy() -> None:
    generator = np.random.default_rng(1)
    one, other = (generator.random((2, 3000)) < np.array([[0.03], [0.02]])).astype(float)
    theirs = stats.bootstrap(
        (one - other,), np.mean, n_resamples=8_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = pair(one[None], other[None], one_stage(3000), 20_000).contrast("m", "a", "b")
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)
    ratio = stats.bootstrap(
        (one, other),
        lambda x, y, axis: 100 * (x.mean(axis) - y.mean(axis)) / y.mean(axis),
        paired=True,
        n_resamples=8_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = ratio.high - ratio.low
    assert (ours.percent_low, ours.percent_high) == pytest.approx(ratio, abs=0.05 * width)
    assert ours.percent == pytest.approx(100 * (one.mean() - other.mean()) / other.mean())


def test_draws_have_the_variance_they_should() -> None:
    y = np.random.default_rng(2).normal(size=(400, 3))
    generator = np.random.default_rng(0)
    assert np.var(sign_flips(y, 5000, generator), axis=0) == pytest.approx(np.sum(y**2, axis=0), rel=0.08)
    centred = y - y.mean(axis=0)
    resamples = user_resamples(centred, 5000, generator)
    assert np.var(resamples, axis=0) == pytest.approx(np.sum(centred**2, axis=0), rel=0.08)
    assert abs(resamples.mean(axis=0)).max() < 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_holm_rejects_step_by_step(p: list[float], level: float) -> None:
    """By the definition: go up the sorted p values while the i-th is at most level / (m − i + 1)."""
    rejected, ordered = set(), sorted(range(len(p)), key=lambda i: p[i])
    for step, number in enumerate(ordered):
        if p[number] * (len(p) - step) > level:
            break
        rejected.add(number)
    assert set(np.flatnonzero(holm(np.array(p)) <= level)) == rejected


# -- what p and intervals mean -----------------------------------------------------------------------


def test_far_apart_gives_a_p_value_smaller_than_one_in_the_draws() -> None:
    """So that Holm's correction over thousands of pairs can still reject."""
    one = np.random.default_rng(0).normal(size=(1, 2000)) + 0.3
    p = pair(one, np.zeros((1, 2000)), one_stage(2000), 1000).p("m", "a", "b")
    z = one.mean() / (one.std() / math.sqrt(2000))
    assert 2 * stats.norm.sf(z) < p < 1e-6


@pytest.mark.parametrize("users", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("difference", [0.1, -2.7, 1e-5])
def test_few_users_who_differ_alike_show_no_more_than_signs_can(users: int, difference: float) -> None:
    values = np.linspace(-5, -4.3, users)[None]
    found = pair(values, values + difference, one_stage(users)).p("m", "a", "b")
    exact = 2.0 ** (1 - users)
    assert exact <= found <= exact + 4 * math.sqrt(exact / 10_000) + 1e-3


def test_one_user_in_two_stages_is_one_sign() -> None:
    panel = Panel.of([np.zeros(1, dtype=int), np.zeros(1, dtype=int)])
    assert pair(np.array([[0.0, 0.0]]), np.array([[0.5, 0.9]]), panel).p("m", "a", "b") == 1


def test_no_p_value_is_smaller_than_signs_allow() -> None:
    values = np.random.default_rng(0).normal(1000, 1e-3, size=(1, 14))
    assert pair(np.zeros((1, 14)), values, one_stage(14)).p("m", "a", "b") >= 2.0**-13


def test_the_bound_of_the_tail_holds() -> None:
    """For the worst weights (two equal ones) and for hits."""
    for weights in ([1.0, 1.0], [1.0] * 12, list(range(1, 13))):
        signs = np.array(list(itertools.product([-1, 1], repeat=len(weights))))
        sums = signs @ weights / math.sqrt(np.sum(np.square(weights)))
        for x in np.unique(sums.round(9)):
            exceeded = np.mean(sums >= x - 1e-9)
            assert exceeded <= contrasts.SIGN_TAIL * stats.norm.sf(x) + 1e-12 or x <= 0


def test_the_same_answers_are_never_apart() -> None:
    values = np.random.default_rng(0).normal(size=(1, 50))
    found = pair(values, values, one_stage(50)).contrast("m", "a", "b")
    assert (found.value, found.p, found.significant, found.detectable) == (0, 1, False, 0)
    assert math.isnan(found.low)


def test_contrasts_change_sign_with_their_order_and_percents_their_base() -> None:
    one, other = np.random.default_rng(3).normal(size=(2, 1, 400)) + np.array([3.0, 2.0])[:, None, None]
    both = pair(one, other, one_stage(400))
    there, back = both.contrast("m", "a", "b"), both.contrast("m", "b", "a")
    assert there.value == -back.value
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert (there.p, there.detectable) == (back.p, back.detectable)
    assert there.percent == pytest.approx(50, abs=5)
    assert back.percent == pytest.approx(-33, abs=5)


def test_users_of_several_stages_are_one_draw() -> None:
    """Repeating every case of its user in a second stage adds nothing to what is known."""
    one = np.random.default_rng(4).normal(size=300) + 0.13
    once = pair(one[None], np.zeros((1, 300)), one_stage(300), 40_000).contrast("m", "a", "b")
    doubled = np.tile(one, 2)[None]
    twice = pair(doubled, 0 * doubled, Panel.of([np.arange(300)] * 2), 40_000).contrast("m", "a", "b")
    strangers = Panel.of([np.arange(300), np.arange(300, 600)])
    apart = pair(doubled, 0 * doubled, strangers, 40_000).contrast("m", "a", "b")
    assert twice.p == pytest.approx(once.p, rel=0.2)
    assert apart.p < 0.5 * once.p
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=0.03)


def test_best_ties_and_worse() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(size=(1, 2000))
    systems = [
        SystemValues(name, [0], {"m": base + shift + 0.5 * generator.normal(size=(1, 2000))})
        for name, shift in (("worse", -0.3), ("tied", -0.02), ("best", 0.02))
    ]
    found = Contrasts(systems, one_stage(2000))
    assert found.best("m") == "best"
    assert found.ties("m") == ["tied"]
    assert found.p_adjusted("m", "worse", "tied") <= 3 * found.p("m", "worse", "tied")


def test_a_table_of_many_identical_systems_marks_none_as_worse() -> None:
    """Although the best of twelve is far above the worst: the best was read from the same data."""
    generator = np.random.default_rng(6)
    marked = 0
    for _ in range(40):
        values = generator.normal(size=(12, 1, 200))
        systems = [SystemValues(f"s{i}", [0], {"m": v}) for i, v in enumerate(values)]
        marked += len(Contrasts(systems, one_stage(200), 1000).ties("m")) < 11
    assert marked <= 5  # 40 · 5 % = 2


def test_the_smallest_detectable_difference_is_detected_four_times_in_five() -> None:
    generator = np.random.default_rng(7)
    null = pair(generator.normal(size=(1, 500)), np.zeros((1, 500)), one_stage(500)).contrast("m", "a", "b")
    noise = generator.normal(size=(2000, 500))
    t = (noise.mean(axis=1) + null.detectable) / (noise.std(axis=1, ddof=1) / math.sqrt(500))
    assert np.mean(np.abs(t) > 1.96) == pytest.approx(0.8, abs=0.06)


# -- seeds -------------------------------------------------------------------------------------------


def test_one_seed_speaks_of_users_alone_and_says_so() -> None:
    values = np.random.default_rng(0).normal(size=(2, 100))
    assert not pair(values[:1], values[1:], one_stage(100)).contrast("m", "a", "b").covers_seeds
    fixed = [SystemValues(name, [None], {"m": values[i : i + 1]}) for i, name in enumerate("ab")]
    assert Contrasts(fixed, one_stage(100)).contrast("m", "a", "b").covers_seeds


def test_seeds_that_disagree_widen_the_interval_beyond_users() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(size=2000)
    agree = base + 0.1 + 0.5 * generator.normal(size=(5, 2000))
    disagree = agree + np.array([-0.2, -0.1, 0.0, 0.1, 0.2])[:, None]
    other = base + 0.5 * generator.normal(size=(5, 2000))
    calm = pair(agree, other, one_stage(2000)).contrast("m", "a", "b")
    torn = pair(disagree, other, one_stage(2000)).contrast("m", "a", "b")
    assert calm.significant
    assert not torn.significant
    assert torn.high - torn.low > 4 * (calm.high - calm.low)
    t, error = 2.776, 0.2 * math.sqrt(2.5 / 4) / math.sqrt(5)  # of −2 … 2 tenths, four degrees of freedom
    assert (torn.high - torn.low) / 2 == pytest.approx(t * error, rel=0.15)


def test_seeds_pair_where_both_systems_have_them_and_in_whatever_order() -> None:
    """What a seed does to both systems, as a common base model does, cancels."""
    generator = np.random.default_rng(2)
    common = np.array([-0.5, 0.0, 0.2, 0.6])[:, None]
    one, other = generator.normal(size=(2, 4, 1500)) + common
    paired = pair(one + 0.2, other, one_stage(1500)).contrast("m", "a", "b")
    assert paired.significant
    systems = [
        SystemValues("a", [0, 1, 2, 3], {"m": one + 0.2}),
        SystemValues("b", [3, 1, 0, 2], {"m": other[[3, 1, 0, 2]]}),
    ]
    shuffled = Contrasts(systems, one_stage(1500)).contrast("m", "a", "b")
    assert shuffled.p == pytest.approx(paired.p)
    strangers = [systems[0], SystemValues("b", [4, 5, 6, 7], {"m": other})]
    assert not Contrasts(strangers, one_stage(1500)).contrast("m", "a", "b").significant


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("apart", [0.0, 0.05, 0.5])
def test_a_difference_that_the_interval_covers_cannot_be_detected(seeds: int, apart: float) -> None:
    """With few seeds the interval is much wider than four standard errors, and so is what can be shown."""
    generator = np.random.default_rng(seeds)
    base = generator.normal(size=1500)
    one = base + apart * np.arange(seeds)[:, None] + 0.3 * generator.normal(size=(seeds, 1500))
    other = base + 0.3 * generator.normal(size=(seeds, 1500))
    found = pair(one, other, one_stage(1500)).contrast("m", "a", "b")
    half = (found.high - found.low) / 2
    assert 1.02 * half < found.detectable < 2 * half


def test_a_system_without_chance_is_set_against_every_seed() -> None:
    generator = np.random.default_rng(3)
    random, fixed = generator.normal(size=(5, 400)), generator.normal(size=(1, 400))
    alone = Contrasts(
        [SystemValues("a", range(5), {"m": random}), SystemValues("b", [None], {"m": fixed})], one_stage(400)
    )
    repeated = pair(random, np.repeat(fixed, 5, axis=0), one_stage(400))
    assert alone.p("m", "a", "b") == pytest.approx(repeated.p("m", "a", "b"))
    assert alone.contrast("m", "a", "b").covers_seeds


def test_satterthwaite_lies_between_the_seeds_degrees_and_infinity() -> None:
    assert Spread(1.0, 1.0, 1.0, 4).effective_degrees == pytest.approx(4)
    assert Spread(3.0, 1.0, 1.0, 4).effective_degrees == pytest.approx(36)
    assert Spread(1.0).effective_degrees == math.inf


def test_systems_that_do_not_fit_are_refused() -> None:
    values = np.zeros((1, 5))
    with pytest.raises(ValueError, match="b has other metrics than a"):
        Contrasts(
            [SystemValues("a", [0], {"m": values}), SystemValues("b", [0], {"n": values})], one_stage(5)
        )
    with pytest.raises(ValueError, match="a does not have 6 cases"):
        Contrasts([SystemValues("a", [0], {"m": values})], one_stage(6))
    with pytest.raises(ValueError, match="distinct seeds"):
        SystemValues("a", [1, 1], {"m": np.zeros((2, 5))})
    with pytest.raises(ValueError, match="one row of values for each of its 2 seeds"):
        SystemValues("a", [0, 1], {"m": values})


# -- identical systems, simulated --------------------------------------------------------------------


def simulated_panel(generator: np.random.Generator) -> tuple[Panel, np.ndarray]:
    """Cases and users like ours; the second value says which user a case belongs to."""
    weight = generator.pareto(3, size=USERS)  # a few users come back
    users = [generator.choice(USERS, size=n, replace=False, p=weight / weight.sum()) for n in SIZES]
    found = Panel.of(users)
    return found, found.owner


def identical(
    panel: Panel, generator: np.random.Generator, seeds: int, of_seed: float
) -> list[dict[str, np.ndarray]]:
    """Two systems drawn from one law: hit rates of 2 %, log-probabilities with heavy tails.

    ``of_seed``: standard deviation of what a seed of training does to every case (in nats).
    """
    taste = 0.7 * generator.normal(size=panel.users)[panel.owner] + generator.normal(size=panel.cases)
    systems = []
    for _ in range(2):
        luck = 0.4 * generator.normal(size=(seeds, panel.users))[:, panel.owner]
        noise = generator.normal(size=(seeds, panel.cases)) * generator.gamma(0.5, size=panel.cases)
        run = luck + noise + of_seed * generator.normal(size=(seeds, 1))
        hits = generator.random((seeds, panel.cases)) < 0.0094 * np.exp(taste + 0.3 * run)
        ranks = generator.integers(1, 11, size=hits.shape)
        systems.append(
            {"hit": hits.astype(float), "ndcg": hits / np.log2(1 + ranks), "log": -13 + 4 * taste + run}
        )
    return systems


def rejection_rates(simulations: int, seeds: int, of_seed: float, draws: int) -> dict[str, float]:
    """How often p ≤ 0.05, and that the hit rate is what it should be."""
    generator, block, rate = np.random.default_rng(20), 50, []
    found, _ = simulated_panel(generator)
    assert 1.03 < found.cases / found.users < 1.2
    rejected = dict.fromkeys(("hit", "ndcg", "log"), 0)
    for _ in range(simulations // block):
        values: list[dict[str, np.ndarray]] = [{}, {}]
        for number in range(block):
            for system, answers in zip(values, identical(found, generator, seeds, of_seed), strict=True):
                system |= {f"{name}/{number}": value for name, value in answers.items()}
        rate.append(np.mean([v.mean() for name, v in values[0].items() if name.startswith("hit")]))
        systems = [SystemValues(name, range(seeds), v) for name, v in zip("ab", values, strict=True)]
        both = Contrasts(systems, found, draws)
        for metric in both.metrics:
            rejected[metric.split("/")[0]] += both.p(metric, "a", "b") <= 0.05
    assert np.mean(rate) == pytest.approx(0.02, abs=0.004)
    return {name: times / simulations for name, times in rejected.items()}


@pytest.mark.slow
def test_identical_systems_with_one_seed_are_told_apart_no_more_often_than_promised() -> None:
    rates = rejection_rates(1000, seeds=1, of_seed=0.0, draws=499)
    assert rates["hit"] <= 0.06
    assert rates["ndcg"] <= 0.06
    assert 0.04 <= rates["log"] <= 0.06


@pytest.mark.slow
def test_identical_systems_with_several_seeds_are_told_apart_no_more_often_than_promised() -> None:
    """Although a seed moves all cases together."""
    rates = rejection_rates(1000, seeds=4, of_seed=0.05, draws=499)
    assert rates["hit"] <= 0.06
    assert rates["ndcg"] <= 0.06
    assert 0.04 <= rates["log"] <= 0.06

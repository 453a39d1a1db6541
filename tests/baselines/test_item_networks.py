"""The two networks: what they may see, what they learn, that they go on from where they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogs import setting
from hypothesis import given
from hypothesis import strategies as st

from peso.baselines import fitting
from peso.baselines.baseline import Baseline
from peso.baselines.fitting import Network, shuffled
from peso.baselines.sasrec import NO_TARGET, SasRec, training_rows
from peso.baselines.tuning import Validation
from peso.baselines.two_tower import Examples, TwoTower
from peso.errors import ConfigError, Divergence
from peso.events.histories import Cases, Ragged, Stage, TargetSequence
from peso.runtime.progress import Silent

ITEMS, WINDOW, CPU = 12, 6, torch.device("cpu")


def two_tower(seed: int = 0, items: int = ITEMS, **options) -> TwoTower:
    given = {"width": 8, "epochs": 30, "learning_rate": 0.02, "batch_size": 16, "dropout": 0.0}
    options = {**given, "user_dropout": 0.5, **options}
    return TwoTower(setting(items, WINDOW, seed), **options)


def sasrec(seed: int = 0, items: int = ITEMS, **options) -> SasRec:
    given = {"width": 16, "epochs": 12, "learning_rate": 0.01, "batch_size": 16, "dropout": 0.1}
    return SasRec(setting(items, WINDOW, seed), **{**given, "weight_decay": 0.01, **options})


MAKERS = pytest.mark.parametrize("make", [two_tower, sasrec])


def clubs(number: int, users: range, swap: bool = False, length: int = 8, seed: int = 0) -> Stage:
    """Users with even numbers have the first half of the items, the others the second; ``swap``: reversed."""
    generator = np.random.default_rng([seed, number])
    half = ITEMS // 2
    rows = [generator.integers(0, half, length) + half * ((user + swap) % 2) for user in users]
    return Stage(number, [f"u{u}" for u in users], Ragged.of([[]] * len(rows)), Ragged.of(rows))


def cycles(number: int, users: int, step: int = 1, length: int = 9) -> Stage:
    """Everyone goes round: after item i comes i + step."""
    starts = np.random.default_rng(number).integers(0, ITEMS, users)
    rows = [(start + step * np.arange(length)) % ITEMS for start in starts]
    return Stage(number, [f"u{u}" for u in range(users)], Ragged.of([[]] * users), Ragged.of(rows))


def asked(users: list[str], histories: list[list[int]]) -> Cases:
    arrays = [np.array(history, dtype=np.int32) for history in histories]
    return Cases(users, arrays, np.zeros(len(users), dtype=np.int32))


@given(st.integers(1, 5), st.lists(st.integers(0, ITEMS - 1), min_size=2, max_size=9), st.data())
def test_a_later_item_changes_no_earlier_state(place: int, items: list[int], data: st.DataObject) -> None:
    network = _sasrec_for_states().network
    place = min(place, len(items) - 1)
    later = data.draw(
        st.lists(st.integers(0, ITEMS), min_size=len(items) - place, max_size=len(items) - place)
    )
    other = items[:place] + later
    window = slice(0, WINDOW)
    with torch.no_grad():
        first, second = network(torch.tensor([items[window]])), network(torch.tensor([other[window]]))
    torch.testing.assert_close(first[:, :place], second[:, :place], atol=1e-6, rtol=0)


_STATES: list[SasRec] = []


def _sasrec_for_states() -> SasRec:
    if not _STATES:
        _STATES.append(sasrec())
    return _STATES[0]


def test_an_earlier_item_does_change_a_later_state() -> None:
    network = sasrec().network
    with torch.no_grad():
        first, second = network(torch.tensor([[1, 2, 3]])), network(torch.tensor([[4, 2, 3]]))
    assert (first[0, 2] - second[0, 2]).abs().max() > 1e-3


def test_a_stage_in_which_no_target_follows_an_item_changes_nothing() -> None:
    """The only user is new and has three events: one target, with an empty history."""
    first = cycles(0, users=12)
    only = Stage(1, ["new"], Ragged.of([[]]), Ragged.of([[1, 2, 3]]))
    inputs, targets = training_rows(only.training_sequences(), WINDOW, padding=ITEMS)
    assert inputs.shape == targets.shape == (0, WINDOW)
    assert inputs.dtype == targets.dtype == np.int64
    model = sasrec(epochs=2)
    model.learn([first], Silent())
    before = model.scores(asked(["u0"], [[1, 2]]))
    model.learn([first, only], Silent())
    np.testing.assert_array_equal(model.scores(asked(["u0"], [[1, 2]])), before)


@given(
    st.lists(
        st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 8),
)
def test_every_target_is_trained_on_once_with_a_history_of_its_own(
    shapes: list[tuple[int, int]], window: int
) -> None:
    # an item is its own place, so that each can be followed
    ends = np.cumsum([length for length, _ in shapes])
    sequences = [
        TargetSequence(f"u{n}", np.arange(end - length, end), first)
        for n, ((length, first), end) in enumerate(zip(shapes, ends, strict=True))
    ]
    expected = [int(t) for s in sequences for t in s.items[max(s.first_target, 1) :]]
    inputs, targets = training_rows(sequences, window, padding=999)
    trained = targets != NO_TARGET
    assert sorted(targets[trained].tolist()) == expected
    np.testing.assert_array_equal(targets[trained], inputs[trained] + 1)
    first_of = {int(t): int(s.items[0]) for s in sequences for t in s.items}
    for row, columns in zip(inputs, trained, strict=True):
        for column in np.flatnonzero(columns):
            seen = row[: column + 1]
            assert seen.tolist() == list(range(seen[-1] - column, seen[-1] + 1))
            available = seen[-1] - first_of[int(seen[-1])] + 1
            assert len(seen) >= min(available, window // 2 + 1)

    examples = Examples(sequences, window, padding=999)
    of, histories, own = examples.take(np.arange(len(examples)))
    assert own.tolist() == [int(t) for s in sequences for t in s.items[s.first_target :]]
    for number, history, target in zip(of, histories, own, strict=True):
        begin = int(sequences[number].items[0])
        assert history[history != 999].tolist() == list(range(max(begin, target - window), target))


def test_the_two_tower_model_learns_who_likes_what() -> None:
    model = two_tower()
    model.learn([clubs(0, range(60))], Silent())
    scores = model.scores(asked(["u0", "u1", "stranger", "stranger"], [[], [], [0, 1], [7, 8]]))
    liked = np.exp(scores)[:, : ITEMS // 2].sum(axis=1)
    assert liked[0] > 0.6 > 0.4 > liked[1]  # by the user's own vector alone
    assert liked[2] > 0.9 > 0.1 > liked[3]  # by the history alone


def test_an_unknown_user_is_the_mean_of_the_history() -> None:
    model = two_tower()
    model.learn([clubs(0, range(40))], Silent())
    scores = model.scores(asked(["a", "b", "a"], [[1, 2], [2, 1], [1, 2, 1, 2]]))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-6)
    assert np.abs(scores - model.scores(asked(["u0"] * 3, [[1, 2]] * 3))).max() > 1e-3


def test_sasrec_learns_an_order() -> None:
    model = sasrec()
    model.learn([cycles(0, 60)], Silent())
    found = model.scores(asked(["u"] * 3, [[3, 4, 5], [9, 10, 11], [2]])).argmax(axis=1)
    assert found.tolist() == [6, 0, 3]


@MAKERS
def test_scores_are_log_probabilities_and_read_no_targets(make: Callable[..., Baseline]) -> None:
    model = make(epochs=1)
    model.learn([clubs(0, range(20))], Silent())
    cases = asked(["u0", "new"], [[1, 2, 3], [0] * 10])
    scores = model.scores(cases)
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-5)
    other = Cases(cases.users, cases.histories, cases.targets + 5)
    np.testing.assert_array_equal(scores, model.scores(other))
    shorter = asked(["u0", "new"], [[1, 2, 3], [0] * WINDOW])  # what is older than the window is not read
    np.testing.assert_array_equal(scores, model.scores(shorter))


@MAKERS
def test_updates_follow_the_new_stage_and_the_static_model_does_not(make: Callable[..., Baseline]) -> None:
    stages = [cycles(0, 60), cycles(1, 60, step=5)]
    model = make()
    model.learn(stages[:1], Silent())
    cases = stages[1].test_cases(WINDOW)
    static = float(np.mean(model.scores(cases)[np.arange(len(cases)), cases.targets]))
    model.learn(stages, Silent())
    continual = float(np.mean(model.scores(cases)[np.arange(len(cases)), cases.targets]))
    assert continual > static + 0.5


@MAKERS
def test_saved_and_restored_it_goes_on_alike(make: Callable[..., Baseline], tmp_path: Path) -> None:
    """As after an interruption between two stages."""
    stages = [clubs(0, range(30)), clubs(1, range(10, 50), swap=True)]
    through, stopped, resumed = make(epochs=3), make(epochs=3), make(epochs=3)
    through.learn(stages[:1], Silent())
    through.learn(stages, Silent())
    stopped.learn(stages[:1], Silent())
    stopped.save(tmp_path)
    resumed.restore(tmp_path, stages[:1])
    resumed.learn(stages, Silent())
    cases = stages[1].test_cases(WINDOW)
    np.testing.assert_array_equal(through.scores(cases), resumed.scores(cases))


@MAKERS
def test_the_seed_fixes_everything(make: Callable[..., Baseline]) -> None:
    cases = clubs(0, range(20)).test_cases(WINDOW)

    def learnt(seed: int) -> np.ndarray:
        torch.manual_seed(seed + 77)  # what was drawn before plays no part
        model = make(seed=seed, epochs=2)
        model.learn([clubs(0, range(20))], Silent())
        return model.scores(cases)

    np.testing.assert_array_equal(learnt(3), learnt(3))
    assert np.abs(learnt(3) - learnt(4)).max() > 1e-3


@MAKERS
def test_the_best_epoch_is_kept(make: Callable[..., Network]) -> None:
    stage = clubs(0, range(8))
    model = make(epochs=12, patience=12, learning_rate=0.05)  # few users: it soon learns them by heart
    figures = model.learn([stage], Silent())
    results = list(zip(figures["validation_ndcg"], (-x for x in figures["validation_loss"]), strict=True))
    assert len(results) == 12
    assert results[figures["best_epoch"] - 1] == max(results)
    assert figures["best_epoch"] < 12
    validation = model.validation([stage])
    assert validation.ndcg_of(model) == max(figures["validation_ndcg"])
    cases = validation.cases
    found = -np.take_along_axis(model.scores(cases), cases.targets[:, None], axis=1).mean()
    assert found == pytest.approx(-max(results)[1], rel=1e-5)


def test_patience_ends_a_stage_after_epochs_without_a_better_ranking_or_a_lower_loss() -> None:
    stage = clubs(0, range(8))
    long = sasrec(epochs=12, patience=12, learning_rate=0.05).learn([stage], Silent())
    figures = sasrec(epochs=12, patience=2, learning_rate=0.05).learn([stage], Silent())
    done = len(figures["validation_ndcg"])
    losses = figures["validation_loss"]
    assert done == max(figures["best_epoch"], 1 + losses.index(min(losses))) + 2 < 12
    assert figures["validation_ndcg"] == long["validation_ndcg"][:done]


def test_a_stage_goes_on_while_only_one_of_ranking_and_loss_improves(monkeypatch: pytest.MonkeyPatch) -> None:
    ndcg, loss = iter([0.2, 0.1, 0.1, 0.1, 0.3, 0.3, 0.3]), iter([5.0, 4.0, 3.0, 2.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(Validation, "ndcg_of", lambda *_: next(ndcg))
    monkeypatch.setattr(fitting, "_target_loss", lambda *_: next(loss))
    figures = sasrec(epochs=12, patience=2).learn([clubs(0, range(8))], Silent())
    assert (figures["best_epoch"], len(figures["validation_loss"])) == (5, 7)


def test_what_is_read_is_larger_than_what_the_layers_add_at_first() -> None:
    network = SasRec(setting(200, WINDOW), width=64).network
    items = torch.arange(198).reshape(-1, WINDOW)
    with torch.no_grad():
        read = 8.0 * network.item(items) + network.place.weight[:WINDOW]
        after = read
        for layer in network.layers.layers:
            after = layer(after, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(WINDOW))
    torch.testing.assert_close(network(items), network.layers.norm(after), atol=1e-5, rtol=1e-5)
    assert (after - read).square().mean() < read.square().mean()


@MAKERS
def test_a_network_whose_loss_is_not_finite_is_an_error(make: Callable[..., Network]) -> None:
    with pytest.raises(Divergence, match=r"stage 0.*1e\+30.*lower learning_rate"):
        make(learning_rate=1e30).learn([cycles(0, users=40)], Silent())


@MAKERS
def test_a_setting_whose_loss_is_not_finite_is_never_chosen(
    make: Callable[..., Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(make())
    settings = [{**dict(kind.SETTINGS[0]), "learning_rate": rate} for rate in (1e30, 1e-3)]
    monkeypatch.setattr(kind, "SETTINGS", tuple(settings))
    model = make(learning_rate=None)
    found = model.learn([cycles(0, users=40)], Silent())
    assert model.chosen is not None
    assert model.chosen["learning_rate"] == 1e-3
    assert [entry["ndcg"] > 0 for entry in found["tried"]] == [False, True]
    assert np.isfinite(model.scores(asked(["u0"], [[1, 2]]))).all()


@pytest.mark.slow
@MAKERS
def test_what_is_open_is_chosen_by_halving_and_learned_as_if_it_had_been_given(
    make: Callable[..., Network], tmp_path: Path
) -> None:
    stages = [cycles(0, 30), cycles(1, 30, step=5)]
    open_options = dict.fromkeys(make().SETTINGS[0])
    model = make(epochs=17, patience=17, **open_options)
    figures = model.learn(stages[:1], Silent())
    assert sorted(trial["epochs"] for trial in figures["tried"]) == [8] * 4 + [16] * 2 + [17] * 2
    (best,) = [each for each in figures["tried"] if figures["chosen"].items() <= each.items()]
    assert best["epochs"] == 17
    assert best["ndcg"] == max(each["ndcg"] for each in figures["tried"] if each["epochs"] == 17)

    alone = make(epochs=17, patience=17, **figures["chosen"])
    assert alone.learn(stages[:1], Silent())["validation_loss"] == figures["validation_loss"]
    cases = stages[0].test_cases(WINDOW)
    np.testing.assert_array_equal(alone.scores(cases), model.scores(cases))

    model.save(tmp_path)
    restored = make(epochs=17, patience=17, **open_options)
    restored.restore(tmp_path, stages[:1])
    np.testing.assert_array_equal(restored.scores(cases), model.scores(cases))
    later = restored.learn(stages, Silent())  # keeps the choice
    assert later["chosen"] == figures["chosen"]
    assert later["tried"] == []


def test_batches_hold_every_example_once_and_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 999)
    batches = shuffled(lengths, 16, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(999))
    assert max(len(batch) for batch in batches) == 16
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 8
    other = shuffled(lengths, 16, np.random.default_rng(2))
    assert [batch.tolist() for batch in batches] != [batch.tolist() for batch in other]


def test_padding_is_no_part_of_the_loss() -> None:
    stage = clubs(0, range(6), length=5)
    losses = []
    for window in (4, 9):
        model = SasRec(setting(ITEMS, window), width=16, learning_rate=0.01, dropout=0.0)
        with torch.no_grad():
            places = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
            for name, tensor in sasrec().network.state_dict().items():
                model.network.state_dict()[name].copy_(places[:window] if name == "place.weight" else tensor)
        loss_of, lengths = model.examples(stage)
        losses.append(float(loss_of(np.arange(len(lengths))).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_states_of_sasrec_are_those_of_gpt2_with_its_weights() -> None:
    """GPT-2 of Transformers is another implementation of pre-norm causal layers with learned positions."""
    from transformers import GPT2Config, GPT2Model

    own = sasrec(layers=2, heads=4).network
    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": WINDOW, "vocab_size": ITEMS + 1}
    other = GPT2Model(GPT2Config(**sizes, activation_function="gelu")).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    state = {"wte.weight": 4 * own.item.weight, "wpe.weight": own.place.weight}  # √16
    state |= {f"ln_f.{name}": p for name, p in own.layers.norm.named_parameters()}
    for number, layer in enumerate(own.layers.layers):
        parts = {
            "ln_1": layer.norm1,
            "attn.c_proj": layer.self_attn.out_proj,
            "ln_2": layer.norm2,
            "mlp.c_fc": layer.linear1,
            "mlp.c_proj": layer.linear2,
        }
        named = {f"{name}.{key}": p for name, part in parts.items() for key, p in part.named_parameters()}
        named["attn.c_attn.weight"] = layer.self_attn.in_proj_weight
        named["attn.c_attn.bias"] = layer.self_attn.in_proj_bias
        # GPT-2 stores the matrices of its linear layers transposed
        state |= {f"h.{number}.{name}": p.T if p.ndim == 2 else p for name, p in named.items()}
    missing = other.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert not [name for name in missing.missing_keys if not name.endswith(("attn.bias", "masked_bias"))]
    items = torch.randint(0, ITEMS, (5, WINDOW), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(items), other(items).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_the_sampled_softmax_approaches_the_exact_one() -> None:
    network = sasrec().network
    generator = torch.Generator().manual_seed(0)
    states = 3 * torch.randn(40, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, ITEMS, (40,), generator=generator)
    proposal = torch.arange(1.0, ITEMS + 1) / sum(range(1, ITEMS + 1))
    exact = network.log_probabilities(states).gather(1, targets[:, None])[:, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        far, near = (
            network.sampled_log_probabilities(states, targets, proposal, count) for count in (20, 200_000)
        )
    torch.testing.assert_close(near, exact, atol=0.02, rtol=0)
    assert (far - exact).abs().max() > 0.05
    (expected,) = torch.autograd.grad(exact.sum(), states)
    (found,) = torch.autograd.grad(near.sum(), states)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_negatives_are_drawn_from_large_catalogs_or_as_many_as_are_asked_for() -> None:
    options = sasrec().options
    assert (options.drawn(5_000), options.drawn(5_001)) == (0, 512)
    assert [SasRec.Options(name="sasrec", negatives=n).drawn(9_000) for n in (0, 7)] == [0, 7]
    model = sasrec(negatives=8)
    model.learn([cycles(0, 60)], Silent())
    found = model.scores(asked(["u"] * 3, [[3, 4, 5], [9, 10, 11], [2]])).argmax(axis=1)
    assert found.tolist() == [6, 0, 3]


@MAKERS
def test_a_catalogue_that_grew_keeps_what_was_learnt(make: Callable[..., Baseline], tmp_path: Path) -> None:
    stage = clubs(0, range(20))
    model, larger = make(epochs=2), make(epochs=2, items=ITEMS + 3)
    model.learn([stage], Silent())
    model.save(tmp_path)
    larger.restore(tmp_path, [stage])
    cases = stage.test_cases(WINDOW)
    before, after = model.scores(cases), larger.scores(cases)[:, :ITEMS]
    np.testing.assert_allclose(
        after - after[:, :1], before - before[:, :1], atol=1e-5
    )  # the same but for the normalisation


def test_heads_that_do_not_share_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="width 16 is not a multiple of heads 3"):
        sasrec(heads=3)

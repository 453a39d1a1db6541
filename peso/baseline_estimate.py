"""What the baselines of a run will take: for the dry runs of `peso run` and `peso compare`.

Knows how a baseline learns and answers, timed on a few users of stage 0; knows nothing of terminals. A
network stops early, so its figure is the most that it may take.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from peso.baselines.answers import BaselineAnswers
from peso.baselines.ease import ease_weights
from peso.baselines.registry import make_baseline
from peso.config import Config
from peso.config.baselines import EaseConfig, NetworkOptions, PlainBaselineConfig
from peso.events.histories import Ragged, Stage
from peso.items.trie import ItemTrie
from peso.progress import Silent
from peso.training.precision import Precision

TIMED_USERS = 100
EASE_ITEMS = 1500  # that the dense system is timed with


def baseline_seconds(
    options: PlainBaselineConfig, settings: Config, stages: Sequence[Stage], trie: ItemTrie
) -> float:
    """Seconds to learn and test a baseline on all these stages, updated and static, at most."""
    window = settings.prompt.window
    sample = _some_users(stages[0])
    timed, times = options, float(len(stages))
    if isinstance(options, NetworkOptions):
        timed = options.model_copy(update={"epochs": 1})
        times = options.epochs * sum(map(_targets, stages)) / max(1, _targets(sample))
    solving = 0.0
    if isinstance(options, EaseConfig):
        solving = len(stages) * _seconds_to_solve(min(options.items, len(trie.leaf_of)))
        timed = options.model_copy(update={"items": 1})
    device = Precision.of("float32", settings.training.device).device
    baseline = make_baseline(timed, trie, window, settings.seed, device)
    began = time.perf_counter()
    baseline.learn([sample], Silent())
    learning = (time.perf_counter() - began) * times + solving
    cases = sample.test_cases(window)
    began = time.perf_counter()
    BaselineAnswers(baseline, trie).answer(cases, settings.decoding.beams, lambda done: None)
    a_case = (time.perf_counter() - began) / max(1, len(cases))
    tested = len(stages[0].eligible()) + 2 * sum(len(stage.eligible()) for stage in stages[1:])
    return learning + tested * a_case


def _seconds_to_solve(items: int) -> float:
    """Of EASE's dense system, from that of a smaller one: time grows with the cube."""
    timed = min(items, EASE_ITEMS)
    began = time.perf_counter()
    ease_weights(np.eye(timed) + 1.0, 1.0)
    return (time.perf_counter() - began) * (items / timed) ** 3


def _some_users(stage: Stage) -> Stage:
    """The stage with a few of its users that take part."""
    rows = stage.eligible()
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), TIMED_USERS)).astype(int)]
    return Stage(
        stage.number,
        [stage.users[row] for row in rows],
        Ragged.of(stage.previous[row] for row in rows),
        Ragged.of(stage.current[row] for row in rows),
    )


def _targets(stage: Stage) -> int:
    return int((stage.current.lengths[stage.eligible()] - 2).sum())

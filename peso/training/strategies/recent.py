"""``recent``: each stage is trained together with a fixed share of the events just before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from peso.events.histories import TargetSequence
from peso.training.strategies.strategy import StageContext, Strategy


class Recent(Strategy):
    """``single`` on the new stage and on the most recent targets of the stage before.

    There are ``share`` times as many replayed targets as new ones: the last targets of every user of the
    previous stage, equally many for each user as far as there are so many; those left over are drawn. Nothing
    is stored, unlike with ``replay``.
    """

    name = "recent"
    moves_one_adapter = True
    chooses_by_data = True

    class Options(Strategy.Options):
        share: float = Field(0.25, gt=0, le=10, description="replayed targets for each new target")

    options: Options

    def choose(self, context: StageContext) -> Sequence[TargetSequence] | None:
        assert context.examples is not None
        new, before = (context.examples.of(context.number - past) for past in (0, 1))
        count = round(self.options.share * sum(sequence.targets for sequence in new))
        return [*new, *latest(before, count, np.random.default_rng((context.seed, context.number)))]


def latest(sequences: Sequence[TargetSequence], count: int, rng: np.random.Generator) -> list[TargetSequence]:
    """The sequences with only their last targets, ``count`` in all (or all, if there are fewer): the last
    ``depth`` of each sequence, and one more of some, which are drawn. Sequences without targets are left
    out."""
    targets = np.array([sequence.targets for sequence in sequences], dtype=np.int64)
    depth = 0
    while depth < targets.max(initial=0) and np.minimum(targets, depth + 1).sum() <= count:
        depth += 1
    taken, longer = np.minimum(targets, depth), np.flatnonzero(targets > depth)
    taken[rng.choice(longer, min(count - taken.sum(), len(longer)), replace=False)] += 1
    return [
        TargetSequence(sequence.user, sequence.items, len(sequence.items) - number)
        for sequence, number in zip(sequences, taken.tolist(), strict=True)
        if number
    ]

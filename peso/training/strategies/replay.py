"""``replay``: each stage is trained together with a sample of earlier data, whose size is fixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from peso.events.histories import TargetSequence
from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor

VALUES, OFFSETS, FIRST, SEEN = "replay.items", "replay.offsets", "replay.first_target", "replay.seen"


class Replay(Strategy):
    """``single`` on the new stage and a sample of earlier stages.

    The sample consists of ``budget`` target sequences, drawn uniformly by reservoir sampling (Vitter 1985,
    algorithm R). It is stored with the stage, so the log of earlier stages is not needed.
    """

    name = "replay"
    reads = needs = frozenset({"replay"})
    moves_one_adapter = True
    chooses_by_data = True

    class Options(Strategy.Options):
        budget: int = Field(1000, ge=1, description="number of target sequences kept from earlier stages")

    options: Options

    def choose(self, context: StageContext) -> Sequence[TargetSequence] | None:
        assert context.examples is not None
        kept, seen = stored(context.memory)
        # all stages before the previous one are in the reservoir already
        rng = np.random.default_rng((context.seed, context.number))
        for sequence in context.examples.of(context.number - 1):
            seen += 1
            sequence = trimmed(sequence, context.examples.window)
            if len(kept) < self.options.budget:
                kept.append(sequence)
            elif (place := int(rng.integers(0, seen))) < self.options.budget:
                kept[place] = sequence
        context.memory.update(as_tensors(kept, seen))
        return [*context.examples.of(context.number), *kept]


def trimmed(sequence: TargetSequence, window: int) -> TargetSequence:
    """The sequence without the items more than one window before its first target, which training does not
    read."""
    start = max(0, sequence.first_target - window)
    return TargetSequence(sequence.user, sequence.items[start:], sequence.first_target - start)


def as_tensors(kept: Sequence[TargetSequence], seen: int) -> dict[str, Tensor]:
    """The reservoir as tensors to store.

    Args:
        kept: the sequences in the reservoir.
        seen: the number of sequences that were drawn from so far.
    """
    import torch

    lengths = [len(sequence.items) for sequence in kept]
    return {
        VALUES: torch.from_numpy(np.concatenate([sequence.items for sequence in kept]).astype(np.int32)),
        OFFSETS: torch.tensor(np.cumsum([0, *lengths])),
        FIRST: torch.tensor([sequence.first_target for sequence in kept]),
        SEEN: torch.tensor(seen),
    }


def stored(memory: dict[str, Tensor]) -> tuple[list[TargetSequence], int]:
    """The reservoir and ``seen`` that :func:`as_tensors` stored. The users' names are empty, because training
    does not use them."""
    if SEEN not in memory:
        return [], 0
    values, offsets = memory[VALUES].numpy(), memory[OFFSETS].tolist()
    spans = zip(offsets, offsets[1:], memory[FIRST].tolist(), strict=False)
    return [TargetSequence("", values[a:b], first) for a, b, first in spans], int(memory[SEEN])

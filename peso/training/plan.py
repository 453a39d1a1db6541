"""The batches of a stage, which are planned before training starts, and the examples for strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor

from peso.config import TrainingConfig
from peso.errors import TrainingError
from peso.events.histories import Stage, TargetSequence
from peso.model.generative import GenerativeModel
from peso.model.layout import PromptLayout
from peso.model.tree_attention import serves
from peso.runtime.device import Precision
from peso.runtime.machine import require_memory
from peso.runtime.processes import ALONE, Processes
from peso.training.batches import Chunk, Packed, cut, deal, lay_out, pack, plan_epoch
from peso.training.likelihood import (
    predicts_end,
    target_states,
    target_token_log_probabilities,
    tokens_of_target,
)

# The limits of `pack`: tokens of a row, tokens of a pass, significant binary digits of a row's length. On a
# CPU, one row per pass is as fast as many, and needs the least memory. Tree attention computes only visible
# pairs of tokens, so its rows may be longer than those of dense attention. A GPU needs large passes, because
# launching kernels dominates small ones, and few shapes, because planning attention for a new shape takes
# longer than a pass.
ALONG_TREES, DENSE_ON_CPU, ELSEWHERE = (1152, 1152, 64), (384, 384, 64), (768, 32768, 6)
SHARE_OF_MEMORY = 0.7  # of a GPU, for the activations that a pass stores for its backward pass
MOST_BRANCHES = 16  # with more targets per chunk, attention to branches costs more than sharing saves


def budget(model: GenerativeModel) -> tuple[int, int, int]:
    """The limits of :func:`~peso.training.batches.pack` for a model on its device: tokens of a row, tokens of
    a pass, binary digits of a row's length."""
    if model.device.type != "cpu":
        row, most, digits = ELSEWHERE
        return row, min(most, _tokens_that_fit(model)), digits
    return ALONG_TREES if serves(model.causal_lm) else DENSE_ON_CPU


def _tokens_that_fit(model: GenerativeModel) -> int:
    """The number of tokens for which a GPU can store activations. It depends on the total memory and not on
    the free memory, so that it is the same in every run."""
    if model.device.type != "cuda":
        return ELSEWHERE[1] // 2
    config = model.causal_lm.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    # 3 bytes per value for the input of each projection after dropout and for its mask, and 2 bytes per value
    # for activations between projections; within 10 % of measurements in bfloat16, with LoRA and dropout on
    # seven projections
    each = config.num_hidden_layers * (34 * width + 11 * inner) * model.dtype.itemsize // 2
    return int(SHARE_OF_MEMORY * torch.cuda.get_device_properties(model.device).total_memory) // each


def most_targets(layout: PromptLayout) -> int | None:
    """The largest useful number of targets in one chunk; None if there is no limit."""
    return MOST_BRANCHES if layout.branches else None


class StagePlan:
    """The batches of a stage. ``len(plan)`` is the number of optimizer steps.

    Args:
        sequences: the stage's training targets with the items before them.
        window: the window of the prompt layout.
        settings: the section ``training`` of the configuration, for the epochs, the batch size and the
            largest number of steps.
        seed: the seed of the run. Together with the stage, it determines the order of every epoch.
        most: the largest number of targets in one chunk, see :func:`most_targets`. The batch size is always a
            limit.

    Raises:
        TrainingError: there are no targets.
        ConfigError: the plan of so many epochs does not fit in memory.
    """

    def __init__(
        self,
        sequences: Sequence[TargetSequence],
        window: int,
        settings: TrainingConfig,
        seed: int,
        stage: int,
        most: int | None = None,
    ) -> None:
        self.sequences = sequences
        self.chunks = cut(sequences, window, min(settings.batch_size, most or settings.batch_size))
        if not self.chunks:
            raise TrainingError(
                f"stage {stage} has no training targets: no user has three items in it. "
                "Use fewer stages (data.stages); if the stage was appended, remove it (`peso undo`)"
            )
        targets = np.array([chunk.targets for chunk in self.chunks])
        # an epoch has at least one step
        planned = min(settings.epochs, settings.max_steps or settings.epochs)
        require_memory(
            8 * planned * len(targets), f"training.epochs {settings.epochs:,}: the plan of stage {stage}"
        )
        epochs = (plan_epoch(targets, settings.batch_size, (seed, stage, e)) for e in range(settings.epochs))
        steps = ((epoch, batch) for epoch, batches in enumerate(epochs) for batch in batches)
        self._steps = list(islice(steps, settings.max_steps))
        self.epochs = self._steps[-1][0] + 1

    def __len__(self) -> int:
        return len(self._steps)

    def epoch(self, step: int) -> int:
        """The epoch of a step; both count from 0."""
        return self._steps[step][0]

    def ends_epoch(self, step: int) -> bool:
        """Whether a step is the last one of its epoch."""
        return step + 1 == len(self) or self.epoch(step + 1) != self.epoch(step)

    def members(self, step: int) -> list[Chunk]:
        """The chunks in the batch of a step."""
        return [self.chunks[i] for i in self._steps[step][1]]

    def targets(self, step: int) -> int:
        """The number of targets in the batch of a step."""
        return sum(chunk.targets for chunk in self.members(step))

    def batch(self, step: int, model: GenerativeModel, processes: Processes = ALONE) -> list[Packed]:
        """The forward passes of a step, on the model's device.

        With several processes, these are the passes of this process's share of the chunks, which may be
        empty. If the model is sharded over the processes, a process with fewer passes than the others also
        gets passes that do not count.
        """
        pieces = []
        for chunk in self.members(step):
            rows = self.sequences[chunk.sequence].items[chunk.start : chunk.stop]
            items, first = model.item_token_ids(rows), chunk.first - chunk.start
            pieces.append(lay_out(model.layout, items, first, predict_end=predicts_end(model), rows=rows))
        mine = deal([len(piece) for piece in pieces], processes.count)[processes.rank]
        prefix, limits = model.layout.prefix, budget(model)
        passes = pack([pieces[number] for number in sorted(mine)], prefix, *limits)
        if model.sharded and (missing := processes.largest(len(passes)) - len(passes)):
            (short,) = pack([min(pieces, key=len)], prefix, *limits)
            passes += [replace(short, tokens=0, counts=False)] * missing
        return [packed.to(model.device) for packed in passes]


class StageExamples:
    """Implements :class:`peso.training.strategies.strategy.Examples`.

    Args:
        model: the model that is trained.
        stage: a function that returns the stage with a given number.
        learning: the number of the stage that is trained. Later stages are refused.
        settings: the section ``training`` of the configuration.
        seed: the seed of the samples.
    """

    def __init__(
        self,
        model: GenerativeModel,
        stage: Callable[[int], Stage],
        learning: int,
        settings: TrainingConfig,
        seed: int,
    ) -> None:
        self.tokens = tokens_of_target(model)
        self.window = model.layout.window
        self._model = model
        self._stage = stage
        self._learning = learning
        self._settings = settings
        self._seed = seed
        self._precision = Precision.of(settings.precision, str(model.device))
        self._sequences: dict[int, list[TargetSequence]] = {}

    def of(self, stage: int) -> Sequence[TargetSequence]:
        if stage < 0:
            raise TrainingError(
                f"there is no stage {stage}: this strategy reads the stage before the one being trained, and "
                "stage 0 has none. Train stage 0 with the default strategy, as every run does"
            )
        if stage > self._learning:
            raise TrainingError(
                f"stage {stage} cannot be read while stage {self._learning} is being trained: its data come "
                "later. A strategy may read the current stage and earlier ones"
            )
        if stage not in self._sequences:
            self._sequences[stage] = self._stage(stage).training_sequences()
        return self._sequences[stage]

    def losses(self, stage: int, count: int) -> Iterator[Tensor]:
        model, layout = self._model, self._model.layout
        with self._without_dropout():
            for history, target in self._single_targets(stage, count):
                items = model.item_token_ids(np.append(history, target))
                piece = lay_out(layout, items, len(history), predict_end=predicts_end(model))
                (packed,) = pack([piece], layout.prefix, len(piece), len(piece) + len(layout.prefix))
                with self._in_precision():
                    scores = target_token_log_probabilities(
                        model, packed.to(model.device), self._settings.temperature
                    )
                    loss = -scores.mean()
                yield loss

    @torch.no_grad()
    def show(self, stage: int, count: int) -> None:
        model, sequences = self._model, self.of(stage)
        chosen = self._draw(len(sequences), count, stage)
        most = most_targets(model.layout) or self._settings.batch_size
        pieces = []
        for chunk in cut([sequences[number] for number in chosen], model.layout.window, most):
            items = sequences[chosen[chunk.sequence]].items[chunk.start : chunk.stop]
            ids = model.item_token_ids(items)
            first = chunk.first - chunk.start
            pieces.append(lay_out(model.layout, ids, first, predict_end=predicts_end(model)))
        row_tokens, *_ = budget(model)
        with self._without_dropout(), self._in_precision():
            # one row per pass, so that there is no padding that hooks would see
            for packed in pack(pieces, model.layout.prefix, row_tokens, 1):
                target_states(model, packed.to(model.device))

    def _single_targets(self, stage: int, count: int) -> Iterator[tuple[np.ndarray, int]]:
        """``count`` pairs of a history and its target, drawn uniformly from all targets of the stage."""
        sequences = self.of(stage)
        ends = np.cumsum([sequence.targets for sequence in sequences])
        for number in self._draw(int(ends[-1]), count, stage):
            row = int(np.searchsorted(ends, number, side="right"))
            sequence = sequences[row]
            place = len(sequence.items) - int(ends[row] - number)
            yield sequence.items[:place][-self._model.layout.window :], int(sequence.items[place])

    def _draw(self, size: int, count: int, stage: int) -> list[int]:
        """``count`` different numbers below ``size``, ascending; all of them if there are fewer."""
        rng = np.random.default_rng((self._seed, self._learning, stage))
        return np.sort(rng.choice(size, min(count, size), replace=False)).tolist()

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """A context in which the model is in evaluation mode."""
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)

    @contextmanager
    def _in_precision(self) -> Iterator[None]:
        """A context in which the model computes in the precision of training."""
        with disable_input_dtype_casting(self._model, self._precision.mixed), self._precision.products():
            yield

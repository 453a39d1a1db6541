"""The training examples of a run's stages, for strategies that inspect single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor

from peso.config import TrainingConfig
from peso.errors import TrainingError
from peso.events.histories import Stage, TargetSequence
from peso.model.generative import GenerativeModel
from peso.runtime.device import Precision
from peso.training.batches import cut, lay_out, pack
from peso.training.likelihood import (
    predicts_end,
    target_states,
    target_token_log_probabilities,
    tokens_of_target,
)
from peso.training.plan import budget, most_targets


class StageExamples:
    """See :class:`peso.training.strategies.strategy.Examples`.

    Args:
        stage: the stage of a number.
        learning: the number of the stage that is learned: later ones are not to be seen.
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
        self._known: dict[int, list[TargetSequence]] = {}

    def of(self, stage: int) -> Sequence[TargetSequence]:
        if stage < 0:
            raise TrainingError(
                f"there is no stage {stage}: this strategy looks at the stage before the one being trained, "
                "and stage 0 has none. Learn stage 0 with the defaults, as every run does"
            )
        if stage > self._learning:
            raise TrainingError(f"stage {stage} cannot be looked at while stage {self._learning} is trained")
        if stage not in self._known:
            self._known[stage] = self._stage(stage).training_sequences()
        return self._known[stage]

    def losses(self, stage: int, count: int) -> Iterator[Tensor]:
        model, layout = self._model, self._model.layout
        for history, target in self._single_targets(stage, count):
            items = model.item_token_ids(np.append(history, target))
            piece = lay_out(layout, items, len(history), predict_end=predicts_end(model))
            with self._still():
                (packed,) = pack([piece], layout.prefix, len(piece), len(piece) + len(layout.prefix))
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
        with self._still():
            # one row a pass: there is no padding for a hook to take for examples
            for packed in pack(pieces, model.layout.prefix, row_tokens, 1):
                target_states(model, packed.to(model.device))

    def _single_targets(self, stage: int, count: int) -> Iterator[tuple[np.ndarray, int]]:
        """A target and its history: of all the stage's targets each is as likely as any other."""
        sequences = self.of(stage)
        ends = np.cumsum([sequence.targets for sequence in sequences])
        for number in self._draw(int(ends[-1]), count, stage):
            row = int(np.searchsorted(ends, number, side="right"))
            sequence = sequences[row]
            place = len(sequence.items) - int(ends[row] - number)
            yield sequence.items[:place][-self._model.layout.window :], int(sequence.items[place])

    def _draw(self, size: int, count: int, stage: int) -> list[int]:
        rng = np.random.default_rng((self._seed, self._learning, stage))
        return np.sort(rng.choice(size, min(count, size), replace=False)).tolist()

    @contextmanager
    def _still(self) -> Iterator[None]:
        """The model without dropout, in the precision of training."""
        training = self._model.training
        self._model.eval()
        try:
            with disable_input_dtype_casting(self._model, self._precision.mixed), self._precision.products():
                yield
        finally:
            self._model.train(training)

"""The two-tower model: a score is the product of a vector of user and history with a vector of the item.

    x(u, h) = e_u + 1/|h| Σ_{i ∈ h} p_i,    score(u, h, j) = x · q_j + b_j,    P(j | u, h) = softmax_j score

where e_u is the embedding of the user, p_i that of an item in the history, and q_j that of the scored item
(as in FISM, Kabbur et al. 2013). The loss is the cross-entropy over the whole catalog, for every target with
the last ``window`` items before it. Texts and codes of items are not used.

Users with a training target in any stage so far have an embedding e_u. For all others e_u = 0, so only the
mean of the history is used. To train this case, e_u = 0 in a share ``user_dropout`` of the training cases. A
later stage starts from the weights of the previous one, and new items get newly initialized rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import Field

from peso.baselines.baseline import Setting, padded
from peso.baselines.fitting import LossOf, Network
from peso.events.histories import Cases, Stage, TargetSequence
from peso.runtime.machine import TRAINED

if TYPE_CHECKING:
    from torch import Tensor

    from peso.baselines.networks import Towers

USERS = "users.json"


class TwoTower(Network):
    """An embedding per user and item, with the mean of the items in the history."""

    name = "two-tower"
    WEIGHTS, PADDED = "two_tower.safetensors", "history"
    SETTINGS = tuple(
        {"learning_rate": rate, "dropout": dropout, "user_dropout": of_users}
        for of_users in (0.5, 0.8)
        for rate in (1e-3, 3e-3)
        for dropout in (0.2, 0.5)
    )

    class Options(Network.Options):
        user_dropout: float | None = Field(
            None,
            ge=0,
            lt=1,
            description="share of training cases without the user's embedding; default: chosen on validation",
        )

        def memory(self, items: int, users: int, window: int) -> int:
            return super().memory(items, users, window) + TRAINED * users * self.width

    options: Options

    def __init__(self, setting: Setting, **options: Any) -> None:
        super().__init__(setting, **options)
        self.users: dict[str, int] = {}  # the row of each user in the embedding table, from 1
        self.network = self.initialized()

    def examples(self, stage: Stage) -> tuple[LossOf, np.ndarray]:
        from torch import from_numpy
        from torch.nn.functional import nll_loss

        sequences = stage.training_sequences()
        self._add_users([sequence.user for sequence in sequences])
        rows = np.array([self.users[sequence.user] for sequence in sequences])
        examples = Examples(sequences, self.window, self.items)
        generator = np.random.default_rng([self.seed, stage.number, 1])

        def loss_of(numbers: np.ndarray) -> Tensor:
            of_sequence, histories, targets = examples.take(numbers)
            known = generator.random(len(numbers)) >= self.used.user_dropout
            scores = self._forward(rows[of_sequence] * known, histories)
            return nll_loss(scores, from_numpy(targets).to(self.device))

        return loss_of, np.ones(len(examples), dtype=np.int64)

    def save(self, directory: Path) -> None:
        super().save(directory)
        (directory / USERS).write_text(json.dumps(list(self.users), ensure_ascii=False), encoding="utf-8")

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        users = json.loads((directory / USERS).read_text(encoding="utf-8"))
        self.users = {user: row for row, user in enumerate(users, 1)}
        super().restore(directory, stages)

    def _add_users(self, users: Sequence[str]) -> None:
        known = len(self.users)
        for user in users:
            self.users.setdefault(user, len(self.users) + 1)
        if len(self.users) > known:
            self.load(self.state())

    def initialized(self) -> Towers:
        from peso.baselines.networks import Towers, seeded

        def make() -> Towers:
            return Towers(len(self.users), self.items, self.used.width, self.used.dropout)

        return cast(Towers, seeded([self.seed, self.items, 2], make)).to(self.device).eval()

    def log_probabilities(self, cases: Cases) -> Tensor:
        rows = np.array([self.users.get(user, 0) for user in cases.users])
        return self._forward(rows, padded(cases.histories, self.window, self.items))

    def _forward(self, rows: np.ndarray, histories: np.ndarray) -> Tensor:
        from torch import from_numpy

        return self.network(from_numpy(rows).to(self.device), from_numpy(histories).to(self.device))


class Examples:
    """The training targets with the items before them. Padded rows are created when they are needed."""

    def __init__(self, sequences: Sequence[TargetSequence], window: int, padding: int) -> None:
        self.window, self.padding = window, padding
        lengths = np.array([len(sequence.items) for sequence in sequences])
        firsts = np.array([sequence.first_target for sequence in sequences])
        starts = np.cumsum(lengths) - lengths
        self.values = np.concatenate([sequence.items for sequence in sequences]).astype(np.int64)
        self.of = np.repeat(np.arange(len(sequences)), lengths - firsts)
        self.start = starts[self.of]
        self.place = np.concatenate(
            [
                np.arange(start + first, start + n)
                for start, first, n in zip(starts, firsts, lengths, strict=True)
            ]
        )

    def __len__(self) -> int:
        return len(self.place)

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The index of the sequence (n,), the padded history (n, window) and the target (n,) of these
        examples, all int64."""
        places = self.place[numbers][:, None] + np.arange(-self.window, 0)
        inside = places >= self.start[numbers][:, None]
        histories = np.where(inside, self.values[np.maximum(places, 0)], self.padding)
        return self.of[numbers], histories, self.values[self.place[numbers]]

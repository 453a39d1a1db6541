"""The training loop of small networks, which keeps the epoch with the best validation result.

Training goes on while the ranking or the loss of validation improves. Either alone can stand still for many
epochs while the other one improves: the ranking as long as only the popularity of items has been learned, the
loss as soon as probabilities become too high.

Options without a value are chosen at stage 0 by successive halving (Jamieson and Talwalkar 2016, arXiv
1502.07943): all settings are trained for a few epochs, then the better half for the same number again, until
one is left, which is trained to the end. Later stages keep the choice. All random numbers depend only on the
seed, so training a stage again gives the same weights.
"""

from __future__ import annotations

import copy
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from peso.baselines.baseline import Setting
from peso.baselines.tuning import Tuned, Validation, described, record
from peso.config.model import MOST_EPOCHS, WIDEST
from peso.errors import Divergence
from peso.events.histories import Cases, Stage
from peso.runtime.machine import TRAINED, threads
from peso.runtime.progress import Observer, Silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MAX_GRADIENT_NORM = 1.0
VALIDATED_AT_ONCE = 256  # cases
SORTED_TOGETHER = 32  # the number of batches whose examples are sorted by length together
# The epochs of every setting before the worse half is dropped. After fewer, small learning rates that are
# better in the end are still behind (docs/results/baselines.md).
FIRST_EPOCHS = 8
LossOf = Callable[[np.ndarray], "Tensor"]


class Network(Tuned):
    """A baseline with a network. Training stops early by the NDCG of validation targets."""

    random, revision = True, 1

    class Options(Tuned.Options):
        width: int = Field(64, ge=1, le=WIDEST, description="embedding width")
        epochs: int = Field(
            20,
            ge=1,
            le=MOST_EPOCHS,
            description="maximum; the epoch with the best NDCG on validation is kept",
        )
        patience: int = Field(
            3,
            ge=1,
            description="training stops after this many epochs without a better NDCG or a lower loss",
        )
        batch_size: int = Field(256, ge=1, description="targets (two-tower) or sequences (sasrec) per step")
        learning_rate: float | None = Field(
            None, gt=0, description="of AdamW, in stage 0; default: chosen on validation"
        )
        later_learning_rate_scale: float = Field(
            1.0, gt=0, description="learning rate of later stages, relative to stage 0"
        )
        weight_decay: float | None = Field(0.01, ge=0, description="of AdamW")
        dropout: float | None = Field(
            None, ge=0, lt=1, description="dropout rate; default: chosen on validation"
        )

        def memory(self, items: int, users: int, window: int) -> int:
            return TRAINED * items * self.width + 4 * min(self.batch_size, users) * items

    WEIGHTS: ClassVar[str]
    """The name of the file of weights."""
    PADDED: ClassVar[str]
    """The name of the embedding table whose last row is padding."""

    network: Any  # an nn.Module, on the device
    options: Any

    def __init__(self, setting: Setting, **options: Any) -> None:
        import torch

        super().__init__(setting, **options)
        self.seed, self.device = setting.seed, torch.device(setting.device)
        self.used = self.options.model_copy(update=self.settings()[0])
        """The options, with a value for each one that was left open."""

    @abstractmethod
    def initialized(self) -> nn.Module:
        """A newly initialized network for all items and users so far, on the device, in evaluation mode."""

    @abstractmethod
    def examples(self, stage: Stage) -> tuple[LossOf, np.ndarray]:
        """The training examples of a stage: a function from the indices of examples to their mean loss, and
        the length of each example."""

    @abstractmethod
    def log_probabilities(self, cases: Cases) -> Tensor:
        """The log-probability of every item as the next one of each case: (n, items)."""

    def scores(self, cases: Cases) -> np.ndarray:
        from torch import no_grad

        with no_grad(), threads(self.network):
            return self.log_probabilities(cases).cpu().numpy()

    def learn(self, stages: Sequence[Stage], observer: Observer) -> dict[str, Any]:
        stage, validation, tried = stages[-1], self.validation(stages), list[dict[str, Any]]()
        if self.chosen is None and len(settings := self.settings()) > 1:
            training, tried = self._best_of(settings, stage, validation, observer)
            # adopt the winner's options, network and other state
            vars(self).update(
                {name: value for name, value in vars(training.model).items() if name != "options"}
            )
            training.model = self
        else:
            training = Training(self, stage, validation)
        self.chosen = {name: getattr(self.used, name) for name in self.SETTINGS[0]}
        training.run(self.used.epochs, observer)
        training.finish()
        return {**asdict(training.fit), **record(self.chosen, tried)}

    def save(self, directory: Path) -> None:
        from safetensors.torch import save_file

        super().save(directory)
        state = {name: tensor.contiguous() for name, tensor in self.state().items()}
        save_file(state, directory / self.WEIGHTS)

    def restore(self, directory: Path, stages: Sequence[Stage]) -> None:
        from safetensors.torch import load_file

        self.chosen = self.saved_setting(directory)
        self.used = self.options.model_copy(update=self.chosen)
        self.load(load_file(directory / self.WEIGHTS, device=str(self.device)))

    def state(self) -> dict[str, Tensor]:
        """The weights without the padding row, whose index depends on the size of the catalog."""
        state, name = self.network.state_dict(), f"{self.PADDED}.weight"
        return {**state, name: state[name][:-1]}

    def load(self, state: dict[str, Tensor]) -> None:
        """Load the weights of a model with at most the same numbers of users and items. New rows are
        initialized."""
        from torch import no_grad

        network = self.initialized()
        with no_grad():
            for name, tensor in network.state_dict().items():
                rows = state[name].to(tensor.device)
                tensor[: len(rows)] = rows
            getattr(network, self.PADDED).weight[self.items] = 0
        self.network = network

    def _best_of(
        self, settings: Sequence[dict[str, Any]], stage: Stage, validation: Validation, observer: Observer
    ) -> tuple[Training, list[dict[str, Any]]]:
        """Compare settings by successive halving. Returns the unfinished training of the best one, and the
        results of all."""
        running = [Training(self._with(setting), stage, validation) for setting in settings]
        tried: dict[int, dict[str, Any]] = {}
        before, epochs, done = 0, min(FIRST_EPOCHS, self.options.epochs), 0
        total = planned_epochs(len(settings), self.options.epochs)
        observer.begin(f"{self.name}: tune on validation of stage {stage.number}", total, "epochs")
        while len(running) > 1:
            for training in running:
                training.run(epochs, Silent())
                done += epochs - before  # even if patience ended it earlier
                observer.advance(done)
                tried[id(training)] = {**training.setting, **training.result}
            ranked = sorted(running, key=lambda each: (each.best_is_missing, -each.result["ndcg"]))  # stable
            running = ranked[: (len(ranked) + 1) // 2]
            before, epochs = epochs, min(2 * epochs, self.options.epochs)
        observer.end()
        best = described(running[0].setting)
        observer.note(f"{self.name}: {best}, the best of {len(settings)} on validation")
        return running[0], list(tried.values())

    def _with(self, setting: dict[str, Any]) -> Self:
        """A new baseline with this setting."""
        given = {name: value for name, value in self.options.given().items() if value is not None}
        return type(self)(self.setting, **{**given, **setting})


class Training:
    """The training of a network on a stage. It can stop after any epoch and continue with the same result.

    Args:
        model: the network to train.
        validation: the validation cases of the stage.
    """

    def __init__(self, model: Network, stage: Stage, validation: Validation) -> None:
        import torch

        self.model, self.validation, self.stage = model, validation, stage.number
        self.diverged = False
        self.setting = {name: getattr(model.used, name) for name in model.SETTINGS[0]}
        self.loss_of, self.lengths = model.examples(stage)
        used = model.used
        rate = used.learning_rate * (used.later_learning_rate_scale if stage.number else 1.0)
        self.optimizer = torch.optim.AdamW(
            model.network.parameters(), lr=rate, weight_decay=used.weight_decay
        )
        self.generator = np.random.default_rng([model.seed, stage.number])
        self.fit = Fit(0, [], [], len(self.lengths), 0.0)
        self.best = copy.deepcopy(model.network.state_dict())

    @property
    def result(self) -> dict[str, Any]:
        """The NDCG of the best epoch so far, and the number of epochs with a finite loss."""
        return {"ndcg": max(self.fit.validation_ndcg, default=0.0), "epochs": len(self.fit.validation_ndcg)}

    @property
    def last_gain(self) -> int:
        """The last epoch with a better NDCG or a lower loss than all before it; 0 before the first epoch."""
        losses = self.fit.validation_loss
        return max(self.fit.best_epoch, 1 + losses.index(min(losses))) if losses else 0

    @property
    def best_is_missing(self) -> bool:
        """Whether no epoch so far has a finite loss."""
        return not self.fit.validation_ndcg

    def run(self, until: int, observer: Observer) -> None:
        """Train until ``until`` epochs are completed, until ``patience`` epochs improved neither the NDCG nor
        the loss of validation, or until the loss is not finite."""
        import torch

        from peso.runtime.device import reproducible

        model, fit, batch = self.model, self.fit, self.model.used.batch_size
        steps, began = -(-fit.examples // batch), time.perf_counter()
        observer.begin("learn", steps * until, "steps")
        with (
            torch.random.fork_rng(devices=_devices(model.device)),
            reproducible(model.device),
            threads(model.network),
        ):
            for epoch in range(len(fit.validation_loss), until):
                if self.diverged or epoch - self.last_gain >= model.used.patience:
                    break
                torch.manual_seed(int(self.generator.integers(2**31)))  # for dropout and negatives
                model.network.train()
                for step, rows in enumerate(shuffled(self.lengths, batch, self.generator), 1):
                    self.optimizer.zero_grad()
                    loss = self.loss_of(rows)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.network.parameters(), MAX_GRADIENT_NORM)
                    self.optimizer.step()
                    observer.advance(epoch * steps + step, epoch=epoch + 1, loss=float(loss.detach()))
                model.network.eval()
                self._validate()
        observer.end()
        fit.seconds += time.perf_counter() - began

    def _validate(self) -> None:
        """Validate, and keep the weights if their NDCG is the best so far; of equal ones, the lower loss.

        An epoch without a finite loss is not counted. Its ranks would be wrong: nothing is above a NaN.
        """
        fit, loss = self.fit, _target_loss(self.model, self.validation.cases)
        self.diverged = not math.isfinite(loss)
        if self.diverged:
            return
        fit.validation_loss.append(loss)
        fit.validation_ndcg.append(self.validation.ndcg_of(self.model))
        results = list(zip(fit.validation_ndcg, (-loss for loss in fit.validation_loss), strict=True))
        if max(range(len(results)), key=results.__getitem__) == len(results) - 1:
            fit.best_epoch = len(results)
            self.best = copy.deepcopy(self.model.network.state_dict())

    def finish(self) -> None:
        """Load the weights of the best epoch and set evaluation mode.

        Raises:
            Divergence: no epoch has a finite loss.
        """
        if self.best_is_missing:
            raise Divergence(
                f"{self.model.name}, stage {self.stage}: the loss is not finite after the first epoch with a "
                f"learning rate of {self.optimizer.param_groups[0]['lr']:g}; use a lower learning_rate for "
                "this baseline"
            )
        self.model.network.load_state_dict(self.best)
        self.model.network.eval()


@dataclass
class Fit:
    """The results of a training.

    Attributes:
        best_epoch: the epoch whose weights are kept, counted from 1.
        validation_loss: the validation loss of each epoch, in nats per target.
        validation_ndcg: the validation NDCG of each epoch.
        examples: the number of training examples.
        seconds: the computing time.
    """

    best_epoch: int
    validation_loss: list[float]
    validation_ndcg: list[float]
    examples: int
    seconds: float


def planned_epochs(settings: int, most: int) -> int:
    """The total number of epochs that successive halving takes.

    Args:
        settings: the number of settings.
        most: the largest number of epochs of a setting.

    >>> planned_epochs(8, most=100), planned_epochs(8, most=4), planned_epochs(1, most=4)
    (128, 32, 0)
    """
    total, done, epochs = 0, 0, min(FIRST_EPOCHS, most)
    while settings > 1:
        total += settings * (epochs - done)
        settings, done, epochs = (settings + 1) // 2, epochs, min(2 * epochs, most)
    return total


def shuffled(lengths: np.ndarray, batch: int, generator: np.random.Generator) -> list[np.ndarray]:
    """The indices of all examples in random batches of similar lengths, so that there is little padding."""
    order = generator.permutation(len(lengths))
    together = batch * SORTED_TOGETHER
    groups = [order[begin : begin + together] for begin in range(0, len(order), together)]
    groups = [group[np.argsort(lengths[group], kind="stable")] for group in groups]
    batches = [group[begin : begin + batch] for group in groups for begin in range(0, len(group), batch)]
    return [batches[number] for number in generator.permutation(len(batches))]


def _target_loss(model: Network, cases: Cases) -> float:
    """The mean negative log-probability of the targets; 0 if there are no cases."""
    from torch import from_numpy, no_grad

    total = 0.0
    for begin in range(0, len(cases), VALIDATED_AT_ONCE):
        some = cases.take(np.arange(begin, min(begin + VALIDATED_AT_ONCE, len(cases))))
        with no_grad():
            scores = model.log_probabilities(some)
        own = from_numpy(some.targets.astype(np.int64)).to(scores.device)
        total -= float(scores.gather(1, own[:, None]).double().sum())
    return total / max(1, len(cases))


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []

"""What `tests/runs/test_processes.py` does in several processes, and with sharded weights
`tests/runs/test_sharding.py`; each process writes what it found to its own file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import Launched
from plain_path import cases_of, random_sequences
from torch import Tensor
from torch.distributed.tensor import DTensor

from peso.config import TrainingConfig
from peso.decoding import search
from peso.errors import DataError, PesoError
from peso.events.histories import TargetSequence
from peso.model.build import round_frozen
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.model.sharding import mesh_of, shard
from peso.runtime.processes import ALONE, Processes, join
from peso.training.likelihood import target_log_probabilities
from peso.training.loop import train_stage
from peso.training.strategies.distill import Distill
from peso.training.strategies.peso import Peso
from peso.training.strategies.strategy import ForwardPass, StageContext, Strategy
from peso.training.task import Progress, StageTask

MANY = random_sequences(0, count=12, longest=8)
ONE = [
    TargetSequence("alone", sequence.items, 1)
    for sequence in random_sequences(3, 9, 9)
    if len(sequence.items) > 8
]
CASES = cases_of([s for s in random_sequences(1, count=19, longest=9) if len(s.items) > 1], 20)


class Softened(Strategy):
    """A penalty on outputs: target tokens should be less certain. Exact however a batch is passed."""

    def output_penalty(self, context: StageContext, outputs: ForwardPass) -> Tensor:
        probabilities = outputs.log_probabilities()
        return 0.3 * (probabilities.exp() * probabilities).sum(-1).mean()


STRATEGIES = {"single": Strategy, "peso": lambda: Peso(weight=20.0, reduction="sum"), "softened": Softened}
ALSO = {"distill": Distill}  # runs the model again within a pass


class Stop:
    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, progress: Progress) -> None:
        if progress.step == self.step:
            raise KeyboardInterrupt


def train(
    model: GenerativeModel,
    directory: Path,
    processes: Processes = ALONE,
    strategy: str = "single",
    sequences: list[TargetSequence] = MANY,
    stop: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """The training's losses and what it learnt."""
    result = train_stage(
        model,
        StageTask(
            sequences,
            CASES,
            TrainingConfig(**{"epochs": 2, "batch_size": 8, "device": "cpu", "warmup": 0, **settings}),
            stage=1,
            learning_rate=1e-2,
            strategy={**STRATEGIES, **ALSO}[strategy](),
            seed=7,
            directory=directory / "checkpoint",
            log=directory / "log.jsonl",
            on_progress=Stop(stop),
            checkpoint_seconds=0.0,
            processes=processes,
        ),
    )
    return {
        "training": result.training_losses,
        "validation": result.validation_losses,
        "targets": result.targets,
        "learnt": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
    }


def answers(model: GenerativeModel, processes: Processes = ALONE) -> list[Any]:
    """Searches and likelihoods of many cases and of one."""
    found = []
    for cases in (CASES, CASES.take([0])):
        beams = search(model.eval(), cases.histories, beams=10, batch_size=4, processes=processes)
        likelihood = target_log_probabilities(model, cases, 200, processes=processes)
        found.append([torch.from_numpy(x) for x in (beams.leaves, beams.scores, likelihood)])
    return found


def fresh(directory: Path) -> GenerativeModel:
    return torch.load(directory / "model.pt", weights_only=False)


def fresh_bfloat16(directory: Path) -> GenerativeModel:
    model = fresh(directory)
    round_frozen(model, torch.bfloat16)
    return model


def sharded(model: GenerativeModel, processes: Processes) -> GenerativeModel:
    shard(model, mesh_of("cpu", processes.count), torch.device("cpu"))
    return model


def bytes_held(model: GenerativeModel) -> dict[str, int]:
    """Bytes of the frozen weights of the layers, and of all other parameters, that this process stores."""
    held = {"layers": 0, "others": 0}
    for name, p in model.named_parameters():
        own = p.to_local() if isinstance(p, DTensor) else p
        place = "layers" if ".layers." in name and "lora_" not in name else "others"
        held[place] += own.untyped_storage().nbytes()
    return held


def with_shards(directory: Path, processes: Processes) -> dict[str, Any]:
    """What :func:`everything` finds with sharded weights, and with options that touch them."""

    def new() -> GenerativeModel:
        return sharded(fresh(directory), processes)

    model, rounded = new(), sharded(fresh_bfloat16(directory), processes)
    merged, beside = (
        sharded(for_inference(each), processes) for each in (fresh(directory), fresh_bfloat16(directory))
    )
    return {
        "held": bytes_held(model),
        "distill": train(model, directory / "distill", processes, "distill"),
        "held after training": bytes_held(model),
        "checkpointing": train(new(), directory / "again", processes, gradient_checkpointing=True),
        "bfloat16": train(rounded, directory / "bfloat16", processes, precision="bfloat16"),
        "merged": answers(merged, processes),
        "beside": answers(beside, processes),
        **everything(directory, processes, new),
    }


def everything(directory: Path, processes: Processes, fresh: Callable[[], GenerativeModel]) -> dict[str, Any]:
    found: dict[str, Any] = {"answers": answers(fresh(), processes)}
    for strategy in STRATEGIES:
        found[strategy] = train(fresh(), directory / strategy, processes, strategy)
    found["one user"] = train(fresh(), directory / "one", processes, sequences=ONE)
    try:
        train(fresh(), directory / "stopped", processes, "peso", stop=4)
    except KeyboardInterrupt:
        found["stopped"] = True
    return found


def errors(processes: Processes) -> list[str]:
    """What each process is told when the main one fails, and when they are not alike."""

    def fail() -> None:
        raise DataError("no such file")

    told = [str(processes.on_main(lambda: f"written by {processes.rank}"))]
    for work in (
        lambda: processes.on_main(fail),
        lambda: processes.require_same(str(processes.rank), "rank"),
    ):
        try:
            work()
        except PesoError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def find(directory: Path) -> None:
    joined = join("cpu")
    found = {"errors": errors(joined), **everything(directory, joined, partial(fresh, directory))}
    torch.save(found, directory / f"found.{joined.rank}.pt")


def find_with_shards(directory: Path) -> None:
    joined = join("cpu")
    torch.save(with_shards(directory, joined), directory / f"found.{joined.rank}.pt")


def found_by_two(directory: Path, work: Callable[[Path], None]) -> list[dict[str, Any]]:
    launched = Launched(2, directory / "told", work, directory)
    assert launched.wait(2800) == [0, 0], launched.err(0) + launched.err(1)
    return [torch.load(directory / f"found.{rank}.pt") for rank in range(2)]

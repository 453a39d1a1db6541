"""The phases of a stage: the settings and the start of each training, and the results of finished ones, which
are stored in case the stage is interrupted later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from peso.baselines.popularity import item_counts
from peso.config import Config, TrainingConfig
from peso.errors import WorkspaceError
from peso.model.generative import GenerativeModel
from peso.runs.models import begin_new_codes, context_of, inherited_memory, starting_model
from peso.runs.stage import RunStage
from peso.runs.trust import strategy_of
from peso.runtime.files import read_sealed, write_sealed
from peso.training.rate_trials import Rates
from peso.training.strategies.strategy import StageContext, Strategy

FINISHED = "finished.safetensors"


def training_of(
    config: Config, strategy: Strategy, stage: int, phase: str
) -> tuple[TrainingConfig, list[Rates]]:
    """The settings of a training and its candidate rates, ascending; several if trials choose one.

    A training that starts from scratch uses the settings of stage 0; its rates are chosen by trials if those
    of updates are.
    """
    training, later = config.training, config.training.later
    anew = stage == 0 or strategy.starts_anew(phase)
    settings = training if anew else training.of_update()
    rows = [settings.rows_learning_rate_scale]
    if stage and later.learning_rate == "auto":
        assert later.trials is not None
        products = [training.learning_rate * scale for scale in later.trials.scales]
        rates = sorted({float(f"{rate:.6g}") for rate in products})  # without rounding errors
    else:
        rates = [training.learning_rate if anew else training.rate_of_update]
    if stage and later.rows_learning_rate_scale == "auto":
        assert later.trials is not None
        rows = sorted(set(later.trials.rows))
    return settings, [Rates(rate, scale) for rate in rates for scale in rows]


def directory_of(unfinished: Path, strategy: Strategy, stage: int, phase: str) -> Path:
    """The directory of a training's checkpoint: for the last phase, that of the stage."""
    return unfinished if phase == strategy.phases(stage)[-1] else unfinished / phase


def begin(stage: RunStage) -> tuple[GenerativeModel, StageContext]:
    """The model at the start of a stage, with rows of new codes initialized, and the strategy's context.

    Raises:
        BackboneError, WorkspaceError: see :func:`peso.runs.models.starting_model`.
    """
    memory = inherited_memory(stage)
    model, stream = starting_model(stage), stage.workspace.stream
    head = model.vocabulary.item_head
    if stage.number and strategy_of(stage.workspace).learns(stage.number):
        begin_new_codes(stage, model, learned=stage.number)
        if head is not None and head.arrivals:
            head.arrival_bias.zero_()
    if head is not None:
        seen = [stream.stage(number) for number in range(stage.number + 1)]
        head.compete(item_counts(seen, len(model.semantic_ids.item_ids)))
    return model, context_of(stage, model, memory)


def begin_phase(
    stage: RunStage, phase: str, unfinished: Path
) -> tuple[GenerativeModel, Strategy, StageContext]:
    """Model, strategy and context at the start of a phase, after the earlier phases of the stage."""
    model, context = begin(stage)
    strategy = strategy_of(stage.workspace)
    phases = list(strategy.phases(stage.number))
    for earlier in phases[: phases.index(phase)]:
        restore(model, context.memory, unfinished / earlier / FINISHED)
    return model, strategy, replace(context, phase=phase)


def keep(model: GenerativeModel, memory: dict[str, Tensor], seconds: float, file: Path) -> None:
    """Write the result of a phase (trained parameters, memory, time) atomically."""
    kept = {f"memory.{name}": tensor for name, tensor in memory.items()}
    kept |= {f"model.{name}": p.detach().cpu().contiguous() for name, p in _learnable(model).items()}
    write_sealed(file, save({**kept, "seconds": torch.tensor(seconds)}))


@torch.no_grad()
def restore(model: GenerativeModel, memory: dict[str, Tensor], file: Path) -> float:
    """Load what :func:`keep` wrote into model and memory; returns the seconds.

    Raises:
        WorkspaceError: the file is damaged.
    """
    try:
        kept = load(read_sealed(file))
    except (OSError, SafetensorError, WorkspaceError) as error:
        raise WorkspaceError(
            f"{file} is damaged ({error}); remove {file.parent} to train this phase again"
        ) from error
    for name, p in _learnable(model).items():
        p.copy_(kept[f"model.{name}"])
    memory.clear()
    memory.update(
        {name.removeprefix("memory."): tensor for name, tensor in kept.items() if name.startswith("memory.")}
    )
    return float(kept["seconds"])


def _learnable(model: GenerativeModel) -> dict[str, Tensor]:
    """Parameters of adapter and vocabulary, by name."""
    return {
        name: p for name, p in model.named_parameters() if ".lora_" in name or name.startswith("vocabulary.")
    }

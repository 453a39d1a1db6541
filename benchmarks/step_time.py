"""The time of a training step, for the benchmarks that compare two ways of doing it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peso.config import TrainingConfig
from peso.events.histories import Cases, TargetSequence
from peso.model.generative import GenerativeModel
from peso.training.loop import train_stage
from peso.training.strategies.strategy import Strategy
from peso.training.task import StageTask


def median_step(
    model: GenerativeModel,
    sequences: Sequence[TargetSequence],
    batch: int,
    steps: int,
    *,
    stage: int,
    precision: str,
) -> float:
    """Seconds of an optimizer step on a CPU, the median of some; the first is left out."""
    first = sequences[0].items
    settings = TrainingConfig.model_validate(
        {"epochs": 1, "batch_size": batch, "max_steps": steps + 1, "precision": precision, "device": "cpu"}
    )
    marks = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            model,
            StageTask(
                sequences,
                Cases(["u"], [first[:-1]], first[-1:]),
                settings,
                stage=stage,
                learning_rate=1e-4,
                strategy=Strategy(),
                seed=0,
                directory=Path(folder),
                log=Path(folder) / "log.jsonl",
                on_progress=lambda progress: marks.append(time.perf_counter()),
                checkpoint_seconds=1e9,
                item_weight=float(model.has_item_head),
            ),
        )
    return statistics.median(np.diff(marks[1:-1]).tolist())

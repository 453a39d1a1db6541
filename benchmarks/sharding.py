"""Memory and time of training in several processes that each have a whole backbone, or share its weights.

    torchrun --nproc-per-node 2 benchmarks/sharding.py [--quick] [--json] [--layers N]

`none` and `full` are values of `training.sharding`. `layers`: MiB of the weights of the backbone's layers
that one process stores; `other`: of all its other parameters (embedding, head, adapter, vocabulary); `peak`:
MiB, on a GPU, the highest memory of training. `step`: the median time of an optimizer step of 64 targets, in
seconds. `loss`: of the first step; both must agree. The backbone is SmolLM2-135M if it was pulled, else
random weights of its shape; the targets are as in `benchmarks/training.py`, the layout is `stream`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training as on_cpu  # benchmarks/training.py: data and model
from usual_training import TARGETS

from peso.adapters.lora import add_adapter
from peso.config import TrainingConfig
from peso.events.histories import Cases, TargetSequence
from peso.items.semantic_ids import SemanticIds
from peso.model.build import round_frozen
from peso.model.sharding import mesh_of, shard
from peso.runtime.device import Precision, peak_memory
from peso.runtime.processes import Processes, join
from peso.training.loop import train_stage
from peso.training.strategies.strategy import Strategy
from peso.training.task import Progress, StageTask

MIB = 2**20


def measure(
    sharding: str, processes: Processes, ids: SemanticIds, sequences: list[TargetSequence], args: Any
) -> dict[str, float]:
    """The figures of this process."""
    precision = Precision.of("auto", "auto")
    model, _ = on_cpu.build(on_cpu.Contestant("ours", "stream"), args.layers, ids)
    model.backbone = add_adapter(model.backbone, rank=8, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    round_frozen(model, precision.frozen)
    if sharding == "full":
        shard(model, mesh_of(precision.device.type, processes.count), precision.device)
    else:
        model.to(precision.device)
    stored = {"layers": 0, "other": 0}
    for name, p in model.named_parameters():
        own = p.to_local() if hasattr(p, "to_local") else p
        stored["layers" if ".layers." in name and "lora_" not in name else "other"] += own.nbytes
    marks, losses = [time.perf_counter()], list[float]()

    def note(progress: Progress) -> None:
        marks.append(time.perf_counter())
        losses.append(progress.loss)

    first = sequences[0].items
    settings = {"epochs": 1, "batch_size": 64, "max_steps": args.steps + 1, "warmup": 0}
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            model,
            StageTask(
                sequences,
                Cases(["u"], [first[:-1]], first[-1:]),
                TrainingConfig.model_validate(settings),
                stage=1,
                learning_rate=1e-4,
                strategy=Strategy(),
                seed=0,
                directory=Path(folder),
                log=Path(folder) / "log.jsonl",
                on_progress=note,
                checkpoint_seconds=1e9,
                processes=processes,
            ),
        )
    return {
        **{name: held / MIB for name, held in stored.items()},
        **({"peak": peak_memory(precision.device) / MIB} if precision.device.type == "cuda" else {}),
        "step": statistics.median(np.diff(marks[1:-1]).tolist()),
        "loss": losses[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 steps instead of 10")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--layers", type=int, help="of the backbone; default: all")
    args = parser.parse_args()
    args.steps = 3 if args.quick else 10
    processes = join()
    if processes.count == 1:
        parser.error("start several processes, for example with torchrun --nproc-per-node 2")
    ids, sequences, _ = on_cpu.real_or_random()
    found = {}
    for sharding in ("none", "full"):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        found[sharding] = measure(sharding, processes, ids, sequences, args)
    if not np.isclose(found["none"]["loss"], found["full"]["loss"], rtol=1e-3):
        raise SystemExit(f"the losses differ: {found}")
    if not processes.is_main:
        return
    if args.json:
        print(json.dumps({"processes": processes.count, **found}))
        return
    for sharding, figures in found.items():
        print(sharding, *(f"{name} {value:,.2f}" for name, value in figures.items()), sep="  ")


if __name__ == "__main__":
    main()

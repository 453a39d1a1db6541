"""The cost of each strategy relative to `single`: time and memory of a step, passes, stored bytes.

    python benchmarks/strategies.py [--quick] [--json] [--only "NAME;NAME"] [--width N] [--layers N]

The backbone is `scratch` on a simulated stream: stage 0 is trained once for all strategies, and then each
strategy trains three short stages, as `peso run` does. In the last stage, the strategy and `single` take
turns step by step, each in a separate process. The ratio of CPU times (one thread) is computed within a turn
(median and quartiles), so that other work on the machine has little effect, and affects both.

- `share`: the part of its steps that the strategy's hooks and the addition of their gradients take.
- `watch`: the part that measuring the effect of the anchor takes (in one of eight steps).
- `passes`: forward passes of the backbone in a step relative to `single`, and those before the first step.
- `steps`: optimizer steps of the last stage relative to `single`, without a limit on steps.
- `kept`: bytes that a stage stores for serving and for the next stage, without the backbone of stage 0 and
  metrics, after each of the three stages.
- `memory`: bytes of the tensors that the last stage allocates (backbone, adapter, optimizer, values of the
  strategy, activations, gradients), at the highest point of steps 2 to 6, relative to `single`.
- `standing`: the same between two steps, without activations.

The memory is read from the profiler's record of allocations, in a separate run after the turns. It does not
include code and libraries, which are most of a process of this size. `none` trains nothing and is left out.
`lsat`, `replay` and `retrain` learn from other examples too, so their steps have other lengths; for `lsat`,
the turns are those of its long-term training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"name": "single"},
    "peso": {"name": "peso"},
    "peso, in the loss": {"name": "peso", "weight": 2.0},
    "peso, fisher": {"name": "peso", "proximal": "fisher"},
    "peso, output_kl": {"name": "peso", "proximal": "output_kl"},
    "sum_lora, all": {"name": "sum_lora", "history": "all", "inherit": True},
    "sum_lora, latest": {"name": "sum_lora", "history": "latest", "inherit": True},
    "sd_lora, all": {"name": "sd_lora", "history": "all", "inherit": True},
    "inf_lora": {"name": "inf_lora"},
    "o_lora": {"name": "o_lora"},
    "lsat": {"name": "lsat"},
    "replay": {"name": "replay", "budget": 100},
    "recent": {"name": "recent"},
    "distill": {"name": "distill"},
    "blend": {"name": "blend"},
    "ema": {"name": "ema"},
    "interpolate": {"name": "interpolate"},
    "slao": {"name": "slao"},
    "slice": {"name": "slice"},
    "sa_caisr": {"name": "sa_caisr"},
    "average": {"name": "average"},
    "retrain": {"name": "retrain"},
    "full": {"name": "full"},
}
STAGES = 4
NOT_SERVED = ("log.jsonl", "metrics.json", "predictions.parquet", "manifest.json")


def configured(strategy: dict[str, Any], steps: int | None, width: int, layers: int) -> Any:
    from peso.config import load_config

    return load_config(
        {
            "data": {"simulate": {"users": 600, "items": 400, "stages": STAGES}},
            "items": {"quantizer": "rq-kmeans"},
            "backbone": {"name": "scratch", "width": width, "layers": layers},
            "strategy": strategy,
            "training": {"epochs": 1, "max_steps": steps, "learning_rate": 1e-3, "validation_cases": 20},
            "evaluation": {"enabled": False},
        }
    )


class Turns:
    """An observer that waits before each step of the last stage until it is its turn."""

    def __init__(self, pipe: Connection, watched: dict[str, float], passes: Counter[str]) -> None:
        self.pipe, self.watched, self.passes = pipe, watched, passes
        self.waits = False
        self._began = 0.0

    def note(self, text: str) -> None: ...

    def begin(self, title: str, total: int, unit: str) -> None: ...

    def end(self) -> None: ...

    def advance(self, done: int, **figures: Any) -> None:
        if not self.waits:
            return
        taken = {
            "seconds": time.process_time() - self._began,
            "hooks": self.watched.pop("hooks", 0.0),
            "watch": self.watched.pop("watch", 0.0),
            "passes": self.passes.pop("passes", 0),
        }
        self.pipe.send(taken)
        self.pipe.recv()
        self._began = time.process_time()


class Allocations:
    """An observer that records every tensor that is allocated or freed, until step ``UNTIL`` of a stage."""

    UNTIL = 6

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()
        self._records = True

    def note(self, text: str) -> None: ...

    def begin(self, title: str, total: int, unit: str) -> None: ...

    def end(self) -> None: ...

    def advance(self, done: int, **figures: Any) -> None:
        from torch.profiler import record_function

        if self._records:
            with record_function(f"after step {done}"):
                pass
            if done == self.UNTIL:
                self._records = False
                self._profile.stop()

    def figures(self) -> dict[str, int]:
        """Bytes since the recording began: ``memory``, the most at any moment between the ends of steps 1 and
        ``UNTIL``; ``standing``: the least."""
        events = sorted(self._profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
        now, seen, within = 0, [], False
        for event in events:
            name = event.name()
            within = within or name == "after step 1"
            if name == "[memory]":
                now += event.nbytes()
            if within:
                seen.append(now)
        return {"memory": max(seen), "standing": min(seen)}


def timed(owner: Any, name: str, watched: dict[str, float], key: str) -> None:
    """Add the time that a method takes to ``watched[key]``."""
    method: Callable[..., Any] = getattr(owner, name)

    def around(*arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return method(*arguments, **options)
        finally:
            watched[key] = watched.get(key, 0.0) + time.process_time() - began

    setattr(owner, name, around)


def contestant(root: Path, base: Path, config: Any, pipe: Connection) -> None:
    """Learn all stages; take turns in the last."""
    import torch

    torch.set_num_threads(1)
    from torch.nn.modules.module import register_module_forward_hook
    from transformers import LlamaModel

    from peso.runs import pipeline, reuse
    from peso.runs.workspace import Workspace
    from peso.training.penalty import Movement, Penalty
    from peso.training.strategies.strategy import make_strategy

    watched: dict[str, float] = {}
    passes: Counter[str] = Counter()
    hooks = type(make_strategy(config.strategy))
    for name in ("penalty", "output_penalty", "after_step"):
        timed(hooks, name, watched, "hooks")
    for name in ("add", "with_loss", "apply"):
        timed(Penalty, name, watched, "hooks")
    for name in ("begin", "stepped", "figures"):
        timed(Movement, name, watched, "watch")

    def count(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, LlamaModel):
            passes["passes"] += 1

    register_module_forward_hook(count)
    workspace, source = Workspace.create_or_open(root, config), Workspace.open(base)
    observer = Turns(pipe, watched, passes)
    with workspace.lock():
        reuse.take_data(workspace, source, observer)
        reuse.take_base(workspace, source, observer)
        for stage in range(1, STAGES):
            observer.waits = stage == STAGES - 1
            watched.clear()
            passes.clear()
            observer._began = time.process_time()
            pipeline.learn(workspace.stage(stage), observer)
        manifest = workspace.stage(STAGES - 1).manifest
        kept = [served(workspace.stage(stage).directory) for stage in range(1, STAGES)]
        shutil.rmtree(workspace.stage(STAGES - 1).directory)
        allocations = Allocations()
        pipeline.learn(workspace.stage(STAGES - 1), allocations)  # once more, for its memory alone
    pipe.send({"parameters": manifest["trained_parameters"], "kept": kept, **allocations.figures()})


def served(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file() and p.name not in NOT_SERVED)


def race(base: Path, strategy: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A strategy and `single`, step by step in turn."""
    context = get_context("spawn")
    sides: list[tuple[Any, Connection]] = []
    for place, options in (("held", strategy), ("single", STRATEGIES["single"])):
        ours, theirs = context.Pipe()
        config = configured(options, arguments.steps, arguments.width, arguments.layers)
        worker = context.Process(target=contestant, args=(folder / place, base, config, theirs))
        worker.start()
        theirs.close()
        sides.append((worker, ours))
    steps: tuple[list[Any], list[Any]] = ([], [])
    try:
        ends: list[Any] = [None, None]
        while not all(ends):  # several phases make more steps of one than of the other
            for number, (_, pipe) in enumerate(sides):
                if ends[number] is None:
                    try:
                        told = pipe.recv()
                    except EOFError:
                        raise SystemExit(f"{strategy}: a contestant stopped; its error is above") from None
                    if "kept" in told:
                        ends[number] = told
                    else:
                        steps[number].append(told)
                        pipe.send("go")
    finally:
        for worker, _ in sides:
            worker.join(5)
            worker.kill()
    pairs = list(zip(*steps, strict=False))[1:]  # the first step pays for what is set up once
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in pairs]
    own = sum(ours["seconds"] for ours, _ in pairs)
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "parameters": ends[0]["parameters"],
        "kept": ends[0]["kept"],
        "passes": sum(ours["passes"] for ours, _ in pairs) / sum(theirs["passes"] for _, theirs in pairs),
        "passes_before": steps[0][0]["passes"] - steps[1][0]["passes"],
        "step_ratio": statistics.median(ratios),
        "step_ratio_quartiles": [low, high],
        "memory": ends[0]["memory"],
        "memory_ratio": ends[0]["memory"] / ends[1]["memory"],
        "standing_ratio": ends[0]["standing"] / ends[1]["standing"],
        "share": sum(ours["hooks"] for ours, _ in pairs) / own,
        "watch": sum(ours["watch"] for ours, _ in pairs) / own,
    }


def steps_of_a_stage(base: Path, strategy: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Optimizer steps of the last stage if nothing limits them, by its examples alone."""
    from peso.runs.workspace import Workspace
    from peso.training.strategies.strategy import StageContext, make_strategy

    stream = Workspace.open(base).stream
    config = configured(strategy, None, arguments.width, arguments.layers)
    size = config.training.batch_size

    class OfStream:
        tokens, window = 1, config.prompt.window

        def of(self, stage: int) -> Any:
            return stream.stage(stage).training_sequences()

    total = 0
    memory: dict[str, Any] = {}
    for stage in range(1, STAGES):
        made, total = make_strategy(config.strategy), 0
        for phase in made.phases(stage):
            context = StageContext(stage, None, 0, phase=phase, examples=OfStream(), memory=memory)  # type: ignore[arg-type]
            chosen = made.choose(context)
            sequences = OfStream().of(stage) if chosen is None else chosen
            total += -(-sum(sequence.targets for sequence in sequences) // size)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 steps per stage instead of 60")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--only", help="names of strategies, separated by semicolons")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    arguments.steps = 12 if arguments.quick else 60

    from peso.runs import pipeline, preparation
    from peso.runs.workspace import Workspace
    from peso.runtime.progress import Silent

    chosen = arguments.only.split(";") if arguments.only else list(STRATEGIES)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "base"
        config = configured(STRATEGIES["single"], arguments.steps, arguments.width, arguments.layers)
        workspace = Workspace.create_or_open(root, config)
        with workspace.lock():
            preparation.ingest(workspace, Silent())
            preparation.tokenize(workspace, Silent())
            pipeline.learn(workspace.stage(0), Silent())
        plain = steps_of_a_stage(root, STRATEGIES["single"], arguments)
        if not arguments.json:
            size = f"width {arguments.width}, {arguments.layers} layers"
            print(f"scratch, {size}, {arguments.steps} steps a stage")
            print(
                f"{'':>18} {'trained':>9} {'kept, KiB, after stage 1, 2, 3':>30} {'steps':>6} {'passes':>10} "
                f"{'time/step':>22} {'memory':>7} {'standing':>8} {'share':>7} {'watch':>7}"
            )
        for number, name in enumerate(chosen):
            found = race(root, STRATEGIES[name], arguments, Path(folder) / str(number))
            steps = steps_of_a_stage(root, STRATEGIES[name], arguments)
            result[name] = {**found, "steps_ratio": steps / plain}
            if not arguments.json:
                print(line(name, result[name]), flush=True)
    if arguments.json:
        print(json.dumps(result))


def line(name: str, row: dict[str, Any]) -> str:
    kept = ", ".join(f"{count / 1024:,.0f}" for count in row["kept"])
    low, high = row["step_ratio_quartiles"]
    return (
        f"{name:>18} {row['parameters']:>9,} {kept:>30} {row['steps_ratio']:>6.1f} "
        f"{row['passes']:>4.1f} + {row['passes_before']:<3} "
        f"{row['step_ratio']:>6.2f} ({low:.2f} to {high:.2f}) "
        f"{row['memory_ratio']:>7.2f} {row['standing_ratio']:>8.2f} {row['share']:>7.2%} {row['watch']:>7.2%}"
    )


if __name__ == "__main__":
    main()

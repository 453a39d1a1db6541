"""Training speed and memory, compared with Transformers + PEFT (same model, targets and losses).

    python benchmarks/training.py [--quick] [--json] [--layers N] [--threads N]

The usual way: one example per target in the `instruct` prompt, padded batches of 8, embedding and head
copied and trained, logits of the whole vocabulary at all positions, gradients accumulated to 32 targets. The
expert's way: PEFT's trainable token rows, batches of similar length, logits at the answer only
(`benchmarks/usual_training.py`). Ours: `peso.training.loop.train_stage` itself, `instruct` and `stream`,
float32 and bfloat16, loss vocabulary `full`, LoRA dropout 0.05 everywhere.

Each contestant runs in a separate process, so that its peak memory can be measured. They take turns with one
optimizer step of 32 targets each; ratios are computed within a turn, with median and range. `…_ratio` is the
ratio of ours in float32 to the usual way, `…_expert_ratio` to the expert's way, and `…_best` that of ours in
its fastest precision (the others stay in float32). `memory_ratio` is the peak memory of ours (`instruct`,
float32) divided by that of the usual way. `storage_ratio` is the size of the files that ours stores for
stage 1, divided by that of the released layout (embedding, head and adapter in float32, and the adapter of
stage 0). Before the turns, the float32 losses of 32 targets without dropout must agree.

The targets are those of `Video_Games` stage 1 if the data are available (PESO_DATA), else random. The
backbone is SmolLM2-135M if it was pulled (`peso pull smollm2-135m`), else random weights of its shape. The
six processes together take about 12 GiB.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from usual_training import BATCH, TARGETS, TEMPERATURE, Example, ExpertWay, UsualWay

from peso.adapters.lora import add_adapter
from peso.config import TrainingConfig
from peso.events.histories import Cases, TargetSequence
from peso.events.release import read_release
from peso.items.semantic_ids import SemanticIds
from peso.model.backbone import load_backbone
from peso.model.build import save_stage_weights
from peso.model.generative import GenerativeModel
from peso.model.layout import PromptLayout, make_layout
from peso.model.vocabulary import SemanticVocabulary
from peso.runtime import assets
from peso.runtime.device import Precision, peak_memory
from peso.training.likelihood import validation_loss
from peso.training.loop import train_stage
from peso.training.plan import StagePlan, most_targets
from peso.training.strategies.strategy import Strategy
from peso.training.task import Progress, StageTask

ROOT = Path(__file__).resolve().parent.parent
WINDOW, DROPOUT, RATE, SEED = 20, 0.05, 2e-5, 0
TARGETS_A_STEP = 32
USUAL, EXPERT = "usual way", "expert's way"


@dataclass(frozen=True)
class Contestant:
    name: str
    layout: str = "instruct"
    precision: str = "float32"


OURS = [
    Contestant("instruct float32"),
    Contestant("stream float32", "stream"),
    Contestant("instruct bfloat16", "instruct", "bfloat16"),
    Contestant("stream bfloat16", "stream", "bfloat16"),
]
CONTESTANTS = [Contestant(USUAL), Contestant(EXPERT), *OURS]


def real_or_random() -> tuple[SemanticIds, list[TargetSequence], str]:
    """Catalog, target sequences of one stage, and where they come from."""
    data = Path(os.environ.get("PESO_DATA", ROOT.parent / "shared" / "data"))
    folder = data / "peso_release" / "Video_Games_cl_0.6_0_5_3_0"
    if folder.is_dir():
        _, stages, ids = read_release(folder)
        return ids, stages[1].training_sequences(), "Video_Games stage 1"
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (25_935, 4)).astype(np.int32)
    ids = SemanticIds([str(i) for i in range(len(codes))], codes, (256,) * 4)
    sequences = []
    for user in range(1000):
        before, targets = generator.geometric(0.15), generator.geometric(0.2)
        items = generator.integers(0, len(codes), before + targets).astype(np.int32)
        sequences.append(TargetSequence(str(user), items, before))
    return ids, sequences, "random sequences"


def build(contestant: Contestant, layers: int | None, ids: SemanticIds) -> tuple[GenerativeModel, str]:
    """The model without adapter, the same for every contestant, and what its backbone is."""
    dtype = Precision.of(contestant.precision, "cpu").frozen
    if assets.find("smollm2-135m") is not None:
        causal_lm, tokenizer = load_backbone("smollm2-135m", layers=layers, dtype=dtype)
        layout, source = make_layout(contestant.layout, tokenizer, WINDOW), "SmolLM2-135M"
    else:
        causal_lm, tokenizer = of_its_shape(layers).to(dtype), None
        layout, source = LAYOUTS[contestant.layout], "random weights of SmolLM2-135M's shape"
    words = causal_lm.get_input_embeddings().weight
    vocabulary = SemanticVocabulary(49152, ids.sizes, words.shape[1])
    vocabulary.initialise(words, words, seed=0)
    return GenerativeModel(causal_lm, tokenizer, vocabulary, layout, ids, "full"), source


# as long as SmolLM2's tokenizer makes them
LAYOUTS = {
    "stream": PromptLayout("stream", (1,), (), (), (), WINDOW),
    "instruct": PromptLayout(
        "instruct", tuple(range(100, 131)), (28, 216), tuple(range(200, 222)), (2,), WINDOW
    ),
}


def of_its_shape(layers: int | None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers or 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def examples_of(model: GenerativeModel, sequences: list[TargetSequence]) -> Iterator[Example]:
    """One example per target, as the usual way has them."""
    for sequence in sequences:
        for t in range(sequence.first_target, len(sequence.items)):
            history = model.item_token_ids(sequence.items[max(0, t - WINDOW) : t])
            answer = np.concatenate([model.item_token_ids(sequence.items[t]), model.layout.end])
            yield model.layout.prompt(history.reshape(-1, 4)), answer.astype(np.int64)


def one_target_each(sequences: list[TargetSequence], count: int) -> list[TargetSequence]:
    """The first target of users whose history lies within the window, where ours and theirs are the same."""
    short = [s for s in sequences if s.first_target <= WINDOW][:count]
    return [TargetSequence(s.user, s.items[: s.first_target + 1], s.first_target) for s in short]


def run_contestant(contestant: Contestant, layers: int | None, threads: int, to_parent: Connection) -> None:
    """What a contestant's process does: report the loss at the start, then a step whenever told to."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    ids, sequences, data = real_or_random()
    model, source = build(contestant, layers, ids)
    settings = TrainingConfig.model_validate(
        {"epochs": 1, "batch_size": TARGETS_A_STEP, "precision": contestant.precision, "device": "cpu"}
    )
    plan = StagePlan(sequences, WINDOW, settings, SEED, 1, most_targets(model.layout))
    few = one_target_each(sequences, TARGETS_A_STEP)
    if contestant.name in (USUAL, EXPERT):
        way = (UsualWay if contestant.name == USUAL else ExpertWay)(model, DROPOUT, RATE, len(plan))
        of_adapters = sum(p.nbytes for name, p in way.model.named_parameters() if "lora_" in name)
        to_parent.send(
            {
                "loss": way.loss(list(examples_of(model, few))),
                "stored": sum(p.nbytes for p in way.trained) + of_adapters,
                "backbone": source,
                "data": data,
            }
        )
        to_parent.recv()
        way.step(list(examples_of(model, few[:BATCH])))
        to_parent.send((0.0, 0))
        for step in range(len(plan)):
            to_parent.recv()
            started = time.perf_counter()
            batch = [
                TargetSequence("", sequences[c.sequence].items[: c.stop], c.first) for c in plan.members(step)
            ]
            way.step(list(examples_of(model, batch)))
            seconds = time.perf_counter() - started
            to_parent.send((plan.targets(step) / seconds, peak_memory(model.device)))
        return

    model.backbone = add_adapter(model.causal_lm, 8, 16, DROPOUT, TARGETS, seed=0)
    cases = Cases([s.user for s in few], [s.items[:-1] for s in few], np.array([s.items[-1] for s in few]))
    with Precision.of(contestant.precision, "cpu").products():
        loss = validation_loss(model, cases, TEMPERATURE)
    to_parent.send({"loss": loss, "stored": stored(model)})
    to_parent.recv()
    started = time.perf_counter()

    def report_and_wait(progress: Progress) -> None:
        nonlocal started
        seconds = time.perf_counter() - started
        to_parent.send((TARGETS_A_STEP / seconds, peak_memory(model.device)))
        to_parent.recv()
        started = time.perf_counter()

    with tempfile.TemporaryDirectory() as directory:
        train_stage(
            model,
            StageTask(
                sequences,
                cases,
                settings,
                stage=1,
                learning_rate=RATE,
                strategy=Strategy(),
                seed=SEED,
                directory=Path(directory),
                log=Path(directory) / "log.jsonl",
                on_progress=report_and_wait,
                checkpoint_seconds=1e9,
            ),
        )


def stored(model: GenerativeModel) -> int:
    """Bytes of the files that a stage keeps of its weights."""
    with tempfile.TemporaryDirectory() as directory:
        save_stage_weights(model, directory, whole_backbone=False)
        return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


@dataclass
class Figures:
    """What a contestant's process reported."""

    first: dict[str, Any]
    rates: list[float]  # targets per second, one a turn
    memory: int = 0  # peak bytes


def measure(layers: int | None, threads: int, turns: int) -> dict[str, Figures]:
    """Start every contestant, check that their losses agree, let them take turns."""
    start = get_context("spawn")
    workers, pipes, figures = [], {}, {}
    try:
        for contestant in CONTESTANTS:
            pipe, theirs = start.Pipe()
            worker = start.Process(
                target=run_contestant, args=(contestant, layers, threads, theirs), daemon=True
            )
            worker.start()
            theirs.close()
            workers.append(worker)
            pipes[contestant.name] = pipe
            figures[contestant.name] = Figures(pipe.recv(), [])
            pipe.send("step")  # untimed: the first step pays for what is set up once
            pipe.recv()
        losses = [figures[c.name].first["loss"] for c in CONTESTANTS if c.precision == "float32"]
        same = [losses[0], losses[1], losses[2]]  # stream has another prompt, so another loss
        if max(same) - min(same) > 1e-4:
            raise SystemExit(f"the losses of usual way, expert's way and ours differ: {same}")
        for _ in range(turns):
            for name, pipe in pipes.items():
                pipe.send("step")
                rate, memory = pipe.recv()
                figures[name].rates.append(rate)
                figures[name].memory = memory
    finally:
        for worker in workers:
            worker.kill()
    return figures


def ratios(figures: dict[str, Figures], ours: str, theirs: str) -> list[float]:
    """Ours over theirs, turn by turn."""
    return [a / b for a, b in zip(figures[ours].rates, figures[theirs].rates, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn instead of five")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--layers", type=int, help="use only the first N layers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    turns = 1 if arguments.quick else 5

    figures = measure(arguments.layers, arguments.threads, turns)
    result: dict[str, Any] = {}
    for layout in ("instruct", "stream"):
        speed = {c.name: statistics.median(figures[c.name].rates) for c in OURS if c.layout == layout}
        fastest = max(speed, key=lambda name: speed[name])
        for suffix, ours in (("", f"{layout} float32"), ("_best", fastest)):
            for key, theirs in (("ratio", USUAL), ("expert_ratio", EXPERT)):
                values = ratios(figures, ours, theirs)
                result[f"{layout}_{key}{suffix}"] = statistics.median(values)
                result[f"{layout}_{key}{suffix}_range"] = [min(values), max(values)]
        result[f"{layout}_best_precision"] = fastest.split()[1]
    usual = figures[USUAL]
    result |= {
        "memory_ratio": figures["instruct float32"].memory / usual.memory,
        "memory_expert_ratio": figures["instruct float32"].memory / figures[EXPERT].memory,
        "storage_ratio": figures["instruct float32"].first["stored"] / usual.first["stored"],
        "stored_mb": {name: f.first["stored"] / 1e6 for name, f in figures.items()},
        "targets_per_second": {name: statistics.median(f.rates) for name, f in figures.items()},
        "peak_gib": {name: f.memory / 2**30 for name, f in figures.items()},
        "losses": {name: f.first["loss"] for name, f in figures.items()},
        "turns": turns,
        "layers": arguments.layers or 30,
        "threads": arguments.threads,
        "backbone": usual.first["backbone"],
        "data": usual.first["data"],
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{result['backbone']}, {result['layers']} layers, {result['threads']} threads; {result['data']}, "
        f"{turns} turns of 32 targets"
    )
    print(f"{'':>20} {'targets/s':>10} {'x usual':>9} {'x expert':>9} {'peak GiB':>9} {'loss':>8}")
    for name, f in figures.items():
        usual_ratio, expert_ratio = (statistics.median(ratios(figures, name, t)) for t in (USUAL, EXPERT))
        print(
            f"{name:>20} {statistics.median(f.rates):>10.2f} {usual_ratio:>9.2f} {expert_ratio:>9.2f} "
            f"{f.memory / 2**30:>9.2f} {f.first['loss']:>8.4f}"
        )


if __name__ == "__main__":
    main()

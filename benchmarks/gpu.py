"""Training, decoding and memory on one GPU, compared with the usual ways, as one JSON object.

    python benchmarks/gpu.py [--quick] [--device cuda] [--peak-tflops T] [--model NAME] [--part training]

Each figure is also printed to stderr as soon as it is measured.

There are two models: SmolLM2-135M (if it was pulled, else random weights of its shape) and random weights of
Llama-3.2-1B's shape. Training: optimizer steps of the same targets, LoRA on seven projections, loss
vocabulary `full`, products in bfloat16 (`training.precision: auto`, layers compiled or not); the usual way
and the expert's way of `benchmarks/usual_training.py` (float32 weights under bfloat16 autocast, as
`Trainer(bf16=True)` has them) at the batch size that is their fastest. Decoding: 10 beams, weights in
bfloat16; `generate` with `prefix_allowed_tokens_fn` at its fastest batch size, and one request at a time.

With `--quick`, the usual ways of training run only with 64 examples at once (with 8, as released, they were
several times slower).

Model FLOP utilization counts the operations that a step needs: per token, 4 FLOPs for each frozen weight of
the layers (forward, and backward to the activations); per predicted position, 4 FLOPs for each value of the
head (6 if the head is trained). The scores of attention, adapters and recomputation are not counted. The
utilization is null if the peak of the GPU is not known; in this case, give --peak-tflops. `gpu_time` divides
the device's time of one step by kind. For decoding, `profile` does this for one batch and one request, and
gives the elapsed time and the number of kernels: elapsed time beyond the device's time is spent waiting for
the host, which launches them.

`--device cpu` is for testing the script, with toy shapes and float32; the figures have no meaning.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training as on_cpu  # benchmarks/training.py: data, layouts and the examples of the usual way
from transformers import LlamaConfig, LlamaForCausalLM
from usual_training import TARGETS, TEMPERATURE, ExpertWay, UsualWay

from peso.adapters.lora import add_adapter
from peso.config import TrainingConfig
from peso.decoding import search
from peso.events.histories import Cases, TargetSequence
from peso.items.semantic_ids import SemanticIds
from peso.model.backbone import load_backbone
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.model.layout import PromptLayout, make_layout
from peso.model.vocabulary import SemanticVocabulary
from peso.runtime import assets
from peso.runtime.device import Precision, peak_memory
from peso.training.likelihood import validation_loss
from peso.training.loop import train_stage
from peso.training.plan import StagePlan, most_targets
from peso.training.strategies.strategy import Strategy
from peso.training.task import Progress, StageTask

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import transformers_reference as generation

PARTS = ("training", "decoding")
BEAMS, RANK, DROPOUT, RATE, SEED = 10, 8, 0.05, 2e-5, 0
# dense bfloat16, 10¹² FLOPs a second, from the makers' data sheets
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    targets: int  # in an optimizer step
    steps: int  # of ours, timed, after those that are not
    untimed: int  # in which ours compiles, and plans its attention for each shape of rows
    their_steps: int  # of the usual ways, timed, after one that is not, in which theirs is planned too
    users: int
    requests: int
    train_batches: tuple[int, ...]  # of the usual ways
    generate_batches: tuple[int, ...]
    search_batches: tuple[int, ...]


FULL = Size(512, 20, 12, 3, 4096, 100, (8, 64), (1, 16, 64, 256), (256, 1024))
QUICK = Size(512, 8, 10, 2, 2048, 30, (64,), (1, 64, 256), (256, 1024))
TOY = Size(16, 2, 2, 1, 6, 3, (4, 8), (1, 4), (2, 4))


def shape(vocab: int, width: int, inner: int, layers: int, heads: int, groups: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )


SHAPES = {
    "smollm2-135m": shape(49152, 576, 1536, 30, 9, 3),
    "llama-3.2-1b-shape": shape(128256, 2048, 8192, 16, 32, 8),
    "toy": shape(512, 64, 128, 2, 4, 2),
}


class Bench:
    """One model on one device: makes it anew for each contestant, so that none has another's memory."""

    def __init__(self, name: str, device: torch.device, size: Size, peak: float | None) -> None:
        self.name, self.device, self.size, self.peak = name, device, size, peak
        self.began = time.perf_counter()
        self.compute = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.ids, sequences, self.data = toy_data() if name == "toy" else on_cpu.real_or_random()
        self.sequences: list[TargetSequence] = sequences
        self.few = on_cpu.one_target_each(sequences, 32)

    def model(self, layout: str, dtype: torch.dtype = torch.float32) -> GenerativeModel:
        tokenizer, prompt = None, on_cpu.LAYOUTS[layout]
        if self.name == "smollm2-135m" and assets.find(self.name) is not None:
            causal_lm, tokenizer = load_backbone(self.name, dtype=dtype)
            prompt = make_layout(layout, tokenizer, on_cpu.WINDOW)
        else:
            torch.manual_seed(SEED)
            with torch.device(self.device):
                causal_lm = (
                    LlamaForCausalLM(copy.deepcopy(SHAPES[self.name])).to(dtype).eval().requires_grad_(False)
                )
        if self.name == "toy":
            prompt = PromptLayout(
                layout, prompt.prefix[:3], prompt.separator[:1], prompt.suffix[:3], prompt.end, 20
            )
        words = causal_lm.get_input_embeddings().weight
        vocabulary = SemanticVocabulary(len(words), self.ids.sizes, words.shape[1])
        vocabulary.initialise(words.float().cpu(), words.float().cpu(), seed=SEED)
        return GenerativeModel(causal_lm, tokenizer, vocabulary, prompt, self.ids, "full").to(self.device)

    def result(self, parts: Sequence[str]) -> dict[str, Any]:
        return {"data": self.data} | {part: getattr(self, part)() for part in parts}

    def told(self, what: str, figures: dict[str, Any]) -> dict[str, Any]:
        """The same figures, told at once: what stops the script takes only what is not measured yet."""
        line = {"model": self.name, "what": what, "at": round(time.perf_counter() - self.began), **figures}
        print(json.dumps(line), file=sys.stderr, flush=True)
        return figures

    # -- training --------------------------------------------------------------------------------

    def training(self) -> dict[str, Any]:
        found = {"ours, instruct, not compiled": self.ours("instruct", compiled=False)}
        for name, way in (("usual way", UsualWay), ("expert's way", ExpertWay)):
            tried = [self.theirs(way, batch) for batch in self.size.train_batches]
            found[name] = max(tried, key=lambda figures: figures["examples_per_second"])
        for layout in ("instruct", "stream"):  # compiling takes longest
            found[f"ours, {layout}"] = self.ours(layout)
        losses = [found[name].pop("loss") for name in ("ours, instruct", "usual way", "expert's way")]
        found["ours, stream"].pop("loss")
        found["ours, instruct, not compiled"].pop("loss")
        if max(losses) - min(losses) > 1e-3:
            raise SystemExit(f"the losses of ours, usual way and expert's way differ: {losses}")
        ratios: dict[str, float] = {}
        for layout in ("instruct", "stream"):
            own = found[f"ours, {layout}"]
            for key, other in (("ratio", found["usual way"]), ("expert_ratio", found["expert's way"])):
                ratios[f"{layout}_{key}"] = own["examples_per_second"] / other["examples_per_second"]
        memory = found["ours, instruct"]["peak_gib"] / found["usual way"]["peak_gib"]
        return {**ratios, "memory_ratio": memory, "loss": losses[0], "contestants": found}

    def plan(self, model: GenerativeModel) -> StagePlan:
        return StagePlan(self.sequences, on_cpu.WINDOW, self.settings(), SEED, 1, most_targets(model.layout))

    def settings(self, *, compiled: bool = True) -> TrainingConfig:
        size = self.size
        return TrainingConfig(
            epochs=100,
            max_steps=size.untimed + size.steps + 1,  # the last one under the profiler
            batch_size=size.targets,
            loss_vocabulary="full",
            device=str(self.device),
            precision="auto",
            compile="auto" if compiled else False,
        )

    def ours(self, layout: str, *, compiled: bool = True) -> dict[str, Any]:
        model = self.model(layout)
        model.backbone = add_adapter(model.causal_lm, RANK, 16, DROPOUT, TARGETS, seed=SEED)
        few = self.few
        cases = Cases(
            [s.user for s in few], [s.items[:-1] for s in few], np.array([s.items[-1] for s in few])
        )
        loss = validation_loss(model, cases, TEMPERATURE)  # in float32, as theirs
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(self.compute)
        self.forget()
        steps: list[Progress] = []
        at: list[float] = []
        timed = self.size.untimed + self.size.steps
        profiler = torch.profiler.profile(record_shapes=True)

        def show(progress: Progress) -> None:
            self.wait()
            steps.append(progress)
            at.append(time.perf_counter())
            if len(steps) == timed:
                profiler.start()
            if len(steps) == timed + 1:
                profiler.stop()

        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            train_stage(
                model,
                StageTask(
                    self.sequences,
                    cases,
                    self.settings(compiled=compiled),
                    stage=1,
                    learning_rate=RATE,
                    strategy=Strategy(),
                    seed=SEED,
                    directory=Path(directory),
                    log=Path(directory) / "log.jsonl",
                    on_progress=show,
                    checkpoint_seconds=1e9,
                ),
            )
        # without the steps after the end of an epoch: validation and a checkpoint lie before those
        counted = [i for i in range(self.size.untimed, timed) if steps[i].epoch == steps[i - 1].epoch]
        seconds = sum(at[i] - at[i - 1] for i in counted)
        targets, tokens = (sum(steps[i].record[key] for i in counted) for key in ("targets", "tokens"))
        positions = targets * (self.ids.levels + (len(model.layout.end)))
        needed = self.flops(tokens, positions, trained_head=False)
        figures = {
            "loss": loss,
            "first_step_seconds": at[0] - started,
            "slowest_step_seconds": max(at[i] - at[i - 1] for i in counted),
            "fastest_step_seconds": min(at[i] - at[i - 1] for i in counted),
            **(device_account(profiler) if self.device.type == "cuda" else {}),
            **self.speed(targets, tokens, needed, seconds),
        }
        return self.told(f"training, ours, {layout}{'' if compiled else ', not compiled'}", figures)

    def theirs(self, way: type[UsualWay], batch: int) -> dict[str, Any]:
        model, size = self.model("instruct"), self.size
        plan = self.plan(model)
        few = list(on_cpu.examples_of(model, self.few))
        contestant = way(model, DROPOUT, RATE, len(plan), batch, torch.float32)
        loss = contestant.loss(few)
        contestant.compute = self.compute
        self.forget()
        targets = tokens = positions = 0
        for step in range(1 + size.their_steps):
            if step == 1:
                self.wait()
                started = time.perf_counter()
            members = [
                TargetSequence("", self.sequences[c.sequence].items[: c.stop], c.first)
                for c in plan.members(step % len(plan))
            ]
            examples = list(on_cpu.examples_of(model, members))
            contestant.step(examples)
            if step:
                targets += len(examples)
                tokens += sum(len(prompt) + len(answer) for prompt, answer in examples)
                positions += sum(len(answer) for _, answer in examples)
        self.wait()
        seconds = time.perf_counter() - started
        usual = way is UsualWay
        needed = self.flops(tokens, tokens if usual else positions, trained_head=usual)
        figures = {"loss": loss, "batch_size": batch, **self.speed(targets, tokens, needed, seconds)}
        return self.told(f"training, {way.__name__}, {batch} at once", figures)

    def flops(self, tokens: int, predicted: int, *, trained_head: bool) -> float:
        config = SHAPES[self.name]
        head = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
        layer = config.hidden_size * (head + 3 * config.intermediate_size)
        rows = config.vocab_size + sum(self.ids.sizes)
        per_position = (6 if trained_head else 4) * rows * config.hidden_size
        return 4.0 * layer * config.num_hidden_layers * tokens + per_position * predicted

    def speed(self, targets: int, tokens: int, flops: float, seconds: float) -> dict[str, Any]:
        return {
            "examples_per_second": targets / seconds,
            "tokens_per_second": tokens / seconds,
            "tflops": flops / seconds / 1e12,
            "model_flop_utilisation": flops / seconds / 1e12 / self.peak if self.peak else None,
            "peak_gib": peak_memory(self.device) / 2**30,
        }

    # -- decoding --------------------------------------------------------------------------------

    def decoding(self) -> dict[str, Any]:
        generator = np.random.default_rng(SEED)
        chosen = generator.choice(len(self.sequences), self.size.users)
        histories = [self.sequences[i].items[-on_cpu.WINDOW :] for i in chosen]
        found: dict[str, Any] = {}
        for layout in ("instruct", "stream"):
            model = for_inference(self.model(layout, self.compute))
            tried = {}
            for size in self.size.search_batches:
                figures = self.answering(
                    lambda some, model=model, size=size: search(model, some, beams=BEAMS, batch_size=size),
                    histories,
                    self.size.requests if size == self.size.search_batches[0] else 0,
                )
                figures["profile"] = self.profiled(model, histories[:size])
                tried[size] = self.told(f"decoding, ours, {layout}, {size} at once", figures)
            found[f"ours, {layout}"] = fastest(tried)
            found[f"ours, {layout}"]["profile_of_one_request"] = self.profiled(model, histories[:1])
        for name, way in (("usual way", generation.UsualWay), ("expert's way", generation.ExpertWay)):
            usual = way(self.model("instruct", self.compute).eval())
            tried = {}
            for size in self.size.generate_batches:
                figures = self.answering(
                    lambda some, usual=usual, size=size: usual.in_batches(some, BEAMS, size),
                    histories[: max(8, 2 * size)],
                    -(-self.size.requests // 4) if size == 1 else 0,
                )
                tried[size] = self.told(f"decoding, {name}, {size} at once", figures)
            found[name] = fastest(tried)
        ratios = {}
        for layout in ("instruct", "stream"):
            own = found[f"ours, {layout}"]
            for key, other in (("ratio", found["usual way"]), ("expert_ratio", found["expert's way"])):
                ratios[f"{layout}_{key}"] = own["users_per_second"] / other["users_per_second"]
                ratios[f"{layout}_latency_{key}"] = other["p50_ms"] / own["p50_ms"]
        return {**ratios, "contestants": found}

    def answering(
        self, answer: Callable[[list[np.ndarray]], Any], histories: list[np.ndarray], requests: int
    ) -> dict[str, Any]:
        """Users a second, and the milliseconds of single requests where there are any."""
        self.forget()
        answer(histories[:2])
        started = time.perf_counter()
        answer(histories)
        figures = {"users_per_second": len(histories) / (time.perf_counter() - started)}
        figures["peak_gib"] = peak_memory(self.device) / 2**30
        if requests:
            taken = list(each_taken(answer, histories, requests))
            figures["p50_ms"] = statistics.median(taken)
            figures["p99_ms"] = float(np.quantile(taken, 0.99))
        return figures

    def profiled(self, model: GenerativeModel, histories: list[np.ndarray]) -> dict[str, Any] | None:
        """One batch: seconds on the clock, then, in another turn, what the device did; None on a CPU."""
        if self.device.type != "cuda":
            return None

        def answer() -> None:
            search(model, histories, beams=BEAMS, batch_size=len(histories))
            self.wait()

        answer()
        started = time.perf_counter()
        answer()
        seconds = time.perf_counter() - started
        with torch.profiler.profile(record_shapes=True) as profiler:
            answer()
        return {"seconds": seconds, **device_account(profiler)}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Peak memory counts from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def device_time(profiler: torch.profiler.profile) -> dict[str, float]:
    """Seconds of the device in what was profiled: products of the backbone and head, products with an
    adapter's A or B (one side is the rank), attention, all else (element by element, copies, optimizer)."""
    seconds = dict.fromkeys(("products", "adapters' products", "attention", "else"), 0.0)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU or not event.self_device_time_total:
            continue  # kernels are counted with the operation that launched them
        kind = "else"
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
            sides = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
            kind = "adapters' products" if sides & {RANK} else "products"
        elif "attention" in event.key:
            kind = "attention"
        seconds[kind] += event.self_device_time_total / 1e6
    return seconds


def device_account(profiler: torch.profiler.profile) -> dict[str, Any]:
    """Where the device's time went, in how many kernels, and the largest of them."""
    kernels = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "gpu_time": device_time(profiler),
        "kernels": sum(event.count for event in kernels),
        "gpu_kernels": largest_times(profiler),
    }


def largest_times(profiler: torch.profiler.profile, count: int = 15) -> list[tuple[str, float]]:
    """The operations and kernels that took the device longest, seconds each."""
    events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    return [(event.key[:100], round(event.self_device_time_total / 1e6, 5)) for event in events[:count]]


def fastest(tried: dict[int, dict[str, float]]) -> dict[str, float]:
    """The figures of the batch size that answers most users a second, and latencies of single requests."""
    best = max(tried, key=lambda size: tried[size]["users_per_second"])
    latencies = {key: x for figures in tried.values() for key, x in figures.items() if key.endswith("_ms")}
    return {**latencies, **tried[best], "batch_size": best}


def each_taken(
    answer: Callable[[list[np.ndarray]], Any], histories: list[np.ndarray], count: int
) -> Iterator[float]:
    for number in range(count):
        started = time.perf_counter()
        answer([histories[number % len(histories)]])
        yield 1000 * (time.perf_counter() - started)


def toy_data() -> tuple[SemanticIds, list[TargetSequence], str]:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 16, (300, 4)).astype(np.int32)
    ids = SemanticIds([str(i) for i in range(len(codes))], codes, (16,) * 4)
    sequences = []
    for user in range(60):
        before, targets = generator.integers(1, 6, 2)
        items = generator.integers(0, len(codes), before + targets).astype(np.int32)
        sequences.append(TargetSequence(str(user), items, int(before)))
    return ids, sequences, "random sequences"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and users")
    parser.add_argument(
        "--json", action="store_true", help="accepted for consistency; the output is always JSON"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-tflops", type=float, help="peak of this GPU for dense bfloat16")
    parser.add_argument("--model", choices=["smollm2-135m", "llama-3.2-1b-shape"], help="run only this one")
    parser.add_argument("--part", choices=PARTS, help="run only this one")
    arguments = parser.parse_args()
    parts = [arguments.part] if arguments.part else PARTS
    warnings.simplefilter("ignore")
    device = Precision.of("auto", arguments.device).device
    on_gpu = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if on_gpu else "CPU: toy shapes"
    known = next((float(peak) for name, peak in PEAKS.items() if name in card), None)
    peak = arguments.peak_tflops or (known if on_gpu else None)
    size = (QUICK if arguments.quick else FULL) if on_gpu else TOY
    models = [arguments.model] if arguments.model else ["smollm2-135m", "llama-3.2-1b-shape"]
    started = time.perf_counter()
    result: dict[str, Any] = {"device": card, "peak_tflops": peak, "torch": torch.__version__}
    for name in models if on_gpu else ["toy"]:
        result[name] = Bench(name, device, size, peak).result(parts)
    print(json.dumps(result | {"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()

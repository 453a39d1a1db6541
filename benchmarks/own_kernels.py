"""The time that each of our own kernels saves in a training step on a CPU.

    python benchmarks/own_kernels.py [--quick] [--json]

Three kernels replace what PEFT, PyTorch and Transformers do: a LoRA layer as one operation (`fused_lora`),
dropout from random bits (`dropout_bits`) and attention along the tree of shared histories
(`tree_attention`). Two models with LoRA r = 8 and dropout 0.05 on all seven projections, `stream` and
`instruct`, in float32 and bfloat16: `scratch` (width 128, 4 layers) and the first 4 layers of SmolLM2-135M's
shape (random weights). Steps have 32 targets with random histories of 20 items. Turns alternate between all
kernels and all kernels except one, with one thread. Each figure is the ratio of the medians of the steps:
1.10 means that a step takes 10 % longer without the kernel. A kernel that never saves that much is not worth
its code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from step_time import median_step
from transformers import LlamaConfig, LlamaForCausalLM

from peso.config import AdapterConfig, BackboneConfig, PromptConfig
from peso.events.histories import TargetSequence
from peso.items.semantic_ids import SemanticIds
from peso.model import generative
from peso.model.backbone import byte_tokenizer
from peso.model.build import build_model, round_frozen
from peso.model.generative import GenerativeModel
from peso.training import loop, plan

ITEMS, LEVELS, CODES, HISTORY, TARGETS = 2_500, 4, 256, 20, 32
KERNELS = ("fused_lora", "dropout_bits", "tree_attention")
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def smollm2_shape(folder: Path, layers: int) -> str:
    """The path of a Transformers model of that shape, for a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=258, num_hidden_layers=layers, bos_token_id=0, eos_token_id=1, **SMOLLM2)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def build(backbone: str, layout: str, precision: str) -> GenerativeModel:
    codes = np.random.default_rng(0).integers(0, CODES, (ITEMS, LEVELS), dtype=np.int32)
    ids = SemanticIds([str(n) for n in range(ITEMS)], codes, (CODES,) * LEVELS)
    model = build_model(
        BackboneConfig.model_validate(
            {"name": backbone, **({"dropout": 0.0} if backbone == "scratch" else {})}
        ),
        PromptConfig.model_validate({"layout": layout}),
        AdapterConfig(),
        "semantic",
        ids,
        seed=0,
    )
    if precision == "bfloat16":
        round_frozen(model, torch.bfloat16)
    return model


@contextmanager
def without(kernel: str | None) -> Iterator[None]:
    """Within the context a kernel is replaced by what the libraries do."""
    with ExitStack() as patched:
        if kernel == "fused_lora":
            patched.enter_context(patch.object(loop, "fused_lora", lambda model: nullcontext()))
        if kernel == "dropout_bits":
            patched.enter_context(patch.object(loop, "fast_dropout", lambda model: nullcontext()))
            patched.enter_context(patch("peso.adapters.fused._bits", lambda rows: False))
        if kernel == "tree_attention":
            for module in (generative, plan):
                patched.enter_context(patch.object(module, "serves", lambda causal_lm: False))
        yield


def step_seconds(model: GenerativeModel, precision: str, steps: int) -> float:
    count = TARGETS * (steps + 1) // 4 + 1
    histories = np.random.default_rng(1).integers(0, ITEMS, (count, HISTORY))
    sequences = [TargetSequence("", row.astype(np.int32), HISTORY - 4) for row in histories]
    return median_step(model, sequences, TARGETS, steps, stage=1, precision=precision)


def ratios(model: GenerativeModel, precision: str, turns: int, steps: int) -> dict[str, float]:
    """Milliseconds of a step with all kernels, and for each kernel what a step takes without it over that."""
    seconds: dict[str | None, list[float]] = {kernel: [] for kernel in (None, *KERNELS)}
    for _ in range(turns):
        for kernel, found in seconds.items():
            with without(kernel):
                found.append(step_seconds(model, precision, steps))
    every = statistics.median(seconds[None])
    return {"milliseconds": every * 1e3} | {k: statistics.median(seconds[k]) / every for k in KERNELS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    turns, steps = (3, 3) if arguments.quick else (7, 6)
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        backbones = {"scratch": "scratch", "smollm2 shape": smollm2_shape(Path(folder), 4)}
        for name, backbone in backbones.items():
            for layout in ("stream", "instruct"):
                for precision in ("float32", "bfloat16"):
                    model = build(backbone, layout, precision)
                    result[f"{name}, {layout}, {precision}"] = ratios(model, precision, turns, steps)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{'':<34}{'step ms':>9}" + "".join(f"{kernel:>16}" for kernel in KERNELS))
    for name, row in result.items():
        print(f"{name:<34}{row['milliseconds']:>9.0f}" + "".join(f"{row[k]:>16.2f}" for k in KERNELS))


if __name__ == "__main__":
    main()

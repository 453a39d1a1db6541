"""The cost of an item head: a training step and an answer, with and without it.

    python benchmarks/item_head.py [--quick] [--negatives | --large] [--json]

A small Llama (`scratch`, width 128, 4 layers, dropout 0.2, `stream`) on random histories of 20 items, all
weights trained, in catalogs of 2,500 and 25,000 items with 4 levels × 256 codes. Steps of 32, 128 and 512
targets; the head's share of a step is 1 - t(codes) / t(items), with a softmax over all items (`step_share`)
and with 1,024 negatives (`sampled_share`). `answer_share` is the same for the search of 10 beams over 64
users; `counted_answer_share` with counts of transitions as well, 40 edges per item. The models take turns,
and each figure is the median over all turns.

`--negatives`: instead, the head's share of a step by the number of negatives, with the sizes that `backbone:
auto` chooses for `Video_Games`: `scratch`, 2 layers 64 wide, 256 targets, 25,935 items.

`--large`: instead, the search in a catalog of a million items with vectors 64 wide (`scratch`, 2 layers), in
processor time: of the whole search, of the exact product and the choice of its best items, and the largest
memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from scipy import sparse
from step_time import median_step

from peso.config import BackboneConfig, HeadConfig, PromptConfig
from peso.decoding import search
from peso.decoding.pool import best_leaves, leaf_log_probabilities
from peso.events.histories import TargetSequence
from peso.items.semantic_ids import SemanticIds
from peso.model.build import build_model
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.model.transitions import Transitions

CATALOGS, BATCHES = (2_500, 25_000), (32, 128, 512)
LEVELS, CODES, HISTORY, USERS = 4, 256, 20, 64
EDGES = 40  # per item; 36 in the last stage of `Video_Games`
LARGE, WIDTH, TOGETHER = 1_000_000, 64, 32  # items, width of their vectors, users in a batch

HEADS = {
    "codes": HeadConfig(),
    "items": HeadConfig(name="items"),
    "sampled": HeadConfig(name="items", negatives=1024),
    "counted": HeadConfig(name="items"),
}
TRAINED = ("codes", "items", "sampled")
SAMPLES, SAMPLED_ITEMS, SAMPLED_BATCH = (2048, 1024, 512, 256), 25_935, 256


def build(items: int, head: HeadConfig, **sizes: int) -> GenerativeModel:
    codes = np.random.default_rng(0).integers(0, CODES, (items, LEVELS), dtype=np.int32)
    ids = SemanticIds([str(n) for n in range(items)], codes, (CODES,) * LEVELS)
    return build_model(
        BackboneConfig.model_validate({"name": "scratch", **sizes}),
        PromptConfig(),
        None,
        "semantic",
        ids,
        seed=0,
        head=head,
    )


def counted(items: int) -> Transitions:
    """Random transitions, to measure their cost."""
    generator = np.random.default_rng(3)
    rows = np.repeat(np.arange(items), EDGES)
    columns, weights = generator.integers(0, items, rows.size), generator.random(rows.size)
    edges = sparse.csr_array((weights.astype(np.float32), (rows, columns)), shape=(items, items))
    return Transitions(edges, recency=0.7, window=HISTORY, repeats=False)


def step_seconds(model: GenerativeModel, items: int, batch: int, steps: int) -> float:
    histories = np.random.default_rng(1).integers(0, items, (batch * (steps + 1) // HISTORY + 1, HISTORY + 1))
    sequences = [TargetSequence("", row.astype(np.int32), 1) for row in histories]
    return median_step(model, sequences, batch, steps, stage=0, precision="float32")


def answer_seconds(model: GenerativeModel, items: int) -> float:
    histories = list(np.random.default_rng(2).integers(0, items, (USERS, HISTORY)))
    start = time.perf_counter()
    search(model, histories, beams=10)
    return time.perf_counter() - start


def by_negatives(turns: int, steps: int) -> dict[str, float]:
    """The head's share of a step with each number of negatives, and the milliseconds without a head."""
    heads = {"codes": HEADS["codes"]}
    heads |= {str(drawn): HeadConfig(name="items", negatives=drawn) for drawn in SAMPLES}
    models = {name: build(SAMPLED_ITEMS, head, width=WIDTH, layers=2) for name, head in heads.items()}
    step = partial(step_seconds, items=SAMPLED_ITEMS, batch=SAMPLED_BATCH, steps=steps)
    found = medians(step, models, turns)
    shares = {f"share_{name}": 1 - found["codes"] / found[name] for name in heads if name != "codes"}
    return {"step_milliseconds": found["codes"] * 1e3, **shares}


def large() -> dict[str, float]:
    """Milliseconds of the processor for a user in a large catalog, and the peak memory in gigabytes."""
    model = for_inference(build(LARGE, HEADS["items"], width=WIDTH, layers=2))
    ids, result = model.semantic_ids, dict[str, float]()
    histories = list(np.random.default_rng(2).integers(0, LARGE, (TOGETHER, HISTORY)))
    leaves = torch.arange(ids.trie.leaves)
    for users in (1, TOGETHER):
        start = time.process_time()
        search(model, histories[:users], beams=10)
        result[f"search_milliseconds_{users}"] = (time.process_time() - start) / users * 1e3
        start = time.process_time()
        with torch.no_grad():
            found = leaf_log_probabilities(model, torch.randn(users, WIDTH))
            best_leaves(found, leaves, 10, None)
        result[f"exact_milliseconds_{users}"] = (time.process_time() - start) / users * 1e3
    result["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result


def with_heads(items: int, heads: Sequence[str]) -> dict[str, GenerativeModel]:
    models = {head: build(items, HEADS[head]) for head in heads}
    if "counted" in models:
        models["counted"].transitions = counted(items)
    return models


def medians(
    measure: Callable[[GenerativeModel], float], models: Mapping[str, GenerativeModel], turns: int
) -> dict[str, float]:
    """Seconds with each model; they take turns."""
    seconds: dict[str, list[float]] = {head: [] for head in models}
    for _ in range(turns):
        for head, model in models.items():
            seconds[head].append(measure(model))
    return {head: statistics.median(found) for head, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--negatives", action="store_true", help="the share by the number of negatives")
    mode.add_argument("--large", action="store_true", help="a catalog of a million items")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    turns, steps = (3, 6) if arguments.quick else (7, 12)
    result: dict[str, float] = {}
    special = arguments.large or arguments.negatives
    for items in () if special else CATALOGS:
        for batch in BATCHES:
            step = partial(step_seconds, items=items, batch=batch, steps=steps)
            found = medians(step, with_heads(items, TRAINED), turns)
            result[f"step_milliseconds_{items}_{batch}"] = found["codes"] * 1e3
            result[f"step_share_{items}_{batch}"] = 1 - found["codes"] / found["items"]
            result[f"sampled_share_{items}_{batch}"] = 1 - found["codes"] / found["sampled"]
        models = with_heads(items, ("codes", "items", "counted"))
        found = medians(partial(answer_seconds, items=items), models, turns)
        result[f"answer_milliseconds_{items}"] = found["codes"] * 1e3
        result[f"answer_share_{items}"] = 1 - found["codes"] / found["items"]
        result[f"counted_answer_share_{items}"] = 1 - found["codes"] / found["counted"]
    if special:
        result = large() if arguments.large else by_negatives(turns, steps)
    if arguments.json:
        print(json.dumps(result))
        return
    if not arguments.large:
        print("1 thread; milliseconds without the head, and its share of the time with it")
    for name, value in result.items():
        print(f"{name:>32} {value:.4g}")


if __name__ == "__main__":
    main()

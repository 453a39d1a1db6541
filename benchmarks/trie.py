"""The trie of large catalogs: the time and memory to build it, and the cost of a step of the search.

    python benchmarks/trie.py [--quick] [--json]

The catalogs are random, with 4 levels × 256 codes. Building is measured in a separate process, whose total
peak resident memory counts (including interpreter, libraries and the input codes). A step computes the 10
best continuations of each user from the logits of a level's codes for 64 users × 10 beams: log-softmax, mask
and select; also with 20 seen items per user excluded. `select_growth` is for mask and select only, whose
work depends on the number of existing children. Times are the best of many runs (slower ones were
disturbed), added up over the levels of a search. `step_share` is the time of a mean step divided by that of
one decoding pass of a model of SmolLM2-135M's shape (random weights) over the same beams.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peso.decoding.filters import NodeFilter
from peso.decoding.trie_step import Selection, TrieTensors, select
from peso.items.semantic_ids import ItemTrie

LEVELS, CODES = 4, 256
USERS, BEAMS, SEEN = 64, 10, 20
SIZES = (100_000, 1_000_000, 10_000_000)
CPU = torch.device("cpu")


def random_codes(items: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, CODES, (items, LEVELS), dtype=np.int32)


def build_alone(items: int) -> tuple[float, float]:
    """Seconds, and peak resident memory of this process in GB."""
    codes = random_codes(items)
    start = time.perf_counter()
    ItemTrie.build(codes)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # bytes on macOS, else kilobytes


def time_steps(trie: ItemTrie, logits: torch.Tensor, admitted: NodeFilter | None) -> tuple[float, float]:
    """Seconds of all steps of one search, and of mask and select among them.

    logits: (levels, users, beams, codes).
    """
    tensors = TrieTensors.of(trie, CPU)
    beams = Selection.root(USERS, CPU)
    selecting = 0.0
    start = time.perf_counter()
    for level in range(LEVELS):
        log_probabilities = logits[level, :, : beams.nodes.shape[1]].log_softmax(-1)
        begin = time.perf_counter()
        beams = select(tensors, level, beams, log_probabilities, BEAMS, admitted)
        selecting += time.perf_counter() - begin
    return time.perf_counter() - start, selecting


def time_model(repetitions: int) -> float:
    """Seconds of one decoding pass over all beams, behind prompts of 80 tokens."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    with torch.no_grad():
        model = LlamaForCausalLM(config).eval().model
        cache = model(torch.zeros(USERS, 80, dtype=torch.int64), use_cache=True).past_key_values
        beams, mask = torch.zeros(USERS, BEAMS, dtype=torch.int64), torch.zeros(USERS, 1, BEAMS, 80 + BEAMS)
        seconds = []
        for _ in range(repetitions):
            start = time.perf_counter()
            model(beams, attention_mask=mask, position_ids=beams + 80, past_key_values=cache)
            seconds.append(time.perf_counter() - start)
            cache.crop(-BEAMS)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        builds = {items: pool.apply(build_alone, (items,)) for items in SIZES}

    logits = torch.randn(LEVELS, USERS, BEAMS, CODES, generator=torch.Generator().manual_seed(0))
    tries = {items: ItemTrie.build(random_codes(items)) for items in SIZES}
    filters = {
        items: NodeFilter.without(trie, np.random.default_rng(1).integers(0, items, (USERS, SEEN)))
        for items, trie in tries.items()
    }
    # sizes take turns, so that a busy moment of the machine meets all of them
    turns = [
        [
            [time_steps(tries[items], logits, admitted) for admitted in (None, filters[items])]
            for items in SIZES
        ]
        for _ in range(100 if arguments.quick else 1000)
    ]
    # (sizes, without and with filter, step and select alone)
    milliseconds = np.min(turns, axis=0) * 1e3
    model = time_model(3 if arguments.quick else 10) * 1e3
    growth, share = milliseconds[-1] / milliseconds[0], milliseconds[-1, :, 0] / LEVELS / model
    result = {
        "build_seconds_10m": builds[SIZES[-1]][0],
        "build_gb_10m": builds[SIZES[-1]][1],
        "step_growth": growth[0, 0],
        "step_growth_excluding": growth[1, 0],
        "select_growth": growth[0, 1],
        "step_milliseconds_10m": milliseconds[-1, 0, 0] / LEVELS,
        "step_share": share[0],
        "step_share_excluding": share[1],
        "threads": torch.get_num_threads(),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{LEVELS} levels × {CODES} codes, {torch.get_num_threads()} threads; {LEVELS} steps a search")
    print(
        f"{'items':>12} {'build s':>9} {'peak GB':>9} {'steps ms':>9} {'select ms':>10} {'20 excluded':>12}"
    )
    for row, items in enumerate(SIZES):
        (step, selecting), (excluding, _) = milliseconds[row]
        seconds, peak = builds[items]
        print(f"{items:>12,} {seconds:>9.2f} {peak:>9.2f} {step:>9.2f} {selecting:>10.2f} {excluding:>13.2f}")
    print(f"one decoding pass of SmolLM2's shape over {USERS} × {BEAMS} beams: {model:.0f} ms")
    for name, value in result.items():
        print(f"{name:>24} {value:.4g}")


if __name__ == "__main__":
    main()

"""Evaluation speed: our search beside Transformers' `generate`, same model, same prompts, same top-10.

    python benchmarks/decoding.py [--quick] [--json] [--layers N | --scratch] [--threads N]

The usual way is `generate` with 10 beams and `prefix_allowed_tokens_fn` on a model whose embedding and head
hold the semantic tokens, prompt layout `instruct`, left-padded batches, at batch size 1 as released and at
the batch size that is fastest here. Ours runs on the same weights, with the same layout and with `stream`.
Contestants take turns in one process; a ratio is taken within each turn, and its median and range are given.
The rankings are compared in every turn: the run fails if they are not the same.

Prompts are test cases of `Video_Games` stage 1 where the data are at hand (PESO_DATA), else random histories
over a random catalogue of the same size. SmolLM2-135M comes from `peso pull smollm2-135m`. The semantic
tokens' rows are freshly initialised: what is measured does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peso.decoding import search
from peso.events.release import read_release
from peso.items.semantic_ids import SemanticIds
from peso.model.backbone import load_backbone
from peso.model.generative import GenerativeModel
from peso.model.layout import make_layout
from peso.model.vocabulary import SemanticVocabulary

ROOT = Path(__file__).resolve().parent.parent
# the reference that the tests compare with is the one that is timed
sys.path.append(str(ROOT / "tests"))
from transformers_reference import UsualWay, assert_same_ranking  # noqa: E402

BEAMS, WINDOW = 10, 20
BATCH_SIZES = (1, 2, 4, 8)  # of `generate`


def real_or_random(users: int) -> tuple[SemanticIds, list[np.ndarray], str]:
    """Catalogue, a sample of histories, and where they come from."""
    data = Path(os.environ.get("PESO_DATA", ROOT.parent / "shared" / "data"))
    folder = data / "peso_release" / "Video_Games_cl_0.6_0_5_3_0"
    generator = np.random.default_rng(0)
    if folder.is_dir():
        _, stages, ids = read_release(folder)
        histories = stages[1].test_cases(WINDOW).histories
        chosen = generator.choice(len(histories), users, replace=False)
        return ids, [histories[i] for i in chosen], "Video_Games stage 1"
    codes = generator.integers(0, 256, (25_935, 4)).astype(np.int32)
    ids = SemanticIds([str(i) for i in range(len(codes))], codes, (256,) * 4)
    lengths = generator.integers(3, WINDOW + 1, users)
    return ids, [generator.integers(0, len(codes), n).astype(np.int32) for n in lengths], "random histories"


def models(name: str, layers: int | None, ids: SemanticIds) -> dict[str, GenerativeModel]:
    """One set of weights under both layouts."""
    causal_lm, tokenizer = load_backbone(name, layers=layers)
    words = causal_lm.get_input_embeddings().weight
    vocabulary = SemanticVocabulary(len(tokenizer), ids.sizes, words.shape[1])
    vocabulary.initialise(words, causal_lm.get_output_embeddings().weight, seed=0)
    return {
        layout: GenerativeModel(
            causal_lm, tokenizer, vocabulary, make_layout(layout, tokenizer, WINDOW), ids, "full"
        ).eval()
        for layout in ("instruct", "stream")
    }


def by_search(model: GenerativeModel, histories: list[np.ndarray]) -> Any:
    found = search(model, histories, beams=BEAMS)
    return found.leaves, found.scores


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer users and turns")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--layers", type=int, help="keep the first N layers of SmolLM2-135M")
    parser.add_argument("--scratch", action="store_true", help="the small Llama of `backbone: scratch`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    users, turns = (16, 2) if arguments.quick else (64, 5)

    ids, histories, source = real_or_random(users)
    backbone = "scratch" if arguments.scratch else "smollm2-135m"
    ours = models(backbone, arguments.layers, ids)
    usual = UsualWay(ours["instruct"])
    probe = histories[: users // 2]
    usual.generate(probe[:1], BEAMS)  # warms up
    rates = {
        size: len(probe) / timed(lambda size=size: usual.in_batches(probe, BEAMS, size))[0]
        for size in BATCH_SIZES
    }
    best = max(rates, key=lambda size: rates[size])

    seconds: dict[str, list[float]] = {"generate": [], "instruct": [], "stream": []}
    for _ in range(turns):
        taken, expected = timed(lambda: usual.in_batches(histories, BEAMS, best))
        seconds["generate"].append(taken)
        for layout, model in ours.items():
            taken, found = timed(lambda model=model: by_search(model, histories))
            seconds[layout].append(taken)
            if layout == "instruct":
                assert_same_ranking(expected, found)

    ratios = {
        layout: [usual / own for usual, own in zip(seconds["generate"], seconds[layout], strict=True)]
        for layout in ours
    }
    rate = {who: users / statistics.median(times) for who, times in seconds.items()}
    result = {
        "instruct_ratio": statistics.median(ratios["instruct"]),
        "stream_ratio": statistics.median(ratios["stream"]),
        "instruct_ratio_range": [min(ratios["instruct"]), max(ratios["instruct"])],
        "stream_ratio_range": [min(ratios["stream"]), max(ratios["stream"])],
        "instruct_ratio_to_batch_size_1": rate["instruct"] / rates[1],
        "users_per_second": rate,
        "generate_users_per_second_by_batch_size": rates,
        "generate_best_batch_size": best,
        "same_top_10": True,
        "users": users,
        "turns": turns,
        "layers": ours["instruct"].causal_lm.config.num_hidden_layers,
        "backbone": backbone,
        "prompts": source,
        "threads": torch.get_num_threads(),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{backbone}, {result['layers']} layers, float32, {result['threads']} threads; "
        f"{users} users of {source}, {turns} turns; {BEAMS} beams"
    )
    print(f"{'':>34} {'users/s':>9} {'ratio':>7}  range")
    for size, value in rates.items():
        mark = "   (best)" if size == best else ""
        print(f"{f'generate, instruct, batch size {size}':>34} {value:>9.3f}{mark}")
    for layout, values in ratios.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{f'ours, {layout}':>34} {rate[layout]:>9.3f} {statistics.median(values):>7.1f}  {spread}")
    print("instruct: the same 10 semantic IDs, order and log-probabilities (1e-4) in every turn")


if __name__ == "__main__":
    main()

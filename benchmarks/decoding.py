"""Evaluation speed: our search compared with Transformers' `generate` (same model, prompts and top 10).

    python benchmarks/decoding.py [--quick] [--json] [--layers N | --scratch] [--threads N]

The usual way is `generate` with 10 beams and `prefix_allowed_tokens_fn` on a model whose embedding and head
contain the semantic tokens, with prompt layout `instruct` and left-padded batches, at batch size 1 as
released and at the batch size that is fastest here. The expert's way batches users with histories of similar
length and stores the catalog in arrays; it also uses its fastest batch size. Ours runs on the same weights,
with the same layout and with `stream`, in float32 and bfloat16. The contestants take turns in one process.
Ratios are computed within each turn, and their median and range are printed. `…_ratio` is the ratio of ours
in float32 to the usual way, `…_expert_ratio` to the expert's way, and `…_best` that of ours in its fastest
precision (the others stay in float32). The rankings of `instruct` in float32 are compared in every turn, and
the run fails if they differ.

The prompts are the test cases of `Video_Games` stage 1 if the data are available (PESO_DATA), else random
histories over a random catalog of the same size. These weights have no adapter. `stage_cost` is the time
that an adapter of rank 8 on seven projections adds to ours (`instruct`), when answering all users or one,
and in testing, where the targets are scored too: as a stage does it, and with PEFT's layers and a separate
pass. SmolLM2-135M comes from `peso pull smollm2-135m`. The rows of the semantic tokens are newly
initialized, because the measurements do not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peso.adapters.lora import add_adapter
from peso.decoding import search
from peso.events.histories import Cases
from peso.events.release import read_release
from peso.items.semantic_ids import SemanticIds
from peso.model.backbone import load_backbone
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.model.layout import make_layout
from peso.model.vocabulary import SemanticVocabulary
from peso.training.likelihood import target_level_log_probabilities

ROOT = Path(__file__).resolve().parent.parent
# the reference that the tests compare with is the one that is timed
sys.path.append(str(ROOT / "tests"))
from transformers_reference import ExpertWay, UsualWay, assert_same_ranking  # noqa: E402
from usual_training import TARGETS  # noqa: E402

BEAMS, WINDOW = 10, 20
BATCH_SIZES = (1, 2, 4, 8)  # of `generate`
REQUESTS = 6  # answered one by one, a turn


def real_or_random(users: int) -> tuple[SemanticIds, list[np.ndarray], str]:
    """Catalog, a sample of histories, and where they come from."""
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


USUAL, EXPERT = "usual way", "expert's way"
LAYOUTS, PRECISIONS = ("instruct", "stream"), {"float32": torch.float32, "bfloat16": torch.bfloat16}


def models(
    name: str, layers: int | None, ids: SemanticIds, dtype: torch.dtype = torch.float32
) -> dict[str, GenerativeModel]:
    """One set of weights under both layouts."""
    causal_lm, tokenizer = load_backbone(name, layers=layers, dtype=dtype)
    words = causal_lm.get_input_embeddings().weight
    vocabulary = SemanticVocabulary(len(tokenizer), ids.sizes, words.shape[1])
    vocabulary.initialise(words, causal_lm.get_output_embeddings().weight, seed=0)
    return {
        layout: GenerativeModel(
            causal_lm, tokenizer, vocabulary, make_layout(layout, tokenizer, WINDOW), ids, "full"
        ).eval()
        for layout in LAYOUTS
    }


def adapted(model: GenerativeModel) -> GenerativeModel:
    """With an adapter in place that does something."""
    model.backbone = add_adapter(model.causal_lm, 8, 16, 0.05, TARGETS, seed=0)
    torch.manual_seed(0)
    for name, p in model.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return model.eval()


def by_search(model: GenerativeModel, histories: list[np.ndarray]) -> Any:
    found = search(model, histories, beams=BEAMS)
    return found.leaves, found.scores


def stage_cost(
    stage: GenerativeModel, plain: GenerativeModel, histories: list[np.ndarray], turns: int
) -> dict[str, float]:
    """What answering and testing a stage's model, which has an adapter, takes in relation to answering
    without one: as it is done, and by PEFT's layers and a pass of its own for the targets."""
    ready = for_inference(stage)
    targets = np.arange(len(histories)) % len(stage.semantic_ids.item_ids)
    cases = Cases([""] * len(histories), histories, targets)

    def test_apart(histories: list[np.ndarray]) -> Any:
        found = by_search(stage, histories)
        target_level_log_probabilities(stage, cases)
        return found

    def test(histories: list[np.ndarray]) -> Any:
        found = search(ready, histories, beams=BEAMS, targets=targets)
        return found.leaves, found.scores

    answer: dict[str, Callable[[list[np.ndarray]], Any]] = {
        "without": partial(by_search, plain),
        "by PEFT": partial(by_search, stage),
        "as done": partial(by_search, ready),
    }
    if stage.dtype == torch.float32:
        for way in (answer["as done"], test):
            assert_same_ranking(answer["by PEFT"](histories), way(histories))
    every = relative({**answer, "test by PEFT, apart": test_apart, "test": test}, [histories] * turns)
    one = relative(answer, [[history] for history in histories[:REQUESTS]] * turns)
    return every | {f"one request {name}": ratio for name, ratio in one.items()}


def relative(
    works: dict[str, Callable[[list[np.ndarray]], Any]], given: list[list[np.ndarray]]
) -> dict[str, float]:
    """Seconds of each work over those of ``without``, on the same histories: medians over what is given."""
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for histories in given:
        taken = {name: timed(partial(work, histories))[0] for name, work in works.items()}
        for name, seconds in taken.items():
            ratios[name].append(seconds / taken["without"])
    return {name: statistics.median(all_) for name, all_ in ratios.items() if name != "without"}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer users and turns")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--users", type=int, help="number of users in a turn (64; 8 with --quick)")
    parser.add_argument("--layers", type=int, help="use only the first N layers of SmolLM2-135M")
    parser.add_argument("--scratch", action="store_true", help="use the small Llama of `backbone: scratch`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    users, turns = (8, 2) if arguments.quick else (64, 5)
    users = arguments.users or users

    ids, histories, source = real_or_random(users)
    backbone = "scratch" if arguments.scratch else "smollm2-135m"
    ours = {
        f"{layout} {precision}": model
        for precision, dtype in PRECISIONS.items()
        for layout, model in models(backbone, arguments.layers, ids, dtype).items()
    }
    theirs = {name: way(ours["instruct float32"]) for name, way in ((USUAL, UsualWay), (EXPERT, ExpertWay))}
    probe = histories[: max(8, users // 4)]
    tried: dict[str, dict[int, float]] = {}
    for name, way in theirs.items():
        way.generate(probe[:1], BEAMS)  # warms up
        tried[name] = {
            size: len(probe) / timed(lambda way=way, size=size: way.in_batches(probe, BEAMS, size))[0]
            for size in BATCH_SIZES
        }
    best = {name: max(rates, key=lambda size: rates[size]) for name, rates in tried.items()}
    for model in ours.values():
        by_search(model, probe[:2])

    seconds: dict[str, list[float]] = {name: [] for name in (*theirs, *ours)}
    for _ in range(turns):
        expected = []
        for name, way in theirs.items():
            taken, found = timed(lambda way=way, name=name: way.in_batches(histories, BEAMS, best[name]))
            seconds[name].append(taken)
            expected.append(found)
        for name, model in ours.items():
            taken, found = timed(lambda model=model: by_search(model, histories))
            seconds[name].append(taken)
            if name == "instruct float32":
                for each in expected:
                    assert_same_ranking(each, found)

    def ratios(own: str, other: str) -> list[float]:
        return [theirs / ours for theirs, ours in zip(seconds[other], seconds[own], strict=True)]

    rate = {who: users / statistics.median(times) for who, times in seconds.items()}
    result: dict[str, Any] = {}
    for layout in LAYOUTS:
        fastest = max((f"{layout} {precision}" for precision in PRECISIONS), key=lambda name: rate[name])
        for suffix, own in (("", f"{layout} float32"), ("_best", fastest)):
            for key, other in (("ratio", USUAL), ("expert_ratio", EXPERT)):
                values = ratios(own, other)
                result[f"{layout}_{key}{suffix}"] = statistics.median(values)
                result[f"{layout}_{key}{suffix}_range"] = [min(values), max(values)]
        result[f"{layout}_best_precision"] = fastest.split()[1]
    result |= {
        "stage_cost": {
            precision: stage_cost(
                adapted(models(backbone, arguments.layers, ids, dtype)["instruct"]),
                ours[f"instruct {precision}"],
                histories,
                turns,
            )
            for precision, dtype in PRECISIONS.items()
        },
        "instruct_ratio_to_batch_size_1": rate["instruct float32"] / tried[USUAL][1],
        "users_per_second": rate,
        "generate_users_per_second_by_batch_size": tried,
        "generate_best_batch_size": best,
        "same_top_10": True,
        "users": users,
        "turns": turns,
        "layers": ours["instruct float32"].causal_lm.config.num_hidden_layers,
        "backbone": backbone,
        "prompts": source,
        "threads": torch.get_num_threads(),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{backbone}, {result['layers']} layers, {result['threads']} threads; {users} users of {source}, "
        f"{turns} turns; {BEAMS} beams; fastest batch sizes of generate: {best}"
    )
    print(f"{'':>20} {'users/s':>9} {'x usual':>9} {'x expert':>9}  range of x usual")
    for name, value in rate.items():
        usual, expert = ratios(name, USUAL), statistics.median(ratios(name, EXPERT))
        spread = f"{min(usual):.1f} to {max(usual):.1f}"
        print(f"{name:>20} {value:>9.3f} {statistics.median(usual):>9.1f} {expert:>9.1f}  {spread}")
    for precision, costs in result["stage_cost"].items():
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in costs.items())
        print(f"{precision}, time of instruct without adapter = 1: {told}")
    print("instruct, float32: the same 10 semantic IDs, order and log-probabilities (1e-4) in every turn")


if __name__ == "__main__":
    main()

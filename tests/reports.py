"""Made-up runs that look like real ones, for tests of reports; run as a program it times a large one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from peso.evaluation.catalogue import Catalogue
from peso.evaluation.comparison import Comparison
from peso.evaluation.predictions import Predictions
from peso.evaluation.report.page import write_report
from peso.evaluation.run_summary import RunSummary, StageCost, StageSummary, TrainingCurve
from peso.events.histories import Cases

CASES = (900, 300, 320, 500, 450)
CONFIGURATION = """\
data:
  format: peso-release
  path: data/Video_Games
backbone:
  name: scratch
  layers: 4
  width: 128
strategy:
  name: {strategy}
  weight: {weight}
training:
  epochs: 8
  learning_rate: 0.001
seed: 0
"""


def predictions(stage: int, skill: float, seed: int, n: int, depth: int = 10) -> Predictions:
    """Cases that are the same for every skill and seed; ranks and log-probabilities that are not."""
    cases, answers = np.random.default_rng(stage), np.random.default_rng((seed, stage))
    users = cases.choice(max(2000, n), size=n, replace=False)
    hard = cases.normal(size=n)  # what makes a case hard for every run
    log_probability = -7.5 + 1.5 * skill - 1.2 * hard + 0.3 * answers.normal(size=n)
    hits = answers.random(n) < np.clip(0.04 * (1 + skill) * np.exp(-0.8 * hard), 0, 1)
    ranks = np.where(hits, answers.integers(1, depth + 1, n), 0).astype(np.int32)
    segments = cases.choice(["dormant", "continuing", "new"], p=[0.1, 0.2, 0.7], size=n)
    return Predictions(
        users=[f"u{user}" for user in users],
        targets=[f"i{item}" for item in cases.integers(0, 500, n)],
        items=[[f"i{item}" for item in range(depth)]] * n,
        scores=[-np.arange(depth, dtype=np.float32)] * n,
        rank_semantic_id=ranks,
        rank_item=ranks,
        target_log_probability=log_probability.astype(np.float32),
        user_segment=segments.tolist() if stage else ["new"] * n,
        item_segment=cases.choice(["known", "new"], p=[0.8, 0.2], size=n).tolist(),
        history_length=cases.integers(2, 80, n).astype(np.int32),
        depth=depth,
        target_level_log_probabilities=np.outer(log_probability, [0.4, 0.3, 0.2, 0.1]).astype(np.float32),
    )


def curve(stage: int, penalty: float, seed: int) -> TrainingCurve:
    generator = np.random.default_rng((seed, stage, 1))
    steps = np.arange(1, (2000 if stage == 0 else 260) + 1)
    loss = (
        (6.5 if stage == 0 else 4.6 - 0.1 * stage)
        - 0.28 * np.log(steps)
        + 0.1 * generator.normal(size=len(steps))
    )
    epochs = np.linspace(steps[-1] / 4, steps[-1], 4)
    return TrainingCurve(
        steps=steps,
        loss=loss,
        gradient_norm=0.6 * np.exp(0.3 * generator.normal(size=len(steps))),
        penalty_gradient_norm=penalty * (stage > 0) * (1 - np.exp(-steps / 60)),
        validation_steps=epochs,
        validation_loss=np.interp(epochs, steps, loss) + 0.35,
    )


def moved(stage: int, penalty: float) -> dict[str, Any]:
    """What is known of a stage's anchor; without a penalty only how far the adapter moved."""
    distances = {
        f"model.layers.{k}.{m}": k + 0.1 for k in (0, 1) for m in ("mlp.up_proj", "self_attn.q_proj")
    }
    modules = {name: {"distance": d, "kl": d / 100, "second_order": d / 99} for name, d in distances.items()}
    whole = {"distance": 2.5 + stage, "kl": 0.0123, "second_order": 0.0124, "modules": modules}
    if not penalty:
        return {"moved": whole, "says": None, "gradient_ratios": None, "pull_ratios": None}
    return {
        "moved": whole,
        "says": f"stage {stage}: the penalty's gradient was 12 % of the loss's on average",
        "gradient_ratio": 0.12,
        "gradient_ratios": [0.02, 0.1, 0.16, 0.2],
        "strategy": {"weight": 2.0, "rho": 4.4e4, "rho_standard_error": 9.1e3},
    }


DRIFT = [
    {
        "stage": stage,
        "events": 9000 - 1000 * stage,
        "users": 1000,
        "new_users": 1000 - 150 * stage,
        "continuing_users": 100 * stage,
        "returning_users": 50 * stage,
        "dormant_users": 150 * stage,
        "items": 400,
        "new_items": 400 - 90 * stage,
        "continuing_items": 90 * stage,
        "returning_items": 0,
        "dormant_items": 0,
        "item_divergence": 0.1 * stage if stage else None,
        "code_divergence": 0.02 * stage if stage else None,
        "new_item_targets": 0.08,
        "history_lengths": {"mean": 11.5, "p10": 2.0, "p50": 9.0, "p90": 25.0},
    }
    for stage in range(len(CASES))
]
INDEX = {
    "items": 480,
    "distinct_ids": 478,
    "tokens_in_use": 96,
    "quality": {
        "collisions_before": {"items": 480, "distinct_ids": 440, "items_sharing": 77, "rate": 0.0833},
        "collisions": {"items": 480, "distinct_ids": 478, "items_sharing": 4, "rate": 0.0042},
        "levels": [{"codes": 32, "used": 32, "perplexity": 27.5 - level} for level in range(3)],
        "reconstruction_error": 0.31,
        "neighbours": {"items": 480, "neighbours": 10, "first": 0.61, "first_two": 0.2},
        "without_vector": 3,
        "sample": {
            "prefix": ["<a_4>", "<b_9>"],
            "under_it": 12,
            "items": [{"item": "i7", "title": "Moka Pot"}, {"item": "i8", "title": None}],
        },
    },
    "fitness": {
        "fit": {"items": 400, "error": 0.25, "wanted_taken": 30},
        "held_out": {"items": 20, "error": 0.4, "wanted_taken": 2},
        "stages": [
            {"stage": stage, "items": 20, "error": 0.4 + 0.1 * stage, "wanted_taken": stage, "sharing": 0}
            for stage in range(1, len(CASES))
        ],
        "warnings": ["stage 4: the codes write its 20 new items badly; refit the codebooks"],
    },
}


TRIALS = [
    {
        "phase": "",
        "learning_rate": 4e-4,
        "rows": 3.0,
        "trials": [
            {"learning_rate": 4e-4, "rows": 3.0, "steps": 20, "loss": 6.4, "seconds": 1.0},
            {"learning_rate": 1e30, "rows": 1.0, "steps": 20, "loss": None, "seconds": 1.0},
            {"learning_rate": 4e-4, "rows": 3.0, "steps": 60, "loss": 6.2, "seconds": 3.0},
        ],
    }
]
REFERENCES = {"none": "no updates", "single": "fine-tuning", "retrain": "retraining"}


def run(
    name: str,
    strategy: str,
    skill: float,
    seed: int = 0,
    penalty: float = 0.0,
    learns: bool = True,
    cases: tuple[int, ...] = CASES,
) -> RunSummary:
    stages = {
        stage: StageSummary(
            predictions(stage, skill if stage else 0.6, seed, n),
            StageCost(
                seconds=310.0 if stage == 0 else 41.5 + stage,
                peak_memory_bytes=1_430_000_000 + stage,
                trained_parameters=2_345_678,
                bytes_on_disk=3_456_789,
            )
            if learns
            else None,
            curve(stage, penalty, seed) if learns else None,
            moved(stage, penalty) if learns and stage else {},
            trials=TRIALS if learns and stage else (),
        )
        for stage, n in enumerate(cases)
    }
    manifests = [
        {"step": "stream", "files": {"items.parquet": "9f2c" * 16}, "counts": {"users": 12447}},
        *(
            {
                "stage": stage,
                "parent": f"{stage:x}a7b" * 16,
                "files": {"adapter/adapter_model.safetensors": f"{stage:x}c3d" * 16},
                "versions": {"peso": "0.1.0", "torch": "2.13.0"},
                "created": "2026-01-02T03:04:05+00:00",
            }
            for stage in stages
        ),
    ]
    weight = 2.0 if penalty else 0.0
    configuration = CONFIGURATION.format(strategy=name, weight=weight)
    reference = REFERENCES.get(strategy.split()[0], "")
    return RunSummary(name, strategy, stages, configuration, manifests, DRIFT, INDEX, reference=reference)


def catalogue() -> Catalogue:
    """500 items, some of which were seen much more often, in two categories."""
    generator = np.random.default_rng(9)
    return Catalogue(
        item_ids=[f"i{item}" for item in range(500)],
        seen={stage: (20 * generator.pareto(1.0, 500)).astype(np.int64) for stage in range(len(CASES))},
        codes=generator.integers(0, 8, (500, 3)).astype(np.int32),
        item_columns={
            "category": ["games" if item % 3 else None for item in range(500)],
            "title": [f"Game {item}" if item % 2 else None for item in range(500)],
        },
        cases=cases_of,
    )


def cases_of(stage: int) -> Cases:
    """The histories of :func:`predictions`' users: three items each."""
    users = predictions(stage, 0, 0, CASES[stage]).users
    rows = np.arange(3 * len(users)).reshape(-1, 3) % 500
    return Cases(users, list(rows), np.zeros(len(users), dtype=np.int32))


def across(skill: float, seed: int, cases: tuple[int, ...] = CASES) -> dict[tuple[int, int], Predictions]:
    """The answers of each stage's model to the other stages' cases: the later ones are harder for it."""
    stages = range(len(cases))
    return {
        (i, j): predictions(j, skill - 0.2 * abs(i - j), seed + 100 * (i + 1), cases[j])
        for i in stages
        for j in stages
        if i != j
    }


def seeds(name: str, strategy: str, skill: float, count: int = 3, penalty: float = 0.0) -> list[RunSummary]:
    """Runs of one system, whose skill differs a little from seed to seed."""
    return [
        replace(
            run(f"{name}-{seed}", strategy, skill + 0.02 * seed, 10 * seed + len(name), penalty),
            configuration=CONFIGURATION.format(strategy=name, weight=2.0).replace("seed: 0", f"seed: {seed}"),
            seed=seed,
        )
        for seed in range(count)
    ]


def example_runs() -> list[RunSummary]:
    """A baseline, a stale model and two updated ones that the cases can hardly tell apart."""
    popularity = replace(
        run("popularity", "popularity, all time", -0.8, seed=1, learns=False),
        configuration="",
        manifests=(),
        drift=(),
        semantic_ids={},
    )
    return [
        replace(popularity, catalogue=catalogue()),
        replace(run("none", "none (stage 0 only)", 0.0, seed=2), seed=0),
        replace(run("single", "single", 0.8, seed=3), seed=0, across=across(0.8, 3)),
        replace(run("peso", "peso (weight 2, mean)", 0.82, seed=4, penalty=3e-4), seed=0),
    ]


VIDEO_GAMES = (12_447, 1_035, 1_091, 1_949, 1_791)  # test cases of the released stream


def many_runs(seeds: int = 4, cases: tuple[int, ...] = VIDEO_GAMES) -> list[RunSummary]:
    """Fifty runs of fourteen systems on as many cases as the released stream has."""
    names = ["none", "single", "peso-paper", "peso", "peso-l2", "sum-all", "sum-latest-inherit", "replay"]
    names += ["retrain", "softmax[strength=0.1]", "softmax[strength=1]", "softmax[strength=10]"]
    runs = [
        replace(
            run(f"{name}/{seed}", name, 0.3 + 0.02 * place, 10 * seed + place, 1e-4 * place, cases=cases),
            configuration=CONFIGURATION.format(strategy=name, weight=1.0 * place),
            seed=seed,
            family=name.partition("[")[0],
            options={"strategy.name": "peso", "strategy.strength": float(name.partition("=")[2].strip("]"))}
            if "[" in name
            else {},
            across=across(0.5, place, cases) if seed == 0 and "[" not in name else {},
        )
        for place, name in enumerate(names)
        for seed in range(seeds)
    ]
    popularity = [
        replace(run(name, name, -0.5, seed=50 + place, learns=False, cases=cases), configuration="")
        for place, name in enumerate(["popularity", "popularity (static)"])
    ]
    return [*runs, replace(popularity[0], catalogue=catalogue()), popularity[1]]


def main() -> None:
    """How long the report of fifty runs takes, and how large its page is."""
    runs = many_runs()
    began = time.perf_counter(), time.process_time()
    comparison = Comparison(runs, [5, 10])
    pairs = [
        comparison.contrasts(metric).contrast(metric.name, *two)
        for metric in comparison.metrics
        for two in _pairs(comparison)
    ]
    print(f"significance: {len(pairs)} pairs in {time.perf_counter() - began[0]:.1f} s")
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter(), time.process_time()
        page = write_report(Path(directory) / "report", runs, "Fifty runs")
        seconds, own = time.perf_counter() - began[0], time.process_time() - began[1]
        print(f"report: {seconds:.1f} s ({own:.1f} s of a core), {page.stat().st_size / 1e6:.2f} MB")


def _pairs(comparison: Comparison) -> Iterator[tuple[str, str]]:
    return combinations([system.name for system in comparison.systems], 2)


if __name__ == "__main__":
    main()

"""The effect on quality of training long histories in overlapping chunks.

    python benchmarks/windows.py [--epochs N] [--steps N] [--seeds N] [--quick] [--json]

Under shared-history training a target with more than `window` (20) items before it sees between one and two
windows of them; validation, test and serving always show exactly one. Learns stage 0 of the released
`Video_Games` stream with the scratch backbone (`stream` layout, loss vocabulary `semantic`), then stage 1
from there twice per seed: in chunks, as `peso` does it, and with every later target as a sequence of its own
that shows exactly the window. Prints the share of targets concerned and the test metrics of both, the
differences paired by case and averaged over the seeds, with their 95 % interval; for all users, and for those
whose history is longer than the window.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from copy import deepcopy
from pathlib import Path

import numpy as np

from peso.adapters.lora import add_adapter
from peso.config import BackboneConfig, PromptConfig, TrainingConfig
from peso.decoding import search
from peso.evaluation.metrics import hit, ndcg
from peso.events.histories import Cases, TargetSequence
from peso.events.release import read_release
from peso.model.build import build_model
from peso.model.generative import GenerativeModel
from peso.training.likelihood import target_log_probabilities
from peso.training.loop import train_stage
from peso.training.strategies.strategy import Strategy
from peso.training.task import StageTask

WINDOW = 20
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def exact(sequences: list[TargetSequence]) -> list[TargetSequence]:
    """The same targets, each later one as a sequence of its own that opens one window before it."""
    result = []
    for sequence in sequences:
        whole = min(len(sequence.items), WINDOW + 1)  # its targets see no more than the window
        if sequence.first_target < whole:
            result.append(TargetSequence(sequence.user, sequence.items[:whole], sequence.first_target))
        for t in range(max(whole, sequence.first_target), len(sequence.items)):
            result.append(TargetSequence(sequence.user, sequence.items[t - WINDOW : t + 1], WINDOW))
    return result


def train(
    model: GenerativeModel,
    sequences: list[TargetSequence],
    validation: Cases,
    stage: int,
    seed: int,
    epochs: int,
    steps: int | None,
) -> None:
    settings = TrainingConfig(epochs=epochs, max_steps=steps, device="cpu")
    with tempfile.TemporaryDirectory() as directory:
        train_stage(
            model,
            StageTask(
                sequences,
                validation,
                settings,
                stage=stage,
                learning_rate=1e-3,
                strategy=Strategy(),
                seed=seed,
                directory=Path(directory),
                log=Path(directory) / "log.jsonl",
            ),
        )


def scores(model: GenerativeModel, cases: Cases) -> np.ndarray:
    """(3, cases): Hit@10, NDCG@10, log-probability of the target."""
    leaves = model.semantic_ids.trie.leaf_of[cases.targets]
    found = search(model, cases.histories, beams=10).leaves == leaves[:, None]
    ranks = np.where(found.any(1), found.argmax(1) + 1, 0)
    return np.stack([hit(ranks, 10), ndcg(ranks, 10), target_log_probabilities(model, cases)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, help="largest number of steps per stage")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of stage 1")
    parser.add_argument("--quick", action="store_true", help="100 steps per stage, one seed")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    steps, seeds = (100, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("PESO_DATA", root.parent / "shared" / "data"))
    _, stages, ids = read_release(data / "peso_release" / "Video_Games_cl_0.6_0_5_3_0")

    prompt = PromptConfig(layout="stream", window=WINDOW)
    backbone = BackboneConfig(name="scratch", width=128, layers=4)
    base = build_model(backbone, prompt, None, "semantic", ids, seed=0)
    base.backbone.requires_grad_(True)
    first, second = (stage.training_sequences() for stage in stages[:2])
    train(base, first, stages[0].validation_cases(WINDOW), 0, 0, arguments.epochs, steps)
    base.backbone.requires_grad_(False)
    cases, validation = stages[1].test_cases(WINDOW), stages[1].validation_cases(WINDOW)
    measured: dict[str, list[np.ndarray]] = {"chunks": [], "exact": []}
    for seed in range(seeds):
        for name, sequences in (("chunks", second), ("exact", exact(second))):
            model = deepcopy(base)
            model.backbone = add_adapter(model.causal_lm, 8, 16, 0.05, TARGETS, seed=seed)
            train(model, sequences, validation, 1, seed, arguments.epochs, steps)
            measured[name].append(scores(model, cases))

    before = {user: len(items) for user, items in _lengths(second).items()}
    long = np.array([before.get(user, 0) > WINDOW for user in cases.users])
    concerned = sum(s.targets - max(0, min(len(s.items), WINDOW + 1) - s.first_target) for s in second)
    result: dict[str, object] = {"share_of_targets": concerned / sum(s.targets for s in second)}
    chunks, one = (np.mean(measured[name], axis=0) for name in ("chunks", "exact"))  # (3, cases)
    for users, chosen in (("all", np.ones(len(cases), dtype=bool)), ("long", long)):
        for row, metric in enumerate(("hit@10", "ndcg@10", "log_probability")):
            difference = (chunks - one)[row, chosen]
            half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
            result[f"{users}_{metric}"] = {
                "chunks": float(chunks[row, chosen].mean()),
                "exact": float(one[row, chosen].mean()),
                "difference": float(difference.mean()),
                "half_width": float(half),
                "cases": int(chosen.sum()),
            }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"targets with more than {WINDOW} items before them: {result['share_of_targets']:.1%}")
    for name, values in result.items():
        if isinstance(values, dict):
            print(f"{name:>22} " + "  ".join(f"{key} {value:.4f}" for key, value in values.items()))


def _lengths(sequences: list[TargetSequence]) -> dict[str, np.ndarray]:
    return {sequence.user: sequence.items for sequence in sequences}


if __name__ == "__main__":
    main()

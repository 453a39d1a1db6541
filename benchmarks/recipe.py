"""How a small model is trained from scratch: the search that led to the settings of `peso init`.

    python benchmarks/recipe.py CONFIG DIR [--settings "NAME;…"] [--set KEY=VALUE] [--later] [--test]
        [--quick] [--json]

CONFIG names a log. For each setting stage 0 is trained in a workspace of its own below DIR, from the same
stream and semantic IDs, and its model is tested on the validation cases, with the items that users have had
left out: by the codes alone, by the item head alone, and by both with the tuned shares. `--later` updates
the model at all later stages, and the figures are means of these stages; `--test` tests on test cases, to
report a setting that was chosen without them. `--set` changes a key in every setting, as for `peso run`; use
another DIR then. A run that was stopped goes on where it was. `--quick` trains two epochs of 20 steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from peso.config import load_config
from peso.decoding import search
from peso.runs import pipeline, preparation, reuse
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.machine import threads
from peso.runtime.progress import Silent

HEAD = {"name": "items", "learning_rate_scale": 0.1, "transitions": False}
BEST = {
    "backbone": {"name": "scratch", "width": 64, "layers": 2},
    "head": HEAD,
    "training.epochs": 12,
    "training.patience": 3,
    "training.batch_size": 256,
    "training.learning_rate": 4e-3,
    "training.warmup": 0.05,
    "training.temperature": 1.0,
    "baselines": [],
    "strategy": "single",
}
WIDE = {"backbone": {"name": "scratch", "width": 128, "layers": 4}}
SETTINGS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "with counts of transitions": {"head": {**HEAD, "transitions": True}},
    "items not read": {"head": {**HEAD, "reads": False}},
    "head at the rate of the codes": {"head": {**HEAD, "learning_rate_scale": 1.0}},
    "no head": {"head": "codes"},
    "no dropout": {"backbone": {**BEST["backbone"], "dropout": 0.0}},
    "dropout 0.3": {"backbone": {**BEST["backbone"], "dropout": 0.3}},
    "weight decay 0.3": {"training.weight_decay": 0.3},
    "weight decay 1": {"training.weight_decay": 1.0},
    "dropout 0.3, weight decay 0.1": {
        "backbone": {**BEST["backbone"], "dropout": 0.3},
        "training.weight_decay": 0.1,
    },
    "dropout 0.5, weight decay 0.1": {
        "backbone": {**BEST["backbone"], "dropout": 0.5},
        "head": {**HEAD, "learning_rate_scale": 0.3},
        "training.weight_decay": 0.1,
    },
    "no head, weight decay 1": {"head": "codes", "training.weight_decay": 1.0},
    "no head, 30 epochs": {"head": "codes", "training.epochs": 30},
    "no head, 30 epochs, weight decay 0.3": {
        "head": "codes",
        "training.epochs": 30,
        "training.weight_decay": 0.3,
    },
    "128 wide, 4 layers": {**WIDE, "training.learning_rate": 2e-3},
    "batches of 64 at 1e-3": {"training.batch_size": 64, "training.learning_rate": 1e-3},
    "as it was: wide, head at the rate of the codes, batches of 64 at 1e-3": {
        **WIDE,
        "head": {**HEAD, "learning_rate_scale": 1.0, "reads": False},
        "training.batch_size": 64,
        "training.learning_rate": 1e-3,
        "training.warmup": 0.01,
        "training.temperature": 0.8,
    },
}
QUICK = {"training.epochs": 2, "training.max_steps": 40, "training.validation_cases": 64}


def train(
    config: str, root: Path, settings: list[str], source: Workspace | None, later: bool = False
) -> Workspace:
    """A workspace with a trained stage 0, or with all stages trained, with these ``KEY=VALUE`` settings."""
    workspace = Workspace.create_or_open(root, load_config(config, settings))
    with workspace.lock():
        if not workspace.has_semantic_ids:
            if source is not None:
                reuse.take_data(workspace, source, Silent())
            else:
                preparation.ingest(workspace, Silent())
                preparation.tokenize(workspace, Silent())
        if not workspace.stage(0).is_trained:
            pipeline.rehearse_stages(workspace, Silent())
            pipeline.learn(workspace.stage(0), Silent())
        for number in range(1, workspace.stream.stages if later else 1):
            if not workspace.stage(number).is_trained:
                pipeline.learn(workspace.stage(number), Silent())
    return workspace


def measure(workspace: Workspace, later: bool = False, test: bool = False) -> dict[str, Any]:
    """NDCG@10 by each part of the model, and how stage 0 was trained.

    Args:
        later: the figures are means of the later stages, instead of those of stage 0.
        test: on test cases, instead of validation cases.
    """
    stages = range(1, workspace.stream.stages) if later else range(1)
    rows = [by_parts(workspace.stage(number), test) for number in stages]
    training = workspace.stage(0).metrics["training"]
    return {
        "ndcg@10": {part: float(np.mean([found[part] for found, _ in rows])) for part in rows[0][0]},
        "cases": sum(cases for _, cases in rows),
        "best_epoch": training["best_epoch"],
        "epochs": len(training["validation_losses"]),
        "validation_loss": min(training["validation_losses"]),
        "minutes": training["seconds"] / 60,
    }


def by_parts(stage: RunStage, test: bool) -> tuple[dict[str, float], int]:
    """NDCG@10 of a stage by each part of its model, and the number of cases."""
    config, model, stream = stage.workspace.config, stage.answering_model(), stage.workspace.stream
    of_stage = stream.stage(stage.number)
    cases = (of_stage.test_cases if test else of_stage.validation_cases)(config.prompt.window)
    leaves = model.semantic_ids.trie.leaf_of[cases.targets]
    head = model.vocabulary.item_head
    tuned, counted = None if head is None else head.shares.clone(), model.transitions
    found: dict[str, float] = {}
    for part, share in {"codes": 0.0, "head": 1.0, "both": None}.items():
        if head is None and share != 0.0:
            continue
        if head is not None:
            head.shares.copy_(tuned if share is None else tuned.new_full(tuned.shape, share))
        model.transitions = counted if share is None else None
        with threads(model, config.training.threads):
            lists = search(model, cases.histories, beams=20, exclude=cases.seen)
        hits = lists.leaves[:, :10] == leaves[:, None]
        found[part] = float((hits / np.log2(np.arange(10) + 2)).sum(1).mean())
    return found, len(cases)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a configuration; its section `data` is used")
    parser.add_argument("directory", type=Path, help="where the workspaces are kept")
    parser.add_argument("--settings", help=f"some of: {'; '.join(SETTINGS)} (separated by semicolons)")
    parser.add_argument("--later", action="store_true", help="update at the later stages, and measure there")
    parser.add_argument("--test", action="store_true", help="on test cases")
    parser.add_argument("--set", action="append", default=[], help="a change of every setting, KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="a few steps: to see that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    names = [name for name in SETTINGS if not options.settings or name in options.settings.split(";")]
    if not names:
        parser.error(f"--settings names none of: {'; '.join(SETTINGS)}")
    results: dict[str, Any] = {}
    source: Workspace | None = None
    for name in names:
        root = options.directory / name.replace(" ", "_").replace(":", "").replace(",", "")
        changes = {**BEST, **SETTINGS[name], **(QUICK if options.quick else {})}
        settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()] + options.set
        workspace = train(options.config, root, settings, source, options.later)
        source = source or workspace
        results[name] = measure(workspace, options.later, options.test)
        if not options.json:
            row = results[name]
            parts = ", ".join(f"{part} {value:.4f}" for part, value in row["ndcg@10"].items())
            print(
                f"{name}: NDCG@10 {parts}; epoch {row['best_epoch']} of {row['epochs']}, "
                f"{row['minutes']:.1f} min",
                flush=True,
            )
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

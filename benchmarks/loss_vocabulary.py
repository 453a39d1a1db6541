"""Which loss vocabulary suits the `stream` layout: full, semantic or level?

Learns the released Video Games stream with the scratch backbone under each of the three (strategy `single`),
and compares what cannot be compared by loss: the log-probability of every validation target renormalized over
the items that exist (the catalog's trie), paired by user.

    python benchmarks/loss_vocabulary.py runs/loss_vocabulary [--epochs 4] [--stages 2] [--quick] [--json]

Resumable: finished stages are not learned again. --quick: 100 optimizer steps a stage.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from peso.cli.display import Terminal, table
from peso.config import load_config
from peso.runs import pipeline, preparation
from peso.runs.workspace import Workspace
from peso.training.likelihood import trie_log_likelihood

VOCABULARIES = ("full", "semantic", "level")
CONFIG = Path(__file__).parent.parent / "examples" / "video_games_scratch.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--only", choices=VOCABULARIES, help="train only this one, without a comparison")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    changes = [f"training.epochs={arguments.epochs}"] + ["training.max_steps=100"] * arguments.quick
    names = [arguments.only] if arguments.only else VOCABULARIES
    measured = {name: measure(arguments.directory / name, name, arguments.stages, changes) for name in names}
    if arguments.only:
        return
    result = []
    for stage in range(arguments.stages):
        for name in VOCABULARIES:
            scores = measured[name][stage]
            difference = scores - measured["full"][stage]
            half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference)) if name != "full" else 0.0
            row = {"stage": stage, "loss_vocabulary": name, "cases": len(scores)}
            row |= {"log_likelihood": float(scores.mean()), "against_full": float(difference.mean())}
            result.append(row | {"half_width": float(half)})
    if arguments.json:
        print(json.dumps({"validation": result}))
    else:
        title = "validation targets, nats per item, renormalized over the catalog (95 % interval)"
        table(title, list(result[0]), [list(row.values()) for row in result])


def measure(root: Path, loss_vocabulary: str, stages: int, changes: list[str]) -> list[np.ndarray]:
    """Per stage the log-likelihood of every validation case under the model after that stage."""
    chosen = ["strategy=single", f"training.loss_vocabulary={loss_vocabulary}", *changes]
    config = load_config(CONFIG, chosen)
    workspace, terminal = Workspace.create_or_open(root, config), Terminal()
    result = []
    with workspace.lock():
        if not workspace.has_semantic_ids:
            preparation.ingest(workspace, terminal)
            preparation.tokenize(workspace, terminal)
        stream = workspace.stream
        for number in range(stages):
            if number not in workspace.finished_stages:
                pipeline.learn(workspace.stage(number), terminal)
            cases = stream.stage(number).validation_cases(config.prompt.window)
            result.append(trie_log_likelihood(workspace.stage(number).model(), cases))
    return result


if __name__ == "__main__":
    main()

"""How large can the weight of the anchor be? Compare `none`, `single` and `peso` with several weights.

    python examples/anchor_weight.py examples/video_games_scratch.yaml runs/scratch mean:2 sum:1 sum:5 sum:20

Stage 0 is trained once and shared. Run the script again to resume; finished work is not repeated. For each
run, it prints the means over the later stages of the best validation loss (and its difference from
`single`), of the ratio of the anchor's gradient to the loss's gradient, and of the distance moved. It writes
one report on all runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from peso.cli.display import Terminal, table
from peso.config import load_config
from peso.runs import pipeline, report
from peso.runs.stage import LOG
from peso.runs.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("weights", nargs="+", help="REDUCTION:WEIGHT, such as mean:2")
    arguments = parser.parse_args()
    strategies = {"none": ["strategy=none"], "single": ["strategy=single"]}
    for text in arguments.weights:
        reduction, weight = text.split(":")
        changes = ["strategy=peso", f"strategy.reduction={reduction}", f"strategy.weight={weight}"]
        strategies[f"peso_{reduction}_{weight}"] = changes
    workspaces = []
    for name, changes in strategies.items():
        config = load_config(arguments.config, changes)
        workspace = Workspace.create_or_open(arguments.directory / name, config)
        with workspace.lock():
            pipeline.run(workspace, base=workspaces[0].root if workspaces else None, observer=Terminal())
        workspaces.append(workspace)
    report.report(workspaces, arguments.directory / "report")
    single = validation_losses(workspaces[1])
    rows = []
    for workspace in workspaces[1:]:
        losses = validation_losses(workspace)
        rows.append(
            [
                workspace.root.name,
                f"{losses.mean():.4f}",
                f"{(losses - single).mean():+.4f}",
                " ".join(f"{difference:+.4f}" for difference in losses - single),
                f"{gradient_share(workspace):.2g}",
                f"{np.mean([moved(workspace, stage) for stage in later(workspace)]):.3f}",
            ]
        )
    columns = ["run", "validation loss", "minus single", "by stage", "anchor's share of gradient", "moved"]
    table("later stages", columns, rows)


def later(workspace: Workspace) -> list[int]:
    return [stage for stage in workspace.finished_stages if stage]


def validation_losses(workspace: Workspace) -> np.ndarray:
    """The lowest validation loss of each later stage."""
    return np.array([min(training(workspace, stage)["validation_losses"]) for stage in later(workspace)])


def moved(workspace: Workspace, stage: int) -> float:
    """How far the adapter went from where the stage began, L2."""
    return training(workspace, stage)["moved"]["distance"]


def gradient_share(workspace: Workspace) -> float:
    """Mean over all later steps of ‖gradient of the anchor‖ / ‖gradient of the loss‖, over the adapter."""
    shares = []
    for stage in later(workspace):
        for line in (workspace.stage(stage).directory / LOG).read_text().splitlines():
            record = json.loads(line)
            if record.get("gradient_norm"):
                shares.append(record["penalty_gradient_norm"] / record["gradient_norm"])
    return float(np.mean(shares))


def training(workspace: Workspace, stage: int) -> dict:
    return workspace.stage(stage).metrics["training"]


if __name__ == "__main__":
    main()

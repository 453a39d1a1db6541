"""`peso demo`: the whole loop on simulated data, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Terminal, next_steps, say, show_results

# Small enough for two cores, large enough for the model to learn something.
CONFIG = {
    "data": {"format": "simulate", "simulate": {"users": 600, "items": 300, "stages": 4}},
    "items": {"encoder": "hashing", "quantizer": "rq-kmeans", "levels": 3, "codes": 16},
    "backbone": {"name": "scratch", "width": 64, "layers": 2},
    "training": {"epochs": 5, "learning_rate": 3e-3, "later_learning_rate_scale": 1.0},
    "report": {"title": "peso demo: a simulated shop"},
}
QUICK = [
    *("data.simulate.users=150", "data.simulate.items=80", "data.simulate.stages=3"),
    *("backbone.width=32", "backbone.layers=1", "training.epochs=2"),
]
STRATEGIES = ("none", "single", "peso")


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the runs.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed for all random numbers.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smaller shop and model: only to see that everything works.")
    ] = False,
) -> None:
    """Run the whole loop on simulated data in minutes, and write a report. Needs no network and no files.

    The data are the log of a simulated shop: tastes change, and users arrive, pause and return. The log is
    split into stages, product texts become semantic IDs, and the model is updated in three ways: none
    (trained on stage 0 only), single (fine-tuned at each stage) and peso (fine-tuned with an anchor).
    Popularity is the baseline.

    Example: peso demo -o runs/demo
    """
    from peso.config import load_config
    from peso.evaluation.report import refuse_foreign
    from peso.runs import pipeline, report
    from peso.runs.workspace import Workspace, require_place

    require_place(output / "report")
    refuse_foreign(output / "report")
    terminal = Terminal()
    workspaces: list[Workspace] = []
    for strategy in STRATEGIES:
        config = load_config({**CONFIG, "strategy": strategy, "seed": seed}, QUICK if quick else [])
        terminal.note(f"\n{strategy}: {output / strategy}")
        with Workspace.hold(output / strategy, config) as workspace:
            pipeline.run(workspace, base=workspaces[0].root if workspaces else None, observer=terminal)
        workspaces.append(workspace)
    terminal.begin("writing the report on all three", 0, "")
    report.report(workspaces, output / "report")
    terminal.end()
    show_results("averages over the later stages, each tested right after training", workspaces)
    some_user = workspaces[-1].stream.stage(0).users[0]
    say(f"\nreport: {output / 'report' / 'index.html'}")
    next_steps(["recommend", "-w", workspaces[-1].root, "--user", some_user], ["init", "LOG"])

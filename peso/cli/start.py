"""`peso demo`, `peso init` and `peso doctor`: the first things to try."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import (
    Json,
    Overrides,
    Terminal,
    counted,
    next_steps,
    say,
    say_json,
    show_results,
    table,
)

# Small enough for two cores, large enough for the model to learn something.
CONFIG = {
    "data": {"format": "simulate", "simulate": {"users": 600, "items": 300, "stages": 4}},
    "items": {"encoder": "hashing", "quantizer": "rq-kmeans", "levels": 3, "codes": 16},
    "backbone": {"name": "scratch", "width": 64, "layers": 2},
    "head": {"name": "items", "learning_rate_scale": 0.1},
    "training": {
        "epochs": 20,
        "patience": 3,
        "batch_size": 128,
        "learning_rate": 4e-3,
        "warmup": 0.05,
        "temperature": 1.0,
        "later": {"epochs": 6, "patience": 2, "learning_rate": "auto"},
    },
    "report": {"title": "peso demo: a simulated shop"},
}
QUICK = [
    *("data.simulate.users=150", "data.simulate.items=80", "data.simulate.stages=3"),
    *("backbone.width=32", "backbone.layers=1", "training.epochs=2"),
]
STRATEGIES = ("none", "single", "peso")


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the runs.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed for all random numbers.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a smaller shop and model, only to see that everything works.")
    ] = False,
) -> None:
    """Run all steps on simulated data in minutes, and write a report. Needs no network and no files.

    The data are the log of a simulated shop whose customers change their tastes, arrive, pause and return.
    The log is split into stages, the products get semantic IDs, and three strategies are compared: none
    (trained on stage 0 only), single (fine-tuned at each stage) and peso (fine-tuned with an anchor).
    Popularity is the baseline.

    Example: peso demo -o runs/demo
    """
    from peso.config import load_config
    from peso.evaluation.report import refuse_foreign
    from peso.runs import pipeline, report
    from peso.runs.place import require_place
    from peso.runs.workspace import Workspace

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


def init(
    log: Annotated[str, typer.Argument(metavar="LOG", help="A file, or a directory of files of one kind.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write. Default: NAME-OF-LOG.yaml.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
    data_format: Annotated[
        str | None, typer.Option("--format", help="As in `peso ingest`. Default: guessed from the files.")
    ] = None,
    user: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the user.")] = None,
    item: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the item.")] = None,
    time: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the time.")] = None,
    rating: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the rating.")] = None,
    items: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The product table. Default: the log, if it has titles."),
    ] = None,
    item_id: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the item in the product table.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the title in the product table.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Column of a text in the product table. Can be repeated."),
    ] = None,
    category: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the category in the product table.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a configuration with comments for a log. Columns are guessed; use the options to correct them.

    Give a column by its name or, if a CSV file has no header, by its number. The log is read once, in the
    same way as by `peso ingest`, to make sure that the configuration works.

    Example: peso init shop.csv --items products.csv

    Example: peso init log.csv --user 1 --item 2 --time 4 -o log.yaml --set data.min_user=5
    """
    from peso.errors import UsageError
    from peso.runs.first_config import first_config
    from peso.runs.place import require_place
    from peso.runtime.files import write_atomically

    name = Path(log).name.split(".")[0] or "log"
    target = output or Path(f"{name}.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{target}: the name of a configuration must end in .yaml")
    if target.exists() and not force:
        raise UsageError(f"{target} already exists; use --force to overwrite it, or -o for another name")
    require_place(target)
    columns = {"user": user, "item": item, "time": time, "rating": rating}
    of_items = {"item": item_id, "title": title, "category": category}
    named = {role: [column] for role, column in of_items.items() if column}
    made = first_config(
        log,
        target,
        Terminal(),
        form=data_format,
        columns={role: column for role, column in columns.items() if column},
        items=items,
        item_columns=named | ({"text": text} if text else {}),
        overrides=overrides or [],
    )
    write_atomically(target, made.text.encode())
    if made.columns:
        table("columns", ["file", "field", "column", "example"], made.columns)
    stages = made.manifest["stages"]
    found = [
        counted(sum(stage["events"] for stage in stages), "event"),
        counted(made.manifest["items"], "item"),
        counted(len(stages), "stage"),
    ]
    say(
        f"{target}: {', '.join(found)}. If a column is wrong, give the right one (`peso init --help`) with "
        "--force"
    )
    next_steps(["run", target, "--dry-run"], ["run", target])


def doctor(as_json: Json = False) -> None:
    """Show the resources of this machine (cores, memory, GPU, cache, optional packages) and what peso uses.

    Example: peso doctor
    """
    from peso.runtime.machine import examine

    found = examine()
    if as_json:
        say_json(found)
        return
    table("", ["", "this machine", "peso uses"], found["machine"])
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    next_steps(["demo"], ["init", "LOG"])

"""`peso pull` and `peso export`: download models and data, export models and semantic IDs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peso.cli.display import Directory, ServingStage, Terminal, Trust, next_steps, say


def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="One of smollm2-135m, all-minilm-l6-v2 and ml-100k.")
    ],
) -> None:
    """Download a known model or data set into the cache and check its sha256.

    Example: peso pull smollm2-135m
    """
    from peso.runtime import assets

    terminal = Terminal()
    current = ""

    def show(work: str, share: float) -> None:
        nonlocal current
        if work != current:
            current = work
            terminal.begin(work, 100, "%")
        terminal.advance(round(100 * share))

    directory = assets.pull(name, on_progress=show)
    terminal.end()
    say(directory)
    key = {"backbone": "backbone.name", "encoder": "items.encoder"}
    kind = next(kind for kind in ("backbone", "encoder", "data") if name in assets.names(kind))
    next_steps(["run", "CONFIG", "--set", f"{key[kind]}={name}"] if kind in key else ["init", directory])


def export(
    workspace: Directory,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A new directory, or for the index a new file.")
    ],
    form: Annotated[
        Literal["merged", "peft", "index"],
        typer.Option(
            "--format",
            help="merged: one plain Transformers model; peft: backbone and adapter; index: semantic IDs as "
            "an index.json file, the format that research code reads.",
        ),
    ] = "merged",
    stage: ServingStage = None,
    with_retired: Annotated[
        bool, typer.Option("--with-retired", help="index: write the IDs of retired items, too.")
    ] = False,
    trust: Trust = None,
) -> None:
    """Export a stage's model or the semantic IDs for Transformers, vLLM, PEFT or research code.

    The index contains all items that are not retired (`peso items`), or with --stage those of them that were
    known at that stage. A model's prompt.json lists the semantic IDs of retired items.

    Example: peso export -w runs/games --format merged -o exported

    Example: peso export -w runs/games --format index -o games.index.json
    """
    from peso.runs.place import require_place
    from peso.runs.workspace import Workspace

    require_place(output)
    opened = Workspace.open(workspace, trust or ())
    if form == "index":
        from peso.runs import preparation

        if left_out := preparation.export_index(opened, output, stage, with_retired):
            Terminal().note(f"{left_out:,} retired items are left out; --with-retired writes them, too")
    else:
        from peso.runs.recommender import Recommender

        terminal = Terminal()
        terminal.begin("exporting", 0, "")
        Recommender(opened, stage, device="cpu").export(output, form)
        terminal.end()
    say(output)
    if form == "index":
        next_steps(["run", "CONFIG", "--set", f"items.index={output}"])
    else:
        say("next: load it with Transformers or PEFT (see docs/how-to/export.md)", error=True)

"""`peso pull` and `peso export`: download models and data, export models and semantic IDs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peso.cli.display import Directory, ServingStage, Terminal, Trust, next_steps, say
from peso.errors import UsageError


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="smollm2-135m, all-minilm-l6-v2 or ml-100k; or, from the Hugging Face hub: owner/model or "
            "datasets/owner/name. @REVISION may follow, and after a data set a path in it.",
        ),
    ],
) -> None:
    """Download a model or data set: a known one, whose sha256 is checked, or any from the Hugging Face hub.

    Files from the hub go to the cache of its client, where backbone.name, items.encoder and data.path find
    them. With HF_HUB_OFFLINE=1, nothing is downloaded: the command shows where the cache has the files.

    Example: peso pull smollm2-135m

    Example: peso pull Qwen/Qwen3-0.6B

    Example: peso pull datasets/owner/name/data
    """
    from peso.runtime import assets, hub
    from peso.runtime.progress import in_percent

    terminal = Terminal()
    show = in_percent(terminal)
    if "/" in name:
        place, directory = hub.place_of(name), hub.fetch(name, show)
        terminal.end()
        say(directory)
        if place.type == "dataset":
            next_steps(["init", f"hf://{name.removeprefix(hub.HUB)}"])
        else:
            encoder = (directory / "modules.json").is_file()
            wanted = directory if place.revision else place.id
            next_steps(
                ["run", "CONFIG", "--set", f"{'items.encoder' if encoder else 'backbone.name'}={wanted}"]
            )
        return
    directory = assets.pull(name, on_progress=show)
    terminal.end()
    say(directory)
    key = {"backbone": "backbone.name", "encoder": "items.encoder"}
    kind = next(kind for kind in ("backbone", "encoder", "data") if name in assets.names(kind))
    next_steps(["run", "CONFIG", "--set", f"{key[kind]}={name}"] if kind in key else ["init", directory])


def export(
    workspace: Directory,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="A new directory, or for the index a new file; a path or an address (s3://, gs://).",
        ),
    ] = None,
    form: Annotated[
        Literal["merged", "peft", "mlflow", "index", "catalog"],
        typer.Option(
            "--format",
            help="merged: one plain Transformers model; peft: backbone and adapter; mlflow: a pyfunc model "
            "that answers histories; index: semantic IDs as an index.json file, the format that research "
            "code reads; catalog: semantic IDs as arrays for serving stacks such as STATIC.",
        ),
    ] = "merged",
    stage: ServingStage = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="NAME",
            help="merged, peft: upload the model and its card to the Hugging Face hub as OWNER/MODEL, or as "
            "MODEL of the user who is logged in.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="--push-to-hub: a new repository is public. Default: private.")
    ] = False,
    register: Annotated[
        str | None,
        typer.Option(
            "--register",
            metavar="NAME",
            help="mlflow: log the model to MLFLOW_TRACKING_URI, or else to tracking/mlflow in the workspace, "
            "and register it under this name.",
        ),
    ] = None,
    with_retired: Annotated[
        bool, typer.Option("--with-retired", help="index, catalog: write the IDs of retired items, too.")
    ] = False,
    trust: Trust = None,
) -> None:
    """Export a stage's model or the semantic IDs for Transformers, vLLM, PEFT, MLflow or research code.

    A model has a card, README.md: data, metrics with intervals, limits, and code that uses it without peso.
    Index and catalog contain all items that are not retired (`peso items`); with --stage, only those that
    were known at that stage. A model's prompt.json lists the semantic IDs of retired items. Nothing is
    uploaded without --push-to-hub or --register.

    Example: peso export -w runs/games --format merged -o exported

    Example: peso export -w runs/games --push-to-hub games-recommender

    Example: peso export -w runs/games --format mlflow --register games

    Example: peso export -w runs/games --format index -o games.index.json

    Example: peso export -w runs/games --format catalog -o catalog
    """
    from peso.runs.place import require_place
    from peso.runs.workspace import Workspace
    from peso.runtime import remote

    _refuse_mixed(output, form, push_to_hub, public, register)
    if output is not None and remote.is_remote(output):
        remote.require_output(output)
    elif output is not None:
        require_place(Path(output))
    opened = Workspace.open(workspace, trust or ())
    if form == "index" or form == "catalog":
        from peso.runs import preparation

        assert output is not None
        with remote.output(output, Terminal()) as file:
            left_out = preparation.export_index(opened, file, stage, with_retired, form)
        if left_out:
            Terminal().note(f"{left_out:,} retired items are left out; --with-retired writes them, too")
        say(output)
        if form == "index":
            next_steps(["run", "CONFIG", "--set", f"items.index={output}"])
        else:
            say("next: build a server's index from it (see docs/how-to/export.md)", error=True)
        return
    from peso.runs.recommender import Recommender

    terminal = Terminal()
    terminal.begin("exporting", 0, "")
    recommender = Recommender(opened, stage, device="cpu")
    if form == "mlflow":
        from peso.runs import publish

        done = publish.register_mlflow(recommender, register) if register else str(output)
        if output is not None:
            with remote.output(output, terminal) as folder:
                publish.save_mlflow(recommender, folder)
        read = "mlflow.pyfunc.load_model (see docs/how-to/publish.md)"
    elif push_to_hub is not None:
        from peso.runs import publish

        done = publish.push_to_hub(recommender, push_to_hub, form, private=not public)
        read = "the code in its card (see docs/how-to/publish.md)"
    else:
        assert output is not None
        with remote.output(output, terminal) as folder:
            recommender.export(folder, form)
        done = output
        read = "Transformers or PEFT (see its README.md and docs/how-to/export.md)"
    terminal.end()
    say(done)
    say(f"next: load it with {read}", error=True)


def _refuse_mixed(
    output: str | None, form: str, push_to_hub: str | None, public: bool, register: str | None
) -> None:
    """Raise UsageError unless there is exactly one place to write to, which fits the format."""
    if len([place for place in (output, push_to_hub, register) if place is not None]) != 1:
        raise UsageError("give exactly one of -o, --push-to-hub and --register")
    if push_to_hub is not None and form not in ("merged", "peft"):
        raise UsageError(f"--push-to-hub is for --format merged and peft, not {form}")
    if register is not None and form != "mlflow":
        raise UsageError(f"--register needs --format mlflow, not {form}")
    if public and push_to_hub is None:
        raise UsageError("--public needs --push-to-hub")

"""`peso diagnose`: drift of the stream, fit of the codes, and the effect of the anchor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peso.cli.display import Directory, Json, Terminal, Trust, next_step_of, next_steps, say, say_json, table

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace

EXAMPLES = 256  # as in peso.runs.directions, which is slow to import


def diagnose(
    workspace: Directory,
    directions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Instead, show this number of the directions that a stage's data support most."
        ),
    ] = None,
    stage: Annotated[
        int | None, typer.Option(help="With --directions: the stage. Default: the newest.")
    ] = None,
    examples: Annotated[
        int,
        typer.Option(min=20, help="With --directions: the number of targets used to estimate the support."),
    ] = EXAMPLES,
    free: Annotated[
        Path | None,
        typer.Option(help="With --directions: a workspace in which the strategy `single` trained the stage."),
    ] = None,
    at: Annotated[
        Literal["start", "end"],
        typer.Option(help="With --directions: compute gradients at the start or the end of the stage."),
    ] = "start",
    plot: Annotated[
        Path | None,
        typer.Option(help="With --directions: plot predicted and measured weights in FILE.svg or FILE.png."),
    ] = None,
    trust: Trust = None,
    as_json: Json = False,
) -> None:
    """Show how the stream drifts, whether the codes still fit new items, and what the anchor does.

    The drift is available after `peso ingest`, the fit of the codes after `peso tokenize`, and the anchor
    after each trained stage. Warnings come last. With --directions, show the directions of the adapter that
    the new data support, how much of each the anchor is predicted to keep and, with --free, how much was
    kept (docs/how-to/diagnose.md).

    Example: peso diagnose -w runs/shop

    Example: peso diagnose -w runs/peso --directions 8 --stage 1 --free runs/single --plot directions.svg
    """
    from peso.errors import UsageError
    from peso.runs import diagnosis
    from peso.runs.workspace import Workspace

    if directions is None and (stage, examples, free, at, plot) != (None, EXAMPLES, None, "start", None):
        raise UsageError(
            "--stage, --examples, --free, --at and --plot need --directions N, the number of directions to "
            "show"
        )
    opened = Workspace.open(workspace, trust or ())
    if directions is not None:
        _directions(opened, directions, stage, examples, free, at, plot, as_json)
        return
    found = diagnosis.diagnose(opened)
    if as_json:
        say_json(found)
        return
    for title, columns, rows in diagnosis.diagnosis_tables(found):
        table(title, columns, rows)
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    next_steps(next_step_of(opened))


def _directions(
    workspace: Workspace,
    count: int,
    stage: int | None,
    examples: int,
    free: Path | None,
    at: Literal["start", "end"],
    plot: Path | None,
    as_json: bool,
) -> None:
    from peso.errors import UsageError
    from peso.runs.diagnosis import require_later_stage
    from peso.runs.place import require_place
    from peso.runs.workspace import Workspace
    from peso.runtime.files import write_atomically

    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {plot}: the file name must end in .svg or .png")
    if plot is not None:
        require_place(plot)
    later = require_later_stage(workspace, stage)
    trained = later.as_trained.workspace
    unanchored = None if free is None else Workspace.open(free)

    from peso.runs.trust import strategy_of

    if plot is not None and free is None and strategy_of(trained).term is None:
        raise UsageError(
            f"--plot {plot}: there is nothing to plot, because the strategy {trained.config.strategy.name} "
            "has no anchor; choose a workspace whose strategy has one, or give one to compare with (--free)"
        )

    from peso.evaluation.report.plots import files
    from peso.runs.directions import direction_plot, direction_sentences, direction_tables, stage_directions

    terminal = Terminal()
    terminal.begin("gradients of the stage's data", 0, "")
    found = stage_directions(workspace, count, later.number, examples, unanchored, at)
    terminal.end()
    found["sentences"] = direction_sentences(found)
    if plot is not None:
        write_atomically(plot, files(direction_plot(found))[plot.suffix])
    if as_json:
        say_json(found)
        return
    for title, columns, rows in direction_tables(found):
        table(title, columns, rows)
    for sentence in found["sentences"]:
        say(sentence)
    if free is None:
        further = ["--free", "WORKSPACE-OF-SINGLE", "--plot", "directions.svg"]
        next_steps(["diagnose", "-w", workspace.root, "--directions", count, *further])
    else:
        next_steps(next_step_of(workspace))

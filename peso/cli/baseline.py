"""`peso baseline`: train and test other recommenders on the same stages and test cases."""

from __future__ import annotations

from typing import Annotated

import typer

from peso.cli.display import Directory, Overrides, Terminal, Trust, next_steps, table
from peso.config.baselines import BASELINES


def baseline(
    workspace: Directory,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help=f"Baselines to run: {', '.join(BASELINES.built_in())}, or one with options as in the "
            "configuration, such as '{name: ease, items: 8000}'. A name without options uses those in the "
            "configuration. Default: all baselines in the configuration.",
        ),
    ] = None,
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Train and test baselines on every stage. Finished stages are not repeated.

    Each baseline is tested in two ways: updated at every stage, and trained on stage 0 only. The workspace
    needs a stream and semantic IDs; `hybrid` also needs the trained stages. Options without a value are
    chosen on validation cases. `peso report` compares the baselines with the run.

    Example: peso baseline popularity ease sasrec -w runs/games
    """
    from peso.config import load_config
    from peso.errors import UsageError
    from peso.runs import baselines, report
    from peso.runs.checks import check_configuration
    from peso.runs.workspace import Workspace

    path = workspace / "config.yaml"
    Workspace.open(workspace, trust or ())  # raises where there is none
    configured = load_config(path, overrides or []).baselines
    if names:
        requested: list[str] = []
        for name in names:  # a bare name stands for every listed baseline of that name
            listed = [options.model_dump_json() for options in configured if options.name == name]
            requested += listed or [name]
        config = load_config(path, [*(overrides or []), f"baselines=[{', '.join(requested)}]"])
        check_configuration(config)
        configured = config.baselines
    if not configured:
        raise UsageError(f"no baseline was given: name one, or list some under `baselines` in {path}")
    with Workspace.change(workspace, overrides or [], trust=trust or ()) as opened:
        baselines.run_baselines(opened, configured, Terminal())
    runs = baselines.baseline_summaries(opened, configured)
    table("averages over the later stages", *report.run_table(runs, opened.config.evaluation.k))
    next_steps(["report", "-w", workspace])

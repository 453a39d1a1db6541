"""`peso run`: do everything that a configuration describes, and resume after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peso.cli.display import Overrides, Trust, duration, next_steps, say, show_results, table, watcher


def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see examples/.")],
    workspace: Annotated[
        Path | None, typer.Option("-w", "--workspace", help="Default: runs/NAME-OF-CONFIG.")
    ] = None,
    overrides: Overrides = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Reuse stage 0 of this workspace. All settings that determine stage 0 must be equal."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the remaining steps, with time, memory and disk.")
    ] = False,
    trust: Trust = None,
) -> None:
    """Do all steps of CONFIG that are not done yet: ingest, tokenize, train and test the stages, report.

    The report compares the newest model with the previous one on the newest stage's test cases.

    The command can be interrupted at any time: run it again to continue, with the same result. Several
    processes can work together: torchrun --nproc-per-node 2 -m peso run CONFIG -w W
    (docs/how-to/several-processes.md).

    Example: peso run examples/video_games_scratch.yaml -w runs/games --set strategy=single
    """
    from peso.config import load_config
    from peso.runs.checks import check_configuration, check_surroundings
    from peso.runs.run import run as run_all
    from peso.runs.workspace import Workspace, trusted_classes
    from peso.runtime.processes import current

    resolved = load_config(config, overrides or [])
    check_configuration(resolved)
    root = workspace or Path("runs") / config.stem
    trusted = [*(trust or []), *trusted_classes(resolved, overrides or [], config)]
    if dry_run:
        preview = Workspace.preview(root, resolved, trusted)
        check_surroundings(preview, models=False)
        from peso.runs.estimate import estimate
        from peso.runs.sizes import sizes_for

        if (sizes := sizes_for(root, resolved)) is not None:  # otherwise printed when the data are read
            say(str(sizes))
        plan = estimate(preview, observer=watcher(), previous=True)
        if not plan:
            say(f"{root}: everything is done")
            return
        table(
            f"{root}: remaining steps",
            ["step", "minutes", "memory GiB", "disk MiB", "note"],
            [[str(e.step), *map(_shown, (e.minutes, e.memory_gib, e.disk_mib)), e.note] for e in plan],
        )
        unknown = ", ".join(str(e.step) for e in plan if e.minutes is None)
        total = duration(60 * sum(e.minutes or 0 for e in plan))
        say(
            f"about {total} in total on this machine (a rough estimate)"
            + (f"; not included: {unknown}" if unknown else "")
        )
        given = [part for text in overrides or [] for part in ("--set", text)]
        given += [part for name in trust or [] for part in ("--trust", name)]
        given += [] if base is None else ["--base", str(base)]
        next_steps(["run", config, "-w", root, *given])
        return
    opened = run_all(resolved, root, base=base, observer=watcher(), trust=trusted)
    if not current().is_main:
        return
    if not resolved.evaluation.enabled:
        say(
            f"{root}: {len(opened.finished_stages)} stages are trained. Nothing was tested and no report was "
            "written, because evaluation.enabled is false; to do both, run the command again with --set "
            "evaluation.enabled=true"
        )
        return
    show_results(f"{root}: averages over the later stages", [opened])
    say(f"report: {opened.report_directory / 'index.html'}")
    next_steps(["recommend", "-w", root, "--all", "-o", "recommendations.csv"], ["diagnose", "-w", root])


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"

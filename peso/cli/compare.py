"""`peso compare`: run strategies × data sets × backbones × seeds from one file, and report on all of them."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from peso.cli.display import Overrides, Terminal, counted, duration, next_steps, say, table
from peso.errors import PesoError, UsageError, WorkspaceError
from peso.runtime.failures import printable
from peso.runtime.files import only_writer

if TYPE_CHECKING:
    from peso.runs.compare.plan import Plan
    from peso.runs.compare.schedule import Row
    from peso.runs.executors import Machine

BUDGET = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
SHOWN_ROWS = 40  # of the live table; a table taller than the screen cannot be redrawn


def compare(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="YAML file with a `compare` section (docs/how-to/compare.md)."),
    ],
    workspace: Annotated[
        Path | None, typer.Option("-w", "--workspace", help="Default: runs/NAME-OF-CONFIG.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Directory for the table and report. Default: the workspace."),
    ] = None,
    overrides: Overrides = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Time limit for this call, such as 90m or 2h30m; the next call continues."),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Start no runs; report the results so far.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the runs and the time that they will take.")
    ] = False,
) -> None:
    """Do all unfinished runs of CONFIG, several at a time, and write one report on all runs.

    Every run is an ordinary workspace, DIR/runs/DATA/BACKBONE/STRATEGY/seed=S. Data and base stages are
    created once and shared. Baselines are included. At the end, the first seed's models are tested on the
    test cases of every stage to measure forgetting and transfer. The command can be interrupted at any time
    or limited with --budget; run it again to continue.

    Example: peso compare examples/experiment/strategies.yaml -w runs/strategies --budget 90m
    """
    from peso.runs.compare.plan import make_plan
    from peso.runs.compare.results import require_results

    began = time.time()
    seconds = None if budget is None else _seconds(budget)
    root = workspace or Path("runs") / config.stem
    plan = make_plan(config, root, overrides or [])
    plan.check()
    if not report_only:
        plan.refuse_changes()
        plan.check_surroundings(models=not dry_run)
    elif not plan.is_begun:
        raise WorkspaceError(f"there is nothing to report: no run in {root} has started; omit --report-only")
    if not dry_run:
        require_results(output or root)
    from peso.runs.executors import Machine, open_executor

    given = [part for text in overrides or [] for part in ("--set", text)]
    given += [] if output is None else ["--output", str(output)]
    given += [] if budget is None else ["--budget", budget]
    if dry_run:
        _show_plan(plan, Machine.of(plan.compare.workers, plan.common.training.device))
        next_steps(["compare", config, "-w", root, *given])
        return
    from peso.runs.compare.results import collect, write_results
    from peso.runs.compare.schedule import Schedule

    rows: list[Row] = []
    if not report_only:
        plan.rehearse()
        deadline = None if seconds is None else began + seconds
        device = plan.common.training.device
        executor = open_executor(plan.compare.executor, plan.compare.workers, device, root / "logs" / "slurm")
        with closing(executor), only_writer(root), Display() as display:
            rows = Schedule(plan, executor, deadline, display.show).run()
        for row in rows:
            if row.state == "failed":
                say(f"failed: {row.run.name}: {row.note}", error=True)
        states = Counter(row.state for row in rows)
        say(", ".join(f"{count} {state}" for state, count in states.items()))
    collected = collect(plan)
    for remark in collected.remarks:
        say(f"- {remark}")
    if collected.runs or report_only:
        terminal = Terminal()
        terminal.begin("writing the report", 0, "")
        page = write_results(plan, collected, output or root)
        terminal.end()
        say(f"report: {page}")
        say(f"table:  {(output or root) / 'results.parquet'}")
    else:
        say("no report was written, because no run has a tested stage yet")
    if not rows or any(row.state != "done" for row in rows):
        next_steps(["compare", config, "-w", root, *given])
    else:
        runs = [row.run.task.root for row in rows if row.run.kind == "strategy"]
        next_steps(["diagnose", "-w", runs[-1]])
    if failed := sum(row.state == "failed" for row in rows):
        raise PesoError(f"{failed} of {len(plan.all)} runs failed; run the same command again to retry them")


class Display:
    """Shows the runs as a table that is redrawn in a terminal; without a terminal, as one line per change."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._said: dict[str, tuple[Any, ...]] = {}

    def __enter__(self) -> Display:
        if sys.stderr.isatty():
            self._live = Live(console=self.console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, rows: Sequence[Row]) -> None:
        if self._live is not None:
            self._live.update(_drawn(rows))
            return
        for row in rows:
            now = (row.state, row.progress.done)
            if self._said.get(row.run.name, ("waiting", 0)) != now:
                stages, hit, ndcg, left = _cells(row)
                figures = "" if row.progress.hit is None else f", hit {hit}, ndcg {ndcg}"
                more = f", {left} left" if row.seconds_left else ""
                note = f" ({row.note})" if row.state == "failed" else ""
                what = "tests" if row.run.kind == "transfer" else "stages"
                line = f"{row.run.name}: {row.state}, {stages} {what}{figures}{more}{note}"
                self.console.print(printable(line), markup=False, soft_wrap=True)
            self._said[row.run.name] = now


def _drawn(rows: Sequence[Row]) -> Table:
    """The table of runs. If not all fit, running and finished ones come first. The caption counts all."""
    order = ["running", "failed", "done", "stopped", "waiting"]
    shown = list(rows)
    if len(shown) > SHOWN_ROWS:
        shown = sorted(shown, key=lambda row: order.index(row.state))[:SHOWN_ROWS]
    states = Counter[str](row.state for row in rows)
    title = ", ".join(f"{states[state]} {state}" for state in order if states[state])
    drawn = Table(header_style="bold", caption=title)
    for name in ("run", "state", "done", "Hit", "NDCG", "left", "now"):
        drawn.add_column(name, no_wrap=name != "now")
    for row in shown:
        drawn.add_row(
            escape(row.run.name), row.state, *_cells(row), escape(printable(row.note, one_line=True))
        )
    return drawn


def _cells(row: Row) -> tuple[str, str, str, str]:
    at = row.progress
    stages = f"{at.done}/{'?' if at.stages is None else at.stages}"
    hit, ndcg = ("–" if value is None else f"{value:.4f}" for value in (at.hit, at.ndcg))
    return stages, hit, ndcg, "" if row.seconds_left is None else duration(row.seconds_left)


def _show_plan(plan: Plan, machine: Machine) -> None:
    from peso.runs.compare.forecast import forecast

    expected = forecast(plan, machine.threads)
    rows = [[e.name, e.state, None if e.minutes is None else round(e.minutes, 1), e.note] for e in expected]
    table(f"{plan.root}: {_counted(plan)}", ["run", "state", "minutes", "note"], rows)
    known = sum(e.minutes or 0 for e in expected)
    unknown = sum(e.minutes is None for e in expected)
    say(
        f"about {duration(60 * known / machine.workers)} in total on this machine (a rough estimate): "
        f"{counted(machine.workers, 'run')} at once, {counted(machine.threads, 'thread')} each"
        + (f"; not included: {counted(unknown, 'run')} of unknown length" if unknown else "")
    )


def _counted(plan: Plan) -> str:
    parts = [(plan.runs, "runs"), (plan.baselines, "baselines"), (plan.transfers, "tested on other stages")]
    return ", ".join(f"{len(some)} {name}" for some, name in parts if some)


def _seconds(text: str) -> float:
    found = BUDGET.fullmatch(text.strip())
    if not found or not any(found.groups()):
        raise UsageError(f"--budget must be a duration such as 90m, 2h or 1h30m; got {text!r}")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 3600.0 * hours + 60 * minutes + seconds

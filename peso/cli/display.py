"""Progress bars, tables and options that the commands share.

Progress goes to stderr, results to stdout. Control characters in ids and titles are escaped.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from peso.errors import UsageError
from peso.runtime.failures import printable
from peso.runtime.files import finite
from peso.runtime.processes import current
from peso.runtime.progress import Observer, Silent

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace


WORTH_A_LINE = 0.1  # seconds of finished work
SECONDS_BETWEEN_LINES = 30  # of progress in a log file, where no bar can be drawn


class Terminal:
    """An Observer (peso/runtime/progress.py) that draws a progress bar, or prints lines if there is no
    terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._title, self._total, self._unit = "", 0, ""
        self._started = self._spoke = 0.0

    def note(self, text: str) -> None:
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def begin(self, title: str, total: int, unit: str) -> None:
        self.end()
        self._title, self._total, self._unit = title, total, unit
        self._started = self._spoke = time.monotonic()
        self._first: tuple[int, float] | None = None  # what was done when, at the first call of advance
        if sys.stderr.isatty():  # rich would treat a pipe as a terminal with FORCE_COLOR, which notebooks set
            parts: list[ProgressColumn] = [
                MofNCompleteColumn(),
                TextColumn(unit, markup=False),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
            ]
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                *(parts if total else [TimeElapsedColumn()]),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total or None, figures="")
            self._bar.start()
            _drawn.append(self._bar)

    def advance(self, done: int, **figures: Any) -> None:
        now = time.monotonic()
        before, since = self._first = self._first or (done, now)  # resumed work does not start at 0
        rate = (done - before) / (now - since) if done > before and now > since else None
        speed = [] if rate is None else [f"{rate:.3g} {self._unit}/s"]
        shown = "  ".join([*speed, *(f"{k.replace('_', ' ')} {_short(v)}" for k, v in figures.items())])
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=shown)
        elif now - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = now
            left = [] if rate is None else [f"{duration((self._total - done) / rate)} left"]
            said = [f"{self._title}: {done}/{self._total} {self._unit}", *([shown] if shown else []), *left]
            self.note(", ".join(said))

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._title and (seconds := time.monotonic() - self._started) >= WORTH_A_LINE:
            self.note(f"{self._title}: {duration(seconds)}")
        self._title = ""


_drawn: list[Progress] = []


def clear_bars() -> None:
    """Remove the progress bars of failed work, so that the message stays and the cursor is visible again."""
    while _drawn:
        _drawn.pop().stop()


def watcher() -> Observer:
    """The observer of a command. If there are several processes, only the main one prints."""
    return Terminal() if current().is_main else Silent()


def say(text: object, *, error: bool = False) -> None:
    """Print to stdout (``error``: stderr), with control characters escaped."""
    print(printable(str(text)), file=sys.stderr if error else sys.stdout)


def confirm(question: str, nothing: str) -> bool:
    """Ask a question on stderr.

    Args:
        nothing: what did not happen, for the message if nobody answers.

    Raises:
        UsageError: the input ended, or the question was interrupted.
    """
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        say("", error=True)  # end the line of the prompt
        raise UsageError(f"no answer: {nothing}; use --yes to continue without confirmation") from None


def say_json(value: Any) -> None:
    """Print one JSON document, in ASCII unless stdout is UTF-8."""
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    print(printable(json.dumps(finite(value), ensure_ascii=not utf8, allow_nan=False)))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table to stdout; numbers are right-aligned."""
    drawn = Table(header_style="bold")
    rows = [list(row) for row in rows]
    for position, column in enumerate(columns):
        numeric = all(isinstance(row[position], int | float | None) for row in rows)
        drawn.add_column(escape(_short(column)), justify="right" if numeric else "left")
    for row in rows:
        drawn.add_row(*(escape(_short(value)) for value in row))  # `l2[weight=3]` is not markup
    # in a file or pipe, cells are not cut to the width of a terminal
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)
    if title:  # printed separately, because a narrow table would wrap its own title
        console.print(printable(title, one_line=True), markup=False, style="bold")
    console.print(drawn)


def show_results(title: str, workspaces: Sequence[Workspace]) -> None:
    """Print the averages of runs and their baselines, and the findings as sentences."""
    from peso.runs import report

    columns, rows, sentences = report.results(workspaces)
    table(title, columns, rows)
    for sentence in sentences:
        say(f"- {sentence}")


def _short(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value), one_line=True)


def called() -> list[str]:
    """The command that starts this program again. It is ``peso`` if the shell finds that."""
    if shutil.which("peso"):
        return ["peso"]
    return [sys.argv[0]] if Path(sys.argv[0]).name == "peso" else [sys.executable, "-m", "peso"]


def next_steps(*commands: Sequence[object]) -> None:
    """Print to stderr what to do next: commands of this program, each as a list of arguments."""
    for place, command in enumerate(commands):
        say(f"{'     ' if place else 'next:'} {shlex.join([*called(), *map(str, command)])}", error=True)


def next_step_of(workspace: Workspace) -> list[object]:
    """The command that continues a workspace."""
    root = workspace.root
    if not workspace.has_stream:
        return ["ingest", "-w", root]
    if not workspace.has_semantic_ids or workspace.lacks_semantic_ids:
        return ["tokenize", *(["--append"] if workspace.has_semantic_ids else []), "-w", root]
    if not workspace.finished_stages:
        return ["train", "-w", root]
    if len(workspace.finished_stages) < workspace.stream.stages:
        return ["update", "-w", root]
    return ["ingest", "NEW", "--append", "-w", root]


def counted(count: int, what: str) -> str:
    """A count with its noun: ``1 stage``, ``1,200 items``."""
    return f"{count:,} {what}" + "s" * (count != 1)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


Directory = Annotated[Path, typer.Option("-w", "--workspace", help="The run's directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key, such as --set training.epochs=2. Can be repeated."),
]
Stage = Annotated[
    int | None, typer.Option("--stage", help="Use the model of this stage. Default: the newest.")
]
ServingStage = Annotated[
    int | None,
    typer.Option(
        "--stage",
        help="Use the model of this stage. Default: the one that serves (peso status), or the newest if none "
        "was promoted.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
OnError = Annotated[
    Literal["fail", "skip"] | None,
    typer.Option(help="What to do with unreadable rows. skip: skip and count them; fail: stop."),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="MODULE.CLASS",
        help="Allow importing a custom strategy that the workspace names. Importing runs its code.",
    ),
]

"""The `peso` command: its list of commands, and how errors and interruptions are shown.

Heavy libraries are imported inside the commands, so `peso --help` and commands with wrong options return
at once.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from typing import Annotated, Any

import typer
import typer.core

from peso.cli import items, steps, users
from peso.cli.baseline import baseline
from peso.cli.compare import compare
from peso.cli.diagnose import diagnose
from peso.cli.display import called, clear_bars
from peso.cli.ingest import ingest
from peso.cli.models import export, pull
from peso.cli.promotion import promote, rollback, status
from peso.cli.recommend import recommend
from peso.cli.removal import forget, prune, undo
from peso.cli.run import run
from peso.cli.serve import serve
from peso.cli.start import demo, doctor, init
from peso.errors import DataError, UsageError
from peso.runtime.failures import (
    AGAIN,
    FAILED,
    HOW_STOPPED,
    INTERRUPTED,
    MISUSED,
    explain,
    installed_version,
    printable,
    sentence,
)
from peso.runtime.machine import check_environment
from peso.runtime.processes import ON_MAIN, current, ended_by_sigterm, launched

DISTRIBUTED = ("run", "train", "update", "evaluate")  # commands that several processes can share
MAY_BE_EMPTY = ("history", "user")  # the history of a new user; a user's id, which is then unknown


class Commands(typer.core.TyperGroup):
    """Report an EOFError as a truncated file. Typer would treat it as Ctrl-D at a prompt."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise DataError(sentence(error)) from error


class Command(typer.core.TyperCommand):
    """Refuses empty arguments: with a shell variable that is not set, ``-w "$RUN"`` would otherwise mean the
    current directory."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            for parameter in self.params:
                values = given.get(parameter.name)
                if "" in (values if isinstance(values, list | tuple) else [values]):
                    self._refuse_empty(parameter)
        return super().parse_args(ctx, args)

    @staticmethod
    def _refuse_empty(parameter: Any) -> None:
        if parameter.name not in MAY_BE_EMPTY:
            is_option = parameter.param_type_name == "option"
            name = "/".join(parameter.opts) if is_option else str(parameter.metavar).strip("[].")
            raise UsageError(f"{name} is empty; give a value, or omit it")


app = typer.Typer(
    cls=Commands,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit status: 0 success, 1 failure, 2 incorrect use of the command line, 130 interrupted "
    "(Ctrl-C), 143 terminated (SIGTERM).",
)
STEPS = (ingest, steps.tokenize, steps.train, steps.update, undo, steps.evaluate, steps.report)
SERVING = (serve, status, promote, rollback)
OTHERS = (recommend, baseline, diagnose, pull, export)
for command in (demo, init, doctor, run, compare, *STEPS, *SERVING, *OTHERS, forget, prune):
    app.command(cls=Command)(command)
of_items = typer.Typer(
    no_args_is_help=True, help="Retire, restore and rename items, and list retired and renamed items."
)
of_items.command("retire", cls=Command)(items.retire)
of_items.command("rename", cls=Command)(items.rename)
of_items.command("restore", cls=Command)(items.restore)
of_items.command("list", cls=Command)(items.show)
app.add_typer(of_items, name="items")
of_users = typer.Typer(
    no_args_is_help=True, help="Merge users who are the same person, and list merged users."
)
of_users.command("merge", cls=Command)(users.merge)
of_users.command("list", cls=Command)(users.show)
app.add_typer(of_users, name="users")


def _show_version(requested: bool) -> None:
    if requested:
        print(f"peso {installed_version()}")
        raise typer.Exit


@app.callback()
def peso(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; PESO_DEBUG=1 does the same.")
    ] = False,
) -> None:
    """Continual learning for LLM-based generative recommenders: one LoRA adapter, updated stage by stage and
    held close to its previous state by a proximal anchor."""
    if context.invoked_subcommand is None:
        _welcome()
        return
    if debug:
        os.environ["PESO_DEBUG"] = "1"  # inherited by the processes of `peso compare`
    check_environment()
    if launched() > 1 and context.invoked_subcommand not in DISTRIBUTED:
        raise UsageError(
            f"`peso {context.invoked_subcommand}` runs in one process: call it without torchrun or "
            f"accelerate launch. Commands that support several processes: {', '.join(DISTRIBUTED)}"
        )


def _welcome() -> None:
    """Print the text of `peso` without arguments."""
    peso = shlex.join(called())
    print(
        f"peso {installed_version()} keeps an LLM-based generative recommender up to date: one LoRA\n"
        "adapter, updated as the log of events grows, and held close to its previous state by a\n"
        "proximal anchor.\n\n"
        "Three commands to try:\n"
        f"  {peso} demo      run everything on simulated data, in minutes and without a network\n"
        f"  {peso} init LOG  write a configuration for your own log\n"
        f"  {peso} doctor    show what this machine has and what peso will use\n\n"
        f"All commands: {peso} --help. Shell completion: {peso} --install-completion"
    )


def _print_error(error: Exception) -> None:
    """Print an error. Each process prints its own errors, and one that the main process raised for all of
    them is printed only once."""
    if ON_MAIN in getattr(error, "__notes__", ()):
        return
    who = f"process {current().rank} of {current().count}: " if current().count > 1 else ""
    _print_to_stderr(who + explain(error))


def _print_to_stderr(text: str) -> None:
    """Print a line to stderr, if that is still open."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        _close(sys.stderr)


def _close(stream: object) -> None:
    """Discard buffered output, because Python flushes once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


def _prepare_streams() -> None:
    """Escape characters that the terminal cannot show, and discard output to closed streams."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _run() -> int:
    try:
        with ended_by_sigterm():
            try:
                app()
            finally:
                clear_bars()
    except SystemExit as stop:
        status = FAILED if isinstance(stop.code, str) else stop.code or 0
    except KeyboardInterrupt:  # before or after the command itself
        status = INTERRUPTED
    except Exception as error:
        _print_error(error)
        status = MISUSED if isinstance(error, UsageError) else FAILED
    try:
        sys.stdout.flush()
    except OSError as error:
        _close(sys.stdout)
        if error.errno != errno.EPIPE:  # the reader has closed the pipe (`peso … | head -1`)
            _print_error(error)
        status = status or FAILED
    return status


def main() -> None:
    """Entry point; the exit statuses are those of :mod:`peso.runtime.failures`."""
    _prepare_streams()
    status = _run()
    if how := HOW_STOPPED.get(status):
        reason = ", most likely because another process ended" if current().count > 1 else ""
        _print_to_stderr(f"\n{how}{reason}; {AGAIN}")
    sys.exit(status)

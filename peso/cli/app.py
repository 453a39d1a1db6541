"""The `peso` command: its list of commands, and how errors and interruptions are shown.

Heavy libraries are imported inside the commands, so that `peso --help` answers at once.
"""

from __future__ import annotations

import signal
import sys

import typer

from peso.cli import baseline, compare, demo, diagnose, models, recommend, run, steps
from peso.durable import is_full
from peso.errors import ConfigError, LostProcess, PesoError
from peso.processes import ON_MAIN, current, launched

INTERRUPTED = 130
TOGETHER = ("run", "train", "update", "evaluate")  # commands that several processes may share

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Continual learning for LLM-based generative recommenders: one evolving LoRA adapter, held by a "
    "proximal anchor.",
)
for module in (demo, run, compare, steps, recommend, baseline, diagnose, models):
    module.register(app)


def _refuse_processes() -> None:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command not in TOGETHER:
        raise ConfigError(
            f"`peso {command}` is the work of one process: call it without torchrun or accelerate launch. "
            f"Several processes can {', '.join(TOGETHER)}"
        )


def _stopped(*_: object) -> None:
    """A launcher stops the processes that are left when one ends."""
    raise LostProcess(
        "told to stop, most likely since another process ended. Start the same command again: it continues "
        "at its newest checkpoint"
    )


def _tell(error: PesoError) -> None:
    """Of several processes each tells its own errors; what all were told of is said once."""
    if ON_MAIN in getattr(error, "__notes__", ()):
        return
    who = f" (process {current().rank} of {current().count})" if current().count > 1 else ""
    print(f"error{who}: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point: a PesoError becomes one line and exit status 1, Ctrl-C becomes exit status 130."""
    try:
        if launched() > 1:
            _refuse_processes()
            signal.signal(signal.SIGTERM, _stopped)
        app()
    except PesoError as error:
        _tell(error)
        sys.exit(1)
    except OSError as error:
        if not is_full(error):
            raise
        print(f"error: no space left ({error}); free some and start again: it continues", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # Typer's own answer to Ctrl-C says nothing
            print("\ninterrupted; the same command continues where it was", file=sys.stderr)
        raise

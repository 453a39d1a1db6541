"""The `peso` command: its list of commands, and how errors and interruptions are shown.

Heavy libraries are imported inside the commands, so that `peso --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from peso.cli import baseline, compare, demo, diagnose, models, recommend, run, steps
from peso.durable import is_full
from peso.errors import PesoError

INTERRUPTED = 130

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


def main() -> None:
    """Entry point: a PesoError becomes one line and exit status 1, Ctrl-C becomes exit status 130."""
    try:
        app()
    except PesoError as error:
        print(f"error: {error}", file=sys.stderr)
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

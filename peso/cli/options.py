"""Options that several commands share, worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Directory = Annotated[Path, typer.Option("-w", "--workspace", help="The directory of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key, such as --set training.epochs=2; can be given several times."),
]
Stage = Annotated[
    int | None, typer.Option("--stage", help="The stage whose model is used. Default: the newest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
OnError = Annotated[
    Literal["fail", "skip"] | None,
    typer.Option(help="skip: leave unreadable rows out and count them; fail: refuse the log."),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="MODULE.CLASS",
        help="Allow a custom strategy that the workspace names to be imported, which runs its code.",
    ),
]

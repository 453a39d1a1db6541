"""`peso doctor`: what this machine has, and what peso will use of it."""

from __future__ import annotations

import typer

from peso.cli.display import Json, next_steps, say, say_json, table


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: Json = False) -> None:
    """Show what this machine has (cores, memory, GPU, cache, optional packages) and what peso will use.

    Example: peso doctor
    """
    from peso.runtime.machine import examine

    found = examine()
    if as_json:
        say_json(found)
        return
    table("", ["", "this machine", "peso uses"], found["machine"])
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    next_steps(["demo"], ["init", "LOG"])

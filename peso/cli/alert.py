"""A command that is run to alert somebody: the gate keeps the serving stage, drift is high, or an update
fails. It is taken only from the command line, never from a workspace, and runs without a shell."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peso.cli.display import say
from peso.errors import UsageError
from peso.runtime.failures import sentence
from peso.runtime.processes import current
from peso.runtime.provenance import timestamp

Event = Literal["refused", "undecided", "drift", "failed"]
WAIT = 60.0  # seconds before the command is stopped


@dataclass(frozen=True)
class Alert:
    """Sends alerts to a command. If ``command`` is empty, nothing is sent."""

    command: list[str]
    workspace: Path

    @classmethod
    def of(cls, text: str | None, workspace: Path) -> Alert:
        """Parse a command line such as ``mail -s peso ops@example.org``.

        Raises:
            UsageError: the command line cannot be split into words, or the program does not exist.
        """
        if text is None:
            return cls([], workspace)
        try:
            command = shlex.split(text)
        except ValueError as error:
            raise UsageError(
                f"--alert {text!r} cannot be split into words: {error}; close the quotes"
            ) from None
        if not command or shutil.which(command[0]) is None:
            program = command[0] if command else ""
            raise UsageError(
                f"--alert: the program {program!r} was not found; give its path, or a program on PATH"
            )
        return cls(command, workspace)

    def send(self, event: Event, message: str, stage: int | None = None, **figures: Any) -> None:
        """Run the command with one JSON object on its standard input. If the command fails, a warning is
        printed and the work continues."""
        if not self.command or not current().is_main:
            return
        told = {
            "event": event,
            "workspace": str(self.workspace.absolute()),
            "stage": stage,
            "message": message,
            "time": timestamp(),
            **figures,
        }
        try:
            done = subprocess.run(
                self.command, input=json.dumps(told).encode(), capture_output=True, timeout=WAIT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            say(f"warning: the alert was not sent: {sentence(error) or error}", error=True)
            return
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            say(
                f"warning: the alert command ended with status {done.returncode}"
                + (f": {said[-1]}" if said else ""),
                error=True,
            )

    @contextmanager
    def on_failure(self) -> Iterator[None]:
        """Send an alert if the work fails, and raise its error again."""
        try:
            yield
        except Exception as error:
            self.send("failed", sentence(error) or f"unexpected {type(error).__name__}: {error}")
            raise

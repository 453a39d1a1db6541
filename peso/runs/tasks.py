"""Processes that do one task each: how one is started, and what it does besides its task.

A task is a module with a function ``main``, which calls :func:`do`. It is started as ``python -m MODULE JOB``
with a JSON job. Progress goes to stdout, one JSON object per line; everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peso.runtime.failures import FAILED, debugging, explain, sentence
from peso.runtime.processes import ended_by_sigterm

POLL_SECONDS = 0.5
TERMINATE_SECONDS = 10.0
LAST_LINES = 5


@dataclass(frozen=True)
class Call:
    """One process to start. The paths are absolute.

    Attributes:
        module: the module of the task.
        job: its argument, as JSON.
        log: the file for its messages, which is appended to.
        progress: the file for its progress, which is started anew.
        directory: the working directory.
        environment: additional environment variables, which the executor sets.
    """

    module: str
    job: str
    log: Path
    progress: Path
    directory: Path = field(default_factory=Path.cwd)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def stop(self) -> Path:
        """A file that tells a process on another machine to end."""
        return self.progress.with_suffix(".stop")

    def popen(self) -> subprocess.Popen[bytes]:
        """Start the process on this machine."""
        with self.log.open("ab") as log, self.progress.open("wb") as progress:
            return subprocess.Popen(
                [sys.executable, "-m", self.module, self.job],
                stdin=subprocess.DEVNULL,
                stdout=progress,
                stderr=log,
                cwd=self.directory,
                env={**os.environ, **self.environment},
                start_new_session=True,  # so that Ctrl-C reaches only the process that ends the others
            )

    def explained(self, status: int) -> str:
        """What its exit status means, other than 0: the message that it has logged, or how it ended."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        if status == FAILED and lines and lines[-1].startswith("error: "):
            return lines[-1].removeprefix("error: ")
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{how}; last lines of {self.log}: {' | '.join(lines) or 'none'}"


def run(call: Call) -> int:
    """Run a call on a machine of a cluster until it ends, or until its stop file appears; returns its exit
    status."""
    process = call.popen()
    try:
        while process.poll() is None:
            if call.stop.exists():
                break
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
        return process.returncode if process.poll() is not None else _ended(process)
    finally:  # canceled by the cluster
        if process.poll() is None:
            _ended(process)


def _ended(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        return process.wait(TERMINATE_SECONDS)
    process.kill()
    return process.wait()


def do(work: Callable[[dict[str, Any], Any], int]) -> int:
    """Do the task of this process.

    Args:
        work: receives the job and a file for progress; returns the exit status.

    Returns:
        The exit status; ``FAILED`` after an error, which is logged.
    """
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with progress
    try:
        with ended_by_sigterm():
            return work(json.loads(sys.argv[1]), out)
    except Exception as error:
        if sentence(error) is None and not debugging():
            traceback.print_exception(error)  # into the task's log
        print(explain(error), file=sys.stderr)
        return FAILED


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent process ends, because this process would keep its locks."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(os.EX_TEMPFAIL)

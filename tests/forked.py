"""Processes that begin as copies of one that has imported everything: a new process spends five seconds on
that, more than on its work."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peso.runs.tasks import Call

_CONTEXT = multiprocessing.get_context("forkserver")
# importing these starts no threads, which would not be copied
_CONTEXT.set_forkserver_preload(
    [
        "peso.cli.app",  # before PyTorch: peso decides how threads wait
        "peso.runs.compare.worker",
        "peso.runs.learn",
        "peso.runs.report",
        "ibis.backends.duckdb",
    ]
)


class Copy:
    """What is used of `subprocess.Popen`, of a copy that calls a function."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._process = _CONTEXT.Process(target=work, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a copy", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def script(path: Path, *arguments: object) -> Copy:
    """As `python PATH ARGUMENTS`."""
    return Copy(_run_script, str(path), [str(argument) for argument in arguments])


def of_call(call: Call) -> Copy:
    """In place of :meth:`peso.runs.tasks.Call.popen`."""
    call.log.touch()
    call.progress.write_bytes(b"")
    return Copy(_do, replace(call, environment={**os.environ, **call.environment}))


def _run_script(path: str, arguments: Sequence[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _do(call: Call) -> None:
    os.setsid()
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, call.progress, os.O_WRONLY | os.O_APPEND),
        (2, call.log, os.O_WRONLY | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags), number)
    os.chdir(call.directory)
    os.environ.update(call.environment)
    sys.argv = [call.module, call.job]
    sys.exit(importlib.import_module(call.module).main())

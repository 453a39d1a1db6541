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

from peso.cli import app  # before PyTorch: peso decides how threads wait

# isort: split
import torch
from torch.distributed import TCPStore

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
        "accelerate",
        "transformers.models.llama.modeling_llama",
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


class Launched:
    """Copies that work together, as `torchrun` starts processes: number ``rank`` has `copies[rank]`."""

    def __init__(self, count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # they meet here, at a free port
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self.copies = [Copy(_join, folder, ranks[rank], work, *arguments) for rank in range(count)]

    def wait(self, timeout: float) -> list[int]:
        return [copy.wait(timeout) for copy in self.copies]

    def out(self, rank: int) -> str:
        return (self._folder / f"{rank}.out").read_text()

    def err(self, rank: int) -> str:
        return (self._folder / f"{rank}.err").read_text()


def peso(*arguments: object) -> None:
    """As `python -m peso ARGUMENTS`."""
    sys.argv = ["peso", *map(str, arguments)]
    app.main()


def of_call(call: Call) -> Copy:
    """In place of :meth:`peso.runs.tasks.Call.popen`."""
    call.log.touch()
    call.progress.write_bytes(b"")
    return Copy(_do, replace(call, environment={**os.environ, **call.environment}))


def _run_script(path: str, arguments: Sequence[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _write_to(out: Path, err: Path) -> None:
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        (2, err, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), number)


def _join(folder: Path, environment: dict[str, str], work: Callable[..., Any], *arguments: Any) -> None:
    rank = environment["RANK"]
    _write_to(folder / f"{rank}.out", folder / f"{rank}.err")
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*arguments)


def _do(call: Call) -> None:
    os.setsid()
    _write_to(call.progress, call.log)
    os.chdir(call.directory)
    os.environ.update(call.environment)
    sys.argv = [call.module, call.job]
    sys.exit(importlib.import_module(call.module).main())

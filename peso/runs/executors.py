"""Where the processes of tasks run: on this machine, on a Ray or Dask cluster, or as Slurm jobs.

On a cluster, every machine must have this version of peso and see the workspace under the same path; a
process reports its progress in a file there. Clusters are reached through Ray, Dask and submitit, which also
handle queues, resources and lost machines.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from peso.config.executors import AnyExecutor, DaskConfig, RayConfig, SlurmConfig
from peso.errors import PesoError
from peso.runs.tasks import Call, run
from peso.runtime.machine import NUMBER, SHARE, usable_cores

if TYPE_CHECKING:
    from types import ModuleType

THREADS = (NUMBER, "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CONNECT_SECONDS = 30
SLURM_JOBS = 64  # submitted at once with `workers: auto`
SHUTDOWN_SECONDS, POLL_SECONDS = 3.0, 0.05  # less than the time this process has after a SIGTERM


class LostWorker(Exception):
    """The machine or process that a task ran on is gone; the task can continue elsewhere."""


class Handle(Protocol):
    """A started call."""

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None: it runs, or waits for a machine.

        Raises:
            LostWorker: it will never have one.
        """

    def cancel(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """Do not wait for it any longer."""


class Executor(Protocol):
    """Starts calls somewhere."""

    @property
    def workers(self) -> int:
        """Calls at once."""

    @property
    def patience(self) -> float:
        """Seconds that a process waits for the lock of its workspace, which a lost predecessor may hold."""

    def start(self, call: Call, slot: int) -> Handle:
        """Start a call in a slot (0 … workers − 1) that no running call has."""

    def close(self) -> None:
        """Disconnect."""


def poll(handle: Handle) -> int | LostWorker | None:
    """As :meth:`Handle.poll`, with a lost worker as a result."""
    try:
        return handle.poll()
    except LostWorker as lost:
        return lost


def end_all(handles: Sequence[Handle]) -> None:
    """Ask all to end, wait for a short time, and end the others."""
    for handle in handles:
        handle.cancel()
    until = time.monotonic() + SHUTDOWN_SECONDS
    for handle in handles:
        while (ended := poll(handle)) is None and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        if ended is None:
            handle.kill()


# -- this machine --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """This machine: ``workers`` processes with ``threads`` threads each; ``devices``: CUDA names of GPUs,
    empty on a CPU."""

    workers: int
    threads: int
    devices: tuple[str, ...] = ()
    patience: float = 0.0

    @classmethod
    def of(cls, workers: int | Literal["auto"], device: str) -> Machine:
        """Choose processes and threads for this machine: with ``auto``, one process per usable GPU, else one
        per core. Each gets an equal share of the cores as threads, limited by OMP_NUM_THREADS.

        Args:
            workers: number of processes, or ``auto``.
            device: the setting `training.device`.
        """
        cores = usable_cores()
        devices = _devices() if device in ("auto", "cuda") else ()
        count = (len(devices) or cores) if workers == "auto" else workers
        asked = os.environ.get(NUMBER, "")
        most = int(asked) if asked.isdecimal() and int(asked) else cores
        return cls(count, max(1, min(most, cores // count)), devices)

    def environment(self, slot: int) -> Mapping[str, str]:
        """The environment variables of the process in a slot (0 … workers − 1)."""
        result = _threads(self.threads)
        if not os.environ.get(NUMBER):
            result[SHARE] = "at most"
        if self.devices:
            result["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        return result

    def start(self, call: Call, slot: int) -> Handle:
        return _Local(replace(call, environment=self.environment(slot)).popen())

    def close(self) -> None:
        """Nothing to disconnect."""


@dataclass(frozen=True)
class _Local:
    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.process.poll()

    def cancel(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _devices() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",")) if visible else tuple(str(n) for n in range(torch.cuda.device_count()))


def _threads(count: int) -> dict[str, str]:
    return {name: str(count) for name in THREADS}


# -- clusters ------------------------------------------------------------------------------------------

PATIENCE = 120.0  # a shared file system can take this long to notice that the holder of a lock is gone


@dataclass
class _Remote:
    """A call on a cluster: the library's future, and functions that query and cancel it."""

    call: Call
    future: Any
    found: Any  # function: future → exit status, or None; raises LostWorker
    withdraw: Any  # function: future → None

    def poll(self) -> int | None:
        status: int | None = self.found(self.future)
        if status is not None and status < 0 and not self.call.stop.exists():
            raise LostWorker(self.call.explained(status))  # killed there: for want of memory, or by hand
        return status

    def cancel(self) -> None:
        self.call.stop.touch()
        self.withdraw(self.future)

    def kill(self) -> None:
        """The process ends when it sees the stop file."""


def _started(call: Call, cpus: int) -> Call:
    """The call, limited to the threads of its share of a machine. The stop file of an earlier call is
    removed."""
    call.stop.unlink(missing_ok=True)
    return replace(call, environment=_threads(cpus))


class Ray:
    """Tasks on a Ray cluster. Each reserves the configured CPUs and GPUs."""

    def __init__(self, config: RayConfig, workers: int | Literal["auto"]) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        self.ray = _import("ray", "ray")
        self.config, self.patience = config, PATIENCE
        try:
            self.ray.init(address=config.address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PesoError(
                f"executor ray: no cluster at {config.address!r} ({_cause(error)}); start one with "
                "`ray start --head`, or correct the executor's address"
            ) from None
        has = self.ray.cluster_resources()
        rooms = [has.get("CPU", 0) / config.cpus]
        rooms += [has.get("GPU", 0) / config.gpus] if config.gpus else []
        if min(rooms) < 1:
            raise PesoError(
                f"executor ray: the cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs, "
                f"not the {config.cpus} and {config.gpus:g} of one task; reduce the executor's cpus or gpus"
            )
        self.workers = int(min(rooms)) if workers == "auto" else workers

    def start(self, call: Call, slot: int) -> Handle:
        task = self.ray.remote(run).options(
            num_cpus=self.config.cpus, num_gpus=self.config.gpus, max_retries=0, scheduling_strategy="SPREAD"
        )
        call = _started(call, self.config.cpus)
        return _Remote(call, task.remote(call), self._found, lambda future: self.ray.cancel(future))

    def _found(self, future: Any) -> int | None:
        ready, _ = self.ray.wait([future], timeout=0)
        if not ready:
            return None
        try:
            return int(self.ray.get(future))
        except self.ray.exceptions.RayError as error:
            raise LostWorker(_cause(error)) from None

    def close(self) -> None:
        self.ray.shutdown()


class Dask:
    """Tasks on a Dask cluster."""

    def __init__(self, config: DaskConfig, workers: int | Literal["auto"]) -> None:
        distributed = _import("distributed", "dask")
        self.config, self.patience = config, PATIENCE
        try:
            self.client = distributed.Client(config.address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise PesoError(
                f"executor dask: no scheduler at {config.address!r} ({_cause(error)}); start one with "
                "`dask scheduler` and `dask worker`, or correct the executor's address"
            ) from None
        slots = sum(self.client.nthreads().values()) // config.cpus
        if not slots:
            raise PesoError(
                f"executor dask: the cluster at {config.address} has fewer than {config.cpus} threads on its "
                "workers; start workers, or reduce the executor's cpus"
            )
        self.workers = slots if workers == "auto" else workers

    def start(self, call: Call, slot: int) -> Handle:
        call = _started(call, self.config.cpus)
        resources = self.config.resources or None
        future = self.client.submit(run, call, pure=False, retries=0, resources=resources)
        return _Remote(call, future, self._found, lambda future: future.cancel())

    @staticmethod
    def _found(future: Any) -> int | None:
        if future.status == "finished":
            return int(future.result())
        if future.status in ("error", "lost", "cancelled"):
            error = future.exception() if future.status == "error" else future.status
            raise LostWorker(_cause(error))
        return None

    def close(self) -> None:
        self.client.close()


class Slurm:
    """Jobs of Slurm, submitted with submitit."""

    def __init__(self, config: SlurmConfig, workers: int | Literal["auto"], folder: Path) -> None:
        submitit = _import("submitit", "slurm")
        self.config, self.patience = config, PATIENCE
        self.workers = SLURM_JOBS if workers == "auto" else workers
        options: dict[str, Any] = {
            "name": "peso",
            "timeout_min": round(60 * config.hours),
            "cpus_per_task": config.cpus,
            "gpus_per_node": config.gpus,
            **({} if config.memory_gib is None else {"mem_gb": config.memory_gib}),
            **config.options,
        }
        try:
            self.executor = submitit.AutoExecutor(folder=folder.resolve(), cluster=config.cluster)
            self.executor.update_parameters(**options)
        except (RuntimeError, NameError, TypeError) as error:
            raise PesoError(
                f"executor slurm: Slurm cannot be used ({_cause(error)}); run the command on a machine with "
                "sbatch, or correct the executor's options"
            ) from None

    def start(self, call: Call, slot: int) -> Handle:
        call = _started(call, self.config.cpus)
        try:
            job = self.executor.submit(run, call)
        except (RuntimeError, OSError) as error:  # RuntimeError: what sbatch says
            raise PesoError(
                f"executor slurm: Slurm did not accept a job ({_cause(error)}); check the executor's "
                "options, such as slurm_partition, and the limits of your account"
            ) from None
        return _Remote(call, job, self._found, lambda job: job.cancel())

    @staticmethod
    def _found(job: Any) -> int | None:
        if not job.done():
            return None
        try:
            return int(job.result())
        except Exception as error:  # submitit's errors, and those that the function raised
            raise LostWorker(f"job {job.job_id}, {job.state}: {_cause(error)}") from None

    def close(self) -> None:
        """Nothing to disconnect."""


def open_executor(config: AnyExecutor, workers: int | Literal["auto"], device: str, folder: Path) -> Executor:
    """Create the executor that a configuration names, and connect to its cluster.

    Args:
        workers: tasks at once; ``auto``: as many as the machine or the cluster has room for.
        device: `training.device`, for processes on this machine.
        folder: a directory for the files of Slurm jobs.

    Raises:
        PesoError: a package is missing, there is no cluster, or it is too small for one task.
    """
    if isinstance(config, RayConfig):
        return Ray(config, workers)
    if isinstance(config, DaskConfig):
        return Dask(config, workers)
    if isinstance(config, SlurmConfig):
        return Slurm(config, workers, folder)
    return Machine.of(workers, device)


def _import(name: str, extra: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise PesoError(
            f"executor {extra}: {name} is not installed; install it with pip install 'peso[{extra}]'"
        ) from None


def _cause(error: object) -> str:
    """The line of an error's text that says what happened: the last exception of a traceback, or the first
    line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    return [*lines[:1], *exceptions][-1] if lines else type(error).__name__

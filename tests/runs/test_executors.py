"""Comparisons on clusters: Ray, Dask and Slurm give the results of local processes, lost machines or not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparisons import do, plan_of, result_files

from peso.config.compare import load_comparison
from peso.config.executors import DaskConfig, RayConfig, SlurmConfig
from peso.errors import ConfigError, PesoError
from peso.runs import executors
from peso.runs.compare.plan import Plan
from peso.runs.compare.progress import is_done
from peso.runs.compare.schedule import WORKER, Row, Schedule
from peso.runs.executors import Dask, Handle, LostWorker, Machine, Ray, Slurm, open_executor
from peso.runs.tasks import Call, run

pytestmark = pytest.mark.slow

ONE = {"strategies": ["single"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The run of `single`, done in this process."""
    plan = plan_of(tmp_path_factory.mktemp("here"), ONE)
    do(plan.runs[0].task)
    return plan


@pytest.fixture(scope="module")
def expected(done: Plan) -> dict[str, dict[str, str]]:
    return files_of(done)


@pytest.fixture
def prepared(done: Plan, tmp_path: Path) -> Callable[[dict[str, Any]], Plan]:
    """prepared(compare) → a plan whose data and stage 0 are done, so that only the runs need processes."""

    def prepare(compare: dict[str, Any]) -> Plan:
        plan = plan_of(tmp_path / "prepared", compare)
        for part in ("data", "base"):
            shutil.copytree(done.root / part, plan.root / part)
        assert all(is_done(task) for run in plan.runs for task in run.task.needs)
        return plan

    return prepare


def files_of(plan: Plan) -> dict[str, dict[str, str]]:
    return {run.strategy: result_files(run.task.root) for run in plan.runs}


def states(rows: Sequence[Row]) -> list[str]:
    return [f"{row.state} {row.note}".strip() for row in rows]


# -- without a cluster ---------------------------------------------------------------------------------


def call_of(tmp_path: Path, job: str = "{}") -> Call:
    return Call(WORKER, job, tmp_path / "x.log", tmp_path / "x.progress")


def test_the_exit_status_of_a_process_on_another_machine_is_returned(tmp_path: Path) -> None:
    assert run(call_of(tmp_path)) == 1  # an invalid job
    assert "Job.__init__()" in (tmp_path / "x.log").read_text()


def test_a_stop_file_ends_a_process_on_another_machine(tmp_path: Path, monkeypatch: Any) -> None:
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(Call, "popen", lambda call: sleeping)
    call = call_of(tmp_path)
    call.stop.touch()
    assert run(call) == -signal.SIGTERM


def ended(handle: Handle) -> int:
    until = time.monotonic() + 60
    while (status := handle.poll()) is None and time.monotonic() < until:
        time.sleep(0.1)
    assert status is not None
    return status


class Losing:
    """This machine, but the first process that trains stage 1 is killed with its machine."""

    workers, patience = 1, 30.0

    def __init__(self) -> None:
        self.left = 1

    def start(self, call: Call, slot: int) -> Any:
        handle = Machine(1, 1).start(call, slot)
        poll = handle.poll

        def lost() -> int | None:
            if self.left and "learn stage 1" in call.progress.read_text():
                self.left -= 1
                os.kill(handle.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
                raise LostWorker("node 7 is down")
            return poll()

        object.__setattr__(handle, "poll", lost)
        return handle

    def close(self) -> None:
        pass


class Lost:
    """A cluster that loses every machine at once."""

    workers, patience, started = 1, 0.0, 0

    def start(self, call: Call, slot: int) -> Any:
        self.started += 1
        return self

    def poll(self) -> int | None:
        raise LostWorker("node 7 is down")

    def cancel(self) -> None:
        pass

    kill = close = cancel


def test_a_run_goes_on_elsewhere_when_its_machine_is_lost_and_gives_the_same_result(
    prepared: Callable[..., Plan], expected: dict[str, dict[str, str]], forked_tasks: None
) -> None:
    plan = prepared(ONE)
    losing = Losing()
    assert states(Schedule(plan, losing).run()) == ["done"]
    assert losing.left == 0
    assert files_of(plan) == expected


def test_after_the_allowed_retries_the_run_fails_with_the_cause(tmp_path: Path) -> None:
    plan, lost = plan_of(tmp_path, {**ONE, "retries": 1}), Lost()
    (row,) = Schedule(plan, lost).run()
    assert (row.state, lost.started) == ("failed", 2)
    assert row.note.endswith("its machine or process was lost 2 times; the last time: node 7 is down")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("spark", "compare.executor"),
        ({"name": "ray", "cpu": 2}, "compare.executor.cpu.*the nearest valid key"),
        ({"name": "ray", "cpus": 0}, "compare.executor.cpus"),
        ({"name": "dask"}, "compare.executor.address"),
        ({"name": "slurm", "hours": -1}, "compare.executor.hours"),
    ],
)
def test_a_wrong_executor_is_refused_with_its_key(tmp_path: Path, section: Any, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"compare": {"strategies": ["single"], "executor": section}}))
    with pytest.raises(ConfigError, match=message):
        load_comparison(path)


@pytest.mark.parametrize(("name", "extra"), [("ray", "ray"), ("distributed", "dask"), ("submitit", "slurm")])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: Any, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = {"ray": RayConfig(), "dask": DaskConfig(address="tcp://x:1"), "slurm": SlurmConfig()}[extra]
    with pytest.raises(PesoError, match=rf"{name} is not installed.*'peso\[{extra}\]'"):
        open_executor(config, "auto", "cpu", tmp_path)


# -- Slurm, by submitit's local executor ---------------------------------------------------------------


def test_jobs_of_submitit_give_the_results_of_local_processes(
    tmp_path: Path, prepared: Callable[..., Plan], expected: dict[str, dict[str, str]]
) -> None:
    pytest.importorskip("submitit")
    plan = prepared(ONE)
    executor = Slurm(SlurmConfig(cluster="local"), 1, tmp_path / "jobs")
    assert states(Schedule(plan, executor).run()) == ["done"]
    assert files_of(plan) == expected


def test_a_job_that_raises_or_dies_counts_as_lost(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    executor = Slurm(SlurmConfig(cluster="local"), 2, tmp_path / "jobs")
    handle = executor.start(call_of(tmp_path / "nowhere"), 0)  # no such directory: not a shared file system
    with pytest.raises(LostWorker, match=r"^job \d+, FINISHED: FileNotFoundError: .*nowhere/x.log"):
        ended(handle)


def test_a_process_that_is_killed_on_a_cluster_is_lost_unless_it_was_stopped(tmp_path: Path) -> None:
    """`run` starts the process on a machine of the cluster and returns how it ended."""
    call = call_of(tmp_path)
    dies = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    with call.log.open("wb") as log:
        status = subprocess.run(dies, stderr=log).returncode
    handle = executors._Remote(call, status, lambda status: status, lambda status: None)
    with pytest.raises(LostWorker, match=r"killed by SIGKILL; last lines of .*x.log"):
        handle.poll()
    handle.cancel()
    assert handle.poll() == -signal.SIGKILL


def test_slurm_without_sbatch_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(PesoError, match="Slurm cannot be used"):
        Slurm(SlurmConfig(), "auto", tmp_path)


def test_a_job_that_slurm_does_not_accept_is_told_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    words = "sbatch: error: invalid partition specified: lnog"
    for name, text in (("sbatch", f"echo '{words}' >&2; exit 1"), ("srun", ""), ("sacct", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    executor = Slurm(SlurmConfig(options={"slurm_partition": "lnog"}), "auto", tmp_path / "jobs")
    with pytest.raises(PesoError, match=rf"did not accept a job .*{words}.*check the executor's options"):
        executor.start(call_of(tmp_path), 0)


# -- Dask ----------------------------------------------------------------------------------------------


def test_dask_gives_the_results_of_local_processes(
    prepared: Callable[..., Plan], expected: dict[str, dict[str, str]], forked_tasks: None
) -> None:
    distributed = pytest.importorskip("distributed")
    plan = prepared(ONE)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        executor = Dask(DaskConfig(address=cluster.scheduler_address), "auto")
        try:
            assert executor.workers == 1
            assert states(Schedule(plan, executor).run()) == ["done"]
        finally:
            executor.close()
    assert files_of(plan) == expected


def test_a_missing_dask_scheduler_is_named(monkeypatch: Any) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 1)
    with pytest.raises(PesoError, match=r"executor dask: no scheduler at 'tcp://127.0.0.1:9'"):
        Dask(DaskConfig(address="tcp://127.0.0.1:9"), "auto")


# -- Ray -----------------------------------------------------------------------------------------------


def test_a_ray_cluster_that_loses_a_node_gives_the_results_of_local_processes(
    two_nodes: Any, prepared: Callable[..., Plan], expected: dict[str, dict[str, str]]
) -> None:
    plan = prepared({"strategies": ["single", "paper"]})
    executor = Ray(RayConfig(address=two_nodes.address), "auto")
    removed = []

    def watch(rows: Sequence[Row]) -> None:
        if not removed and all(row.note.startswith("learn stage 1") for row in rows):
            (node,) = [node for node in two_nodes.list_all_nodes() if not node.head]
            removed.append(node)
            two_nodes.remove_node(node)

    try:
        assert executor.workers == 2
        schedule = Schedule(plan, executor, watch=watch)
        assert states(schedule.run()) == ["done", "done"]
        assert removed
        assert sum(schedule._lost.values()) == 1
    finally:
        executor.close()
    assert files_of(plan)["single"] == expected["single"]

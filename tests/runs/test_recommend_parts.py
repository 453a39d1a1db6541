"""Several processes write the recommendations for all users as one does, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_user_histories import receive

from peso.config.executors import read_executor
from peso.errors import ConfigError, PesoError
from peso.runs import recommend_all, recommend_parts
from peso.runs.executors import LostWorker, Machine
from peso.runs.recommend_all import AllUsers
from peso.runs.recommend_parts import Job
from peso.runs.recommend_worker import work
from peso.runs.recommender import Recommender
from peso.runs.retired import retire
from peso.runs.tasks import Call
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent


class Here:
    """An executor that does each task in this process. ``fails``: what the n-th task does instead."""

    patience = 0.0

    def __init__(self, workers: int = 2, **fails: Callable[[Job, Call], int | None]) -> None:
        self.workers, self.fails, self.jobs = workers, fails, list[Job]()

    def start(self, call: Call, slot: int) -> Any:
        assert 0 <= slot < self.workers
        job = Job(**json.loads(call.job))
        self.jobs.append(job)
        number = len(self.jobs)
        return Handle(lambda: self._done(number, job, call))

    def _done(self, number: int, job: Job, call: Call) -> int | None:
        if (fails := self.fails.get(f"at_{number}")) is not None:
            return fails(job, call)
        work(job)
        return 0

    def close(self) -> None:
        pass


class Handle:
    def __init__(self, poll: Callable[[], int | None]) -> None:
        self.poll = poll

    def cancel(self) -> None:
        pass

    kill = cancel


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Here]:
    def use(*arguments: Any, **fails: Any) -> Here:
        executor = Here(*arguments, **fails)
        monkeypatch.setattr(recommend_parts, "open_executor", lambda *_: executor)
        return executor

    return use


def begins(job: Job, call: Call) -> None:
    """Computes the first batch of a job, and no other."""
    answer, asked = Recommender.search, list[int]()

    def once(*arguments: Any, **options: Any) -> Any:
        asked.append(1)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return answer(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Recommender, "search", once)
        with pytest.raises(KeyboardInterrupt):
            work(job)


def dies(job: Job, call: Call) -> int:
    begins(job, call)
    call.log.write_text("1 thread (OMP_NUM_THREADS)\n")
    return -signal.SIGKILL


def is_lost(job: Job, call: Call) -> int:
    begins(job, call)
    raise LostWorker("node 7 is down")


@pytest.mark.parametrize("parts", [None, 1, 2, 3, 100])
def test_any_number_of_parts_gives_the_file_of_one_process(
    workspace: Workspace,
    tmp_path: Path,
    answering: list[list[str]],
    here: Callable[..., Here],
    parts: int | None,
) -> None:
    receive(workspace, *[(f"new {n}", workspace.stream.item_ids[n], n + 1) for n in range(7)])
    recommender, executor = Recommender(workspace), here()
    one = recommender.recommend_all(tmp_path / "one.parquet", k=3)
    alone = list(answering)
    answering.clear()
    many = recommender.recommend_all(tmp_path / "many.parquet", k=3, parts=parts, executor="processes")
    assert one == many
    assert (tmp_path / "many.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    batches = -(-recommender.histories.count() // 16)
    assert len(executor.jobs) == min(parts or 2, batches)
    assert sorted(answering) == sorted(alone), "each user once"
    assert not list(tmp_path.glob(".*.parts"))


def test_a_part_of_the_users_can_be_shared_too(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]], here: Callable[..., Here]
) -> None:
    recommender = Recommender(workspace)
    here()
    recommender.recommend_all(tmp_path / "one.csv", k=3, part=(2, 2))
    recommender.recommend_all(tmp_path / "many.csv", k=3, part=(2, 2), parts=2)
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


@pytest.mark.parametrize("death", [dies, is_lost])
def test_what_a_dead_process_has_done_is_not_done_again(
    workspace: Workspace,
    tmp_path: Path,
    answering: list[list[str]],
    here: Callable[..., Here],
    death: Callable[..., Any],
) -> None:
    recommender = Recommender(workspace)
    recommender.recommend_all(tmp_path / "one.parquet", k=3)
    alone = list(answering)
    answering.clear()
    executor = here(1, at_1=death, at_2=death)
    recommender.recommend_all(tmp_path / "many.parquet", k=3, parts=1)
    assert len(executor.jobs) == 3
    assert answering == alone
    assert (tmp_path / "many.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


def test_a_part_that_dies_again_and_again_fails_and_another_call_continues(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]], here: Callable[..., Here]
) -> None:
    recommender, file = Recommender(workspace), tmp_path / "r.parquet"
    recommender.recommend_all(tmp_path / "one.parquet", k=3)
    alone = list(answering)
    answering.clear()
    here(1, **{f"at_{n}": dies for n in (1, 2, 3)})
    with pytest.raises(PesoError, match=r"part 1 of 1 died 3 times; the last time: killed by SIGKILL.*again"):
        recommender.recommend_all(file, k=3, parts=1)
    assert (tmp_path / ".r.parquet.parts" / "part-1.log").exists()
    assert not file.exists()
    recommender.recommend_all(file, k=3)  # this time without other processes
    assert answering == alone
    assert file.read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert not list(tmp_path.glob(".*.parts"))


def test_an_error_ends_the_call_and_leaves_nothing(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]], here: Callable[..., Here]
) -> None:
    def fails(job: Job, call: Call) -> int:
        call.log.write_text("error: the backbone is damaged\n")
        return 1

    executor = here(1, at_1=fails)
    with pytest.raises(PesoError, match=r"^part 1 of 2: the backbone is damaged$"):
        Recommender(workspace).recommend_all(tmp_path / "r.csv", k=3, parts=2)
    assert len(executor.jobs) == 1, "an error is not tried again"
    assert not list(tmp_path.glob("*r.csv*"))


def test_a_process_whose_workspace_has_changed_since_refuses(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]], here: Callable[..., Here]
) -> None:
    def retires(job: Job, call: Call) -> int:
        retire(workspace, workspace.stream.item_ids[:1])
        work(job)
        return 0

    here(1, at_1=retires)
    with pytest.raises(PesoError, match="has changed since the call began; run the same command again"):
        Recommender(workspace).recommend_all(tmp_path / "r.csv", k=3, parts=1)


def test_what_a_process_of_an_earlier_call_writes_late_is_not_taken(
    workspace: Workspace, tmp_path: Path, answering: list[list[str]], here: Callable[..., Here]
) -> None:
    recommender = Recommender(workspace)
    recommender.recommend_all(tmp_path / "one.parquet", k=3)

    def late(job: Job, call: Call) -> int:
        earlier = AllUsers(recommender, 2, True, (1, 1))  # another k
        folder = Path(job.folder)
        earlier.compute(folder, recommend_all.DataState(earlier.determined_by, 0), Silent())
        work(job)
        return 0

    here(1, at_1=late)
    recommender.recommend_all(tmp_path / "r.parquet", k=3, parts=1)
    assert (tmp_path / "r.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "spark"}, r"executor: expected one of processes, ray, dask, slurm.*'spark'"),
        ({"executor": {"name": "ray", "gpu": 1}}, r"executor\.gpu.*nearest valid key is 'executor\.gpus'"),
        ({"executor": {"name": "dask"}}, r"executor\.address is missing"),
        ({"executor": {"name": "slurm", "hours": 0}}, r"executor\.hours: .*greater than 0; got 0"),
        ({"executor": {"cpus": 1}}, r"executor: expected one of"),
        ({"parts": 0}, r"parts must be a number from 1 to 10,000, not 0"),
    ],
)
def test_a_wrong_executor_is_refused(
    workspace: Workspace, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recommender(workspace).recommend_all(tmp_path / "r.csv", k=3, **options)
    assert not list(tmp_path.glob("*r.csv*"))


def test_the_options_of_the_command_line_are_checked_first(
    peso: Callable[..., tuple[int, str, str]], root: Path, tmp_path: Path
) -> None:
    call = ("recommend", "-w", root)
    status, _, error = peso(*call, "--user", "1", "--parts", "2")
    assert (status, "--parts and --executor need --all" in error) == (2, True)
    status, _, error = peso(*call, "--all", "-o", tmp_path / "r.csv", "--executor", "{name: ray, gpu: 1}")
    assert status == 2 or status == 1
    assert "'--executor.gpu'" in error
    assert "the nearest valid key is '--executor.gpus'" in error


def test_an_executor_is_a_name_or_a_section() -> None:
    assert read_executor("ray") == read_executor({"name": "ray"})
    assert read_executor({"name": "slurm", "cpus": 4}).model_dump()["cpus"] == 4


# -- real processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_processes_one_of_which_is_killed_give_the_file_of_one(
    peso: Callable[..., tuple[int, str, str]],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forked_tasks: None,
) -> None:
    monkeypatch.setattr(recommend_all, "AT_ONCE", 16)
    Recommender(Workspace.open(root)).recommend_all(tmp_path / "one.parquet", k=3)
    start, killed = Machine.start, list[int]()

    def kill_first(self: Machine, call: Call, slot: int) -> Any:
        handle = start(self, call, slot)
        if not killed:
            killed.append(handle.process.pid)  # type: ignore[attr-defined]
            os.kill(killed[0], signal.SIGKILL)
        return handle

    monkeypatch.setattr(Machine, "start", kill_first)
    status, out, error = peso(
        "recommend", "-w", root, "--all", "-o", tmp_path / "many.parquet", "-k", "3", "--parts", "2"
    )
    assert (status, "recommendations for 60 users" in out) == (0, True), error
    assert "part 1 of 2 is continued by another process (killed by SIGKILL" in error
    assert (tmp_path / "many.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


@pytest.mark.slow
def test_a_ray_cluster_gives_the_file_of_one_process(
    one_node: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend_all, "AT_ONCE", 16)
    recommender = Recommender(Workspace.open(root))
    recommender.recommend_all(tmp_path / "one.parquet", k=3)
    section = {"name": "ray", "address": one_node.address}
    assert recommender.recommend_all(tmp_path / "many.parquet", k=3, executor=section) == 60
    assert (tmp_path / "many.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert not list(tmp_path.glob(".*.parts"))

"""Several processes train and test as one does: same losses, same answers, one writer, resumable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import together
import torch
import yaml
from forked import Launched
from hypothesis import given
from hypothesis import strategies as st
from plain_path import with_adapter
from together import find, found_by_two, fresh

from peso.config import load_config
from peso.model.generative import GenerativeModel
from peso.runs import evaluate, pipeline, preparation
from peso.runs.workspace import Workspace
from peso.runtime.processes import ALONE
from peso.runtime.progress import Silent
from peso.training.batches import deal

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CONFIG = """
data: {format: simulate, simulate: {users: 60, items: 40, stages: 1}}
items: {quantizer: rq-kmeans, levels: 2, codes: 8}
backbone: {name: tiny}
training: {epochs: 2, max_steps: 20, batch_size: 16, learning_rate: 3e-3, device: cpu}
adapter: {dropout: 0.0}
decoding: {batch_size: 8}
"""


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 8))
def test_everything_is_dealt_once_and_evenly(sizes: list[int], hands: int) -> None:
    dealt = deal(sizes, hands)
    assert len(dealt) == hands
    assert sorted(number for hand in dealt for number in hand) == list(range(len(sizes)))
    loads = [sum(sizes[number] for number in hand) for hand in dealt]
    assert max(loads) - min(loads) <= max(sizes)


def test_one_process_exchanges_nothing() -> None:
    gradient, rows = torch.ones(3), np.arange(4)
    assert ALONE.is_main
    assert ALONE.sum_tensors([gradient, None], [gradient, gradient]) == [gradient, None]
    assert ALONE.merge(rows, np.ones(4, bool)) is rows
    assert ALONE.on_main(lambda: 3) == 3
    assert all(ALONE.takes(number) for number in range(5))


def test_commands_of_one_process_refuse_several(
    peso: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    status, _, error = peso("ingest", "log.csv")
    assert status == 2
    assert "runs in one process: call it without torchrun" in error


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., GenerativeModel]
) -> tuple[Path, list[dict[str, Any]]]:
    """Where two processes worked, and what each of them found."""
    directory = tmp_path_factory.mktemp("two")
    torch.save(with_adapter(make_model("instruct", "full", layers=1)), directory / "model.pt")
    return directory, found_by_two(directory, find)


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for losses in ("training", "validation"):
        assert found[losses] == pytest.approx(expected[losses], abs=1e-4)
    assert found["targets"] == expected["targets"]
    for name, value in expected["learnt"].items():
        torch.testing.assert_close(found["learnt"][name], value, atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "peso", "softened"])
def test_two_processes_learn_what_one_learns(
    two: tuple[Path, list[dict[str, Any]]], tmp_path: Path, strategy: str
) -> None:
    directory, (main, other) = two
    expected = together.train(fresh(directory), tmp_path, strategy=strategy)
    check_same(main[strategy], expected)
    for name, value in main[strategy]["learnt"].items():
        assert torch.equal(other[strategy]["learnt"][name], value), name
    ours, theirs = (
        [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        for place in (tmp_path, directory / strategy)
    )
    assert len(ours) == len(theirs)  # one process writes, each step once
    for one, both in zip(ours, theirs, strict=True):
        assert one.keys() == both.keys()
        for key in set(one) - {"tokens", "tokens_per_second"}:
            known = one[key] is not None
            assert both[key] == (pytest.approx(one[key], abs=1e-4, rel=1e-3) if known else None), key


@pytest.mark.slow
def test_a_step_may_leave_a_process_without_targets(
    two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    directory, (main, _) = two
    expected = together.train(fresh(directory), tmp_path, sequences=together.ONE)
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any(step.get("targets") == 8 for step in steps)  # a whole batch of one user: one chunk
    check_same(main["one user"], expected)


@pytest.mark.slow
def test_answers_do_not_depend_on_how_many_processes_find_them(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    directory, found = two
    expected = together.answers(fresh(directory))
    for each in found:
        for ours, theirs in zip(each["answers"], expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(
    two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    directory, (main, _) = two
    assert main["stopped"]
    expected = together.train(fresh(directory), tmp_path, strategy="peso")
    check_same(together.train(fresh(directory), directory / "stopped", strategy="peso"), expected)


@pytest.mark.slow
def test_all_are_told_what_went_wrong(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for each in two[1]:
        written, failed, unlike = each["errors"]
        assert written == "written by 0"
        assert failed == "DataError: no such file"
        assert unlike.startswith("TrainingError: the 2 processes differ in rank")


@pytest.mark.slow
def test_a_killed_worker_is_told_and_the_stage_goes_on(tmp_path: Path) -> None:
    """A stage learnt and tested by two processes, one of which is killed on the way, beside one alone."""
    two, one = (
        Workspace.create_or_open(tmp_path / name, load_config(yaml.safe_load(CONFIG)))
        for name in ("two", "one")
    )
    for workspace in (two, one):
        preparation.ingest(workspace, Silent())
        preparation.tokenize(workspace, Silent())

    launcher = subprocess.Popen(
        [*LAUNCH, "-m", "peso", "train", "-w", two.root],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 2000
    while not any(log.stat().st_size for log in two.root.glob("stages/.0.unfinished/*/log.jsonl")):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (worker,) = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == "1"]
    worker.kill()
    _, told = launcher.communicate(timeout=1200)
    assert launcher.returncode != 0
    # it notices the loss itself, or torchrun does and stops it first
    assert "un the same command again" in told.replace("\n", " "), told
    assert not two.finished_stages

    for command in (["train"], ["evaluate", "--json"]):
        launched = Launched(2, tmp_path / command[0], forked.peso, *command, "-w", two.root)
        assert launched.wait(2500) == [0, 0], launched.err(0) + launched.err(1)
    json.loads(launched.out(0))
    assert launched.out(1) == ""  # the main process alone speaks

    pipeline.learn(one.stage(0), Silent())
    evaluate.test(one.stage(0).on(0), Silent())
    logs, tables = [], []
    for workspace in (two, one):
        directory = workspace.stage(0).directory
        lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
        logs.append([line.get("loss", line.get("validation_loss")) for line in lines])
        tables.append(pq.read_table(directory / "predictions.parquet"))
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)
    assert tables[0]["items"] == tables[1]["items"]
    likelihoods = [table["target_log_probability"].to_numpy() for table in tables]
    np.testing.assert_allclose(*likelihoods, atol=1e-4)

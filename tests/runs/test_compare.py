"""A run of a comparison is the same however it was made, and whatever happens to the others."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from comparisons import COMMON, do, plan_of, result_files
from event_logs import write_log

from peso.config import load_config
from peso.config.baselines import read_baseline
from peso.errors import ConfigError, DataError
from peso.runs import evaluate, pipeline, report
from peso.runs.baselines import BaselineRun
from peso.runs.compare.progress import choose, pairs_across, progress_of, validation_loss
from peso.runs.compare.results import collect, runs_by_data, write_results
from peso.runs.compare.schedule import Schedule
from peso.runs.compare.worker import GRACE_SECONDS, OutOfTime, Reporter
from peso.runs.executors import Machine
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum, write_json
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow  # whole runs


# -- one run -------------------------------------------------------------------------------------------


def test_a_run_of_a_comparison_equals_the_same_configuration_under_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "report", lambda workspaces, directory: None)
    run = plan_of(tmp_path, {"strategies": ["single"], "seeds": [4]}).runs[0]
    do(run.task)
    alone = Workspace.create_or_open(tmp_path / "alone", load_config(run.task.root / "config.yaml"))
    with alone.lock():
        pipeline.run(alone)
    assert result_files(alone.root) == result_files(run.task.root)
    assert progress_of(run.task).complete


def test_seeds_share_data_and_stage_0_and_differ_afterwards(tmp_path):
    zero, one = plan_of(tmp_path, {"strategies": ["single"], "seeds": [0, 1]}).runs
    do(zero.task)
    do(one.task)
    files = [result_files(run.task.root) for run in (zero, one)]
    for name in files[0]:
        assert (files[0][name] == files[1][name]) == name.startswith("stages/0/"), name
    stream = [run.task.root / "stream" / "items.parquet" for run in (zero, one)]
    assert stream[0].stat().st_ino == stream[1].stat().st_ino  # one file, not two


def test_options_are_chosen_on_the_validation_loss_and_the_chosen_trial_is_the_run(tmp_path):
    wide = {"strategy": "single", "set": {"training.later_learning_rate_scale": [0.001, 1.0]}}
    run = plan_of(tmp_path, {"tune": {"tuned": wide}}).runs[0]
    for candidate in run.candidates:
        do(candidate.trial)
        assert not list((candidate.trial.root / "stages" / "1").glob("predictions*"))  # no test is looked at
    losses = [validation_loss(candidate.trial) for candidate in run.candidates]
    best = choose(run.candidates)
    assert best is run.candidates[losses.index(min(losses))]
    chosen = run.with_choice(best)
    do(chosen.task)
    weights = "stages/2/adapter/adapter_model.safetensors"
    assert checksum(chosen.task.root / weights) == checksum(best.trial.root / weights)
    assert progress_of(chosen.task).complete
    figures = json.loads((chosen.task.root / "stages/2/metrics.json").read_text())
    assert {"training", "test"} <= figures.keys()


def test_after_the_deadline_training_stops_at_its_next_checkpoint_and_no_sooner(tmp_path):
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(COMMON))
    reporter = Reporter(workspace, time.time() - 1, io.StringIO())
    with pytest.raises(OutOfTime):
        reporter.step("learn stage 1")
    reporter.begin("learn stage 1", 10, "steps")
    reporter.advance(1)  # nothing since the deadline is on disk yet
    unfinished = workspace.stage(1).unfinished / "abc"
    unfinished.mkdir(parents=True)
    write_json(unfinished / "checkpoint.pt", {})
    with pytest.raises(OutOfTime):
        reporter.advance(2)
    reporter.begin("test stage 1: search", 10, "users")
    reporter.advance(1)
    late = Reporter(workspace, time.time() - GRACE_SECONDS - 1, io.StringIO())
    late.begin("test stage 1: search", 10, "users")
    with pytest.raises(OutOfTime):
        late.advance(1)


@pytest.mark.parametrize("mistake", ["report.segments=[colour]", "evaluation.k=[60]"])
def test_what_the_catalogue_does_not_have_is_refused_before_stage_0_is_learnt(tmp_path, mistake):
    run = plan_of(tmp_path, {"strategies": ["single"]}, "decoding.beams=60", mistake).runs[0]
    with pytest.raises((ConfigError, DataError), match=r"colour|60 items"):
        do(run.task)
    assert not list((tmp_path / "w").glob("base/**/stages"))


def test_workers_share_the_cores_between_them(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert Machine.of("auto", "cpu").workers == cores
    two = Machine.of(2, "cpu")
    assert two.environment(1)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert "CUDA_VISIBLE_DEVICES" not in two.environment(0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    asked = {"": "4", "1": "1", "3": "3", "16": "4", "0": "4", "2,2": "4"}
    for value, threads in asked.items():
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert Machine.of(2, "cpu").environment(0)["OMP_NUM_THREADS"] == threads
    gpus = Machine(3, 1, ("4", "7"))
    assert [gpus.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]


# -- many runs -----------------------------------------------------------------------------------------


def test_a_killed_worker_takes_its_own_run_only_and_the_next_call_ends_with_the_same_result(
    tmp_path, forked_tasks
):
    plan = plan_of(tmp_path, {"strategies": ["single", "paper"]})
    machine = Machine(2, 1)
    killed = []

    def watch(rows):
        for row in rows:
            if row.run.strategy == "single" and row.note.startswith("learn stage 1") and not killed:
                killed.append(row)
                os.kill(schedule._working[row.run.task.key].handle.process.pid, signal.SIGKILL)

    schedule = Schedule(plan, machine, watch=watch)
    single, paper = schedule.run()
    assert (single.state, paper.state) == ("failed", "done")
    assert "SIGKILL" in single.note
    assert (tmp_path / "w" / "logs").is_dir()

    found = collect(plan)
    assert [run.strategy for run, _ in found.runs][-1] == "paper"
    assert any("single" in remark and "only 1 of 3" in remark for remark in found.remarks)
    write_results(plan, found, tmp_path / "part")
    notes: list[str] = []
    (whole,) = runs_by_data(tmp_path / "part", notes.append)["simulate"]
    assert whole.strategy == "paper"
    assert notes == ["simulate: single/seed=0 is left out; 1 of 3 stages are tested"]

    rows = Schedule(plan, machine).run()
    assert [row.state for row in rows] == ["done", "done"]
    assert all(row.progress.hit is not None for row in rows)
    again = plan_of(tmp_path / "again", {"strategies": ["single", "paper"]})
    for run, same in zip(plan.runs, again.runs, strict=True):
        do(same.task)
        assert result_files(run.task.root) == result_files(same.task.root)

    assert write_results(plan, collect(plan), plan.root).is_file()
    table = pq.read_table(tmp_path / "w" / "results.parquet").to_pylist()
    assert [(row["strategy"], row["stage"]) for row in table] == [
        (s, t) for s in ("single", "paper") for t in range(3)
    ]
    for row in table:
        metrics = json.loads((Path(row["workspace"]) / f"stages/{row['stage']}/metrics.json").read_text())
        assert row["hit@10"] == metrics["test"]["metrics"]["hit@10"]["value"]
        assert row["validation_loss"] == min(metrics["training"]["validation_losses"])


def test_one_command_reports_transfer_and_baselines_and_goes_on_where_it_was_killed(tmp_path, forked_tasks):
    quick = {"two_tower": {"epochs": 1}}
    baselines = [{"name": "two-tower", "epochs": 1}, {"name": "hybrid", **quick}]
    plan = plan_of(tmp_path, {"strategies": ["single"], "baselines": baselines, "transfer": True})
    do(plan.runs[0].task)
    machine = Machine(2, 1)
    killed = set()

    def watch(rows):
        for row in rows:
            ripe = row.run.kind != "strategy" and row.progress.done >= 1 and row.state == "running"
            if ripe and row.run.kind not in killed:
                killed.add(row.run.kind)
                os.kill(schedule._working[row.run.task.key].handle.process.pid, signal.SIGKILL)

    schedule = Schedule(plan, machine, watch=watch)
    schedule.run()
    assert killed == {"baseline", "transfer"}
    assert any("forgetting and transfer" in remark for remark in collect(plan).remarks)
    rows = Schedule(plan, machine).run()
    assert {row.state for row in rows} == {"done"}, [row.note for row in rows]
    assert collect(plan).remarks == []

    by_hand = Workspace(tmp_path / "hand", plan.runs[0].task.config)
    shutil.copytree(plan.runs[0].task.root, by_hand.root)
    for folder in by_hand.root.glob("stages/*/on=*"):
        shutil.rmtree(folder)
    for stage, on in pairs_across(3):
        evaluate.test(by_hand.stage(stage).on(on), Silent())
    BaselineRun(by_hand, read_baseline({"name": "hybrid", **quick})).run(Silent())
    done = result_files(plan.runs[0].task.root)
    assert sum("on=" in name for name in done) == 6
    fused = plan.baselines[1].task.root
    done |= {name: digest for name, digest in result_files(fused).items() if name.startswith("baselines")}
    assert done == result_files(by_hand.root)

    page = write_results(plan, collect(plan), tmp_path / "told" / "here").read_text()
    assert not (plan.root / "report").exists()
    for text in (
        " with single (static)",
        "two-tower epochs=1 (static)",
        "Backward transfer",
        "model after stage",
    ):
        assert text in page, text
    table = pq.read_table(tmp_path / "told" / "here" / "results.parquet").to_pylist()
    assert {(row["strategy"], row["seed"]) for row in table} >= {
        ("two-tower epochs=1", 0),
        ("two-tower epochs=1 (static)", 0),
    }


def test_a_budget_that_is_over_starts_nothing_and_the_command_still_says_what_is_missing(tmp_path, peso):
    plan_of(tmp_path, {"strategies": ["single"]})
    asked = ["compare", tmp_path / "c.yaml", "-w", tmp_path / "w", "--set", "seed=1", "--budget", "0s"]
    status, out, err = peso(*asked)
    assert status == 0
    assert "1 stopped" in out
    assert f"next: peso {' '.join(map(str, asked))}" in err
    assert "single/seed=0: missing" in out
    assert not (tmp_path / "w" / "data").exists()


def test_the_dry_run_reads_a_log_that_is_not_ingested(tmp_path, peso):
    events = [(f"u{n % 40}", f"i{n * 7 % 30}", 1_700_000_000 + 60 * n) for n in range(1500)]
    log = str(write_log(tmp_path / "log.csv", events))
    table = write_log(tmp_path / "items.csv", [(f"i{n}", f"Cup {n}") for n in range(30)], "item,title")
    items = {"path": str(table), "columns": {"item": "item", "title": "title"}}
    tree = {
        "data": {"format": "csv", "path": log, "stages": 2, "items": items},
        "backbone": "tiny",
        "training": {"epochs": 1, "max_steps": 1},
        "compare": {"strategies": ["none", "peso"], "baselines": ["ease"]},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    status, out, err = peso(
        "compare", tmp_path / "c.yaml", "-w", tmp_path / "w", "--dry-run", "--set", "seed=1"
    )
    assert status == 0, err
    lines = [line for line in out.splitlines() if "log.csv/tiny/" in line and "baselines" not in line]
    assert len(lines) == 5  # stage 0, two runs, and their tests on other stages
    assert not [line for line in lines if "–" in line]
    assert "in total on this machine" in out
    assert not (tmp_path / "w").exists()


def test_the_dry_run_lists_every_run_and_writes_nothing(tmp_path, peso):
    plan_of(tmp_path, {"strategies": ["none"], "grid": {"p": {"name": "peso", "weight": [1, 2]}}})
    status, out, err = peso(
        "compare", tmp_path / "c.yaml", "-w", tmp_path / "w", "--dry-run", "--budget", "5m", "--set", "seed=1"
    )
    assert status == 0
    assert f"next: peso compare {tmp_path / 'c.yaml'} -w {tmp_path / 'w'} --set seed=1 --budget 5m" in err
    for name in ("tiny/none", "tiny/p[weight=1]/seed=0", "tiny/p[weight=2]/seed=0"):
        assert name in out
    assert not (tmp_path / "w").exists()

"""A run from data to report on a tiny model: resumable anywhere, same files however often interrupted."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from itertools import pairwise
from pathlib import Path

import forked
import numpy as np
import pytest
import small_runs

from peso.config import load_config
from peso.errors import ConfigError, DataError, WorkspaceError
from peso.evaluation.predictions import read_predictions
from peso.runs import evaluate, learn, pipeline, preparation, report
from peso.runs.recommender import Recommender
from peso.runs.stage import FORMAT
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum
from peso.runtime.manifest import write_manifest
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

TREE = {
    "data": {"format": "simulate", "simulate": {"users": 120, "items": 60, "stages": 3}},
    "backbone": {"name": "tiny", "layers": 1},
    "strategy": {"name": "peso", "examples": 8},
    "training": {"epochs": 2, "max_steps": 14, "learning_rate": 3e-3, "later_learning_rate_scale": 0.5},
    "baselines": [],
    "seed": 5,
}


def config(*overrides: str):
    return load_config(TREE, overrides)


def run(root: Path, *overrides: str, base: Path | None = None) -> Workspace:
    return small_runs.run(Workspace.create_or_open(root, config(*overrides)), base)


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    """The run of `finished` writes one."""
    monkeypatch.setattr(report, "report", lambda workspaces, directory: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Workspace:
    return run(tmp_path_factory.mktemp("runs") / "peso")


def result_files(workspace: Workspace) -> dict[str, str]:
    """Checksums of everything that a run is judged by."""
    kept = ("adapter_model.safetensors", "vocabulary.safetensors", "model.safetensors", "predictions.parquet")
    stages = workspace.root / "stages"
    files = [path for path in stages.rglob("*") if path.name in kept]
    own = [
        path for path in files if not path.parent.name.startswith("on=")
    ]  # not tests on other stages' cases
    return {str(path.relative_to(stages)): checksum(path) for path in own}


def test_the_layout_on_disk_is_the_documented_one(finished):
    names = {str(path.relative_to(finished.root)) for path in finished.root.rglob("*") if path.is_file()}
    for stage in range(3):
        for name in (
            "vocabulary.safetensors",
            "manifest.json",
            "metrics.json",
            "predictions.parquet",
            "log.jsonl",
        ):
            assert f"stages/{stage}/{name}" in names
    assert "stages/0/backbone/model.safetensors" in names  # trained whole there, and only there
    assert "stages/1/adapter/adapter_model.safetensors" in names
    assert not any(name.startswith("stages/1/backbone") for name in names)
    assert {"config.yaml", "stream/items.parquet", "stream/manifest.json", "report/index.html"} <= names
    assert {"semantic_ids/index.parquet", "semantic_ids/manifest.json"} <= names
    assert not [path for path in (finished.root / "stages").iterdir() if path.name.startswith(".")]


def test_a_manifest_names_its_parent_its_inputs_and_every_output(finished):
    chain = [finished.stage(stage).manifest for stage in finished.finished_stages]
    for parent, child in pairwise(chain):
        assert child["parent"] == {"stage": parent["stage"], "determined_by": parent["determined_by"]}
    for manifest in chain:
        directory = finished.stage(manifest["stage"]).directory
        found = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()} - {
            "manifest.json"
        }
        assert set(manifest["files"]) == found
        assert all(checksum(directory / name) == sha for name, sha in manifest["files"].items())
        assert manifest["configuration"] == finished.config.model_dump(mode="json")
        assert {"inputs", "seed", "versions", "hardware", "backbone_sha256"} <= manifest.keys()


def test_a_finished_run_has_nothing_left_to_do(finished):
    before = result_files(finished)
    assert list(pipeline.missing_steps(finished, 3)) == []
    with finished.lock():
        pipeline.run(finished)
    assert result_files(finished) == before


def test_a_run_is_reproducible_bit_for_bit(finished, tmp_path):
    assert result_files(run(tmp_path / "again")) == result_files(finished)


def _steps(root: Path) -> int:
    """How many steps of training are logged, of stages that are done or at work."""
    lines = 0
    for log in root.glob("stages/**/log.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # its stage is being committed
            lines += len(log.read_bytes().splitlines())
    return lines


def test_a_run_killed_again_and_again_ends_with_the_same_bits(finished, tmp_path):
    root, script = tmp_path / "killed", tmp_path / "run.py"
    script.write_text(
        "import torch; torch.set_num_threads(1)\n"
        "from dataclasses import replace\n"
        "import peso.training.loop as loop\n"
        "plain = loop.train_stage\n"
        "import peso.runs.learn as learn\n"
        "import peso.runs.pipeline as pipeline\n"
        "import peso.runs.report; peso.runs.report.report = lambda *a: None\n"
        "learn.train_stage = lambda model, task: plain(model, replace(task, checkpoint_seconds=0.0))\n"
        "from peso.config import load_config; from peso.runs.workspace import Workspace\n"
        f"ws = Workspace.create_or_open({str(root)!r}, load_config({TREE!r}))\n"
        "with ws.lock(): pipeline.run(ws)\n"
    )
    kills = 0
    for _ in range(2):
        before = _steps(root)
        process = forked.script(script)
        while process.poll() is None and _steps(root) < before + 3:
            time.sleep(0.02)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert forked.script(script).wait() == 0
    assert kills > 0, "the run was over before it could be killed"
    assert result_files(Workspace.open(root)) == result_files(finished)


def test_a_checkpoint_of_a_changed_strategy_is_not_continued(tmp_path):
    large = "training.batch_size=256"  # so that there is a second epoch to stop in
    root, small = tmp_path / "w", (large, "data.simulate.stages=2", "evaluation.enabled=false")
    workspace = Workspace.create_or_open(root, config("strategy.weight=1e6", *small))

    class Stop(Exception):
        pass

    class StopsInStage1(Silent):
        def advance(self, done, **figures):
            # in the second epoch there is a checkpoint: the one of the first epoch's end
            if 0 in workspace.finished_stages and str(figures.get("epoch")).startswith("2/"):
                raise Stop

    with workspace.lock(), pytest.raises(Stop):
        pipeline.run(workspace, observer=StopsInStage1())
    assert result_files(run(root, *small)) == result_files(run(tmp_path / "straight", *small))


def test_the_base_stage_is_taken_over_only_if_it_would_be_the_same(finished, tmp_path):
    single = run(tmp_path / "single", "strategy=single", base=finished.root)
    theirs = {name: sha for name, sha in result_files(finished).items() if name.startswith("0/")}
    ours = {name: sha for name, sha in result_files(single).items() if name.startswith("0/")}
    assert ours == theirs
    with pytest.raises(WorkspaceError, match=r"training\.epochs"):
        run(tmp_path / "other", "strategy=single", "training.epochs=1", base=finished.root)


def test_none_keeps_the_base_state(finished, tmp_path):
    none = run(tmp_path / "none", "strategy=none", base=finished.root)
    files = result_files(none)
    assert files["2/vocabulary.safetensors"] == files["0/vocabulary.safetensors"]
    assert files["2/adapter/adapter_model.safetensors"] == files["1/adapter/adapter_model.safetensors"]


def test_a_heavier_anchor_moves_less(finished, tmp_path):
    moved = {}
    for weight in ("0", "1e4"):
        workspace = run(tmp_path / weight, f"strategy.weight={weight}", base=finished.root)
        moved[weight] = workspace.stage(1).metrics["training"]["moved"]["distance"]
    assert moved["1e4"] < moved["0"]


def test_any_model_is_tested_on_any_stage(finished):
    metrics = evaluate.test(finished.stage(0).on(2), Silent())
    assert (metrics["stage"], metrics["on"]) == (0, 2)
    found = read_predictions(finished.stage(0).directory / "on=2" / "predictions.parquet")
    by_level = found.target_level_log_probabilities
    assert by_level.shape == (len(found), finished.config.items.levels)
    np.testing.assert_allclose(by_level.sum(axis=1), found.target_log_probability, rtol=1e-6)
    assert metrics != finished.stage(2).metrics["test"]
    with pytest.raises(DataError, match="no stage 9"):
        evaluate.test(finished.stage(0).on(9), Silent())


def test_a_report_knows_the_stages_that_are_not_tested_with_changed_settings(
    finished, tmp_path, peso, monkeypatch
):
    assert report.summarize(finished, "a", drift=False).untested == []
    root = shutil.copytree(finished.root, tmp_path / "w")
    status, _, err = peso("evaluate", "-w", root, "--set", "decoding.beams=12")
    assert status == 0, err
    summary = report.summarize(Workspace.open(root), "a", drift=False)
    assert (list(summary.stages), summary.untested) == ([2], [0, 1])
    nobody = np.empty(0, dtype=np.int64)  # as if all users of the stages were erased
    monkeypatch.setattr("peso.events.histories.Stage.eligible", lambda stage: nobody)
    assert report.summarize(Workspace.open(root), "a", drift=False).untested == []


def test_changing_k_keeps_the_predictions_and_changing_beams_renews_them(finished, tmp_path):
    workspace = run(tmp_path / "w", "strategy=none", base=finished.root)
    path = workspace.stage(1).directory / "predictions.parquet"
    before, written = checksum(path), path.stat().st_mtime_ns
    workspace = run(tmp_path / "w", "strategy=none", "evaluation.k=[1,3]")
    assert path.stat().st_mtime_ns == written
    assert "hit@3" in workspace.stage(1).metrics["test"]["metrics"]
    run(tmp_path / "w", "strategy=none", "evaluation.k=[1,3]", "decoding.beams=15")
    assert checksum(path) != before


def test_a_run_whose_weights_were_removed_is_still_reported(tmp_path):
    workspace = run(tmp_path / "w", "training.max_steps=2")
    assert report.stage_cost(workspace.stage(1)).bytes_on_disk > 0
    for weights in workspace.root.glob("stages/*/**/*.safetensors"):
        weights.unlink()
    found = report.summarize(workspace, "w")
    assert {stage.cost.bytes_on_disk for stage in found.stages.values()} == {None}


def test_evaluation_can_be_left_out(tmp_path):
    workspace = run(tmp_path / "w", "evaluation.enabled=false", "training.max_steps=2")
    assert workspace.finished_stages == [0, 1, 2]
    assert not (workspace.stage(1).directory / "predictions.parquet").exists()
    with pytest.raises(WorkspaceError, match="no tested stage"):
        report.summarize(workspace, "w")


def test_more_items_than_the_catalogue_has_are_refused_before_anything_long(finished, tmp_path):
    workspace = Workspace.create_or_open(
        tmp_path / "w", config("evaluation.k=[100]", "decoding.beams=100", "training.max_steps=1")
    )
    with workspace.lock(), pytest.raises(ConfigError, match="100 items"):
        pipeline.run(workspace)
    assert workspace.finished_stages == []


def test_steps_out_of_order_say_what_comes_first(tmp_path):
    workspace = Workspace.create_or_open(tmp_path / "w", config())
    with pytest.raises(WorkspaceError, match="peso ingest"):
        preparation.tokenize(workspace, Silent())
    preparation.ingest(workspace, Silent())
    with pytest.raises(WorkspaceError, match="peso tokenize"):
        pipeline.learn(workspace.stage(0), Silent())
    preparation.tokenize(workspace, Silent())
    with pytest.raises(WorkspaceError, match="starts from stage 0"):
        pipeline.learn(workspace.stage(1), Silent())
    with pytest.raises(WorkspaceError, match="peso train"):
        pipeline.update(workspace, Silent())


def test_what_is_learnt_is_not_overwritten(finished):
    with pytest.raises(WorkspaceError, match="trained already"):
        pipeline.learn(finished.stage(1), Silent())
    with pytest.raises(WorkspaceError, match="new workspace"):
        preparation.ingest(finished, Silent())
    weights = {path: checksum(path) for path in finished.root.glob("stages/*/*.safetensors")}
    assert len(weights) >= 3
    assert pipeline.update(finished, Silent()) == 2  # tests and reports what is trained
    assert {path: checksum(path) for path in finished.root.glob("stages/*/*.safetensors")} == weights


def test_the_log_has_every_figure_of_every_step(finished, tmp_path):
    anchored = run(tmp_path / "w", "strategy.weight=2.0", base=finished.root)
    lines = (anchored.stage(1).directory / "log.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    wanted = {
        "loss",
        "penalty",
        "gradient_norm",
        "penalty_gradient_norm",
        "learning_rate",
        "tokens_per_second",
    }
    assert all(wanted <= record.keys() for record in steps)
    assert steps[0]["penalty"] == 0.0  # at the anchor
    assert steps[-1]["penalty"] > 0.0
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))


def test_a_backbone_that_changed_is_refused(finished, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from peso.errors import BackboneError

    copy = tmp_path / "copy"
    shutil.copytree(finished.root, copy)
    weights = copy / "stages" / "0" / "backbone" / "model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))] += 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(WorkspaceError, match=r"model\.safetensors is damaged"):
        Recommender.load(copy)
    write_manifest(copy / "stages" / "0", FORMAT, finished.stage(0).manifest)
    with pytest.raises(BackboneError, match="other weights"):
        Recommender.load(copy)


def test_the_recommender_answers_for_histories_users_and_everybody(finished, tmp_path):
    import pyarrow.parquet as pq

    recommender = Recommender.load(finished.root)
    user = next(iter(recommender.histories))
    history = recommender.history(user)
    assert recommender.recommend(user=user, k=5) == recommender.recommend(history=history, k=5)
    ranked = recommender.recommend(history=history, k=20)
    assert len({item for item, _ in ranked}) == 20
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    seen = set(history)
    assert not seen & {item for item, _ in recommender.recommend(history=history, k=10, exclude_seen=True)}
    count = recommender.recommend_all(tmp_path / "all.parquet", k=3)
    table = pq.read_table(tmp_path / "all.parquet")
    assert count == len(table) == len(list(recommender.histories))
    row = table["user"].to_pylist().index(user)
    assert table["items"][row].as_py() == [item for item, _ in ranked[:3]]
    assert recommender.title(ranked[0][0])
    with pytest.raises(DataError, match="'nobody'"):
        recommender.recommend(user="nobody")
    with pytest.raises(DataError, match="'ghost'"):
        recommender.recommend(history=["ghost"])


def test_an_older_stage_answers_as_it_did(finished):
    old, new = Recommender.load(finished.root, stage=0), Recommender.load(finished.root)
    assert (old.stage, new.stage) == (0, 2)
    history = new.history(next(iter(new.histories)))
    assert old.recommend(history=history) != new.recommend(history=history)


@pytest.mark.parametrize("where", ["weights", "log"])
def test_a_full_disk_leaves_no_half_stage_and_the_run_goes_on_later(finished, tmp_path, monkeypatch, where):
    import errno

    from peso.training.checkpoint import TrainingLog

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = tmp_path / "w"
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(learn, "save_stage_weights", full)
        else:
            patch.setattr(TrainingLog, "write", full)
        with pytest.raises((WorkspaceError, OSError), match=r"(?i)no space left"):
            run(root)
    workspace = Workspace.open(root)
    assert workspace.finished_stages == []
    assert not workspace.stage(0).directory.exists()
    assert result_files(run(root)) == result_files(finished)

"""Baselines on a workspace: same cases as the run, resumable, found by the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from peso.baselines.ease import Ease
from peso.config import baseline_label, load_config
from peso.config.baselines import read_baseline
from peso.errors import ConfigError, WorkspaceError
from peso.evaluation.predictions import read_predictions
from peso.events.stream import Stream
from peso.runs import pipeline, preparation, report
from peso.runs.baselines import BaselineRun, baseline_summaries, found_baselines, run_baselines
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum
from peso.runtime.manifest import read_manifest, write_manifest
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow  # whole runs

SMALL = {"width": 8, "epochs": 2, "trials": 2}
TREE = {
    "data": {"format": "simulate", "simulate": {"users": 120, "items": 60, "stages": 3}},
    "backbone": {"name": "tiny"},
    "training": {"epochs": 1, "max_steps": 4},
    "baselines": [
        "popularity",
        {"name": "item-knn", "neighbours": 20},
        {"name": "ease", "items": 30},
        {"name": "two-tower", **SMALL},
        {"name": "sasrec", **SMALL},
        {"name": "hybrid", "candidates": 5, "two_tower": SMALL},
    ],
    "seed": 5,
}


def files(workspace: Workspace) -> dict[str, str]:
    root = workspace.root / "baselines"
    kept = [path for path in root.rglob("*") if path.suffix in (".parquet", ".safetensors")]
    return {str(path.relative_to(root)): checksum(path) for path in kept}


def prepared(root: Path) -> Workspace:
    workspace = Workspace.create_or_open(root, load_config(TREE))
    preparation.ingest(workspace, Silent())
    preparation.tokenize(workspace, Silent())
    return workspace


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Workspace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report", lambda workspaces, directory: None)  # plots take longer than the rest
        workspace = Workspace.create_or_open(tmp_path_factory.mktemp("runs") / "run", load_config(TREE))
        with workspace.lock():
            pipeline.run(workspace)
    return workspace


def test_a_run_tests_its_baselines_on_its_own_cases(finished: Workspace) -> None:
    runs = baseline_summaries(finished, finished.config.baselines)
    labels = [baseline_label(config) for config in finished.config.baselines]
    assert [run.name for run in runs] == [name for label in labels for name in (label, f"{label} (static)")]
    for stage in range(3):
        own = read_predictions(finished.stage(stage).directory / "predictions.parquet")
        for run in runs:
            theirs = run.stages[stage].predictions
            assert (theirs.users, theirs.targets) == (own.users, own.targets)
            assert (theirs.user_segment, theirs.item_segment) == (own.user_segment, own.item_segment)
            assert theirs.depth == own.depth
            assert (theirs.target_log_probability <= 0).all()


def test_static_and_continual_part_after_the_base_stage(finished: Workspace) -> None:
    runs = baseline_summaries(finished, finished.config.baselines)
    for continual, static in zip(runs[::2], runs[1::2], strict=True):
        base = [run.stages[0].predictions.target_log_probability.tolist() for run in (continual, static)]
        assert base[0] == base[1]
        last = [run.stages[2].predictions.target_log_probability.tolist() for run in (continual, static)]
        assert last[0] != last[1], continual.name


def test_a_stage_without_test_cases_is_left_out(
    finished: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`peso forget` can erase the last test case of a stage."""
    workspace = Workspace.open(shutil.copytree(finished.root, tmp_path / "w"))
    shutil.rmtree(workspace.root / "baselines")
    first, second, third = workspace.stream.counts
    monkeypatch.setattr(Stream, "counts", [first, {**second, "test": 0}, third])
    run = BaselineRun(workspace, read_baseline("popularity"))
    run.run(Silent())
    assert [list(summary.stages) for summary in run.summaries()] == [[0, 2], [0, 2]]


def test_what_is_done_is_not_done_again(finished: Workspace, monkeypatch) -> None:
    monkeypatch.setattr(BaselineRun, "_make", None)  # whoever learns or tests would need it
    run_baselines(finished, finished.config.baselines, Silent())


def test_another_option_or_a_lost_stage_is_run_again(finished: Workspace) -> None:
    ease, other = (
        load_config({**TREE, "baselines": [{"name": "ease", "items": n}]}).baselines[0] for n in (30, 31)
    )
    assert BaselineRun(finished, ease).is_done(2)
    assert not BaselineRun(finished, other).is_done(2)


def test_interrupted_between_stages_it_ends_with_the_same_answers(
    finished: Workspace, tmp_path: Path, monkeypatch
) -> None:
    workspace = prepared(tmp_path / "again")
    networks = [config for config in finished.config.baselines if config.name in ("two-tower", "sasrec")]
    learn = BaselineRun._learn

    def interrupted(self, stage, aside, observer):
        if stage == 1 and not (tmp_path / self.config.name).exists():
            (tmp_path / self.config.name).touch()
            learn(self, stage, aside, observer)
            raise KeyboardInterrupt
        return learn(self, stage, aside, observer)

    monkeypatch.setattr(BaselineRun, "_learn", interrupted)
    for config in networks:
        with pytest.raises(KeyboardInterrupt):
            run_baselines(workspace, [config], Silent())
        assert not BaselineRun(workspace, config).stage_directory(1).exists()
        run_baselines(workspace, [config], Silent())
    expected = files(finished)
    assert files(workspace) == {name: expected[name] for name in files(workspace)}
    assert len(files(workspace)) == 2 * (3 + 2 + 3)  # predictions, static, weights


def test_the_report_finds_them(finished: Workspace) -> None:
    assert {baseline_label(c) for c in found_baselines(finished)} >= {
        baseline_label(c) for c in finished.config.baselines
    }
    named = [run.name for run in report.runs_of([finished])]
    assert named[0] == "run"
    assert named.count("popularity") == 1
    assert "ease items=30 (static)" in named


def test_a_name_stands_for_every_listed_baseline_of_that_name(
    peso, finished: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    root = shutil.copytree(finished.root, tmp_path / "w")
    monkeypatch.setattr(
        "peso.runs.baselines.run_baselines",
        lambda workspace, configs, observer: asked.extend(map(baseline_label, configs)),
    )
    both = "baselines=[popularity, {name: popularity, last: 1}, ease]"
    status, _, error = peso("baseline", "popularity", "item-knn", "--set", both, "-w", root)
    assert (status, asked) == (0, ["popularity", "popularity last=1", "item-knn"]), error


def test_the_command_prints_a_table(peso, finished: Workspace, tmp_path: Path) -> None:
    status, out, _ = peso("baseline", "ease", "{name: popularity, last: 1}", "-w", finished.root)
    assert status == 0
    assert "ease items=30 (static)" in out  # the options of the configuration
    assert "popularity last=1" in out
    manifest = finished.root / "baselines" / "popularity last=1" / "2" / "manifest.json"
    assert json.loads(manifest.read_text())["baseline"]["last"] == 1


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("easy", "'easy' is unknown"),
        ("{name: ease, item: 3}", "baselines.item"),
        ("{name: ease, layers: 3}", "baseline 'ease' has no option 'layers'"),
        ("{name: sasrec, width: wide}", "baselines.width"),
    ],
)
def test_a_mistake_is_named(peso, finished: Workspace, asked: str, says: str) -> None:
    status, _, error = peso("baseline", asked, "-w", finished.root)
    assert status == 1
    assert says in error


def test_without_a_name_or_a_learnt_model_it_says_what_is_missing(peso, tmp_path: Path) -> None:
    workspace = Workspace.create_or_open(tmp_path / "bare", load_config({**TREE, "baselines": []}))
    status, _, error = peso("baseline", "-w", workspace.root)
    assert status == 2
    assert "no baseline was given" in error
    with pytest.raises(WorkspaceError, match="peso ingest"):
        run_baselines(workspace, load_config(TREE).baselines[:1], Silent())
    with pytest.raises(WorkspaceError, match="no trained stage"):
        run_baselines(prepared(tmp_path / "data"), load_config(TREE).baselines[-1:], Silent())


def test_a_list_is_never_longer_than_the_catalogue(tmp_path: Path) -> None:
    workspace = prepared(tmp_path / "data")
    leaves = workspace.semantic_ids.trie.leaves
    longer = load_config({**TREE, "decoding": {"beams": 100}})
    workspace = Workspace(workspace.root, longer)
    run = BaselineRun(workspace, longer.baselines[0])
    run.run(Silent())
    found = read_predictions(run.stage_directory(1) / "predictions.parquet")
    assert found.depth == 100
    assert 0 < found.rank_semantic_id.min() <= found.rank_semantic_id.max() <= leaves
    too_many = load_config({**TREE, "decoding": {"beams": 100}, "evaluation": {"k": [100]}})
    with pytest.raises(ConfigError, match=f"asks for 100 items, but the log has {leaves}"):
        run_baselines(Workspace(workspace.root, too_many), too_many.baselines[:1], Silent())


def test_results_of_a_version_with_other_defaults_are_found_and_kept(
    finished: Workspace, tmp_path: Path
) -> None:
    """They lie in a directory called as the name alone then was, and their manifest does not say so."""
    root = tmp_path / "run"
    shutil.copytree(finished.root, root, ignore=shutil.ignore_patterns("baselines"))
    workspace = Workspace.open(root)
    former = read_baseline({"name": "ease", "regularisation": 50.0})
    run = BaselineRun(workspace, former)
    run.run(Silent())
    run.directory.rename(root / "baselines" / "ease")
    for stage in range(3):
        directory = root / "baselines" / "ease" / str(stage)
        manifest = dict(read_manifest(directory, 1))
        del manifest["label"]
        write_manifest(directory, 1, manifest, manifest["files"])

    assert found_baselines(workspace) == [former]
    found = BaselineRun(workspace, former)
    assert all(found.is_done(stage) for stage in range(3))
    assert found.summaries()[0].name == "ease regularisation=50"
    tuned = BaselineRun(workspace, read_baseline({"name": "ease"}))
    assert not tuned.is_done(0)
    tuned.run(Silent())
    assert tuned.is_done(2)
    assert found_baselines(workspace) == [read_baseline({"name": "ease"})]


def test_what_was_chosen_is_recorded_and_printed(peso, finished: Workspace) -> None:
    status, _, error = peso("baseline", "item-graph", "-w", finished.root)
    assert status == 0
    assert "the best of 8 on validation" in error
    learned = json.loads((finished.root / "baselines/item-graph/1/metrics.json").read_text())["learning"]
    best = max(trial["ndcg"] for trial in learned["tried"])
    assert {**learned["chosen"], "ndcg": best} in learned["tried"]
    chosen = json.loads((finished.root / "baselines/item-graph/1/model/chosen.json").read_text())
    assert chosen == learned["chosen"]


def test_answers_are_made_again_where_the_same_options_mean_others(
    finished: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ease,) = [config for config in finished.config.baselines if config.name == "ease"]
    assert BaselineRun(finished, ease).is_done(1)
    monkeypatch.setattr(Ease, "revision", Ease.revision + 1)
    assert not BaselineRun(finished, ease).is_done(1)
    mixed = BaselineRun(finished, read_baseline({"name": "hybrid", "partners": ["ease"]}))
    before = mixed.determination(1)
    monkeypatch.setattr(Ease, "revision", 0)
    assert mixed.determination(1) != before


def test_results_of_a_version_with_another_default_are_made_again_in_the_same_place(
    finished: Workspace, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    (ease,) = [config for config in finished.config.baselines if config.name == "ease"]
    run = BaselineRun(Workspace.open(root), ease)
    manifest = dict(read_manifest(run.stage_directory(1), 1))
    manifest["baseline"] = {**manifest["baseline"], "regularisation": 50.0}
    manifest["determined_by"] = "of other defaults"
    write_manifest(run.stage_directory(1), 1, manifest, manifest["files"])
    assert [run.is_done(stage) for stage in range(3)] == [True, False, True]
    run.run(Silent())
    assert run.is_done(1)


def test_results_with_the_label_of_earlier_defaults_stay_readable(
    finished: Workspace, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    (ease,) = [config for config in finished.config.baselines if config.name == "ease"]
    (root / "baselines" / baseline_label(ease)).rename(root / "baselines" / "ease")
    for stage in range(3):  # as of a version whose default was 30 items
        directory = root / "baselines" / "ease" / str(stage)
        manifest = {**read_manifest(directory, 1), "label": "ease"}
        write_manifest(directory, 1, manifest, manifest["files"])
    workspace = Workspace.open(root)
    assert ease in found_baselines(workspace)
    (summary,) = [run for run in baseline_summaries(workspace, [ease]) if "static" not in run.name]
    assert [*summary.stages] == [0, 1, 2]

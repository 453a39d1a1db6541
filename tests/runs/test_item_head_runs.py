"""Runs of models with an item head: every strategy, interruptions, a catalog that grows, the report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import small_runs
from safetensors.torch import load_file

from peso.config import load_config
from peso.errors import WorkspaceError
from peso.items.ids_by_stage import IdsByStage
from peso.runs import learn, preparation
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

TREE = {
    "data": {"simulate": {"users": 60, "items": 40, "stages": 3}},
    "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
    "backbone": {"name": "tiny", "layers": 1},
    "head": "items",
    "training": {"epochs": 1, "max_steps": 4, "learning_rate": 3e-3, "later_learning_rate_scale": 1.0},
    "evaluation": {"enabled": False},
    "baselines": [],
}


def run(root: Path, *overrides: str, base: Path | None = None, **sections: object) -> Workspace:
    return small_runs.run(Workspace.create_or_open(root, load_config({**TREE, **sections}, overrides)), base)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return run(tmp_path_factory.mktemp("single") / "w", strategy="single")


def vocabulary(workspace: Workspace, stage: int) -> Path:
    return workspace.root / "stages" / str(stage) / "vocabulary.safetensors"


def counts(workspace: Workspace, stage: int) -> Path:
    return workspace.root / "stages" / str(stage) / "transitions.safetensors"


def test_transitions_are_counted_at_every_stage(single: Workspace) -> None:
    seen = [checksum(counts(single, stage)) for stage in (0, 1, 2)]
    assert len(set(seen)) == 3
    model = single.stage(1).model()
    told = json.loads((single.root / "stages" / "1" / "metrics.json").read_text())["training"]["item_head"]
    assert model.transitions.prior == told["prior"]
    assert model.transitions.recency == told["transitions"]["chosen"]["recency"]
    assert model.transitions.evidence([np.array([3, 1])]).sum() > 0


def test_a_strategy_that_does_not_learn_keeps_the_counts(single: Workspace, tmp_path: Path) -> None:
    still = run(tmp_path / "w", base=single.root, strategy="none")
    before, after = (load_file(counts(one, stage)) for one, stage in ((single, 0), (still, 2)))
    for name in ("items", "weights"):
        assert after[name].equal(before[name])


def test_without_transitions_nothing_is_counted(tmp_path: Path) -> None:
    off = run(tmp_path / "w", "training.max_steps=1", head={"name": "items", "transitions": False})
    assert not counts(off, 0).exists()
    assert off.stage(0).model().transitions is None


def test_contents_are_learned_and_belong_to_a_stage(tmp_path: Path, peso) -> None:
    head = {"name": "items", "contents": True}
    with_contents = run(tmp_path / "w", head=head, strategy="single")
    first, second = (load_file(vocabulary(with_contents, stage)) for stage in (0, 1))
    assert first["item_head.projection"].any()
    assert not first["item_head.projection"].equal(second["item_head.projection"])
    stage, ids = with_contents.stage(1), with_contents.semantic_ids
    vectors = stage.model().vocabulary.item_head.vectors()
    bare = replace(ids, contents=np.zeros_like(ids.contents))
    replaced = IdsByStage(bare, None)  # as if contents were replaced
    with_contents._read_ids = with_contents.semantic_ids_manifest, with_contents.names, replaced
    with pytest.raises(WorkspaceError, match="semantic IDs"):
        stage.model()
    with_contents._read_ids = None
    assert vectors.equal(stage.model().vocabulary.item_head.vectors())
    status, _, err = peso("export", "-w", with_contents.root, "-o", tmp_path / "m", "--format", "merged")
    assert status == 0, err
    exported = load_file(tmp_path / "m" / "item_head.safetensors")["vectors"]
    assert exported.equal(with_contents.stage(2).model().vocabulary.item_head.vectors())


def test_semantic_ids_made_without_contents_are_refused_with_the_cure(tmp_path: Path, peso) -> None:
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(TREE))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
        preparation.tokenize(workspace, Silent())
    status, _, err = peso("train", "-w", tmp_path / "w", "--set", "head.contents=true")
    assert status == 1
    assert "peso tokenize" in err
    assert not (tmp_path / "w" / "stages" / "0").exists()
    assert peso("tokenize", "-w", tmp_path / "w")[0] == 0
    status, _, err = peso("train", "-w", tmp_path / "w")
    assert status == 0, err


def test_a_stage_learns_it_and_says_how_much_it_counts(single: Workspace) -> None:
    first, second = (load_file(vocabulary(single, stage)) for stage in (0, 1))
    for name in ("rows", "bias", "code_rows", "code_bias", "query"):
        assert not first[f"item_head.{name}"].equal(second[f"item_head.{name}"]), name
    told = json.loads((single.root / "stages" / "1" / "metrics.json").read_text())["training"]["item_head"]
    assert list(told["shares"].values()) == pytest.approx(second["item_head.shares"].tolist())
    assert len(told["ndcg@10"]) == 21


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "peso", "strength": 1.0, "vocabulary": True, "examples": 8},
        {"name": "retrain"},
        {"name": "average"},
        {"name": "lsat"},
        {"name": "full"},
        {"name": "none"},
    ],
    ids=str,
)
def test_every_strategy_trains_and_answers_with_it(single: Workspace, tmp_path: Path, strategy: dict) -> None:
    other = run(tmp_path / "w", base=single.root, strategy=strategy, evaluation={"enabled": True, "k": [5]})
    for stage in (1, 2):
        tested = json.loads((other.root / "stages" / str(stage) / "metrics.json").read_text())["test"]
        assert 0 <= tested["metrics"]["ndcg@5"]["value"] <= 1


def test_an_anchor_on_the_vocabulary_holds_its_rows(single: Workspace, tmp_path: Path) -> None:
    strategy = {"name": "peso", "proximal": "l2", "strength": 1000.0, "vocabulary": True, "examples": 8}
    held = run(tmp_path / "w", base=single.root, strategy=strategy)
    before = load_file(vocabulary(single, 0))
    moved, free = (
        (load_file(vocabulary(one, 1))["item_head.rows"] - before["item_head.rows"]).norm()
        for one in (held, single)
    )
    assert moved < 0.01 * free


def test_a_run_interrupted_before_the_shares_are_chosen_ends_the_same(
    single: Workspace, tmp_path: Path
) -> None:
    with (
        patch.object(learn, "choose_pool_weights", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        run(tmp_path / "w", strategy="single")
    again = run(tmp_path / "w", strategy="single")
    for stage in (0, 1, 2):
        assert checksum(vocabulary(again, stage)) == checksum(vocabulary(single, stage))
        assert checksum(counts(again, stage)) == checksum(counts(single, stage))


def test_stages_without_it_are_not_continued_with_it(tmp_path: Path, peso) -> None:
    plain = run(tmp_path / "plain", "training.max_steps=1", head="codes")
    status, _, err = peso("update", "-w", plain.root, "--set", "head=items")
    assert status == 1
    assert "head" in err


def test_it_is_scored_recommended_and_reported(single: Workspace, tmp_path: Path, peso) -> None:
    shutil.copytree(single.root, tmp_path / "w")
    status, _, err = peso("evaluate", "-w", tmp_path / "w", "--set", "evaluation.enabled=true")
    assert status == 0, err
    status, out, err = peso("recommend", "-w", tmp_path / "w", "--history", "i1,i2", "--json")
    assert status == 0, err
    assert len(json.loads(out)["recommendations"]) == 10
    status, out, err = peso("report", "-w", tmp_path / "w")
    assert status == 0, err
    status, _, err = peso("export", "-w", tmp_path / "w", "-o", tmp_path / "m", "--format", "peft")
    assert status == 0, err
    assert (tmp_path / "m" / "item_head.safetensors").is_file()
    assert (tmp_path / "m" / "transitions.safetensors").is_file()

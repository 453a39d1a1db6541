"""`peso recommend --with hybrid`: the hybrid's own ranking, the rules of every answer, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from peso import Recommender
from peso.config import load_config
from peso.config.baselines import read_baseline
from peso.decoding import search
from peso.errors import ConfigError, WorkspaceError
from peso.runs import pipeline
from peso.runs.baselines import BaselineRun, run_baselines
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow  # a whole run

MIXED = {"name": "hybrid", "candidates": 40, "partners": [{"name": "popularity", "last": 1}, "item-graph"]}
TOWERS = {"name": "hybrid", "candidates": 4, "two_tower": {"width": 8, "epochs": 1, "user_dropout": 0.0}}
LABEL = "hybrid candidates=40 partners=popularity last=1+item-graph"
TREE = {
    "data": {"format": "simulate", "simulate": {"users": 60, "items": 40, "stages": 2}},
    "backbone": {"name": "tiny", "layers": 1},
    "strategy": {"name": "peso", "examples": 8},
    "training": {"epochs": 1, "max_steps": 4},
    "baselines": [MIXED, TOWERS],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = Workspace.create_or_open(tmp_path_factory.mktemp("w") / "run", load_config(TREE))
    with pytest.MonkeyPatch.context() as patch, workspace.lock():
        patch.setattr("peso.runs.report.report", lambda workspaces, directory: None)
        pipeline.run(workspace)
    return workspace.root


def test_a_report_knows_that_a_hybrid_contains_the_model(root: Path) -> None:
    workspace = Workspace.open(root)
    for baseline, contains in ((MIXED, True), ({"name": "popularity", "last": 1}, False)):
        found = BaselineRun(workspace, read_baseline(baseline)).summaries()
        assert found, baseline
        assert {run.contains_model for run in found} == {contains}


def test_answers_are_the_best_of_the_whole_catalog_by_the_weighted_sum(root: Path) -> None:
    recommender = Recommender.load(root, hybrid=LABEL)
    workspace, ids = recommender.workspace, recommender.semantic_ids
    run = BaselineRun(workspace, read_baseline(MIXED))
    hybrid = run.restored(1)
    *weights, of_model = [*hybrid.weights, 1 - sum(hybrid.weights)]
    cases = workspace.stream.stage(1).validation_cases(20)
    model = recommender.model
    beams = search(model, cases.histories, beams=ids.trie.leaves)
    every = [partner.log_probabilities(cases) for partner in hybrid.with_repeats(True).partners]
    for row, history in enumerate(cases.before[:8]):
        scores = {
            int(leaf): of_model * score + sum(w * of[row, leaf] for w, of in zip(weights, every, strict=True))
            for leaf, score in zip(beams.leaves[row], beams.scores[row].astype(float), strict=True)
        }
        best = sorted(scores, key=lambda leaf: (-scores[leaf], leaf))
        expected = [ids.item_ids[item] for leaf in best for item in ids.trie.items_of(leaf)][:10]
        names = [ids.item_ids[item] for item in history]
        found = recommender.recommend(names, exclude_seen=False)
        assert [item for item, _ in found] == expected
        assert found[0][1] == pytest.approx(scores[best[0]], abs=1e-4)


@pytest.mark.parametrize("hybrid", [LABEL, "hybrid candidates=4 two_tower"])
def test_seen_items_are_left_out_and_as_many_items_come_as_there_are(
    root: Path, hybrid: str, tmp_path: Path
) -> None:
    recommender = Recommender.load(root, hybrid=_label(root, hybrid))
    users = recommender.workspace.stream.stage(1).users
    user = next(user for user in users if 8 < len(set(recommender.history(user))) <= 20)
    seen = set(recommender.history(user))
    fresh = recommender.recommend(user=user, k=15, exclude_seen=True)  # more than some candidates
    assert len(fresh) == 15
    assert not seen & {item for item, _ in fresh}
    scores = [score for _, score in fresh]
    assert scores == sorted(scores, reverse=True)
    every = recommender.recommend(user=user, k=40, exclude_seen=False)
    assert {item for item, _ in every} == set(recommender.semantic_ids.item_ids)
    rest = recommender.recommend(user=user, k=40, exclude_seen=True)
    assert {item for item, _ in rest} == set(recommender.semantic_ids.item_ids) - seen
    assert recommender.recommend(recommender.semantic_ids.item_ids, exclude_seen=True) == []
    assert recommender.recommend([], k=3)

    recommender.recommend_all(tmp_path / "all.parquet", k=15, exclude_seen=True)
    rows = {row["user"]: row for row in pq.read_table(tmp_path / "all.parquet").to_pylist()}
    assert rows[user]["items"] == [item for item, _ in fresh]
    np.testing.assert_allclose(rows[user]["scores"], scores, rtol=1e-4)


def _label(root: Path, start: str) -> str:
    return next(path.name for path in (root / "baselines").iterdir() if path.name.startswith(start[:24]))


def test_a_partner_that_knows_users_is_told_who_asks(root: Path) -> None:
    recommender = Recommender.load(root, hybrid=_label(root, "hybrid candidates=4 two_tower"))
    user = next(iter(recommender.workspace.stream.stage(1).training_sequences())).user
    history = recommender.history(user)
    own = recommender.recommend(user=user, k=5)
    assert own == recommender.recommend(user=user, k=5)
    if recommender.hybrid.models.weights[0] > 0:
        assert own != recommender.recommend(history, k=5)


def test_a_hybrid_is_found_by_its_label_or_the_cure_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several hybrids; choose one of 'hybrid candidates=4"):
        Recommender.load(root, hybrid="hybrid")
    with pytest.raises(ConfigError, match="no hybrid called 'ease'; choose one of"):
        Recommender.load(root, hybrid="ease")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    shutil.rmtree(copy / "baselines" / LABEL / "1")
    with pytest.raises(
        WorkspaceError, match=r"was not run for stage 1 in its current state.*peso baseline '\{.*partners"
    ):
        Recommender.load(copy, hybrid=LABEL)
    assert Recommender.load(copy, 0, hybrid=LABEL).recommend([], k=2)
    shutil.rmtree(copy / "baselines")
    with pytest.raises(WorkspaceError, match="has no hybrid; run `peso baseline hybrid -w"):
        Recommender.load(copy, hybrid="hybrid")


def test_the_command_in_a_refusal_runs_the_hybrid(peso, root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    shutil.rmtree(copy / "baselines" / LABEL / "1")
    shutil.rmtree(next((copy / "baselines").glob("hybrid candidates=4*")))
    ask = ("recommend", "-w", copy, "--history", "", "--with", "hybrid", "--json")
    status, _, err = peso(*ask)
    assert status == 1
    command = err.split("run `peso baseline ")[1].split(" -w ")[0].strip("'")
    status, _, err = peso("baseline", command, "-w", copy)
    assert status == 0, err
    status, out, err = peso(*ask)
    assert status == 0, err
    answer = json.loads(out)
    assert answer["with"] == LABEL
    assert len(answer["recommendations"]) == 10
    run_baselines(Workspace.open(copy), [read_baseline(MIXED)], Silent())  # done


def test_the_model_alone_answers_where_no_hybrid_is_asked_for(peso, root: Path) -> None:
    status, out, _ = peso("recommend", "-w", root, "--history", "", "--json")
    assert status == 0
    assert "with" not in json.loads(out)


def test_a_stopped_call_for_everybody_goes_on_with_the_same_models_only(root: Path) -> None:
    labels = [path.name for path in (root / "baselines").glob("hybrid*")]
    workspace = Workspace.open(root)
    answering = [Recommender(workspace), *(Recommender(workspace, hybrid=label) for label in labels)]
    assert len({recommender.determined_by for recommender in answering}) == 3

"""Runs whose items change codes at later stages: what the model keeps, and that everything goes by item."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_runs
import torch
from safetensors import safe_open

from peso.cli import app as cli
from peso.config import load_config
from peso.decoding import search
from peso.errors import WorkspaceError
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.runs import pipeline, preparation
from peso.runs.baselines import BaselineRun
from peso.runs.evaluate import test as evaluate
from peso.runs.models import changed_codes
from peso.runs.phases import begin
from peso.runs.recommender import Recommender
from peso.runs.retired import retire
from peso.runs.status import status
from peso.runs.undo import last_step, undo
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent
from peso.serving.explain import Likelihood, reason
from peso.serving.messages import Request
from peso.serving.snapshot import Question, Snapshot

pytestmark = pytest.mark.slow  # whole runs

REFRESH = {"support": 1, "drift": 0.001, "depth": 2, "share": 0.3}
TREE = {
    "data": {"simulate": {"users": 80, "items": 40, "stages": 3}},
    "items": {
        "quantizer": "rq-kmeans",
        "levels": 3,
        "codes": 8,
        "behavior": {"dimensions": 8, "weight": 0.95},
    },
    "backbone": {"name": "tiny", "layers": 1},
    "head": {"name": "items", "reads": True},
    "strategy": "single",
    "training": {"epochs": 1, "max_steps": 4, "learning_rate": 3e-3, "later_learning_rate_scale": 1.0},
    "evaluation": {"enabled": False, "k": [5]},
    "decoding": {"beams": 5},
    "baselines": [],
}


def run(
    root: Path, base: Path | None = None, refresh: dict | None = REFRESH, **sections: object
) -> Workspace:
    tree = {**TREE, "items": {**TREE["items"], **({"refresh": refresh} if refresh else {})}, **sections}
    return small_runs.run(Workspace.create_or_open(root, load_config(tree)), base)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return run(tmp_path_factory.mktemp("frozen") / "w", refresh=None)


@pytest.fixture(scope="module")
def shop(frozen: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With refreshed codes; its stage 0 is taken over, because it is the same."""
    tree = {**TREE, "items": {**TREE["items"], "refresh": REFRESH}}
    workspace = Workspace.create_or_open(tmp_path_factory.mktemp("refreshed") / "w", load_config(tree))
    with workspace.lock():
        pipeline.run(workspace, base=frozen.root)
    assert workspace.stage(0).determined_by == frozen.stage(0).determined_by
    assert len(changed_codes(workspace.stage(1)))
    return workspace


@pytest.fixture
def copy(shop: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(shop.root, tmp_path / "w")
    return Workspace.open(tmp_path / "w")


def files(stage: Path) -> dict[str, str]:
    """The checksums of everything a stage's model consists of."""
    listed: dict[str, str] = json.loads((stage / "manifest.json").read_text())["files"]
    return {name: sha for name, sha in listed.items() if not name.endswith((".json", ".jsonl"))}


def unchanged(workspace: Workspace, stage: int) -> np.ndarray:
    """The rows of items that were trained on before the stage and keep their codes."""
    stream = workspace.stream
    rows = np.concatenate([s.items for n in range(stage) for s in stream.stage(n).training_sequences()])
    return np.setdiff1d(rows, changed_codes(workspace.stage(stage)))


@torch.no_grad()
def of_codes(model: GenerativeModel, histories: list[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """The log-probability of each code of the targets."""
    found = search(model, histories, beams=1, targets=targets).targets
    assert found is not None
    return found


def test_unchanged_items_keep_their_answers_bit_for_bit_where_a_stage_begins(shop: Workspace) -> None:
    kept = unchanged(shop, 1)
    assert len(kept) > 10
    before, (after, _) = shop.stage(0).model(), begin(shop.stage(1))
    assert np.isin(after.semantic_ids.codes, before.semantic_ids.codes).all()  # no code is new
    generator = np.random.default_rng(0)
    histories = [generator.choice(kept, 4) for _ in range(20)]
    targets = generator.choice(kept, 20)
    one, other = (of_codes(model.eval(), histories, targets) for model in (before, after))
    np.testing.assert_array_equal(one, other)
    old, new = before.vocabulary.item_head, after.vocabulary.item_head
    assert old is not None
    assert new is not None
    assert torch.equal(new.vectors()[kept], old.vectors()[kept])
    # changed items keep their vectors up to rounding, so the head scores everything as before
    met = np.concatenate([s.items for s in shop.stream.stage(0).training_sequences()])
    assert np.isin(changed_codes(shop.stage(1)), met).any()
    assert torch.allclose(new.vectors()[met], old.vectors()[met], atol=1e-6)
    assert torch.allclose(new.biases()[met], old.biases()[met], atol=1e-6)


def test_manifests_and_status_tell_which_items_changed(
    shop: Workspace, capsys: pytest.CaptureFixture
) -> None:
    found = {entry["stage"]: entry["items"] for entry in shop.semantic_ids_manifest["refresh"]["stages"]}
    for stage in (1, 2):
        rows = changed_codes(shop.stage(stage))
        assert sorted(found[stage]) == sorted(shop.stream.item_ids[row] for row in rows)
        assert shop.stage(stage).manifest["changed_codes"] == len(rows)
        assert status(shop)["stages"][stage]["changed_codes"] == len(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["peso", "status", "-w", str(shop.root)])
        cli.app(standalone_mode=False)
    assert f"stage 1: items with new codes: {len(found[1])}" in capsys.readouterr().out


def test_an_older_stages_model_answers_with_its_own_codes(shop: Workspace, frozen: Workspace) -> None:
    for workspace in (shop, frozen):
        evaluate(workspace.stage(0).on(2), Silent())
    one, other = (each.stage(0).on(2).predictions for each in (shop, frozen))
    assert one.items == other.items
    np.testing.assert_array_equal(one.target_log_probability, other.target_log_probability)
    old, new = (Recommender(shop, stage, "cpu") for stage in (0, 2))
    item = shop.stream.item_ids[changed_codes(shop.stage(2), shop.stage(0))[0]]
    assert old.semantic_id(item) == frozen.semantic_ids.semantic_id(item) != new.semantic_id(item)
    assert new.prompt_ids([item]) != old.prompt_ids([item])
    assert len(new.recommend([item], k=5)) == 5


def test_a_server_answers_with_the_codes_of_the_stage_and_says_that_they_changed(shop: Workspace) -> None:
    snapshots = [
        replace(Snapshot.of(stage), model=for_inference(stage.model("cpu"), packed=True))
        for stage in (shop.stage(0), shop.stage(2))
    ]
    item = shop.stream.item_ids[changed_codes(shop.stage(2), shop.stage(0))[0]]
    history = [item, *shop.stream.item_ids[:2]]
    for snapshot in snapshots:
        (answer,) = snapshot.answer([Question(Request(history=history, k=5), history)])
        expected = Recommender(shop, snapshot.stage, "cpu").recommend(history, k=5)
        assert [found.item for found in answer.items] == [name for name, _ in expected]
    old, new = snapshots
    told = reason(
        item, (new, Likelihood(-5.0, [-1, -2, -2], True)), (old, Likelihood(-6.0, [-2, -2, -2], True)), {}
    )
    codes = ["".join(snapshot.semantic_ids.semantic_id(item)) for snapshot in snapshots]
    assert f"Its codes changed from {codes[0]} to {codes[1]}." in told


def test_none_keeps_the_codes_that_it_was_trained_with(
    shop: Workspace, frozen: Workspace, tmp_path: Path
) -> None:
    still = run(tmp_path / "w", base=shop.root, strategy="none")
    assert [stage.codes_of for stage in still.stages] == [0, 0, 0]
    assert [stage.manifest["changed_codes"] for stage in still.stages[1:]] == [0, 0]
    evaluate(still.stage(2).on(2), Silent())
    evaluate(frozen.stage(0).on(2), Silent())
    assert still.stage(2).predictions.items == frozen.stage(0).on(2).predictions.items


@pytest.mark.parametrize("strategy", ["single", "retrain"])
def test_an_interrupted_stage_ends_the_same(shop: Workspace, tmp_path: Path, strategy: str) -> None:
    class Stop(Exception):
        pass

    class Stops(Silent):
        def advance(self, done: int, **figures: object) -> None:
            if done >= 2:
                raise Stop

    whole = run(tmp_path / "whole", base=shop.root, strategy=strategy)
    tree = {**TREE, "items": {**TREE["items"], "refresh": REFRESH}, "strategy": strategy}
    half = Workspace.create_or_open(tmp_path / "half", load_config(tree))
    with half.lock(), pytest.raises(Stop):
        pipeline.run(half, base=shop.root, observer=Stops())
    half = run(tmp_path / "half", base=shop.root, strategy=strategy)
    for stage in (1, 2):
        assert files(half.stage(stage).directory) == files(whole.stage(stage).directory)


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "peso", "strength": 1.0, "vocabulary": True, "examples": 8},
        *({"name": name} for name in ("average", "lsat", "full", "distill", "blend", "replay", "sum_lora")),
    ],
    ids=lambda strategy: strategy["name"],
)
def test_every_strategy_trains_and_answers(
    shop: Workspace, tmp_path: Path, strategy: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strategy["name"] != "peso":  # one report is enough
        monkeypatch.setattr("peso.runs.report.report", lambda workspaces, directory: None)
    other = run(tmp_path / "w", base=shop.root, strategy=strategy, evaluation={"enabled": True, "k": [5]})
    assert 0 <= other.stage(2).metrics["test"]["metrics"]["ndcg@5"]["value"] <= 1


def test_exports_have_the_codes_of_the_stage(shop: Workspace, tmp_path: Path) -> None:
    item = shop.stream.item_ids[changed_codes(shop.stage(1))[0]]
    for stage in (0, 1):
        preparation.export_index(shop, tmp_path / f"{stage}.json", stage)
        index = json.loads((tmp_path / f"{stage}.json").read_text())
        assert index[item] == shop.stage(stage).semantic_ids.semantic_id(item)
        exported = Recommender(shop, stage).export(tmp_path / f"own{stage}.json", "index")
        assert json.loads(exported.read_text()) == index
    assert json.loads((tmp_path / "0.json").read_text())[item] != index[item]
    place = Recommender(shop, 1, "cpu").export(tmp_path / "merged")
    with safe_open(place / "item_head.safetensors", "np") as file:
        told = {name: json.loads(file.metadata()[name]) for name in ("items", "semantic_ids")}
    codes = dict(zip(told["items"], told["semantic_ids"], strict=True))
    assert codes == {name: "".join(tokens) for name, tokens in index.items()}


def test_retired_items_stay_out_after_their_codes_changed(copy: Workspace) -> None:
    recommender = Recommender(copy, 2, "cpu")
    history = copy.stream.item_ids[:3]
    best = recommender.recommend(history, k=10)
    retire(copy, [best[0][0]])
    left = [item for item, _ in recommender.recommend(history, k=9)]
    assert left == [item for item, _ in best[1:]]


def test_a_hybrid_combines_partners_and_model_by_item(copy: Workspace) -> None:
    config = load_config({**TREE, "baselines": [{"name": "hybrid", "partners": ["item-knn"], "weight": 0.0}]})
    alone = BaselineRun(copy, config.baselines[0])
    with copy.lock():
        alone.run(Silent())
        evaluate(copy.stage(2).on(2), Silent())
    answers = Recommender(copy, 2, "cpu", hybrid="hybrid").recommend(copy.stream.item_ids[:3], k=5)
    model = Recommender(copy, 2, "cpu").recommend(copy.stream.item_ids[:3], k=5)
    assert [item for item, _ in answers] == [item for item, _ in model]


def test_an_append_is_refreshed_before_it_is_trained_and_undone_with_it(
    copy: Workspace, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in copy.semantic_ids_directory.iterdir()}
    stream = copy.stream
    newest = stream.stage(2)
    time = 1_900_000_000
    rows = ["user,item,time"]
    for user, items in zip(newest.users, (newest.current[n] for n in range(len(newest.users))), strict=True):
        rows += [f"{user},{stream.item_ids[item]},{time + n}" for n, item in enumerate(items)]
    (tmp_path / "week.csv").write_text("\n".join(rows))
    data = load_config({"data": {"format": "csv", "path": str(tmp_path / "week.csv"), "stages": 1}}).data
    with copy.lock():
        preparation.append(copy, Silent(), data)
        assert copy.stages_without_refresh == 1
        assert status(copy)["waiting"]["stages_without_refresh"] == 1
        with pytest.raises(WorkspaceError, match=r"not refreshed .* run `peso tokenize --append"):
            pipeline.update(copy, Silent())
        preparation.tokenize_new(copy, Silent())
        assert not copy.lacks_semantic_ids
        pipeline.update(copy, Silent())
        assert copy.stage(3).manifest["changed_codes"] == len(changed_codes(copy.stage(3))) > 0
        for number in range(3):  # earlier stages do not change
            copy.stage(number).require_as_determined()
        for _ in range(2):
            undo(copy, last_step(copy), Silent())
    assert {path: path.read_bytes() for path in copy.semantic_ids_directory.iterdir()} == before

"""Models at work: precision, threads, users for whom little is left to recommend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from event_logs import write_log
from strategy_runs import Runs
from transformers import AutoModelForCausalLM

from peso import pipeline, summary
from peso.config import load_config
from peso.errors import BackboneError, PesoError
from peso.progress import Silent
from peso.stages import answering_model, backbone_fingerprint, starting_model, trained_model
from peso.training.precision import Precision
from peso.workspace import Workspace

ROUNDED = "training.precision=bfloat16"


def copy(workspace: Workspace, root: Path) -> Workspace:
    return Workspace.open(shutil.copytree(workspace.root, root))


def edit_manifest(workspace: Workspace, stage: int, **values: Any) -> None:
    path = workspace.stage_directory(stage) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- the identity of a backbone is that of its files --------------------------------------------------


@pytest.mark.parametrize("strategy", ["single", "full"])
def test_a_rounded_backbone_goes_through_every_stage(runs: Runs, strategy: str) -> None:
    workspace = runs(strategy, ROUNDED, backbone="tiny")
    assert workspace.finished_stages == [0, 1, 2, 3]
    later = trained_model(workspace, 3)
    assert later.dtype == (torch.float32 if strategy == "full" else torch.bfloat16)
    assert torch.isfinite(later.vocabulary.input_rows).all()


def test_the_identity_does_not_depend_on_the_precision(runs: Runs) -> None:
    rounded, exact = (runs("none", *options) for options in ((ROUNDED,), ()))
    manifests = [run.stage_manifest(stage) for run in (rounded, exact) for stage in (0, 1)]
    assert len({manifest["backbone_sha256"] for manifest in manifests}) == 1
    assert starting_model(rounded, 2).dtype == torch.bfloat16


def test_a_stage_continues_on_a_device_of_another_precision(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` is float32 here and bfloat16 on a GPU: a stage of each, answered by the other."""
    workspace = copy(runs("none", backbone="tiny"), tmp_path / "w")
    for stage in (1, 2, 3):
        shutil.rmtree(workspace.stage_directory(stage))
    of = Precision.of
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(Precision, "of", lambda precision, device: of("bfloat16", device))
        pipeline.learn(workspace, 1, Silent())
        assert answering_model(workspace, 1).dtype == torch.bfloat16
    pipeline.learn(workspace, 2, Silent())
    assert answering_model(workspace, 1).dtype == answering_model(workspace, 2).dtype == torch.float32


def test_workspaces_of_earlier_versions_open(runs: Runs, tmp_path: Path) -> None:
    """They noted the sha256 of the rounded weights where training was rounded."""
    workspace = copy(runs("none", ROUNDED), tmp_path / "w")
    model = trained_model(workspace, 1)
    rounded = backbone_fingerprint(model, torch.bfloat16)
    assert rounded != backbone_fingerprint(model)
    edit_manifest(workspace, 1, backbone_sha256=rounded)
    assert trained_model(workspace, 1).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), 0.125])
def test_another_backbone_is_refused_in_either_precision(
    runs: Runs, tmp_path: Path, precision: str, value: float
) -> None:
    workspace = copy(runs("none", *([ROUNDED] if precision == "bfloat16" else [])), tmp_path / "w")
    other = tmp_path / "other"
    shutil.copytree(workspace.config.backbone.name, other)
    causal_lm = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        causal_lm.get_input_embeddings().weight[3] = value
    causal_lm.save_pretrained(other)
    settings = workspace.config.backbone.model_copy(update={"name": str(other)})
    workspace = Workspace(workspace.root, workspace.config.model_copy(update={"backbone": settings}))
    with pytest.raises(BackboneError, match="is refused" if value != value else "other weights"):
        trained_model(workspace, 1)


def test_damaged_weights_of_stage_0_are_refused_when_rounded(runs: Runs, tmp_path: Path) -> None:
    workspace = copy(runs("single", ROUNDED, backbone="tiny"), tmp_path / "w")
    folder = workspace.stage_directory(0) / "backbone"
    causal_lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        causal_lm.get_input_embeddings().weight[3] = float("nan")
    causal_lm.save_pretrained(folder)
    for stage in (0, 1):
        with pytest.raises(PesoError):
            trained_model(workspace, stage)


# -- users who have had nearly everything --------------------------------------------------------------


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A log in which ``bot`` has had everything, ``fan`` all but two of twelve items, others three or four.
    The window is short, the beams are more than the catalogue has IDs."""
    folder = tmp_path_factory.mktemp("heavy")
    items = [f"i{k}" for k in range(12)]
    events = [("bot", item, 1_700_000_000 + 60 * n) for n, item in enumerate([*items, *items])]
    events += [("fan", item, 1_700_000_010 + 60 * n) for n, item in enumerate([*items[:10], *items[:10]])]
    events += [(f"u{n % 6}", items[n * 5 % 12], 1_700_000_020 + 60 * n) for n in range(24)]
    products = [(item, f"ware {n} of shelf {n % 3}") for n, item in enumerate(items)]
    table = {"path": str(write_log(folder / "p.csv", products, "item,title")), "columns": {"title": "title"}}
    log = str(write_log(folder / "log.csv", events))
    config = load_config(
        {
            "data": {"format": "csv", "path": log, "stages": 2, "items": table},
            "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 4},
            "backbone": {"name": "tiny", "layers": 1},
            "prompt": {"window": 4},
            "training": {"epochs": 1, "max_steps": 2},
            "decoding": {"beams": 20},
            "evaluation": {"k": [5]},
            "baselines": [
                "popularity",
                "item-knn",
                {"name": "hybrid", "candidates": 20, "two_tower": {"epochs": 1}},
            ],
        }
    )
    workspace = Workspace.create_or_open(folder / "w", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "report", lambda workspaces, directory: None)
        pipeline.run(workspace)
    return workspace


def test_a_user_gets_as_many_items_as_are_left(heavy: Workspace, tmp_path: Path, peso: Any) -> None:
    status, out, err = peso(
        "recommend", "-w", heavy.root, "--all", "--exclude-seen", "-o", tmp_path / "r.parquet", "-k", "5"
    )
    assert status == 0, err
    assert "2 of 8 users got fewer than 5 items" in err
    assert "user 'bot' got the fewest: 0" in err
    lists = {row["user"]: row["items"] for row in pq.read_table(tmp_path / "r.parquet").to_pylist()}
    assert lists["bot"] == []
    assert set(lists["fan"]) == {"i10", "i11"}  # none of those before the window
    assert {len(items) for user, items in lists.items() if user.startswith("u")} == {5}
    for user, count in (("bot", 0), ("fan", 2)):
        status, out, err = peso(
            "recommend", "-w", heavy.root, "--user", user, "--exclude-seen", "-k", "5", "--json"
        )
        assert status == 0, err
        assert len(json.loads(out)["recommendations"]) == count
        assert f"{count} of 5 items: user '{user}'" in err
    status, _, err = peso("recommend", "-w", heavy.root, "--user", "bot", "-k", "13")
    assert status == 1
    assert "the 12 items of the catalogue" in err


def test_every_model_answers_everybody_from_a_small_catalogue(heavy: Workspace) -> None:
    runs = summary.runs_of([heavy])
    assert len(runs) == 1 + 2 * 4  # the hybrid brings its two-tower model
    for run in runs:
        for found in run.stages.values():
            assert all(len(items) == 12 for items in found.predictions.items)
            assert found.predictions.depth == 20

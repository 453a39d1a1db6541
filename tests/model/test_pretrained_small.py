"""``backbone.pretrained``: a small backbone that another run trained, frozen; stage 0 is in the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_runs import SCALE, TREE, check_same_results, factors, rows, state, weight_changes

from peso.config import load_config
from peso.config.shape import changed_shape, stage_shape
from peso.errors import BackboneError, ConfigError
from peso.runs import pipeline
from peso.runs.checks import check_configuration
from peso.runs.models import trains_backbone
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow

SMALL = {"name": "tiny", "width": 16, "layers": 1}
FAST = {"data.simulate.users": 30, "data.simulate.stages": 2, "training.max_steps": 2}


def config(*overrides: str, backbone: dict[str, Any] | None = None, strategy: Any = "none") -> Any:
    tree = {**TREE, "backbone": backbone or SMALL, "strategy": strategy}
    return load_config(tree, [*(f"{key}={value}" for key, value in FAST.items()), *overrides])


def run(root: Path, *overrides: str, **sections: Any) -> Workspace:
    workspace = Workspace.create_or_open(root, config(*overrides, **sections))
    pipeline.run(workspace)
    return workspace


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A stream of its own, learned in the backbone."""
    return run(tmp_path_factory.mktemp("other") / "w", "seed=5", "training.learning_rate=0.03")


@pytest.fixture(scope="module")
def sums(other: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    backbone = {"name": "tiny", "pretrained": str(other.root)}
    return run(
        tmp_path_factory.mktemp("sums") / "w",
        "training.learning_rate=0.03",
        backbone=backbone,
        strategy="sum_lora",
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    names = model.causal_lm.named_parameters()
    return {n.replace(".base_layer.", "."): p for n, p in names if ".lora_" not in n}


def test_stage_0_is_in_the_adapter_over_the_weights_of_the_other_run(
    other: Workspace, sums: Workspace
) -> None:
    assert not trains_backbone(sums.stage(0))
    assert not (sums.stage(0).directory / "backbone").exists()
    assert any(bool(b.any()) for _, b in factors(sums, 0).values())
    theirs, ours = weights(other.stage(0).model()), weights(sums.stage(1).model())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], p) for name, p in ours.items())


def test_the_semantic_vocabulary_is_its_own(other: Workspace, sums: Workspace) -> None:
    theirs, ours = rows(other, 0)["input_rows"], rows(sums, 0)["input_rows"]
    assert theirs.shape != ours.shape or not torch.allclose(theirs, ours)


def test_cumulative_designs_have_the_adapter_of_stage_0(sums: Workspace) -> None:
    assert state(sums, 1)["past.ranks"].tolist() == [TREE["adapter"]["rank"]]
    changes = weight_changes(sums.stage(1).model())
    for module, (a, b) in factors(sums, 1).items():
        down, up = factors(sums, 0)[module]
        past = (up / up.norm()) @ (down / down.norm())
        torch.testing.assert_close(changes[module], SCALE * (past + b @ a), atol=1e-5, rtol=1e-4)


def test_a_directory_of_weights_does_as_well(other: Workspace, sums: Workspace, tmp_path: Path) -> None:
    place = other.stage(0).directory / "backbone"
    backbone = {"name": "tiny", "pretrained": str(place), "width": 16}
    again = run(tmp_path / "w", "training.learning_rate=0.03", backbone=backbone, strategy="sum_lora")
    check_same_results(again, sums, 0, 1)


def test_a_stage_is_not_continued_over_another_backbone(other: Workspace, sums: Workspace) -> None:
    place = other.stage(0).directory / "backbone" / "model.safetensors"
    saved = place.read_bytes()
    try:
        again = run(other.root.parent / "changed", "seed=6")
        place.write_bytes((again.stage(0).directory / "backbone" / "model.safetensors").read_bytes())
        with pytest.raises(BackboneError, match="has other weights than the one that"):
            sums.stage(1).model()
    finally:
        place.write_bytes(saved)


def test_the_place_may_move_but_it_counts_whether_there_is_one() -> None:
    here, there = (config(backbone={"name": "tiny", "pretrained": f"/{name}"}) for name in "ab")
    assert changed_shape(here, there, 0) == {}
    assert set(changed_shape(config(backbone={"name": "tiny"}), here, 0)) >= {"backbone.pretrained"}
    assert "adapter" in stage_shape(here, 0)
    assert "adapter" not in stage_shape(config(), 0)


def test_it_has_no_dropout_unless_told() -> None:
    assert config(backbone={"name": "scratch"}).backbone.dropout == 0.2
    assert config(backbone={"name": "scratch", "pretrained": "/a"}).backbone.dropout == 0
    given = config(backbone={"name": "scratch", "pretrained": "/a", "dropout": 0.1})
    assert given.backbone.dropout == 0.1


def test_a_path_is_looked_up_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "c.yaml").write_text("data: simulate\nbackbone: {name: tiny, pretrained: runs}\n")
    assert load_config(tmp_path / "c.yaml").backbone.pretrained == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "nowhere does not exist"), ("", "is neither a workspace whose stage 0 trained")],
)
def test_what_is_not_there_is_refused_before_anything_starts(name: str, message: str, tmp_path: Path) -> None:
    backbone = {"name": "tiny", "pretrained": str(tmp_path / name)}
    with pytest.raises(BackboneError, match=message):
        check_configuration(config(backbone=backbone))


def test_wrong_widths_and_other_backbones_are_refused(other: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is pretrained already"):
        config(backbone={"name": "smollm2-135m", "pretrained": "/a"})
    wide = {"name": "tiny", "width": 32, "pretrained": str(other.root)}
    with pytest.raises(BackboneError, match="width is 32, but the backbone in"):
        run(tmp_path / "w", backbone=wide)

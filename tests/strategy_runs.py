"""Runs of every strategy on a few users, and a stage's model and files put together by hand.

``pretrained`` has an adapter from stage 0 on, as a downloaded backbone has; ``tiny`` is itself trained at
stage 0 and has one from stage 1 on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small_runs
import torch
from safetensors.torch import load_file
from torch import Tensor

from peso.adapters.groups import lora_layers
from peso.config import load_config
from peso.model.backbone import byte_tokenizer, small_llama
from peso.runs.workspace import Workspace

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK
STAGES = 4
TREE: dict[str, Any] = {
    "data": {"format": "simulate", "simulate": {"users": 60, "items": 40, "stages": STAGES}},
    "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
    "adapter": {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj"]},
    "training": {
        "epochs": 1,
        "max_steps": 3,
        "batch_size": 64,
        "later_learning_rate_scale": 1.0,
        "warmup": 0,
    },
    "evaluation": {"enabled": False},
}
STILL = "training.later_learning_rate_scale=1e-30"  # a later stage changes nothing by learning


class Runs:
    """``runs(strategy, …)`` → the finished workspace; the same question is computed once a session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, Workspace] = {}

    def __call__(self, strategy: Any, *overrides: str, backbone: str = "pretrained") -> Workspace:
        key = json.dumps([strategy, overrides, backbone])
        if key not in self._known:
            # all but the base itself take data and stage 0 from it
            base = None if strategy == "none" else self("none", *overrides, backbone=backbone).root
            root = self.root / str(len(self._known))
            self._known[key] = small_runs.run(self.start(root, strategy, *overrides, backbone=backbone), base)
        return self._known[key]

    def start(self, root: Path, strategy: Any, *overrides: str, backbone: str = "pretrained") -> Workspace:
        """A workspace in which nothing is done yet."""
        name, rate = ("tiny", 3e-3) if backbone == "tiny" else (str(self._pretrained()), 3e-2)
        options = {"name": strategy} if isinstance(strategy, str) else strategy
        if options["name"] == "peso":
            options = {"examples": 4, **options}  # a gradient each
        tree = {**TREE, "backbone": {"name": name, "layers": 1}, "strategy": options}
        tree["training"] = {**TREE["training"], "learning_rate": rate}
        return Workspace.create_or_open(root, load_config(tree, overrides))

    def _pretrained(self) -> Path:
        place = self.root / "backbone"
        if not place.exists():
            small_llama(32, 1, seed=3).save_pretrained(place)
            byte_tokenizer().save_pretrained(place)
        return place


def factors(workspace: Workspace, stage: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → A (rank, in), B (out, rank), straight from the stage's adapter file."""
    tensors = load_file(workspace.stage(stage).directory / "adapter" / "adapter_model.safetensors")
    begin, end = "base_model.model.", ".lora_A.weight"
    modules = [name[len(begin) : -len(end)] for name in tensors if name.endswith(end)]
    return {m: (tensors[f"{begin}{m}{end}"], tensors[f"{begin}{m}.lora_B.weight"]) for m in modules}


def state(workspace: Workspace, stage: int) -> dict[str, Tensor]:
    """What the strategy kept beside the adapter."""
    file = workspace.stage(stage).directory / "state.safetensors"
    return load_file(file) if file.exists() else {}


def rows(workspace: Workspace, stage: int) -> dict[str, Tensor]:
    return load_file(workspace.stage(stage).directory / "vocabulary.safetensors")


@torch.no_grad()
def weight_changes(model: Any) -> dict[str, Tensor]:
    """Module → what all active adapters together add to its weight, (out, in), from what the layer does."""
    changes = {}
    for name, layer in lora_layers(model.backbone).items():
        one = torch.eye(layer.in_features)
        changes[name] = (layer(one) - layer.base_layer(one)).T
    return changes


def changes_at(workspace: Workspace, stage: int) -> dict[str, Tensor]:
    return weight_changes(workspace.stage(stage).model())


def results(workspace: Workspace, *stages: int) -> dict[str, bytes]:
    """Every tensor file of the stages, byte for byte."""
    return {
        str(path.relative_to(workspace.root)): path.read_bytes()
        for stage in stages
        for path in sorted(workspace.stage(stage).directory.rglob("*.safetensors"))
    }


def check_same_results(one: Workspace, two: Workspace, *stages: int) -> None:
    first, second = results(one, *stages), results(two, *stages)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []

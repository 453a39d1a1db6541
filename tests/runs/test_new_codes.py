"""A stage that brings codes which no item had before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from event_logs import write_log
from safetensors.torch import load_file

from peso.config import load_config
from peso.runs import pipeline
from peso.runs.phases import begin
from peso.runs.workspace import Workspace

T = 1_600_000_000
OLD = [(f"u{k % 13}", f"i{(k * k + k // 7) % 16}", T + k * 3600) for k in range(180)]
LATE = [(f"u{k % 13}", f"i{k % 22}", T + k * 3600) for k in range(180, 300)]  # i16 … i21: kettles
PRODUCTS = [(f"i{k}", "kettle" if k > 15 else ("tea", "cup")[k % 2]) for k in range(22)]


@pytest.fixture
def shop(tmp_path: Path) -> Workspace:
    """Stage 0 is learned, with an item head."""
    write_log(tmp_path / "log.csv", OLD + LATE)
    write_log(tmp_path / "products.csv", PRODUCTS, "item,kind")
    items = {"path": str(tmp_path / "products.csv"), "columns": {"category": "kind"}}
    tree = {
        "data": {"format": "csv", "path": str(tmp_path / "log.csv"), "stages": 2, "items": items},
        "items": {"quantizer": "category-path"},
        "backbone": "tiny",
        "head": "items",
        "strategy": "retrain",
        "training": {"epochs": 1, "max_steps": 3, "learning_rate": 3e-3},
        "evaluation": {"enabled": False},
        "baselines": [],
    }
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(tree))
    with workspace.lock():
        pipeline.run(workspace)
    return workspace


def test_its_rows_begin_with_those_of_its_neighbors_for_retraining_too(shop: Workspace) -> None:
    known = np.zeros(22, bool)
    for sequence in shop.stream.stage(0).training_sequences():
        known[sequence.items] = True
    tokens, rows = shop.semantic_ids.token_numbers, shop.semantic_ids.rows
    new = int(tokens[rows(["i20"])[0], 0])
    assert new not in tokens[known, 0]
    kept = load_file(shop.stage(0).directory / "vocabulary.safetensors")
    model, context = begin(shop.stage(1))
    for _ in range(2):
        for name in ("input_rows", "output_rows", "item_head.code_rows", "item_head.code_bias"):
            row = dict(model.vocabulary.named_parameters())[name].detach()
            assert torch.allclose(row[new], kept[name][tokens[known, 0]].mean(0), atol=1e-6), name
            assert not torch.equal(row[new], kept[name][new]), name
            first = int(tokens[rows(["i1"])[0], 0])
            assert torch.equal(row[first], kept[name][first]), name
        assert context.reset is not None
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        context.reset()  # as strategies do that begin anew

"""Two processes that share the weights of a backbone learn and answer as one process that has all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import together
import torch
from forked import Launched
from plain_path import with_adapter
from safetensors.torch import load_file
from sharded_runs import make_runs, trained_and_tested
from strategy_runs import TREE, Runs
from together import bytes_held, find_with_shards, found_by_two, fresh, fresh_bfloat16

from peso.config import load_config
from peso.config.shape import stage_shape
from peso.errors import ConfigError
from peso.model.backbone import byte_tokenizer, small_llama
from peso.model.generative import GenerativeModel
from peso.model.inference import for_inference
from peso.runs import pipeline
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace

SHARDED = "training.sharding=full"
Found = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., GenerativeModel]) -> Found:
    """Where two processes worked, and what each of them found."""
    directory = tmp_path_factory.mktemp("sharded")
    torch.save(with_adapter(make_model("instruct", "full", layers=2)), directory / "model.pt")
    return directory, found_by_two(directory, find_with_shards)


def check_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for losses in ("training", "validation"):
        assert found[losses] == pytest.approx(expected[losses], abs=tolerance)
    assert found["targets"] == expected["targets"]
    assert found["learnt"].keys() == expected["learnt"].keys()
    for name, value in expected["learnt"].items():
        assert type(found["learnt"][name]) is torch.Tensor, name
        torch.testing.assert_close(found["learnt"][name], value, atol=20 * tolerance, rtol=0)


@pytest.mark.slow
def test_each_process_holds_half_of_the_layers_before_and_after_training(two: Found) -> None:
    directory, found = two
    whole = bytes_held(fresh(directory))
    for each in found:
        for held in (each["held"], each["held after training"]):
            assert held["layers"] == whole["layers"] / 2
            assert held["others"] == whole["others"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "peso", "softened", "distill"])
def test_losses_and_weights_are_those_of_one_process(two: Found, tmp_path: Path, strategy: str) -> None:
    """With penalties on parameters and on outputs, and with more passes of the model within a pass."""
    directory, (main, other) = two
    check_same(main[strategy], together.train(fresh(directory), tmp_path, strategy=strategy))
    for name, value in main[strategy]["learnt"].items():
        assert torch.equal(other[strategy]["learnt"][name], value), name


@pytest.mark.slow
def test_a_step_may_leave_a_process_without_targets(two: Found, tmp_path: Path) -> None:
    directory, (main, _) = two
    check_same(main["one user"], together.train(fresh(directory), tmp_path, sequences=together.ONE))


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number(two: Found) -> None:
    _, (main, _) = two
    check_same(main["checkpointing"], main["single"])


@pytest.mark.slow
def test_frozen_weights_may_be_bfloat16(two: Found, tmp_path: Path) -> None:
    directory, (main, _) = two
    expected = together.train(fresh_bfloat16(directory), tmp_path, precision="bfloat16")
    check_same(main["bfloat16"], expected, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["answers", "merged", "beside"])
def test_answers_are_those_of_one_process(two: Found, adapter: str) -> None:
    """With PEFT's layers, with the adapter in float32 weights, and beside bfloat16 weights."""
    directory, found = two
    model = fresh_bfloat16(directory) if adapter == "beside" else fresh(directory)
    expected = together.answers(model if adapter == "answers" else for_inference(model))
    for each in found:
        for ours, theirs in zip(each[adapter], expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(two: Found, tmp_path: Path) -> None:
    directory, (main, _) = two
    assert main["stopped"]
    expected = together.train(fresh(directory), tmp_path, strategy="peso")
    check_same(together.train(fresh(directory), directory / "stopped", strategy="peso"), expected)


# -- whole runs ------------------------------------------------------------------------------------------

TRIALS = {"learning_rate": "auto", "trials": {"scales": [0.3, 1.0]}}
VARIANTS: dict[str, dict[str, Any]] = {
    "peso": {"strategy": {"name": "peso", "examples": 8}},
    "sum_lora": {"strategy": "sum_lora"},  # adds adapters to sharded layers
    "lsat": {"strategy": "lsat"},  # builds the model again, and answers with two models
    "item head": {"head": "items", "training": {"later": TRIALS}},  # builds a model for each trial
}
REFUSED = "refused"


def tree_of(backbone: Path, variant: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        **TREE,
        "data": {"simulate": {"users": 60, "items": 40, "stages": 2}},
        "backbone": str(backbone),
        "decoding": {"batch_size": 8},
        "baselines": [],
        **variant,
        "training": {
            "epochs": 1,
            "max_steps": 3,
            "batch_size": 16,
            "learning_rate": 3e-2,
            "warmup": 0,
            "device": "cpu",
            **variant.get("training", {}),
            **training,
        },
    }


@pytest.fixture(scope="module")
def runs_of_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Where two processes that share the weights made a run of each variant, and the errors they got."""
    root = tmp_path_factory.mktemp("runs")
    small_llama(32, 2, seed=3).save_pretrained(root / "backbone")
    byte_tokenizer().save_pretrained(root / "backbone")
    variants = {**VARIANTS, REFUSED: {"strategy": "slice"}}
    trees = {name: tree_of(root / "backbone", variant, sharding="full") for name, variant in variants.items()}
    launched = Launched(2, root / "told", make_runs, {root / name: tree for name, tree in trees.items()})
    assert launched.wait(2800) == [0, 0], launched.err(0) + launched.err(1)
    return root, [line for rank in range(2) for line in launched.out(rank).splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_writes_what_a_run_of_one_process_writes(
    runs_of_two: tuple[Path, list[str]], tmp_path: Path, variant: str
) -> None:
    root, _ = runs_of_two
    two = Workspace.open(root / variant)
    one = trained_and_tested(tree_of(root / "backbone", VARIANTS[variant]), tmp_path / "one")
    for number in range(2):
        ours, theirs = two.stage(number), one.stage(number)
        assert ours.determined_by == theirs.determined_by
        assert ours.manifest["backbone_sha256"] == theirs.manifest["backbone_sha256"]
        assert ours.manifest["files"].keys() == theirs.manifest["files"].keys()
        assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
        for file in sorted(theirs.directory.rglob("*.safetensors")):
            tensors, expected = (
                load_file(stage.directory / file.relative_to(theirs.directory)) for stage in (ours, theirs)
            )
            assert tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(tensors[name], tensor, atol=1e-3, rtol=0)
    tables = [pq.read_table(each.directory / "predictions.parquet") for each in (ours, theirs)]
    assert tables[0]["items"] == tables[1]["items"]
    likelihoods = [table["target_log_probability"].to_numpy() for table in tables]
    np.testing.assert_allclose(*likelihoods, atol=1e-4)
    # one process has the whole model, with the same configuration
    assert bytes_held(ours.model()) == bytes_held(theirs.model())


def losses(stage: RunStage) -> list[float]:
    return [line.get("loss", line.get("validation_loss")) for line in stage.log]


@pytest.mark.slow
def test_a_strategy_that_reads_the_weights_is_refused(runs_of_two: tuple[Path, list[str]]) -> None:
    root, told = runs_of_two
    assert len(told) == 2  # every process
    assert "strategy slice uses all weights of the backbone" in told[0]
    assert not (root / REFUSED / "stages").exists()


# -- the configuration -----------------------------------------------------------------------------------


def test_one_process_alone_is_refused_before_anything_is_made(runs: Runs, tmp_path: Path) -> None:
    workspace = runs.start(tmp_path / "w", "peso", SHARDED)
    with pytest.raises(ConfigError, match=r"only one .*start several with torchrun"):
        pipeline.run(workspace)
    assert not workspace.has_stream


def test_the_backbone_must_be_frozen() -> None:
    with pytest.raises(ConfigError, match="stage 0 trains all weights of tiny"):
        load_config({"data": "simulate", "backbone": "tiny"}, [SHARDED])


def test_sharding_does_not_change_what_identifies_a_stage(runs: Runs) -> None:
    whole, sharded = (
        load_config({"data": "simulate", "backbone": "smollm2-135m"}, overrides)
        for overrides in ([], [SHARDED])
    )
    assert [stage_shape(whole, stage) for stage in (0, 1)] == [
        stage_shape(sharded, stage) for stage in (0, 1)
    ]
    assert "sharding" not in whole.model_dump(mode="json")["training"]

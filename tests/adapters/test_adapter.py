"""The adapter: PEFT's own, seeded, whole after saving, and readable by PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peso.adapters.lora import (
    adapter_parameters,
    add_adapter,
    load_adapter,
    save_adapter,
    weights_without_adapter,
)
from peso.errors import BackboneError, WorkspaceError
from peso.model.backbone import small_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> PeftModel:
    options = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": TARGETS, "seed": seed} | changes
    return add_adapter(small_llama(32, 2, seed=0).to(dtype).eval(), **options)


def fill(model: PeftModel, seed: int = 3) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_every_target_of_every_layer_gets_an_a_and_a_b_and_nothing_else_learns() -> None:
    model = adapted()
    assert len(adapter_parameters(model)) == 2 * len(TARGETS) * 2
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == set(adapter_parameters(model))


def test_a_fresh_adapter_changes_nothing() -> None:
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(adapted()(input_ids=ids).logits, small_llama(32, 2, seed=0)(input_ids=ids).logits)


@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_adapter_is_in_the_mode_of_its_model(training: bool) -> None:
    model = add_adapter(small_llama(32, 2, seed=0).train(training), 4, 8, 0.5, TARGETS, seed=0)
    assert {module.training for module in model.modules()} == {training}


def test_the_seed_decides_and_the_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (adapter_parameters(adapted(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_adapter_is_float32_on_a_bfloat16_backbone() -> None:
    assert {p.dtype for p in adapter_parameters(adapted(dtype=torch.bfloat16)).values()} == {torch.float32}


def test_a_missing_target_names_what_there_is() -> None:
    with pytest.raises(
        BackboneError, match=r"named c_attn; it has: down_proj, gate_proj, k_proj, .*up_proj, v_proj"
    ):
        adapted(targets=["q_proj", "c_attn"])


def test_saved_and_loaded_it_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = fill(adapted())
    save_adapter(model, tmp_path)
    again = adapted(seed=9)
    load_adapter(again, tmp_path)
    theirs = adapter_parameters(again)
    assert all(torch.equal(p, theirs[name]) for name, p in adapter_parameters(model).items())


def test_peft_reads_what_we_write(tmp_path: Path) -> None:
    model = fill(adapted())
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs = PeftModel.from_pretrained(small_llama(32, 2, seed=0).eval(), tmp_path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)


def test_we_read_what_peft_writes(tmp_path: Path) -> None:
    model = fill(adapted())
    model.save_pretrained(tmp_path)
    again = adapted(seed=9)
    load_adapter(again, tmp_path)
    theirs = adapter_parameters(again)
    assert all(torch.equal(p, theirs[name]) for name, p in adapter_parameters(model).items())


def test_the_same_adapter_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    """PEFT holds the targets as a set and would write them in the order of hashes, which vary."""
    save_adapter(adapted(targets=TARGETS), tmp_path / "1")
    save_adapter(adapted(targets=TARGETS[::-1]), tmp_path / "2")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("change", [{"rank": 2}, {"alpha": 4}, {"targets": ["q_proj", "v_proj"]}])
def test_an_adapter_of_another_shape_is_refused(change, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    with pytest.raises(WorkspaceError, match="but the configuration"):
        load_adapter(adapted(**change), tmp_path)


def test_an_adapter_of_a_deeper_backbone_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(weights)
    save_file({name: tensor for name, tensor in state.items() if ".layers.1." not in name}, weights)
    with pytest.raises(WorkspaceError, match="another backbone"):
        load_adapter(adapted(), tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_truncated_file_is_an_error(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(WorkspaceError, match="damaged"):
        load_adapter(adapted(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(WorkspaceError, match="missing"):
        load_adapter(adapted(), tmp_path)


@pytest.mark.parametrize("content", ["[]", "1", "null"])
def test_a_configuration_that_is_not_an_object_is_damaged(content: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(WorkspaceError, match="damaged"):
        load_adapter(adapted(), tmp_path)


def test_the_configuration_names_no_place_on_this_machine(tmp_path: Path) -> None:
    from peso.model.backbone import load_backbone

    causal_lm, _ = load_backbone("tiny")
    save_adapter(add_adapter(causal_lm, 4, 8, 0.0, TARGETS, seed=0), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(TARGETS)


def test_the_weights_beneath_have_the_names_they_had() -> None:
    plain = small_llama(32, 2, seed=0).state_dict()
    beneath = weights_without_adapter(adapted().get_base_model())
    assert beneath.keys() == plain.keys()
    assert all(torch.equal(beneath[name], plain[name]) for name in plain)

"""PEFT's LoRA adapter in a causal LM: initialized from a seed, saved in PEFT's format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peso.adapters.groups import lora_layers
from peso.errors import BackboneError, WorkspaceError
from peso.runtime.files import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's own names


def add_adapter(
    causal_lm: Any, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int
) -> PeftModel:
    """Put a fresh adapter into the causal LM (in place) and freeze everything else.

    A (rank, in) is drawn as PEFT draws it, from ``seed`` and without touching the caller's random state;
    B (out, rank) is zero, so the model answers as before. Both are float32 whatever the backbone's precision.

    Args:
        targets: names of linear layers, such as ``q_proj``; every layer so named gets its own A and B.

    Raises:
        BackboneError: a target that the backbone does not have; says which it has.
    """
    linear = _linear_layers(causal_lm)
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if missing:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise BackboneError(
            f"adapter.targets: the backbone has no linear layer named {', '.join(missing)}; it has: {has}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # as it is written most often
        lora_dropout=dropout,
        target_modules=list(targets),
        # GPT-2's layers hold their weight transposed
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in linear),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks Transformers for a property under the name that it had before
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        torch.manual_seed(seed)
        # in the mode of the model: dropout in a model that answers would go unnoticed
        return get_peft_model(causal_lm, config).train(causal_lm.training)


def redraw_adapter(peft_model: PeftModel, seed: Sequence[int]) -> None:
    """Draw the trained adapter anew, as :func:`add_adapter` does: A from ``seed``, B zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
        for layer in lora_layers(peft_model).values():
            place = layer.lora_A["default"].weight.device
            layer.to("cpu").reset_lora_parameters("default", init_lora_weights=True)
            layer.to(place)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B of the LoRA layers in ``model``, by full name, in the order of the layers."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def save_adapter(peft_model: PeftModel, directory: str | Path) -> None:
    """Write the two files that ``PeftModel.from_pretrained`` reads.

    Same adapter, same bytes: PEFT's own writer lists the targets in the order of a set.
    """
    write_adapter(peft_model.peft_config["default"].to_dict(), adapter_state(peft_model), Path(directory))


def write_adapter(config: dict[str, Any], state: dict[str, Tensor], directory: Path) -> None:
    """The two files of PEFT's format from their content."""
    directory.mkdir(parents=True, exist_ok=True)
    # inference mode as PEFT itself writes it: whoever wants to train on asks for that when loading
    write_json(directory / CONFIG, _as_json({**config, "inference_mode": True}))
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


def adapter_state(peft_model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, under the names of PEFT's files."""
    # never the embedding layers: to find out whether they were resized PEFT would ask the hub
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_adapter(peft_model: PeftModel, directory: str | Path) -> None:
    """Read the values of an adapter of the same shape into ``peft_model``.

    Raises:
        WorkspaceError: files that are missing or damaged, or an adapter of another rank, scale or targets.
    """
    folder = Path(directory)
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise WorkspaceError(
            f"{error.filename or folder / WEIGHTS} is missing; train the stage again"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise WorkspaceError(
            f"the adapter in {folder} is damaged ({error}); train the stage again"
        ) from error
    config = _as_json(peft_model.peft_config["default"].to_dict())
    stored["target_modules"] = sorted(stored.get("target_modules", []))  # PEFT writes them in any order
    for key in ("r", "lora_alpha", "target_modules"):
        if stored.get(key) != config[key]:
            raise WorkspaceError(
                f"the adapter in {folder} has {key} {stored.get(key)}, the configuration says {config[key]}"
            )
    expected = {name: tensor.shape for name, tensor in adapter_state(peft_model).items()}
    if expected != {name: tensor.shape for name, tensor in state.items()}:
        raise WorkspaceError(f"the adapter in {folder} was made for another backbone: its layers differ")
    set_peft_model_state_dict(peft_model, state)


def weights_without_adapter(causal_lm: nn.Module) -> dict[str, Tensor]:
    """The causal LM's weights, no copies, under the names that they have without PEFT (adapters left out)."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in causal_lm.state_dict().items()
        if ".lora_" not in name
    }


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """In a fixed order, where PEFT holds the targets as a set."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}


def _linear_layers(causal_lm: Any) -> dict[str, nn.Module]:
    head = causal_lm.get_output_embeddings()
    return {
        name: module
        for name, module in causal_lm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }

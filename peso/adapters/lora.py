"""PEFT's LoRA adapter in a causal LM: initialized from a seed, saved in PEFT's format.

Frozen adapters of earlier stages can be active together with the one that is trained. They form one more PEFT
adapter, whose rank is the sum of theirs: a forward pass costs two products for all of them together, and the
result can be merged and exported like any adapter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from peso.adapters.groups import PAST, lora_layers
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


TRAINED = "default"


@dataclass(frozen=True)
class Past:
    """Low-rank changes of the weights of named modules, adapter after adapter along the rank.

    ``down``: module → float32 (Σ ranks, in), A; ``up``: module → float32 (out, Σ ranks), B; ``ranks``: of
    each adapter; ``magnitudes``: float32 (adapters,), what each is multiplied by: alpha / rank of an adapter
    that acts as it was learned.

        change of a module's weight = Σ_i magnitudes_i · up_i · down_i
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    ranks: tuple[int, ...]
    magnitudes: Tensor

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    def __add__(self, other: Past) -> Past:
        if self.down.keys() != other.down.keys():
            raise ValueError("adapters of other modules")
        return Past(
            {name: torch.cat([self.down[name], other.down[name]]) for name in self.down},
            {name: torch.cat([self.up[name], other.up[name]], dim=1) for name in self.up},
            self.ranks + other.ranks,
            torch.cat([self.magnitudes, other.magnitudes]),
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        return {
            **{f"{PAST}.{name}.down": tensor.contiguous() for name, tensor in self.down.items()},
            **{f"{PAST}.{name}.up": tensor.contiguous() for name, tensor in self.up.items()},
            f"{PAST}.ranks": torch.tensor(self.ranks),
            f"{PAST}.magnitudes": self.magnitudes.contiguous(),
        }

    @property
    def acts(self) -> bool:
        """Whether it changes any weight: a fresh adapter, whose B is zero, does not."""
        return any(bool(up.any()) for up in self.up.values())

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Past | None:
        """From :meth:`state`, other tensors beside it or not; None where no adapters are in it."""
        if f"{PAST}.ranks" not in state:
            return None

        def named(end: str) -> dict[str, Tensor]:
            begin = f"{PAST}."
            return {
                name.removeprefix(begin).removesuffix(end): tensor
                for name, tensor in state.items()
                if name.startswith(begin) and name.endswith(end)
            }

        ranks = tuple(state[f"{PAST}.ranks"].tolist())
        return cls(named(".down"), named(".up"), ranks, state[f"{PAST}.magnitudes"])


class Magnitudes(nn.Module):
    """Multiplies the rows of each adapter by its magnitude; one for all modules of a model."""

    ranks: Tensor
    owners: Tensor  # int64 (Σ ranks,): which adapter a row belongs to

    def __init__(self, past: Past, *, trainable: bool) -> None:
        super().__init__()
        self.magnitudes = nn.Parameter(past.magnitudes.clone().float(), requires_grad=trainable)
        ranks = torch.tensor(past.ranks)
        self.register_buffer("ranks", ranks, persistent=False)
        self.register_buffer("owners", torch.arange(len(ranks)).repeat_interleave(ranks), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.magnitudes.index_select(0, self.owners).unsqueeze(-1)


@torch.no_grad()
def read_adapter(backbone: nn.Module) -> Past:
    """The trained adapter as it stands: a copy on the CPU. One rank and one alpha for all modules."""
    layers = lora_layers(backbone)
    down = {
        name: layer.lora_A[TRAINED].weight.detach().float().cpu().clone() for name, layer in layers.items()
    }
    up = {name: layer.lora_B[TRAINED].weight.detach().float().cpu().clone() for name, layer in layers.items()}
    one = next(iter(layers.values()))
    return Past(down, up, (one.r[TRAINED],), torch.tensor([float(one.scaling[TRAINED])]))


@torch.no_grad()
def put_adapter(backbone: nn.Module, adapter: Past) -> None:
    """Give the trained adapter the values that :func:`read_adapter` read of one like it."""
    for name, layer in lora_layers(backbone).items():
        layer.lora_A[TRAINED].weight.copy_(adapter.down[name])
        layer.lora_B[TRAINED].weight.copy_(adapter.up[name])


@torch.no_grad()
def put_past(backbone: PeftModel, past: Past, *, train_magnitudes: bool = False) -> None:
    """Make the adapters of the past act beside the trained one, frozen; an earlier past is replaced.

    Args:
        train_magnitudes: their magnitudes (one number an adapter) require a gradient.
    """
    remove_past(backbone)
    trained = backbone.peft_config[TRAINED]
    fan_in_fan_out = getattr(trained, "fan_in_fan_out", False)
    config = LoraConfig(
        r=past.rank,
        lora_alpha=past.rank,  # scaled as they are
        lora_dropout=0.0,
        target_modules=trained.target_modules,
        fan_in_fan_out=fan_in_fan_out,
        task_type=trained.task_type,
    )
    with torch.random.fork_rng(devices=[]):
        backbone.add_adapter(PAST, config)
    backbone.base_model.set_adapter([TRAINED, PAST])
    magnitudes = Magnitudes(past, trainable=train_magnitudes)
    for name, layer in lora_layers(backbone).items():
        down, up = layer.lora_A[PAST], layer.lora_B[PAST]
        # as the trained adapter: float32, whatever the backbone's precision
        down.weight = nn.Parameter(past.down[name].to(down.weight.device), requires_grad=False)
        up.weight = nn.Parameter(past.up[name].to(up.weight.device), requires_grad=False)
        parametrize.register_parametrization(down, "weight", magnitudes.to(down.weight.device), unsafe=True)


def remove_past(backbone: PeftModel) -> None:
    """The trained adapter alone acts again."""
    if PAST in backbone.peft_config:
        backbone.delete_adapter(PAST)
        backbone.base_model.set_adapter(TRAINED)


@torch.no_grad()
def read_past(backbone: nn.Module) -> Past | None:
    """The past as it stands, magnitudes included: copies on the CPU; None where there is none."""
    if PAST not in getattr(backbone, "peft_config", {}):
        return None
    down, up = {}, {}
    magnitudes: Any = None
    for name, layer in lora_layers(backbone).items():
        parametrized: Any = layer.lora_A[PAST].parametrizations.weight
        magnitudes = parametrized[0]
        down[name] = parametrized.original.detach().cpu().clone()
        up[name] = layer.lora_B[PAST].weight.detach().cpu().clone()
    return Past(down, up, tuple(magnitudes.ranks.tolist()), magnitudes.magnitudes.detach().cpu().clone())


@torch.no_grad()
def as_one_adapter(backbone: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that acts as one adapter of PEFT's format: its configuration, and tensors by the names in its file.

    The trained adapter itself where it has no past, else the ranks of both concatenated, alpha = rank, and
    what multiplies each adapter worked into its rows of A.
    """
    config, past = backbone.peft_config[TRAINED].to_dict(), read_past(backbone)
    if past is None:
        return config, adapter_state(backbone)
    total = past + read_adapter(backbone)
    config |= {"r": total.rank, "lora_alpha": total.rank}
    scale = total.magnitudes.repeat_interleave(torch.tensor(total.ranks)).unsqueeze(-1)
    begin = "base_model.model."
    down = {f"{begin}{name}.lora_A.weight": scale * rows for name, rows in total.down.items()}
    up = {f"{begin}{name}.lora_B.weight": columns.contiguous() for name, columns in total.up.items()}
    return config, down | up

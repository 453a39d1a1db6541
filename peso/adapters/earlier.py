"""Frozen adapters of earlier stages, active together with the one that is trained.

They form one more PEFT adapter, whose rank is the sum of theirs. A forward pass costs two products for all of
them together, and the result can be merged and exported like any adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peso.adapters.groups import lora_layers
from peso.adapters.lora import adapter_state

PAST = "past"
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

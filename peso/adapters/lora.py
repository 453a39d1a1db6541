"""PEFT's LoRA adapter in a causal LM, initialized from a seed and saved in PEFT's format.

Frozen adapters of earlier stages can be active together with the trained one. They form a second PEFT
adapter, whose rank is the sum of theirs. So a forward pass needs two products for all of them, and the result
can be merged and exported like any adapter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
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
    """Add a new adapter to a causal LM in place, and freeze everything else.

    A (rank, in) is drawn as in PEFT, from ``seed``, without changing the caller's random state. B (out, rank)
    is zero, so the outputs of the model do not change. Both are float32 regardless of the backbone's
    precision.

    Args:
        alpha: the scale of the adapter; its output is multiplied by alpha / rank.
        dropout: the dropout probability of the adapter's input.
        targets: the names of linear layers, such as ``q_proj``. Every layer with such a name gets its own A
            and B.
        seed: the seed of A.

    Returns:
        The PEFT model around ``causal_lm``, in the same mode (training or evaluation).

    Raises:
        BackboneError: the backbone has no layer with one of these names; the message lists its layers.
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
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # usually written as an integer
        lora_dropout=dropout,
        target_modules=list(targets),
        # GPT-2's layers have transposed weights
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT uses the old name of a property of Transformers
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        torch.manual_seed(seed)
        # keep the mode of the model, because dropout during inference would go unnoticed
        return get_peft_model(causal_lm, config).train(causal_lm.training)


def redraw_adapter(peft_model: PeftModel, seed: Sequence[int]) -> None:
    """Reinitialize the trained adapter as in :func:`add_adapter`: A from ``seed``, B zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
        for layer in lora_layers(peft_model).values():
            # not the whole layer, whose frozen weight may be sharded
            matrices = nn.ModuleList([layer.lora_A["default"], layer.lora_B["default"]])
            place = layer.lora_A["default"].weight.device
            matrices.to("cpu")
            layer.reset_lora_parameters("default", init_lora_weights=True)
            matrices.to(place)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every A and B of the LoRA layers of a model, by full name, in the order of the layers."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def save_adapter(peft_model: PeftModel, directory: str | Path) -> None:
    """Write the two files that ``PeftModel.from_pretrained`` reads.

    The same adapter gives the same bytes, unlike PEFT's own writer, which lists the targets in random order.
    """
    write_adapter(peft_model.peft_config["default"].to_dict(), adapter_state(peft_model), Path(directory))


def write_adapter(config: dict[str, Any], state: dict[str, Tensor], directory: Path) -> None:
    """Write the two files of PEFT's format from their contents."""
    directory.mkdir(parents=True, exist_ok=True)
    # PEFT also writes inference mode; to continue training, set the mode when loading
    write_json(directory / CONFIG, _as_json({**config, "inference_mode": True}))
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


def adapter_state(peft_model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, with the names in PEFT's files."""
    # without embedding layers; to find out whether they were resized, PEFT would contact the hub
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def load_adapter(peft_model: PeftModel, directory: str | Path) -> None:
    """Load the values of a saved adapter with the same shape into ``peft_model``.

    Args:
        peft_model: the model, whose adapter has the rank, alpha and targets of the configuration.
        directory: the directory of the two files.

    Raises:
        WorkspaceError: files are missing or damaged, or the adapter has another rank, alpha or targets.
    """
    folder = Path(directory)
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"{CONFIG} is not a JSON object")
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
                f"the adapter in {folder} has {key} {stored.get(key)}, but the configuration has "
                f"{config[key]}; restore that value, or train the stage again"
            )
    expected = {name: tensor.shape for name, tensor in adapter_state(peft_model).items()}
    if expected != {name: tensor.shape for name, tensor in state.items()}:
        raise WorkspaceError(
            f"the adapter in {folder} was trained for another backbone, with other layers; restore "
            "backbone.name and backbone.layers, or train the stage again"
        )
    set_peft_model_state_dict(peft_model, state)


def weights_without_adapter(causal_lm: nn.Module) -> dict[str, Tensor]:
    """The weights of a causal LM without adapters, not copied, with the names that they have without PEFT."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in causal_lm.state_dict().items()
        if ".lora_" not in name
    }


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a fixed order, with the targets as a list instead of a set."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}


def _linear_layers(causal_lm: Any) -> dict[str, nn.Module]:
    """The linear layers of a causal LM by name, without its output head."""
    head = causal_lm.get_output_embeddings()
    return {
        name: module
        for name, module in causal_lm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


TRAINED = "default"  # PEFT's name of the adapter that is trained


@dataclass(frozen=True)
class Past:
    """Frozen adapters of earlier stages, concatenated along the rank. The weight of a module changes by

        Σ_i magnitudes_i · up_i · down_i

    Attributes:
        down: for each module, A, float32 (Σ ranks, in).
        up: for each module, B, float32 (out, Σ ranks).
        ranks: the rank of each adapter.
        magnitudes: float32 (adapters,), the factor of each adapter. For an adapter that is applied as it was
            trained, it is alpha / rank.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    ranks: tuple[int, ...]
    magnitudes: Tensor

    @property
    def rank(self) -> int:
        """The sum of the ranks."""
        return sum(self.ranks)

    def __add__(self, other: Past) -> Past:
        if self.down.keys() != other.down.keys():
            raise ValueError("the adapters belong to different modules")
        return Past(
            {name: torch.cat([self.down[name], other.down[name]]) for name in self.down},
            {name: torch.cat([self.up[name], other.up[name]], dim=1) for name in self.up},
            self.ranks + other.ranks,
            torch.cat([self.magnitudes, other.magnitudes]),
        )

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, to be saved in a file."""
        return {
            **{f"{PAST}.{name}.down": tensor.contiguous() for name, tensor in self.down.items()},
            **{f"{PAST}.{name}.up": tensor.contiguous() for name, tensor in self.up.items()},
            f"{PAST}.ranks": torch.tensor(self.ranks),
            f"{PAST}.magnitudes": self.magnitudes.contiguous(),
        }

    @property
    def acts(self) -> bool:
        """Whether any weight changes. This is not the case for a new adapter, whose B is zero."""
        return any(bool(up.any()) for up in self.up.values())

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Past | None:
        """Restore from the tensors of :meth:`state`, which may be mixed with others; None if there are no
        adapters."""
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
    """Multiplies the rows of each adapter by its magnitude. All modules of a model share one instance."""

    ranks: Tensor
    owners: Tensor  # int64 (Σ ranks,): the adapter that each row belongs to

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
    """A copy of the trained adapter on the CPU. All modules must have the same rank and alpha."""
    layers = lora_layers(backbone)
    down = {
        name: layer.lora_A[TRAINED].weight.detach().float().cpu().clone() for name, layer in layers.items()
    }
    up = {name: layer.lora_B[TRAINED].weight.detach().float().cpu().clone() for name, layer in layers.items()}
    one = next(iter(layers.values()))
    return Past(down, up, (one.r[TRAINED],), torch.tensor([float(one.scaling[TRAINED])]))


@torch.no_grad()
def put_adapter(backbone: nn.Module, adapter: Past) -> None:
    """Set A and B of the trained adapter to values that :func:`read_adapter` returned."""
    for name, layer in lora_layers(backbone).items():
        layer.lora_A[TRAINED].weight.copy_(adapter.down[name])
        layer.lora_B[TRAINED].weight.copy_(adapter.up[name])


@torch.no_grad()
def start_new_adapter(
    backbone: PeftModel, memory: MutableMapping[str, Tensor], seed: Sequence[int]
) -> Past | None:
    """Freeze the trained adapter beside the earlier ones, and reinitialize the trained one.

    Args:
        memory: the tensors of the earlier adapters (:meth:`Past.state`), if there are any. The trained
            adapter is added to them.
        seed: the seed of the new adapter.

    Returns:
        All frozen adapters; None if there are none, because the trained one has no effect (B is zero).
    """
    past, last = Past.of_state(memory), read_adapter(backbone)
    if last.acts:  # otherwise the backbone itself was trained
        past = last if past is None else past + last
    redraw_adapter(backbone, seed)
    if past is not None:
        put_past(backbone, past)
        memory.update(past.state())
    return past


def put_past(backbone: PeftModel, past: Past, *, train_magnitudes: bool = False) -> None:
    """Activate frozen past adapters together with the trained one. They replace earlier past adapters.

    Args:
        train_magnitudes: whether to train their magnitudes (one number per adapter).
    """
    remove_past(backbone)
    trained = backbone.peft_config[TRAINED]
    fan_in_fan_out = getattr(trained, "fan_in_fan_out", False)
    config = LoraConfig(
        r=past.rank,
        lora_alpha=past.rank,  # so that the scale is 1
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
        # float32 regardless of the backbone's precision, like the trained adapter
        down.weight = nn.Parameter(past.down[name].to(down.weight.device), requires_grad=False)
        up.weight = nn.Parameter(past.up[name].to(up.weight.device), requires_grad=False)
        parametrize.register_parametrization(down, "weight", magnitudes.to(down.weight.device), unsafe=True)


def remove_past(backbone: PeftModel) -> None:
    """Remove the past adapters, so that only the trained adapter is active."""
    if PAST in backbone.peft_config:
        backbone.delete_adapter(PAST)
        backbone.base_model.set_adapter(TRAINED)


@torch.no_grad()
def read_past(backbone: nn.Module) -> Past | None:
    """A copy of the past adapters and their magnitudes on the CPU; None if there are none."""
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
    """All active adapters as one adapter in PEFT's format: its configuration, and its tensors by name.

    Without past adapters, this is the trained adapter itself. Otherwise all adapters are concatenated along
    the rank, alpha is the rank, and the factor of each adapter is included in its rows of A.
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

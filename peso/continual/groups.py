"""Groups: the flattened A, or the flattened B, of each module that an adapter is attached to.

Knows how PEFT keeps LoRA matrices in a model; knows nothing of penalties or stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peso.errors import TrainingError

PAST = "past"  # the adapter that holds frozen adapters of earlier stages: never the one that is trained


@dataclass(frozen=True)
class Group:
    """One group and where it belongs.

    ``module``: name of the module in the model without its wrappers, e.g. ``model.layers.0.mlp.up_proj``;
    ``factor``: ``A`` or ``B``; ``tensor``: the parameter itself, in its own shape.
    """

    module: str
    factor: str
    tensor: Tensor

    @property
    def name(self) -> str:
        return f"{self.module}.lora_{self.factor}" if self.factor else self.module

    def snapshot(self) -> Group:
        """The same group as it stands now: a copy that no optimiser moves."""
        return Group(self.module, self.factor, self.tensor.detach().clone())


@dataclass(frozen=True)
class Found:
    """Groups as :func:`find_groups` found them, to be given in the source's place: a walk over the modules in
    every step costs more than most penalties. Good as long as the model keeps its adapter and parameters.

        found = Found.of(model)       # once a stage
        loss = loss + term(found)     # in every step
    """

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, source: Source, adapter: str | None = None) -> Found:
        return cls(tuple(find_groups(source, adapter)))


Source = nn.Module | Found | Iterable[nn.Module | Tensor]


def find_groups(source: Source, adapter: str | None = None) -> list[Group]:
    """The groups of a model in the order of ``named_modules``, A before B.

    Args:
        source: a model with LoRA layers of PEFT anywhere in it (wrapped by DDP or ``torch.compile`` or
            not), or several tensors, or both: ``[model, vocabulary.input_rows]``. Of plain tensors each is
            a group, and a module of its own. Or what was found before.
        adapter: which adapter; None: the active one, beside which one named ``past`` may be active.

    Raises:
        TrainingError: no LoRA layer, no such adapter, several active at once, or an empty tensor.
    """
    if isinstance(source, Found):
        return list(source.groups)
    groups: list[Group] = []
    tensors = 0
    for part in _parts(source):
        if isinstance(part, nn.Module):
            groups.extend(_of_model(part, adapter))
        else:
            groups.append(Group(f"tensor {tensors}", "", part))
            tensors += 1
    for group in groups:
        if group.tensor.numel() == 0:
            raise TrainingError(
                f"{group.name} has no values. Parameters that are sharded or not materialised must be "
                "gathered before an anchor can read them"
            )
    return groups


def find_layers(model: nn.Module, adapter: str | None = None) -> tuple[str, dict[str, Any]]:
    """Name of the adapter that is meant, and PEFT's layers that have it by name of the module.

    Raises:
        TrainingError: no LoRA layer, no such adapter, or several active at once.
    """
    from peft.tuners.lora import LoraLayer  # only a model needs it; plain tensors do without PEFT

    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    if not layers:
        raise TrainingError(
            f"no LoRA adapter found in {type(model).__name__}: "
            "attach one first with peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    name = adapter or _active(layers)
    found = {
        _plain(path): layer for path, layer in layers if name in (*layer.lora_A, *layer.lora_embedding_A)
    }
    if not found:
        known = sorted({known for _, layer in layers for known in (*layer.lora_A, *layer.lora_embedding_A)})
        raise TrainingError(f"the model has no LoRA adapter {name!r}; it has {', '.join(known)}")
    return name, found


def shapes(groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every group, in order: what an anchor and a model must have in common."""
    return {group.name: tuple(group.tensor.shape) for group in groups}


def check_same_groups(anchored: dict[str, tuple[int, ...]], groups: Sequence[Group]) -> None:
    """``anchored``: :func:`shapes` of the anchor. Raises TrainingError that names the first difference."""
    current = shapes(groups)
    if list(current.items()) == list(anchored.items()):
        return
    missing = [name for name in anchored if name not in current]
    added = [name for name in current if name not in anchored]
    if missing or added:
        raise TrainingError(
            "the anchor was taken of other modules: "
            f"it has {len(anchored)} groups, the model {len(current)}; "
            f"{_first('only in the anchor', missing)}{_first('only in the model', added)}"
            "call anchor(model) with the adapter that is trained now"
        )
    for name, shape in anchored.items():
        if shape != current[name]:
            raise TrainingError(
                f"the anchor of {name} has shape {shape}, the model's is {current[name]}: "
                "an adapter of another rank or backbone. Keep both over the stages, or call anchor(model) "
                "with the adapter that is trained now"
            )
    raise TrainingError(
        "the anchor's modules come in another order than the model's: call anchor(model) again"
    )


def _first(what: str, names: list[str]) -> str:
    return f"{what}: {names[0]}{' …' if len(names) > 1 else ''}; " if names else ""


def _parts(source: nn.Module | Iterable[nn.Module | Tensor]) -> list[nn.Module | Tensor]:
    if isinstance(source, nn.Module):
        return [source]
    parts = [] if isinstance(source, Tensor) else list(source)
    if not parts or not all(isinstance(part, Tensor | nn.Module) for part in parts):
        raise TypeError(f"expected a model or a list of tensors, got {type(source).__name__}")
    return parts


def _of_model(model: nn.Module, adapter: str | None) -> list[Group]:
    name, layers = find_layers(model, adapter)
    groups = []
    for module, layer in layers.items():
        for factor, holders in (
            ("A", (layer.lora_A, layer.lora_embedding_A)),
            ("B", (layer.lora_B, layer.lora_embedding_B)),
        ):
            for holder in holders:
                if name in holder:
                    matrix = holder[name]
                    groups.append(Group(module, factor, getattr(matrix, "weight", matrix)))
    return groups


def _active(layers: list[tuple[str, Any]]) -> str:
    active = sorted({name for _, layer in layers for name in layer.active_adapters})
    if len(active) > 1:
        active = [name for name in active if name != PAST]
    if len(active) != 1:
        raise TrainingError(
            f"{len(active)} adapters are active ({', '.join(active)}): "
            "activate one with model.set_adapter(name), or say which one is meant with adapter=name"
        )
    return active[0]


def _plain(path: str) -> str:
    """The path without what PEFT, DDP and ``torch.compile`` put around a model, so that an anchor taken
    before wrapping fits after it."""
    return path.rpartition("base_model.model.")[2].replace("_orig_mod.", "").removeprefix("module.")

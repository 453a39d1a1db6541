"""The frozen layers of a backbone, sharded over several processes (FSDP2: ``torch.distributed.fsdp``).

Each process stores an equal part of every weight of the decoder's layers, and gathers one layer at a time in
the forward and the backward pass. Everything else is whole on every process: adapters, embedding, head, final
norm and vocabulary. Gathering needs all processes, so all must take the same number of passes, in the same
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peso.errors import BackboneError
from peso.model.ensemble import Ensemble
from peso.model.generative import GenerativeModel
from peso.runtime.processes import Processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@cache  # a mesh may make connections, which are never closed
def mesh_of(kind: str, count: int) -> DeviceMesh:
    """A mesh of all ``count`` processes, each with a device of this kind, such as ``cuda``. Every process
    must call this function."""
    from torch.distributed.device_mesh import init_device_mesh

    # PEFT knows this name: adapters that are added later get the full shapes
    return init_device_mesh(kind, (count,), mesh_dim_names=("fsdp",))


def shard(model: GenerativeModel | Ensemble, mesh: DeviceMesh, device: torch.device) -> None:
    """Move a model from the CPU to a device, and keep only this process's part of each layer of its decoder.

    Layers are moved one by one. Nothing is exchanged, because every process has the same model.

    Args:
        model: a model on the CPU with frozen layers. It is changed in place.
        mesh: see :func:`mesh_of`.
        device: the device of this process.

    Raises:
        BackboneError: the backbone has no list of layers.
    """
    from torch.distributed.fsdp import fully_shard

    for member in model.members if isinstance(model, Ensemble) else [model]:
        decoder = member.causal_lm.get_decoder()
        for layer in _layers(decoder, member.causal_lm):
            # adapters are small, and may be trained; their gradients are summed like those of the vocabulary
            adapters = {p for name, p in layer.named_parameters() if "lora_" in name}
            fully_shard(layer, mesh=mesh, ignored_params=adapters)
        # the decoder shards nothing itself, but lets a layer be gathered while the one before it computes
        fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))
        member.sharded = True
    model.to(device)


def _layers(decoder: nn.Module, causal_lm: Any) -> nn.ModuleList:
    count = causal_lm.config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise BackboneError(
        f"{type(causal_lm).__name__} has no list of {count} layers that could be distributed over processes; "
        "set training.sharding=none"
    )


@contextmanager
def uneven_passes(model: GenerativeModel | Ensemble, processes: Processes) -> Iterator[None]:
    """A context in which the processes may take different numbers of forward passes without gradients through
    a sharded model. At its end, a process takes empty passes until the others have finished, too.

    Before each pass, the processes exchange whether any of them still computes. Without a sharded model,
    nothing is exchanged.
    """
    if not model.sharded or processes.count == 1:
        yield
        return

    def announce(*_: object) -> None:
        processes.sum_numbers(1.0)

    with model.causal_lm.get_decoder().register_forward_pre_hook(announce, prepend=True):
        yield
    nothing = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    while processes.sum_numbers(0.0)[0]:
        model.hidden(nothing, None, nothing)

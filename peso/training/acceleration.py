"""Gradient checkpointing and compilation, which change the cost of a training step, but not its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from peso.errors import TrainingError
from peso.model.generative import GenerativeModel
from peso.model.tree_attention import along_trees


@contextmanager
def gradient_checkpointing(model: GenerativeModel, wanted: bool) -> Iterator[None]:
    """A context in which layers in training mode store only their inputs, and are computed again in the
    backward pass. This needs less memory and about a third more computation.

    Args:
        wanted: whether to use gradient checkpointing; if not, nothing changes.

    Raises:
        TrainingError: Transformers does not support it for this backbone.
    """
    causal_lm = model.causal_lm
    if not wanted:
        yield
        return
    if not causal_lm.supports_gradient_checkpointing:
        raise TrainingError(
            f"{type(causal_lm).__name__} does not support gradient checkpointing; "
            "remove training.gradient_checkpointing"
        )
    causal_lm.activation_checkpointing_enable()
    try:
        with along_trees(causal_lm):  # must include the backward pass
            yield
    finally:
        causal_lm.activation_checkpointing_disable()


@contextmanager
def compiled(model: GenerativeModel, wanted: bool | Literal["auto"]) -> Iterator[None]:
    """A context in which the decoder's layers are compiled with dynamic shapes.

    Layers are compiled one by one instead of the whole decoder. They have the same code, so one compilation
    serves all of them.

    Args:
        wanted: whether to compile; ``auto`` to compile only on a GPU.

    Raises:
        TrainingError: the backbone cannot be compiled.
    """
    if not wanted or (wanted == "auto" and model.device.type != "cuda"):
        yield
        return
    decoder = model.causal_lm.get_decoder()
    regions = list(getattr(decoder, "layers", [decoder]))
    before = [region._compiled_call_impl for region in regions]
    for region in regions:
        region.compile(dynamic=True)
    # otherwise, sizes that happen to be equal in the first call are assumed to be always equal
    sizes: Any = torch.fx.experimental._config
    try:
        with sizes.patch(use_duck_shape=False):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        cause = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"the backbone cannot be compiled ({cause}); set training.compile: false"
        ) from error
    finally:
        for region, implementation in zip(regions, before, strict=True):
            region._compiled_call_impl = implementation


def not_compiled() -> AbstractContextManager[object]:
    """A context in which compiled layers run uncompiled. Validation takes only a few passes, for which the
    layers would have to be compiled again, in evaluation mode."""
    return torch.compiler.set_stance("force_eager")

"""Options that change the cost of a training step but not its result."""

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
    """Within the context layers keep only their inputs and are computed again for the gradient: less memory,
    about a third more computation. In training mode alone.

    Raises:
        TrainingError: Transformers cannot do it for this backbone.
    """
    causal_lm = model.causal_lm
    if not wanted:
        yield
        return
    if not causal_lm.supports_gradient_checkpointing:
        raise TrainingError(
            f"{type(causal_lm).__name__} has no gradient checkpointing; "
            "leave training.gradient_checkpointing out"
        )
    causal_lm.activation_checkpointing_enable()
    try:
        with along_trees(causal_lm):  # until the gradient is taken
            yield
    finally:
        causal_lm.activation_checkpointing_disable()


@contextmanager
def compiled(model: GenerativeModel, wanted: bool | Literal["auto"]) -> Iterator[None]:
    """Within the context the decoder's layers are compiled, for any number of rows and tokens; ``auto``: on a
    GPU.

    Layer by layer: they are alike, so one compilation serves them all, where the whole decoder would take
    many times as long.
    """
    if not wanted or (wanted == "auto" and model.device.type != "cuda"):
        yield
        return
    decoder = model.causal_lm.get_decoder()
    regions = list(getattr(decoder, "layers", [decoder]))
    before = [region._compiled_call_impl for region in regions]
    for region in regions:
        region.compile(dynamic=True)
    # two sizes that happen to be equal once are two sizes all the same: else they are compiled once more
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


def as_written() -> AbstractContextManager[object]:
    """Within the context nothing that is compiled runs so: a validation, whose passes are few, would first
    have the layers compiled once more, without dropout and gradients."""
    return torch.compiler.set_stance("force_eager")

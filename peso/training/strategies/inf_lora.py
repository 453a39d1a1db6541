"""``inf_lora``: new adapters learn where inputs of earlier stages have no component (arXiv 2404.00228).

InfLoRA (Liang & Li, CVPR 2024). The memory of earlier inputs is DualGPM's, of every stage up to the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from peso.errors import TrainingError
from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

ROUNDING = 1e-10  # of all energy: directions with less of it are rounding


@dataclass(frozen=True)
class Protected:
    """A subspace of inputs, kept by a basis of itself or of what is left over, whichever is smaller.

    ``basis``: (width, directions), orthonormal columns; ``dual``: they span what is free instead.
    """

    basis: Tensor
    dual: bool

    @classmethod
    def nothing(cls, width: int) -> Protected:
        from torch import zeros

        return cls(zeros(width, 0), dual=False)

    @property
    def free(self) -> int:
        """Dimensions that are not protected."""
        width, directions = self.basis.shape
        return directions if self.dual else width - directions

    def strongest_free(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (free,) of these inputs in what is free, strongest first; the directions, (width, free).

        In coordinates of the free space, so that nothing of a direction leaks into what is protected, however
        much stronger the inputs are there. float64, on the moment's device.
        """
        from torch.linalg import eigh

        inside = self._free_basis().to(moment.device)
        energies, directions = eigh(inside.T @ moment.double() @ inside)
        return energies.flip(0).clamp_min(0), inside @ directions.flip(1)

    def _free_basis(self) -> Tensor:
        """(width, free) orthonormal columns, float64; the stored float32 ones are so to 1e-7 only."""
        basis = self.basis.double()
        return _orthonormal(basis) if self.dual else _complement(basis)

    def grown(self, moment: Tensor, threshold: float) -> Protected:
        """With as many further directions, strongest first, as it takes for the share ``threshold`` of the
        energy of these inputs (the trace of their second moment) to lie in what is protected."""
        from torch import cat

        energies, directions = self.strongest_free(moment)
        free_energy = energies.flip(0).cumsum(0).flip(0)  # left free if all before are protected
        allowed = (1 - threshold) * float(moment.double().trace())
        count = int((free_energy > allowed + ROUNDING * float(moment.double().trace())).sum())
        if count == 0:
            return self
        new = directions[:, :count].cpu()
        basis = self.basis.double()
        if self.dual:
            # the free part is what is left of it: its own coordinates, the new directions taken out
            left = _complement(basis.T @ new)
            return Protected((basis @ left).float(), dual=True)
        basis = cat([basis, new], dim=1)
        if basis.shape[1] <= len(basis) / 2:
            return Protected(_orthonormal(basis).float(), dual=False)
        return Protected(_complement(basis).float(), dual=True)

    def free_directions(self, moment: Tensor, count: int) -> Tensor:
        """(count, width) orthonormal rows: the free directions in which these inputs have most energy. Rows
        beyond those in which they have any are zero: nothing could be learnt along them."""
        from torch import float32

        energies, directions = self.strongest_free(moment)
        strong = energies[:count] > ROUNDING * float(moment.double().trace())
        rows = moment.new_zeros(count, len(moment), dtype=float32)
        rows[: len(strong)] = (directions[:, :count] * strong).T.float()
        return rows


def _orthonormal(columns: Tensor) -> Tensor:
    """The same span; a chain of many stages would let rounding grow."""
    from torch.linalg import qr

    orthonormal: Tensor = qr(columns)[0]
    return orthonormal


def _complement(columns: Tensor) -> Tensor:
    """Orthonormal columns that span what is orthogonal to these, which are linearly independent."""
    from torch.linalg import qr

    whole: Tensor = qr(columns, mode="complete")[0]
    return whole[:, columns.shape[1] :]


PREFIX = "inputs."
ROW_NORM = 1 / math.sqrt(3)  # of a row of A: the authors', and what a row as PEFT draws it has


class InfLora(Strategy):
    """A new adapter whose A spans directions free of earlier inputs, B alone trained (InfLoRA).

    W + s Σ_{i<t} B_i A_i + s B_t A_t, of which B_t alone is learned, from zero.

    The rows of A_t are the strongest directions of the new stage's inputs (of each layer) among those that
    the inputs of the stages before hardly use, so W x stays what it was for them: A_t x ≈ 0. ``threshold``
    of their energy is protected; ``examples`` target sequences of a stage are looked at. Stage 0 is learnt
    like any strategy's; its inputs are looked at when stage 1 begins.
    """

    name = "inf_lora"
    reads = frozenset({"past", "inputs"})
    needs = frozenset({"inputs"})

    class Options(Strategy.Options):
        threshold: float = Field(
            0.95, gt=0, le=1, description="share of the inputs' energy that is protected"
        )
        examples: int = Field(512, ge=1, description="target sequences whose inputs are looked at")

    options: Options

    def begin(self, context: StageContext) -> None:
        from peso.adapters.groups import lora_layers
        from peso.adapters.lora import TRAINED, Past, put_past, read_adapter, redraw_adapter

        past, last = Past.of_state(context.memory), read_adapter(context.backbone)
        if last.acts:  # else the last stage trained the backbone itself
            past = last if past is None else past + last
        redraw_adapter(context.backbone, (context.seed, context.number))
        if past is not None:
            put_past(context.backbone, past)
            context.memory.update(past.state())
        # with B zero, the model answers as the last stage left it, for both
        before, same = self._moments(context, context.number - 1)
        now, _ = self._moments(context, context.number)
        known = protected(context.memory)
        spaces = {
            name: known.get(name, Protected.nothing(len(moment))).grown(moment, self.options.threshold)
            for name, moment in before.items()
        }
        for key in [key for key in context.memory if key.startswith(PREFIX)]:
            del context.memory[key]  # a basis may have changed its kind, and its name with it
        context.memory.update(as_tensors(spaces))
        layers = lora_layers(context.backbone)
        for name, layer in layers.items():
            down, owner = layer.lora_A[TRAINED].weight, same[name]
            down.data.copy_(ROW_NORM * spaces[owner].free_directions(now[owner], len(down)))
            down.requires_grad_(False)
        if not any(bool(layer.lora_A[TRAINED].weight.any()) for layer in layers.values()):
            raise TrainingError(
                f"stage {context.number}: strategy.threshold {self.options.threshold} leaves no direction "
                "free of earlier inputs in any layer; lower it"
            )

    def _moments(self, context: StageContext, stage: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        assert context.examples is not None
        with second_moments(context.backbone) as (moments, same):
            context.examples.show(stage, self.options.examples)
        return moments, same


@contextmanager
def second_moments(backbone: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """What goes into LoRA layers within this context, as Σ x xᵀ, float32 (width, width).

    Yields:
        Σ x xᵀ by layer, once for layers that read the same tensor (as q, k and v do); and for each layer the
        one under whose name it is.
    """
    from peso.adapters.groups import lora_layers

    moments: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    newest: list[tuple[Tensor, str]] = []  # the tensor that was read last, and who read it first

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if newest and newest[0][0] is x:
            same[name] = newest[0][1]
            return
        newest[:] = [(x, name)]
        same[name] = name
        rows = x.detach().flatten(0, -2).float()
        moments[name] = moments[name] + rows.T @ rows if name in moments else rows.T @ rows

    def hook(name: str) -> object:
        return lambda _, inputs: look(name, inputs)

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in lora_layers(backbone).items()]
    try:
        yield moments, same
    finally:
        for handle in handles:
            handle.remove()


def as_tensors(spaces: Mapping[str, Protected]) -> dict[str, Tensor]:
    """By name, for a file."""
    return {
        f"{PREFIX}{name}.{'free' if space.dual else 'protected'}": space.basis.contiguous()
        for name, space in spaces.items()
    }


def protected(memory: Mapping[str, Tensor]) -> dict[str, Protected]:
    """From :func:`as_tensors`, other tensors beside it or not."""
    result = {}
    for key, basis in memory.items():
        if key.startswith(PREFIX):
            name, _, kind = key.removeprefix(PREFIX).rpartition(".")
            result[name] = Protected(basis, dual=kind == "free")
    return result

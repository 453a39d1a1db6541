"""``inf_lora``: new adapters act on directions that inputs of earlier stages do not use (arXiv 2404.00228).

InfLoRA (Liang & Li, CVPR 2024). The inputs of earlier stages are stored as in DualGPM.
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

ROUNDING = 1e-10  # share of the total energy below which a direction is rounding error


@dataclass(frozen=True)
class Protected:
    """A protected subspace of a layer's inputs, stored as a basis of itself or of its orthogonal complement,
    whichever is smaller.

    ``basis``: (width, directions), orthonormal columns; ``dual``: they span the complement (the free
    directions).
    """

    basis: Tensor
    dual: bool

    @classmethod
    def nothing(cls, width: int) -> Protected:
        from torch import zeros

        return cls(zeros(width, 0), dual=False)

    @property
    def free(self) -> int:
        """Dimension of the complement."""
        width, directions = self.basis.shape
        return directions if self.dual else width - directions

    def strongest_free(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        """Principal directions of some inputs within the complement, strongest first.

        Computed in coordinates of the complement, so that no direction has a protected component, however
        much stronger the inputs are there.

        Args:
            moment: (width, width), second moment Σ x xᵀ of the inputs.

        Returns:
            Energies (free,) and directions (width, free), float64 on the moment's device.
        """
        from torch.linalg import eigh

        inside = self._free_basis().to(moment.device)
        energies, directions = eigh(inside.T @ moment.double() @ inside)
        return energies.flip(0).clamp_min(0), inside @ directions.flip(1)

    def _free_basis(self) -> Tensor:
        """(width, free) orthonormal columns in float64; the stored ones are orthonormal in float32 only."""
        basis = self.basis.double()
        return _orthonormal(basis) if self.dual else _complement(basis)

    def grown(self, moment: Tensor, threshold: float) -> Protected:
        """The subspace, extended by the strongest free directions of some inputs until it contains the share
        ``threshold`` of their energy.

        Args:
            moment: (width, width), second moment Σ x xᵀ of the inputs; their energy is its trace.
        """
        from torch import cat

        energies, directions = self.strongest_free(moment)
        free_energy = energies.flip(0).cumsum(0).flip(0)  # left outside if all earlier ones are protected
        allowed = (1 - threshold) * float(moment.double().trace())
        count = int((free_energy > allowed + ROUNDING * float(moment.double().trace())).sum())
        if count == 0:
            return self
        new = directions[:, :count].cpu()
        basis = self.basis.double()
        if self.dual:
            # in coordinates of the old complement: the complement of the new directions
            left = _complement(basis.T @ new)
            return Protected((basis @ left).float(), dual=True)
        basis = cat([basis, new], dim=1)
        if basis.shape[1] <= len(basis) / 2:
            return Protected(_orthonormal(basis).float(), dual=False)
        return Protected(_complement(basis).float(), dual=True)

    def free_directions(self, moment: Tensor, count: int) -> Tensor:
        """(count, width) float32 orthonormal rows: the free directions in which the inputs with second moment
        ``moment`` have most energy. Rows without energy are zero: no gradient would reach them."""
        from torch import float32

        energies, directions = self.strongest_free(moment)
        strong = energies[:count] > ROUNDING * float(moment.double().trace())
        rows = moment.new_zeros(count, len(moment), dtype=float32)
        rows[: len(strong)] = (directions[:, :count] * strong).T.float()
        return rows


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same span; without this, rounding would accumulate over the stages."""
    from torch.linalg import qr

    orthonormal: Tensor = qr(columns)[0]
    return orthonormal


def _complement(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the orthogonal complement of linearly independent columns."""
    from torch.linalg import qr

    whole: Tensor = qr(columns, mode="complete")[0]
    return whole[:, columns.shape[1] :]


PREFIX = "inputs."
ROW_NORM = 1 / math.sqrt(3)  # norm of a row of A, as in the authors' code and in PEFT's initialization


class InfLora(Strategy):
    """A new adapter with a fixed A that spans directions free of earlier inputs; only B is trained (InfLoRA).

    W + s Σ_{i<t} B_i A_i + s B_t A_t, where only B_t is trained, starting from zero.

    For each layer, the rows of A_t are the strongest directions of the new stage's inputs outside the
    protected subspace, which holds the share ``threshold`` of the energy of earlier stages' inputs. For those
    inputs A_t x ≈ 0, so the layer's output does not change. Inputs are measured on ``examples`` target
    sequences per stage; those of stage 0 when stage 1 begins.
    """

    name = "inf_lora"
    reads = frozenset({"past", "inputs"})
    needs = frozenset({"inputs"})

    class Options(Strategy.Options):
        threshold: float = Field(
            0.95, gt=0, le=1, description="share of the inputs' energy that is protected"
        )
        examples: int = Field(512, ge=1, description="number of target sequences whose inputs are measured")

    options: Options

    def begin(self, context: StageContext) -> None:
        from peso.adapters.groups import lora_layers
        from peso.adapters.lora import TRAINED, start_new_adapter

        start_new_adapter(context.backbone, context.memory, (context.seed, context.number))
        # B is zero, so both are measured with the model of the last stage
        before, same = self._moments(context, context.number - 1)
        now, _ = self._moments(context, context.number)
        known = protected(context.memory)
        spaces = {
            name: known.get(name, Protected.nothing(len(moment))).grown(moment, self.options.threshold)
            for name, moment in before.items()
        }
        for key in [key for key in context.memory if key.startswith(PREFIX)]:
            del context.memory[key]  # a basis that became dual has another name
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
    """Collect the second moments Σ x xᵀ of the inputs of all LoRA layers within the context.

    Yields:
        Two dictionaries that fill as the model runs: name of a layer → Σ x xᵀ, float32 (width, width), once
        for layers that read the same tensor (as q, k and v do); name of each layer → key in the first.
    """
    from peso.adapters.groups import lora_layers

    moments: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    newest: list[tuple[Tensor, str]] = []  # the last input tensor, and the layer that read it first

    def record(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if newest and newest[0][0] is x:
            same[name] = newest[0][1]
            return
        newest[:] = [(x, name)]
        same[name] = name
        rows = x.detach().flatten(0, -2).float()
        moments[name] = moments[name] + rows.T @ rows if name in moments else rows.T @ rows

    def hook(name: str) -> object:
        return lambda _, inputs: record(name, inputs)

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in lora_layers(backbone).items()]
    try:
        yield moments, same
    finally:
        for handle in handles:
            handle.remove()


def as_tensors(spaces: Mapping[str, Protected]) -> dict[str, Tensor]:
    """The bases by name, for storage in :attr:`StageContext.memory`."""
    return {
        f"{PREFIX}{name}.{'free' if space.dual else 'protected'}": space.basis.contiguous()
        for name, space in spaces.items()
    }


def protected(memory: Mapping[str, Tensor]) -> dict[str, Protected]:
    """The subspaces that :func:`as_tensors` stored; other tensors are ignored."""
    result = {}
    for key, basis in memory.items():
        if key.startswith(PREFIX):
            name, _, kind = key.removeprefix(PREFIX).rpartition(".")
            result[name] = Protected(basis, dual=kind == "free")
    return result

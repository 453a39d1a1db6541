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

ROUNDING = 1e-10  # a direction with less than this share of the total energy is a rounding error


@dataclass(frozen=True)
class Protected:
    """A protected subspace of a layer's inputs, stored as a basis of itself or of its orthogonal complement,
    whichever is smaller.

    Attributes:
        basis: (width, directions), orthonormal columns.
        dual: whether the columns span the complement, which has the free directions, instead of the subspace.
    """

    basis: Tensor
    dual: bool

    @classmethod
    def nothing(cls, width: int) -> Protected:
        """The empty subspace of inputs of this width."""
        from torch import zeros

        return cls(zeros(width, 0), dual=False)

    @property
    def free(self) -> int:
        """The dimension of the complement."""
        width, directions = self.basis.shape
        return directions if self.dual else width - directions

    def strongest_free(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        """The principal directions of some inputs within the complement, strongest first.

        They are computed in coordinates of the complement, so that no direction has a protected component,
        even if the inputs are much stronger there.

        Args:
            moment: (width, width), the second moment Σ x xᵀ of the inputs.

        Returns:
            Their energies (free,) and the directions (width, free), in float64 on the device of ``moment``.
        """
        from torch.linalg import eigh

        inside = self._free_basis().to(moment.device)
        energies, directions = eigh(inside.T @ moment.double() @ inside)
        return energies.flip(0).clamp_min(0), inside @ directions.flip(1)

    def _free_basis(self) -> Tensor:
        """Orthonormal columns (width, free) in float64, because the stored ones are orthonormal only in
        float32."""
        basis = self.basis.double()
        return _orthonormal(basis) if self.dual else _complement(basis)

    def grown(self, moment: Tensor, threshold: float) -> Protected:
        """The subspace, extended by the strongest free directions of some inputs until it contains the share
        ``threshold`` of their energy.

        Args:
            moment: (width, width), the second moment Σ x xᵀ of the inputs. Its trace is their energy.
            threshold: the share.
        """
        from torch import cat

        energies, directions = self.strongest_free(moment)
        free_energy = energies.flip(0).cumsum(0).flip(0)  # not contained if all stronger ones are protected
        allowed = (1 - threshold) * float(moment.double().trace())
        count = int((free_energy > allowed + ROUNDING * float(moment.double().trace())).sum())
        if count == 0:
            return self
        new = directions[:, :count].cpu()
        basis = self.basis.double()
        if self.dual:
            # the complement of the new directions, in coordinates of the old complement
            left = _complement(basis.T @ new)
            return Protected((basis @ left).float(), dual=True)
        basis = cat([basis, new], dim=1)
        if basis.shape[1] <= len(basis) / 2:
            return Protected(_orthonormal(basis).float(), dual=False)
        return Protected(_complement(basis).float(), dual=True)

    def free_directions(self, moment: Tensor, count: int) -> Tensor:
        """The free directions in which some inputs have the most energy, as orthonormal rows.

        Rows without energy are zero, because no gradient would reach them.

        Args:
            moment: (width, width), the second moment Σ x xᵀ of the inputs.
            count: the number of rows.

        Returns:
            float32 (count, width).
        """
        from torch import float32

        energies, directions = self.strongest_free(moment)
        strong = energies[:count] > ROUNDING * float(moment.double().trace())
        rows = moment.new_zeros(count, len(moment), dtype=float32)
        rows[: len(strong)] = (directions[:, :count] * strong).T.float()
        return rows


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same span. Otherwise, rounding errors would add up over the stages."""
    from torch.linalg import qr

    orthonormal: Tensor = qr(columns)[0]
    return orthonormal


def _complement(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the orthogonal complement of linearly independent columns."""
    from torch.linalg import qr

    whole: Tensor = qr(columns, mode="complete")[0]
    return whole[:, columns.shape[1] :]


PREFIX = "inputs."
ROW_NORM = 1 / math.sqrt(3)  # the norm of a row of A, as in the authors' code and PEFT's initialization


class InfLora(Strategy):
    """A new adapter with a fixed A, whose directions earlier inputs do not use; only B is trained (InfLoRA).

    The weights of stage t are W + s Σ_{i<t} B_i A_i + s B_t A_t, where only B_t is trained, starting from
    zero.

    For each layer, the rows of A_t are the strongest directions of the new stage's inputs outside of a
    protected subspace. This subspace contains the share ``threshold`` of the energy of the inputs of earlier
    stages. For these inputs A_t x ≈ 0, so the output of the layer does not change. The inputs are measured on
    ``examples`` target sequences of each stage; those of a stage are measured when the next stage begins.
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
        # B is zero, so both are measured with the model of the previous stage
        before, same = self._moments(context, context.number - 1)
        now, _ = self._moments(context, context.number)
        known = protected(context.memory)
        spaces = {
            name: known.get(name, Protected.nothing(len(moment))).grown(moment, self.options.threshold)
            for name, moment in before.items()
        }
        for key in [key for key in context.memory if key.startswith(PREFIX)]:
            del context.memory[key]  # because a basis that became dual has another name
        context.memory.update(as_tensors(spaces))
        layers = lora_layers(context.backbone)
        for name, layer in layers.items():
            down, owner = layer.lora_A[TRAINED].weight, same[name]
            down.data.copy_(ROW_NORM * spaces[owner].free_directions(now[owner], len(down)))
            down.requires_grad_(False)
        if not any(bool(layer.lora_A[TRAINED].weight.any()) for layer in layers.values()):
            raise TrainingError(
                f"stage {context.number}: with strategy.threshold {self.options.threshold}, the inputs of "
                "earlier stages use all directions of every layer; use a lower threshold"
            )

    def _moments(self, context: StageContext, stage: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The results of :func:`second_moments` for the inputs of a stage."""
        assert context.examples is not None
        with second_moments(context.backbone) as (moments, same):
            context.examples.show(stage, self.options.examples)
        return moments, same


@contextmanager
def second_moments(backbone: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """A context in which the second moments Σ x xᵀ of the inputs of all LoRA layers are collected.

    Yields:
        Two dictionaries that are filled when the model runs. The first has Σ x xᵀ, float32 (width, width), by
        the name of a layer, only once for layers that read the same tensor (as q, k and v do). The second has
        the key in the first one for each layer.
    """
    from peso.adapters.groups import lora_layers

    moments: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    newest: list[tuple[Tensor, str]] = []  # the last input, and the first layer that read it

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
    """The bases by name, as stored in :attr:`StageContext.memory`."""
    return {
        f"{PREFIX}{name}.{'free' if space.dual else 'protected'}": space.basis.contiguous()
        for name, space in spaces.items()
    }


def protected(memory: Mapping[str, Tensor]) -> dict[str, Protected]:
    """The subspaces that :func:`as_tensors` stored. Other tensors are ignored."""
    result = {}
    for key, basis in memory.items():
        if key.startswith(PREFIX):
            name, _, kind = key.removeprefix(PREFIX).rpartition(".")
            result[name] = Protected(basis, dual=kind == "free")
    return result

"""``orthogonal``: what is learnt shall not use the directions that the anchor reads."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from peso.continual.groups import Group, Source, check_same_groups, find_groups, shapes
from peso.continual.proximal.term import Coupling, Reduction, Term
from peso.continual.stacks import placement
from peso.errors import TrainingError


class Orthogonal(Term):
    """λ · Σ_modules ‖A·Âᵀ‖_F², Â the anchor's A with rows of length 1.

    The penalty of O-LoRA (Wang et al. 2023, arXiv 2310.14152; there Â is not normalised and belongs to
    another, frozen adapter) on the one evolving adapter, as in the ablation of PESO (arXiv 2510.25093). It is
    no distance to the anchor: it is not 0 there, and descending it leads away. Only A matters; B and tensors
    that belong to no LoRA module are left alone. It has no decoupled form.

    Args:
        weight: λ; 0.5, O-LoRA's, where neither it nor a strength is given.
        strength: λ = strength · ρ̄ with tr(H) = Σ_modules 2·r·‖Â‖_F²: it sets the scale, but there is no
            interpolation to the anchor.
        reduction: ``sum`` over the modules, or ``mean``.
        adapter: name of the PEFT adapter; None: the one that is active when the term is called.
        coupling: ``loss``.

    Raises:
        ConfigError: an impossible argument.
    """

    has_decoupled_form = False

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "sum",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
    ) -> None:
        super().__init__(
            weight, reduction, adapter, strength=strength, coupling=coupling, weight_by_default=0.5
        )
        self._anchored: dict[str, tuple[int, ...]] = {}
        self._directions: list[Tensor] = []  # (rank, in) each, rows of length 1, or 0 where A has none

    def anchor(self, source: Source) -> None:
        groups = self._factors(source)
        self._anchored = shapes(groups)
        self._directions = [
            torch.nn.functional.normalize(_rows(group.tensor.detach()), dim=-1) for group in groups
        ]
        self._calibration = None

    def value_at(self, source: Source, weight: float) -> Tensor:
        alike = defaultdict(list)  # one product for all modules of a size
        for group, directions in zip(self.groups_of(source), self._directions, strict=True):
            rows = _rows(group.tensor)
            alike[rows.shape, placement(rows)].append((rows, directions.to(rows)))
        total: Tensor | None = None
        for pairs in alike.values():
            rows, directions = (torch.stack(side) for side in zip(*pairs, strict=True))
            with torch.autocast(rows.device.type, enabled=False):
                squares = torch.bmm(rows, directions.mT).square().sum()
            total = squares if total is None else total + squares.to(total.device)
        assert total is not None
        return total * (weight / self._divisor)

    def metric_trace(self) -> float:
        self._check_anchored()
        traces = [2 * len(rows) * float(rows.square().sum()) for rows in self._directions]
        return sum(traces) / self._divisor

    def groups_of(self, source: Source) -> list[Group]:
        self._check_anchored()
        groups = self._factors(source)
        check_same_groups(self._anchored, groups)
        return groups

    def _factors(self, source: Source) -> list[Group]:
        groups = [group for group in find_groups(source, self.adapter) if group.factor == "A"]
        if not groups:
            raise TrainingError("Orthogonal needs a model with LoRA modules: plain tensors have no A")
        return groups

    @property
    def _divisor(self) -> int:
        return len(self._directions) if self.reduction == "mean" else 1

    def _check_anchored(self) -> None:
        if not self._anchored:
            raise TrainingError("the proximal term has no anchor yet: call anchor(model) before training")


def _rows(matrix: Tensor) -> Tensor:
    """(rank, in) in float32 or better."""
    return matrix.flatten(1).to(placement(matrix)[1])

"""``fisher``: the squared distance to the anchor, each value weighted by its effect on the last stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from peso.adapters.proximal.term import DistanceTerm, check_trained
from peso.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from peso.adapters.groups import Source, Stack
    from peso.adapters.proximal.metrics import DiagonalMetric


def diagonal_fisher(tensors: Sequence[Tensor], losses: Iterable[Tensor]) -> list[Tensor]:
    """E[(∇ loss)²] of every value, over the losses: float32 or better, in the tensors' shapes.

    The empirical Fisher information: gradients of the data's own targets, one example each, averaged after
    squaring. Gradients of the parameters (``.grad``) do not change.

    Args:
        losses: 0-d with their graphs. An iterator is advanced only when the last loss is done with.

    Raises:
        TrainingError: no loss, or a gradient that is not finite.
    """
    import torch

    sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    count = 0
    for loss in losses:
        for total, gradient in zip(
            sums, torch.autograd.grad(loss, list(tensors), allow_unused=True), strict=True
        ):
            if gradient is not None:
                total.add_(gradient.to(total.dtype).square())
        count += 1
    if not count:
        raise TrainingError("no losses to estimate the Fisher information from")
    result = [total / count for total in sums]
    if not all(bool(values.isfinite().all()) for values in result):
        raise TrainingError("the gradients to estimate the Fisher information from are not finite")
    return result


class Fisher(DistanceTerm):
    """λ · ½ · Σ_i F_i·(v_i − a_i)², F the diagonal Fisher information of the previous stage's data at a.

    The Laplace approximation of elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796):
    H = diag(F). The decoupled form shrinks by w = F / mean(F), the mean over everything that is anchored: the
    information also says which modules matter, and a mean over each group would divide that out. It has long
    tails: most values are far below the mean, and at strength 1 are hardly pulled. ::

        term = peso.Fisher(strength=1.0, coupling="decoupled")
        term.anchor(model, losses)            # of single targets of the stage that ends

    For the arguments see :class:`~peso.adapters.proximal.term.Term`.
    """

    name = "fisher"
    needs_losses = True

    _fisher: Sequence[Tensor] = ()
    _mean = 1.0

    def estimate(self, source: Source, losses: Iterable[Tensor]) -> dict[str, Tensor]:
        """The Fisher information of every group by its name, as :meth:`anchor` takes it: for a file.

        Raises:
            TrainingError: a frozen group, no loss, or gradients that are not finite.
        """
        groups = self.select(source)
        check_trained(groups)
        values = diagonal_fisher([group.tensor for group in groups], losses)
        return {group.name: value for group, value in zip(groups, values, strict=True)}

    def anchor(
        self,
        source: Source,
        losses: Iterable[Tensor] | None = None,
        *,
        fisher: Mapping[str, Tensor] | None = None,
    ) -> None:
        """As :meth:`Term.anchor`, with one of

        Args:
            losses: each the loss of one target of the stage that ends, 0-d with its graph.
            fisher: the result of :meth:`estimate`.

        Raises:
            TrainingError: neither or both of the two, a frozen group, information of other groups, or all 0.
        """
        if (losses is None) == (fisher is None):
            raise TrainingError(
                "Fisher needs to know what mattered to the last stage: anchor(model, losses) with the losses "
                "of some of its single targets, or anchor(model, fisher=term.estimate(model, losses))"
            )
        known = self.estimate(source, losses) if losses is not None else fisher or {}
        groups = self.select(source)
        for group in groups:
            values = known.get(group.name)
            if values is None or values.shape != group.tensor.shape:
                raise TrainingError(
                    f"the Fisher information is of other groups: {group.name} has shape "
                    f"{tuple(group.tensor.shape)}, its information "
                    f"{'is missing' if values is None else f'has {tuple(values.shape)}'}"
                )
        self._fisher = [known[group.name].detach().clone() for group in groups]
        count = sum(values.numel() for values in self._fisher)
        self._mean = sum(float(values.cpu().double().sum()) for values in self._fisher) / count
        if not self._mean > 0:
            raise TrainingError("the Fisher information is 0 everywhere: no gradient reached the adapter")
        super().anchor(source)

    def metric(self, stack: Stack) -> DiagonalMetric:
        from peso.adapters.proximal.metrics import DiagonalMetric

        return DiagonalMetric(stack.anchor.shape, stack.gather(self._fisher).to(stack.anchor), self._mean)

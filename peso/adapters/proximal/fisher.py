"""``fisher``: the squared distance to the anchor, with values weighted by their effect on the last stage."""

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
    """The empirical Fisher information: the mean of (∇ loss)² over the losses for every value.

    The gradients are those of single targets of the data. The gradients of the parameters (``.grad``) do not
    change.

    Args:
        tensors: the parameters.
        losses: losses of single targets, 0-d with their graphs. If it is an iterator, the next loss is
            requested only after the gradient of the previous one was computed.

    Returns:
        One tensor for each parameter, with its shape, in float32 or better.

    Raises:
        TrainingError: there are no losses, or a gradient is not finite.
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
        raise TrainingError(
            "the gradients for the Fisher information are not finite; check that every loss is finite, and "
            "compute them in float32"
        )
    return result


class Fisher(DistanceTerm):
    """λ · ½ · Σ_i F_i·(v_i − a_i)², where F is the diagonal Fisher information of the previous stage's data
    at the anchor a.

    This is the Laplace approximation of elastic weight consolidation (Kirkpatrick et al. 2017, arXiv
    1612.00796), with H = diag(F). The weights of the decoupled form are w = F / mean(F). The mean is over all
    anchored values, because a mean over each group would remove the information on which modules matter. F
    has long tails: most values are far below the mean, and are hardly pulled at strength 1. ::

        term = peso.Fisher(strength=1.0, coupling="decoupled")
        term.anchor(model, losses)            # losses of single targets of the stage that ends

    See :class:`~peso.adapters.proximal.term.Term` for the arguments.
    """

    name = "fisher"
    needs_losses = True

    _fisher: Sequence[Tensor] = ()
    _mean = 1.0

    def estimate(self, source: Source, losses: Iterable[Tensor]) -> dict[str, Tensor]:
        """Compute the Fisher information of every group, by name, to be saved and passed to :meth:`anchor`.

        Args:
            source: see :meth:`anchor`.
            losses: see :func:`diagonal_fisher`.

        Raises:
            TrainingError: a group is frozen, there are no losses, or a gradient is not finite.
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
        """Set the anchor, see :meth:`Term.anchor`. Either ``losses`` or ``fisher`` must be given.

        Args:
            source: a model or tensors, see :meth:`Term.anchor`.
            losses: losses of single targets of the stage that ends, 0-d with their graphs.
            fisher: the result of :meth:`estimate`.

        Raises:
            TrainingError: neither or both of the two are given, a group is frozen, or the Fisher information
                belongs to other groups or is 0 everywhere.
        """
        if (losses is None) == (fisher is None):
            raise TrainingError(
                "Fisher needs data of the last stage: call anchor(model, losses) with losses of single "
                "targets, or anchor(model, fisher=term.estimate(model, losses))"
            )
        known = self.estimate(source, losses) if losses is not None else fisher or {}
        groups = self.select(source)
        for group in groups:
            values = known.get(group.name)
            if values is None or values.shape != group.tensor.shape:
                raise TrainingError(
                    f"the Fisher information belongs to other groups: {group.name} has shape "
                    f"{tuple(group.tensor.shape)}, but its information "
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

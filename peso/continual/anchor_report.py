"""Whether an anchor held: how far an adapter moved from where a stage began, and what the penalty pulled.

Knows two states of an adapter and the records of the steps between them; knows nothing of the strategy that
led from one to the other, nor of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from peso.continual.grouping import find_units
from peso.continual.groups import Group, check_same_groups, shapes
from peso.continual.proximal.metrics import SoftmaxMetric
from peso.continual.softmax_kl import second_order, softmax_kl
from peso.continual.stacks import Gather, placement, stack_anchors

NO_EFFECT = 0.01  # of the loss's gradient: below, a penalty is lost in the noise between two batches
SUGGESTED = 0.7  # the strength that the finding speaks of


def gradient_ratio(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean over the steps of ‖∇ penalty‖ / ‖∇ loss‖, each norm over the parameters it moves.

    Args:
        records: of ``log.jsonl``; those without a ``penalty_gradient_norm`` are passed over.

    Returns:
        None where there was no penalty in any step.

    >>> step = {"gradient_norm": 0.5, "penalty_gradient_norm": 0.0}
    >>> gradient_ratio([step, {**step, "penalty_gradient_norm": 0.1}, {"validation_loss": 3.2}])
    0.1
    >>> gradient_ratio([step]) is None
    True
    """
    ratios = _ratios(records)
    return sum(ratios) / len(ratios) if any(ratios) else None


def gradient_ratios(records: Iterable[Mapping[str, Any]], parts: int = 4) -> list[float] | None:
    """:func:`gradient_ratio` over time: of each quarter of the stage's steps.

    Args:
        records: of ``log.jsonl``, in order.
        parts: how many; with fewer steps than that, one value a step.

    Returns:
        None where there was no penalty in any step.

    >>> steps = [{"gradient_norm": 0.5, "penalty_gradient_norm": 0.1 * step} for step in range(5)]
    >>> [round(ratio, 3) for ratio in gradient_ratios(steps, parts=2)]
    [0.1, 0.6]
    """
    ratios = _ratios(records)
    if not any(ratios):
        return None
    parts = min(parts, len(ratios))
    ends = [len(ratios) * (part + 1) // parts for part in range(parts)]
    return [sum(ratios[a:b]) / (b - a) for a, b in pairwise([0, *ends])]


def anchor_finding(
    stage: int, ratio: float | None, rho: float | None = None, strength: float = SUGGESTED
) -> str | None:
    """What a gradient ratio below ``NO_EFFECT`` means, in a sentence; None where there is nothing to say.

    Args:
        rho: ρ̄ of the term, where it was measured; then the sentence says which weight a strength would be.

    >>> anchor_finding(1, 0.0003, rho=4.4e4).split("; ")[1]
    'strength 0.7 would be weight 3.1e4'
    """
    if ratio is None or ratio >= NO_EFFECT:
        return None
    sentence = (
        f"stage {stage}: the penalty's gradient was {100 * ratio:.2g} % of the loss's on average: "
        "the anchor had no measurable effect at this weight"
    )
    if rho is None:
        return sentence
    return f"{sentence}; strength {strength:g} would be weight {_short(strength * rho)}"


def _ratios(records: Iterable[Mapping[str, Any]]) -> list[float]:
    return [
        record["penalty_gradient_norm"] / record["gradient_norm"]
        for record in records
        if record.get("penalty_gradient_norm") is not None and record["gradient_norm"]
    ]


def _short(value: float) -> str:
    """Two digits, as a configuration takes them: 3.1e4, 0.31."""
    return f"{value:.2g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


@torch.no_grad()
def anchor_report(
    before: Sequence[Group], after: Sequence[Group], temperature: float | Literal["auto"] = 1.0
) -> dict[str, Any]:
    """Distance moved, overall and by module.

        before = [group.snapshot() for group in find_groups(model)]     # then a stage is learnt
        metrics["anchor"] = anchor_report(before, find_groups(model))

    Args:
        before: the groups as the stage began (copies); after: the same groups as it ended.
        temperature: τ of the softmax, or ``auto``, see :class:`peso.SoftmaxKL`.

    Returns:
        ``distance`` (the L2 norm of v − a), ``kl`` (Σ_g KL(softmax(v/τ) ‖ softmax(a/τ))) and
        ``second_order`` (Σ_g ½·Var_p((v − a)/τ), which the KL tends to for small steps), and under
        ``modules`` the same three by name of the module.

    Raises:
        TrainingError: the two states have other modules or shapes.
    """
    check_same_groups(shapes(before), after)
    places = [placement(group.tensor) for group in after]
    measured: dict[str, torch.Tensor] = {}  # module → float64 (3,): squared distance, KL, second order

    def metric(anchor: torch.Tensor, gather: Gather) -> SoftmaxMetric:
        return SoftmaxMetric.of(anchor, temperature)

    anchors = [group.tensor for group in before]
    for stack in stack_anchors(anchors, find_units(after, "factor"), places, metric):
        moved = stack.displacement([group.tensor for group in after])
        squares = torch.linalg.vector_norm(moved, dim=-1).square()
        moved = stack.metric.scaled(moved)
        variance = second_order(moved, stack.metric.prior)
        kl, _ = softmax_kl(moved, stack.metric.prior)  # last: it overwrites `moved`
        rows = torch.stack([squares, kl, variance], dim=-1).cpu().double()  # (groups, 3)
        for (piece,), row in zip(stack.layout.units, rows, strict=True):
            member = piece.tensor
            module = after[member].module
            measured[module] = measured.get(module, 0) + row
    modules = {group.module: _named(measured[group.module]) for group in after}  # in the model's order
    return {**_named(torch.stack(list(measured.values())).sum(0)), "modules": modules}


def _named(figures: torch.Tensor) -> dict[str, float]:
    squares, kl, variance = figures.tolist()
    return {"distance": squares**0.5, "kl": kl, "second_order": variance}

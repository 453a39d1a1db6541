"""Report the effect of an anchor: how far the adapter moved, and how strongly the penalty pulled it back.

An anchor in the loss acts through its gradient, which is compared with the gradient of the loss. A decoupled
anchor has no gradient: after each optimizer step it removes a share of the displacement. Its effect is
measured by what these shares add up to over the stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from peso.adapters.groups import Group, check_same_groups, layouts, placement, shapes, stack_anchors
from peso.adapters.proximal.metrics import SoftmaxMetric, second_order, softmax_kl

NO_EFFECT = 0.01  # a penalty with less than this share of the loss's gradient is smaller than batch noise
SUGGESTED = 0.7  # the strength that a finding suggests
QUARTERS = 4
CHECKED_AFTER = 0.1  # the share of a stage's steps after which the monitor reports
LEAST_STEPS = 10  # movements are measured at steps 1, 9, 17, …; at step 1 the warm-up has hardly begun

Records = Sequence[Mapping[str, Any]]


@torch.no_grad()
def anchor_report(
    before: Sequence[Group], after: Sequence[Group], temperature: float | Literal["auto"] = 1.0
) -> dict[str, Any]:
    """How far an adapter moved, in total and for each module. ::

        before = [group.snapshot() for group in find_groups(model)]     # then a stage is trained
        metrics["anchor"] = anchor_report(before, find_groups(model))

    Args:
        before: copies of the groups at the start of the stage.
        after: the same groups at its end.
        temperature: τ of the softmax, or ``auto``, see :class:`peso.SoftmaxKL`.

    Returns:
        ``distance`` (the L2 norm of v − a), ``kl`` (Σ_g KL(softmax(v/τ) ‖ softmax(a/τ))) and
        ``second_order`` (Σ_g ½·Var_p((v − a)/τ), which the KL approaches for small displacements); and the
        same for each module under ``modules``.

    Raises:
        TrainingError: the two states have different modules or shapes.
    """
    check_same_groups(shapes(before), after)
    places = [placement(group.tensor) for group in after]
    measured: dict[str, torch.Tensor] = {}  # module → float64 (3,): squared distance, KL, second order
    for stack in stack_anchors([group.tensor for group in before], layouts(after, "factor"), places):
        metric = SoftmaxMetric.of(stack.anchor, temperature)
        moved = stack.displacement([group.tensor for group in after])
        squares = torch.linalg.vector_norm(moved, dim=-1).square()
        moved = metric.scaled(moved)
        variance = second_order(moved, metric.prior)
        kl, _ = softmax_kl(moved, metric.prior)  # last: it overwrites `moved`
        rows = torch.stack([squares, kl, variance], dim=-1).cpu().double()  # (groups, 3)
        for (piece,), row in zip(stack.layouts, rows, strict=True):
            module = after[piece.tensor].module
            measured[module] = measured.get(module, 0) + row
    modules = {group.module: _named(measured[group.module]) for group in after}  # in the model's order
    return {**_named(torch.stack(list(measured.values())).sum(0)), "modules": modules}


def _named(figures: torch.Tensor) -> dict[str, float]:
    squares, kl, variance = figures.tolist()
    return {"distance": squares**0.5, "kl": kl, "second_order": variance}


# --- the effect of the anchor, from the log of a stage ------------------------------------------------------


def anchor_effect(
    stage: int, records: Iterable[Mapping[str, Any]], rho: float | None = None
) -> dict[str, Any]:
    """The effect of the anchor during a stage.

    Args:
        records: the records of the stage's ``log.jsonl``, in order.
        rho: ρ̄ of the term, if it was measured.

    Returns:
        A dictionary with these keys:

        - ``gradient_ratio`` and, for each quarter of the stage, ``gradient_ratios``; None without a penalty;
        - ``pull_ratio`` and ``pull_ratios``, the length of the decoupled pull relative to that of the
          optimizer's step; None without a pull;
        - ``taken_back``, the share of a displacement present at the start that the pulls have removed by the
          end;
        - ``distances``, the distance from the start at the end of each quarter; None without an adapter;
        - ``says``, one sentence; None if there was no anchor;
        - ``finding``, a sentence if the anchor had no measurable effect, else None.

    >>> step = {"gradient_norm": 1.0, "penalty_gradient_norm": 0.0, "learning_rate": 0.1}
    >>> pulled = {**step, "step": 1, "step_norm": 2.0, "pull_norm": 0.5, "distance": 1.5}
    >>> report = anchor_effect(1, [pulled])
    >>> report["pull_ratio"], round(report["taken_back"], 6), report["gradient_ratio"]
    (0.25, 0.25, None)
    """
    steps = [record for record in records if "loss" in record or "gradient_norm" in record]
    measured = _measured(steps)
    quarters = _quarters(measured, steps)
    ratio, pull, shrunk = gradient_ratio(steps), _pull_ratio(measured), taken_back(steps)
    finding = anchor_finding(stage, ratio, rho) or _pull_finding(stage, shrunk, steps)
    says = finding
    if says is None and ratio is not None:
        says = f"{_gradient_sentence(stage, ratio)} on average"
    elif says is None and pull is not None and shrunk is not None:
        says = (
            f"{_pull_sentence(stage, shrunk)}; a pull was {100 * pull:.2g} % as long as the optimizer's step "
            "on average"
        )
    return {
        "gradient_ratio": ratio,
        "gradient_ratios": gradient_ratios(steps, QUARTERS),
        "pull_ratio": pull,
        "pull_ratios": None if pull is None else [_pull_ratio(part) or 0.0 for part in quarters],
        "taken_back": shrunk,
        "distances": [part[-1]["distance"] for part in quarters] or None,
        "says": says,
        "finding": finding,
    }


def gradient_ratio(records: Iterable[Mapping[str, Any]]) -> float | None:
    """The mean of ‖∇ penalty‖ / ‖∇ loss‖ over the steps, with each norm over the parameters that it affects.

    Args:
        records: the records of ``log.jsonl``. Those without a ``penalty_gradient_norm`` are skipped.

    Returns:
        The mean ratio; None if there was no penalty in any step.

    >>> step = {"gradient_norm": 0.5, "penalty_gradient_norm": 0.0}
    >>> gradient_ratio([step, {**step, "penalty_gradient_norm": 0.1}, {"validation_loss": 3.2}])
    0.1
    >>> gradient_ratio([step]) is None
    True
    """
    ratios = gradient_ratios(records, parts=1)
    return ratios[0] if ratios else None


def gradient_ratios(records: Iterable[Mapping[str, Any]], parts: int = QUARTERS) -> list[float] | None:
    """:func:`gradient_ratio` for each part of a stage.

    Args:
        records: the records of ``log.jsonl``, in order.
        parts: the number of parts. If there are fewer steps, each step is a part.

    >>> steps = [{"gradient_norm": 0.5, "penalty_gradient_norm": 0.1 * step} for step in range(5)]
    >>> [round(ratio, 3) for ratio in gradient_ratios(steps, parts=2)]
    [0.1, 0.6]
    """
    ratios = [
        record["penalty_gradient_norm"] / record["gradient_norm"]
        for record in records
        if record.get("penalty_gradient_norm") is not None and record["gradient_norm"]
    ]
    if not any(ratios):
        return None
    parts = min(parts, len(ratios))
    ends = [len(ratios) * (part + 1) // parts for part in range(parts)]
    return [sum(ratios[a:b]) / (b - a) for a, b in pairwise([0, *ends])]


def taken_back(steps: Records, total_rate: float | None = None) -> float | None:
    """1 − exp(−κ·Σ lr): the share of a displacement present at the start that is gone at the end.

    A pull multiplies the displacement by exp(−lr·κ). κ is estimated from the steps that were measured.

    Args:
        steps: the records of the steps.
        total_rate: the sum of the learning rates of the stage; by default that of the given steps.

    Returns:
        The share; None without pulls.
    """
    measured = [record for record in _measured(steps) if record["distance"] + record["pull_norm"] > 0]
    if not any(record["pull_norm"] for record in measured):
        return None
    if not all(record["distance"] for record in measured):
        return 1.0
    decay = sum(math.log1p(record["pull_norm"] / record["distance"]) for record in measured)
    rate = _total_rate(steps) if total_rate is None else total_rate
    return -math.expm1(-decay / _total_rate(measured) * rate)


def anchor_finding(stage: int, ratio: float | None, rho: float | None = None) -> str | None:
    """A sentence if the gradient ratio is below ``NO_EFFECT``, else None.

    Args:
        ratio: the gradient ratio; None without a penalty.
        rho: ρ̄ of the term, if it was measured. The sentence then gives the weight of a suggested strength.

    >>> anchor_finding(1, 0.0003, rho=4.4e4).split("; ")[1]
    'strength 0.7 would be weight 3.1e4'
    """
    if ratio is None or ratio >= NO_EFFECT:
        return None
    sentence = (
        f"{_gradient_sentence(stage, ratio)} on average: the anchor had no measurable effect at this weight"
    )
    return sentence if rho is None else f"{sentence}; {_suggestion(SUGGESTED * rho)}"


def _pull_finding(stage: int, shrunk: float | None, steps: Records, ahead: float = 1.0) -> str | None:
    """The same as :func:`anchor_finding` for a decoupled anchor. The stage is ``ahead`` times as long as the
    given steps."""
    if shrunk is None or shrunk >= NO_EFFECT:
        return None
    suggestion = _suggestion(SUGGESTED / (_total_rate(steps) * ahead))
    return f"{_pull_sentence(stage, shrunk)}: it had no measurable effect at this weight; {suggestion}"


class AnchorMonitor:
    """Watches the records of a stage during training. After a tenth of the stage, it reports once if the
    anchor has no effect.

    Args:
        steps: the number of steps of the whole stage.
        rho: see :func:`anchor_effect`.
    """

    def __init__(self, stage: int, steps: int, rho: float | None = None) -> None:
        self._stage = stage
        self._steps = steps
        self._rho = rho
        self._records: list[Mapping[str, Any]] = []
        self._done = False

    def add(self, record: Mapping[str, Any]) -> str | None:
        """Add a record. Returns a sentence at most once, else None."""
        if self._done:
            return None
        self._records.append(record)
        records = self._records
        if len(records) < max(LEAST_STEPS, CHECKED_AFTER * self._steps):
            return None
        self._done, self._records = True, []
        # assume that learning rates stay as they are; they can only fall, so this avoids false reports
        ahead = self._steps / len(records)
        shrunk = taken_back(records, _total_rate(records) * ahead)
        finding = anchor_finding(self._stage, gradient_ratio(records), self._rho)
        finding = finding or _pull_finding(self._stage, shrunk, records, ahead)
        return finding and f"{finding} (after {record['step']} of {self._steps} steps)"


def _gradient_sentence(stage: int, ratio: float) -> str:
    return f"stage {stage}: the penalty's gradient was {100 * ratio:.2g} % of the loss's"


def _pull_sentence(stage: int, shrunk: float) -> str:
    return (
        f"stage {stage}: the decoupled anchor takes back {100 * shrunk:.2g} % of a displacement present at "
        "the start"
    )


def _suggestion(weight: float) -> str:
    """The weight with two digits, as written in a configuration: 3.1e4, 0.31."""
    short = f"{weight:.2g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return f"strength {SUGGESTED:g} would be weight {short}"


def _pull_ratio(measured: Records) -> float | None:
    """The mean of ‖pull‖ / ‖optimizer step‖ over the measured steps; None if there were no pulls."""
    pairs = [(record["pull_norm"], record["step_norm"]) for record in measured if record["step_norm"]]
    return sum(pull / step for pull, step in pairs) / len(pairs) if any(pull for pull, _ in pairs) else None


def _measured(steps: Records) -> Records:
    return [record for record in steps if record.get("distance") is not None]


def _total_rate(steps: Records) -> float:
    return math.fsum(record["learning_rate"] for record in steps)


def _quarters(measured: Records, steps: Records) -> list[Records]:
    """The measured steps of each quarter of the stage. Quarters without measured steps are left out."""
    last = [len(steps) * part // QUARTERS - 1 for part in range(1, QUARTERS + 1)]
    ends = [steps[number]["step"] for number in last] if measured else []
    parts = [[r for r in measured if a < r["step"] <= b] for a, b in pairwise([0, *ends])]
    return [part for part in parts if part]

"""Does the anchor hold? Of a stage's log, for either coupling: while it is learnt, and when it is done.

Knows the records of a stage's steps; knows nothing of strategies, models or files. In the loss an anchor
pulls by its gradient, which is measured against the loss's. Decoupled it has none: it moves the adapter back
after each step of the optimiser, by a share of the displacement; what these come to over the stage counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from peso.continual.anchor_report import (
    NO_EFFECT,
    SUGGESTED,
    anchor_finding,
    gradient_ratio,
    gradient_ratios,
)

QUARTERS = 4
WATCHED = 0.1  # of a stage's steps, before anything is said of it
LEAST_STEPS = 10  # movements are measured at steps 1, 9, 17, …, and at 1 a warm-up has hardly begun

Records = Sequence[Mapping[str, Any]]


def hold_report(stage: int, records: Iterable[Mapping[str, Any]], rho: float | None = None) -> dict[str, Any]:
    """
    Args:
        records: of the stage's ``log.jsonl``, in order.
        rho: ρ̄ of the term, where it was measured.

    Returns:
        ``gradient_ratio`` and, by quarter of the stage, ``gradient_ratios`` (None without a penalty);
        ``pull_ratio`` and ``pull_ratios``: length of the decoupled pull over that of the optimiser's step
        (None without one); ``taken_back``: the share of a displacement present at the start that the pulls
        had removed at the end; ``distances``: from the start, at the end of each quarter (None without an
        adapter); ``says``: one sentence (None where nothing was anchored); ``finding``: a sentence where the
        anchor had no measurable effect, else None.

    >>> step = {"gradient_norm": 1.0, "penalty_gradient_norm": 0.0, "learning_rate": 0.1}
    >>> pulled = {**step, "step": 1, "step_norm": 2.0, "pull_norm": 0.5, "distance": 1.5}
    >>> report = hold_report(1, [pulled])
    >>> report["pull_ratio"], round(report["taken_back"], 6), report["gradient_ratio"]
    (0.25, 0.25, None)
    """
    steps = [record for record in records if "loss" in record or "gradient_norm" in record]
    measured = _measured(steps)
    quarters = _quarters(measured, steps)
    ratio, pull = gradient_ratio(steps), pull_ratio(measured)
    shrunk = taken_back(steps)
    finding = anchor_finding(stage, ratio, rho) or pull_finding(stage, shrunk, steps)
    return {
        "gradient_ratio": ratio,
        "gradient_ratios": gradient_ratios(steps, QUARTERS),
        "pull_ratio": pull,
        "pull_ratios": None if pull is None else [pull_ratio(part) or 0.0 for part in quarters],
        "taken_back": shrunk,
        "distances": [part[-1]["distance"] for part in quarters] or None,
        "says": finding or _says(stage, ratio, pull, shrunk),
        "finding": finding,
    }


def pull_ratio(measured: Records) -> float | None:
    """Mean over the measured steps of ‖pull‖ / ‖step of the optimiser‖; None where nothing was pulled."""
    pairs = [(record["pull_norm"], record["step_norm"]) for record in measured if record["step_norm"]]
    return sum(pull / step for pull, step in pairs) / len(pairs) if any(pull for pull, _ in pairs) else None


def taken_back(steps: Records, total_rate: float | None = None) -> float | None:
    """1 − exp(−κ·Σ lr): the share that is gone at the end of a displacement present at the start.

    None without pulls.

    A pull shrinks the displacement to exp(−lr·κ) of it; κ is found from the steps that were measured.

    Args:
        total_rate: Σ of the learning rates of the stage; None: that of the steps.
    """
    measured = [record for record in _measured(steps) if record["distance"] + record["pull_norm"] > 0]
    if not any(record["pull_norm"] for record in measured):
        return None
    if not all(record["distance"] for record in measured):
        return 1.0
    decay = sum(math.log1p(record["pull_norm"] / record["distance"]) for record in measured)
    rate = _total_rate(steps) if total_rate is None else total_rate
    return -math.expm1(-decay / _total_rate(measured) * rate)


def pull_finding(stage: int, shrunk: float | None, steps: Records, ahead: float = 1.0) -> str | None:
    """As :func:`peso.continual.anchor_report.anchor_finding`, of a decoupled anchor.

    Args:
        shrunk: :func:`taken_back`; ahead: how many times the steps the stage is.
    """
    if shrunk is None or shrunk >= NO_EFFECT:
        return None
    return (
        f"stage {stage}: the decoupled anchor takes back {100 * shrunk:.2g} % of a displacement present at "
        f"the start: it had no measurable effect at this weight; strength {SUGGESTED:g} would be weight "
        f"{SUGGESTED / (_total_rate(steps) * ahead):.2g}"
    )


class Watch:
    """Sees each record of a stage as it is learnt, and says once, after a tenth of it, that the anchor does
    nothing.

    Args:
        steps: how many the stage takes; rho: see :func:`hold_report`.
    """

    def __init__(self, stage: int, steps: int, rho: float | None = None) -> None:
        self._stage = stage
        self._steps = steps
        self._rho = rho
        self._seen: list[Mapping[str, Any]] = []
        self._done = False

    def see(self, record: Mapping[str, Any]) -> str | None:
        """A sentence, at most once."""
        if self._done:
            return None
        self._seen.append(record)
        if len(self._seen) < max(LEAST_STEPS, WATCHED * self._steps):
            return None
        self._done = True
        finding = anchor_finding(self._stage, gradient_ratio(self._seen), self._rho) or self._pulled()
        self._seen = []
        return finding and f"{finding} (after {record['step']} of {self._steps} steps)"

    def _pulled(self) -> str | None:
        """The finding as if the stage went on at the rates so far: they only fall, so it errs on silence."""
        ahead = self._steps / len(self._seen)
        rate = _total_rate(self._seen) * ahead
        return pull_finding(self._stage, taken_back(self._seen, rate), self._seen, ahead)


def _says(stage: int, ratio: float | None, pull: float | None, shrunk: float | None) -> str | None:
    if ratio is not None:
        return f"stage {stage}: the penalty's gradient was {100 * ratio:.2g} % of the loss's on average"
    if pull is None or shrunk is None:
        return None
    return (
        f"stage {stage}: the decoupled anchor takes back {100 * shrunk:.2g} % of a displacement present at "
        f"the start; a pull was {100 * pull:.2g} % as long as the optimiser's step on average"
    )


def _measured(steps: Records) -> Records:
    return [record for record in steps if record.get("distance") is not None]


def _total_rate(steps: Records) -> float:
    return math.fsum(record["learning_rate"] for record in steps)


def _quarters(measured: Records, steps: Records) -> list[Records]:
    """What was measured in each quarter of the steps; quarters without a measurement are left out."""
    last = [len(steps) * part // QUARTERS - 1 for part in range(1, QUARTERS + 1)]
    ends = [steps[number]["step"] for number in last] if measured else []
    parts = [[r for r in measured if a < r["step"] <= b] for a, b in pairwise([0, *ends])]
    return [part for part in parts if part]

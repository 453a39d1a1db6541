"""The decision of the gate: whether a new model may replace the one that serves, based on their answers.

The champion and the challenger answer the same cases. Let D be the mean paired difference in the metric
(challenger minus champion), B the champion's mean, and m = δ·|B| the margin. The challenger is not worse if

    D − z_c · se(D) ≥ −m        (non-inferiority at the one-sided confidence c)

and worse if D + z_c · se(D) < −m. Otherwise the cases are inconclusive. se(D) is the standard error of the
report's paired interval (:mod:`peso.evaluation.intervals`), over users. Nothing else is random, because the
question is about these two models, not about other seeds. For log-probability, m = −ln(1 − δ) nats: the
geometric mean of the target's probability is not lower by more than δ.

All conditions must be met. So the probability of promoting a model that does not meet a required condition is
at most 1 − c, regardless of their number, and no correction is needed (intersection-union test, Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from peso.config import GateConfig
from peso.errors import DataError, WorkspaceError
from peso.evaluation.intervals import Panel, spread
from peso.evaluation.metrics import LOG_PROBABILITY, Metric, hit_at, log_probability, mrr_at, ndcg_at
from peso.evaluation.predictions import CONTINUING, DORMANT, KNOWN, NEW, Predictions
from peso.runtime.files import read_json_object

Outcome = Literal["passed", "failed", "undecided"]
Decision = Literal["passed", "refused", "undecided"]
FEW = 30  # with fewer cases, the normal approximation is not reliable
GROUPS = {  # name in the configuration → column of the predictions and its value
    "new_users": ("user_segment", NEW),
    "dormant_users": ("user_segment", DORMANT),
    "continuing_users": ("user_segment", CONTINUING),
    "new_items": ("item_segment", NEW),
    "known_items": ("item_segment", KNOWN),
}


@dataclass(frozen=True)
class Condition:
    """One condition of the gate.

    Attributes:
        name: the name of the condition.
        outcome: whether it is met.
        blocks: whether the outcome prevents the promotion of the challenger.
        says: one sentence with the values.
        figures: the values that the outcome is based on; for a comparison, the result of :func:`compare`.
    """

    name: str
    outcome: Outcome
    blocks: bool
    says: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The decision of the gate.

    It is ``passed`` if every required condition is met, ``refused`` if one is not met, and ``undecided`` if
    the cases do not show that all are met, but none is known not to be met.
    """

    decision: Decision
    conditions: Sequence[Condition]

    @property
    def says(self) -> str:
        """The conditions that decided, as one sentence."""
        blocking = [one for one in self.conditions if one.blocks]
        blocking.sort(key=lambda one: one.outcome != "failed")
        return "; ".join(one.says for one in blocking) or self.conditions[0].says

    def as_json(self) -> dict[str, Any]:
        """The decision and the conditions as JSON."""
        return {"decision": self.decision, "conditions": [asdict(one) for one in self.conditions]}


class StoredCondition(BaseModel):
    """A condition in ``gate.json``."""

    model_config = ConfigDict(strict=True)

    name: str
    outcome: Outcome
    blocks: bool
    says: str
    figures: dict[str, int | float | None]


class StoredVerdict(BaseModel):
    """The contents of ``gate.json`` (docs/reference/files.md)."""

    model_config = ConfigDict(strict=True)

    stage: int
    champion: int
    determined_by: dict[str, str]
    time: str
    settings: dict[str, Any]
    decision: Decision
    conditions: list[StoredCondition]
    says: str
    promote: bool
    pinned: bool
    test: dict[str, int | float | None]
    earlier: dict[str, int | float | None]


def read_verdict(path: Path) -> dict[str, Any]:
    """Read ``gate.json``.

    Raises:
        WorkspaceError: the file is damaged.
    """
    try:
        content = read_json_object(path)
        StoredVerdict.model_validate(content)
    except (DataError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise WorkspaceError(
            f"{path} is damaged ({first}); restore it from a copy, or remove the stage and train it again"
        ) from None
    return content


@dataclass(frozen=True, eq=False)
class Pair:
    """The answers of two models to the same cases.

    Raises:
        WorkspaceError: the models answered different cases.
    """

    champion: Predictions
    challenger: Predictions

    def __post_init__(self) -> None:
        one, other = self.champion, self.challenger
        if (one.users, one.targets) != (other.users, other.targets):
            raise WorkspaceError(
                "champion and challenger answered different cases; remove their predictions and test again"
            )

    def group(self, name: str) -> Pair:
        """The cases of one of the groups in ``GROUPS``."""
        column, value = GROUPS[name]
        rows = np.flatnonzero(np.array(getattr(self.champion, column)) == value)
        return Pair(self.champion.take(rows), self.challenger.take(rows))


def metric_of(settings: GateConfig) -> Metric:
    """The metric that the gate is configured with."""
    if settings.k is None:
        return log_probability()
    name = settings.metric.partition("@")[0]
    return {"hit": hit_at, "ndcg": ndcg_at, "mrr": mrr_at}[name](settings.k)


def decide(
    settings: GateConfig,
    new: Pair,
    earlier: Pair | None,
    list_length: int,
    anchor: tuple[bool, str] | None = None,
) -> Verdict:
    """Decide whether a challenger may replace the champion.

    Args:
        new: the answers to the cases of the new stage that decide.
        earlier: the answers to the test cases of the champion's stage; None if there are none.
        list_length: the length of the lists whose coverage is compared.
        anchor: whether the anchor had an effect or was off, and a sentence; None if nothing was trained.
    """
    metric, proof = metric_of(settings), settings.guards == "proof"
    conditions = [_compared(settings, metric, new, settings.metric, settings.delta, must_show=True)]
    for name, margin in settings.segments.margins.items():
        title = f"{settings.metric} of {name.replace('_', ' ')}"
        conditions.append(_compared(settings, metric, new.group(name), title, margin, must_show=proof))
    if settings.forgetting is not None and earlier is not None:
        title = f"{settings.metric} on earlier cases"
        conditions.append(_compared(settings, metric, earlier, title, settings.forgetting, must_show=proof))
    if settings.coverage is not None:
        conditions.append(_covered(new, list_length, settings.coverage))
    if settings.anchor == "held" and anchor is not None:
        met, says = anchor
        conditions.append(Condition("anchor", "passed" if met else "failed", not met, says))
    blocking = [one.outcome for one in conditions if one.blocks]
    decision: Decision = "refused" if "failed" in blocking else "undecided" if blocking else "passed"
    return Verdict(decision, conditions)


def compare(pair: Pair, metric: Metric, delta: float, confidence: float) -> dict[str, Any]:
    """The paired comparison of two models in one metric.

    Args:
        pair: the answers of the two models.
        delta: the relative margin δ.
        confidence: the one-sided confidence c.

    Returns:
        ``cases``, ``champion`` and ``challenger`` (means), ``difference``, ``low`` and ``high`` (its
        one-sided bounds at the confidence; None if nothing varies), ``margin`` (in units of the metric), and
        ``chance_if_equal``, the probability that an equally good challenger passes with this number of cases
        (None if nothing varies).
    """
    from scipy import stats  # slow to load

    cases = len(pair.champion)
    if not cases:
        return {"cases": 0}
    champion, challenger = metric.values(pair.champion), metric.values(pair.challenger)
    panel = Panel.of([np.array(pair.champion.users)])
    difference = challenger - champion
    value, base = float(difference.mean()), float(champion.mean())
    error = spread(np.array([value]), panel.influence(difference[None])).error
    known = error > 1e-14 * max(abs(value), abs(base))
    z = float(stats.norm.ppf(confidence))
    margin = -math.log1p(-delta) if metric.name == LOG_PROBABILITY else delta * abs(base)
    return {
        "cases": cases,
        "champion": base,
        "challenger": float(challenger.mean()),
        "difference": value,
        "low": value - z * error if known else None,
        "high": value + z * error if known else None,
        "margin": margin,
        "confidence": confidence,
        "chance_if_equal": float(stats.norm.cdf(margin / error - z)) if known else None,
    }


def _compared(
    settings: GateConfig, metric: Metric, pair: Pair, title: str, delta: float, *, must_show: bool
) -> Condition:
    """The condition that a metric is not worse. With ``must_show``, inconclusive cases also keep the
    champion."""
    found = compare(pair, metric, delta, settings.confidence)
    if not found["cases"]:
        return Condition(title, "undecided", must_show, f"{title}: no cases", found)
    outcome, reason = _outcome(found, metric)
    says = f"{title}: {_figures(found, metric)}, margin {found['margin']:.{metric.decimals}f}: {reason}"
    return Condition(
        title, outcome, outcome == "failed" or (outcome == "undecided" and must_show), says, found
    )


def _outcome(found: dict[str, Any], metric: Metric) -> tuple[Outcome, str]:
    if found["cases"] < FEW:
        return "undecided", f"{found['cases']} cases are too few (fewer than {FEW})"
    if found["low"] is None:
        if metric.name != LOG_PROBABILITY and not found["champion"] and not found["difference"]:
            return "undecided", "neither model has a hit, so they cannot be compared"
        same = found["difference"] >= -found["margin"]
        return ("passed", "no case differs") if same else ("failed", "every case is worse by the same amount")
    if found["low"] >= -found["margin"]:
        return "passed", "within the margin"
    if found["high"] < -found["margin"]:
        return "failed", "beyond the margin"
    chance = f"{100 * found['chance_if_equal']:.0f} %"
    return "undecided", f"inconclusive (an equally good model would pass in {chance} of such comparisons)"


def _figures(found: dict[str, Any], metric: Metric) -> str:
    digits = metric.decimals
    text = (
        f"{found['champion']:.{digits}f} → {found['challenger']:.{digits}f} on {found['cases']:,} cases, "
        f"difference {found['difference']:+.{digits}f}"
    )
    if found["low"] is None:
        return text
    return f"{text} (at least {found['low']:+.{digits}f} at {100 * found['confidence']:g} % confidence)"


def _covered(pair: Pair, length: int, least: float) -> Condition:
    """The condition on the ratio of the numbers of distinct items in the models' lists."""
    counts = [
        len({item for items in answers.items for item in items[:length]})
        for answers in (pair.champion, pair.challenger)
    ]
    met = counts[1] >= least * counts[0]
    ratio = counts[1] / counts[0] if counts[0] else None
    says = (
        f"coverage: {counts[0]:,} → {counts[1]:,} distinct items in lists of {length}, at least "
        f"{100 * least:g} % required"
    )
    figures = {"champion": counts[0], "challenger": counts[1], "ratio": ratio, "least": least}
    return Condition("coverage", "passed" if met else "failed", not met, says, figures)

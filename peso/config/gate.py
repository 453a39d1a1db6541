"""The section `gate`: the conditions under which an update may serve. Its keys do not affect the training of
a stage, so they may change at any time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from peso.config.parsing import Section, new_key

METRIC = re.compile(r"(hit|ndcg|mrr)@([1-9][0-9]{0,3})|log_probability")
Margin = Annotated[float, Field(ge=0, lt=1)]


def _metric(name: str) -> str:
    if not METRIC.fullmatch(name):
        raise ValueError("a metric must be hit@K, ndcg@K, mrr@K (such as ndcg@10) or log_probability")
    return name


class GateSegmentsConfig(Section):
    """The groups of cases for which the new stage must not be worse, and the margin of each (relative to the
    stage that serves). A group that is not given is not checked."""

    new_users: Margin | None = new_key(None, description="users without an earlier event")
    dormant_users: Margin | None = new_key(
        None, description="users with earlier events, but none in the stage before"
    )
    continuing_users: Margin | None = new_key(None, description="users with events in the stage before")
    new_items: Margin | None = new_key(None, description="cases whose target did not occur before the stage")
    known_items: Margin | None = new_key(None, description="cases whose target occurred before the stage")

    @model_validator(mode="before")
    @classmethod
    def _knows_its_groups(cls, tree: Any) -> Any:
        unknown = set(tree) - set(cls.model_fields) if isinstance(tree, Mapping) else ()
        if unknown:
            raise ValueError(
                f"unknown groups of the gate: {', '.join(sorted(map(str, unknown)))}; known groups are "
                f"{', '.join(cls.model_fields)}"
            )
        return tree

    @property
    def margins(self) -> dict[str, float]:
        """The margin of each group that is checked."""
        return {name: margin for name, margin in self if margin is not None}


class GateConfig(Section):
    """The conditions under which `peso update` promotes the stage that it trained. The main one is that the
    new stage is not worse than the stage that serves by more than ``delta``
    (docs/how-to/gate-and-promote.md)."""

    enabled: bool = new_key(
        False, description="true: `peso update` promotes a stage only if it passes the gate"
    )
    metric: Annotated[str, AfterValidator(_metric)] = new_key(
        "ndcg@10", description="hit@K, ndcg@K, mrr@K, where K is at most decoding.beams, or log_probability"
    )
    delta: Margin = new_key(
        0.05, description="how much worse the new stage may be, relative to the stage that serves"
    )
    confidence: float = new_key(
        0.95, ge=0.5, lt=1, description="one-sided confidence of every comparison of the gate"
    )
    cases: Literal["validation", "test"] = new_key(
        "validation",
        description="the cases of the new stage that decide; results on test cases are always reported",
    )
    segments: GateSegmentsConfig = new_key(GateSegmentsConfig())
    forgetting: Margin | None = new_key(
        None, description="margin on the test cases of the stage that serves; none given: only reported"
    )
    guards: Literal["no-harm", "proof"] = new_key(
        "no-harm",
        description="segments and forgetting refuse a stage if it is shown to be worse than the margin "
        "(no-harm), or if it is not shown to be within the margin (proof)",
    )
    coverage: float | None = new_key(
        0.8,
        ge=0,
        le=1,
        description="smallest number of distinct recommended items, relative to the stage that serves; none "
        "given: not checked",
    )
    anchor: Literal["any", "held"] = new_key(
        "any", description="held: the update's anchor, if it has one, must have had a measurable effect"
    )
    drift: Annotated[float, Field(gt=0, le=1)] | None = new_key(
        None,
        description="warn, and alert, if the divergence of a stage's items from those of the previous stage "
        "is greater (Jensen-Shannon, in bits; set it above the values that `peso diagnose` shows for usual "
        "stages); none given: never",
    )

    @property
    def k(self) -> int | None:
        """The length of the lists that the metric is computed on, or None for the log-probability."""
        _, at, k = self.metric.partition("@")
        return int(k) if at else None

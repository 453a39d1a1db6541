"""For a stage of a workspace: which directions of the adapter the data support, and how the anchor affected
them. The mathematics is in ``peso/adapters/directions.py``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from peso.adapters.directions import (
    Directions,
    ExampleGradients,
    held_out,
    limit_weight,
    stage_weight,
    strongest,
)
from peso.adapters.groups import Group, Source, find_groups
from peso.adapters.proximal import DistanceTerm, SoftmaxKL
from peso.errors import ConfigError, WorkspaceError
from peso.evaluation.report.plots import Plot, Series
from peso.model.build import has_adapter
from peso.model.generative import GenerativeModel
from peso.runs.diagnosis import require_later_stage
from peso.runs.models import begin_new_codes, context_of, load_stage, starting_model, stored_memory
from peso.runs.stage import RunStage
from peso.runs.trust import strategy_of
from peso.runs.workspace import Workspace
from peso.runtime.machine import threads
from peso.training.strategies.strategy import strategies

At = Literal["start", "end"]
FOLDS = 10
EXAMPLES = 256


def stage_directions(
    workspace: Workspace,
    count: int,
    stage: int | None = None,
    examples: int = EXAMPLES,
    free: Workspace | None = None,
    at: At = "start",
) -> dict[str, Any]:
    """Predicted and measured weights of the strongest directions of (Σ, H) of a stage.

    Args:
        count: number of directions.
        stage: 1 or later; None: the newest.
        examples: number of single targets of the stage from which Σ is estimated.
        free: a workspace that trained the same stage without an anchor (``single``).
        at: where the gradients are computed. ``start``: at the anchor, where H and ρ̄ are computed too, all
            runs of a stage are equal, and the model is not yet fitted to the examples; their common gradient
            counts as support (``mean_share``). ``end``: at the end of the stage, which is closer to the
            optimum of the formula, but fitted to these examples.

    Returns:
        ``directions``: a dict per direction (docs/explanation/directions.md); ``rest``: the weights measured
        in the rest of the sample's span and outside it; ``differences``: sentences on differences between the
        two runs other than the anchor.

    Raises:
        WorkspaceError: the stage has no anchor or is not trained, or the free workspace is not comparable.
        ConfigError: the strategy does not train one adapter throughout, or the term has no metric.
        TrainingError: too few examples for a standard error, or gradients that are all zero.
    """
    trained = require_later_stage(workspace, stage).as_trained
    _require_anchor(trained.workspace)
    there = None if free is None else free.trained(trained.number).as_trained
    differences = [] if there is None else _differences(trained, there)
    model, term, gradients, source = _example_gradients(trained, examples, at)
    gram = gradients.gram()
    everything = strongest(gram, gradients.examples, gradients.tokens)  # the whole span of the sample
    count = min(count, len(everything.support))
    top = Directions(everything.support[:count], everything.coefficients[:, :count])
    fresh = held_out(gram, count, gradients.tokens, FOLDS)
    composition = gradients.composition(top, trained.workspace.config.training.of_update().batch_size)
    rates = _RateSums.of(trained)
    strength = None if strategy_of(trained.workspace).term is None else _strength(term, rates)
    columns: dict[str, Tensor] = {
        "support": fresh.support,
        "support_standard_error": fresh.standard_error,
        "support_of_sample": top.support,
        "mean_share": fresh.mean_share,
    }
    moved = gradients.step(_stored(trained, model, source))
    columns["moved"] = everything.along(gradients.products(moved))
    if strength is not None:
        weight = strength * (composition.pull if term.coupling == "decoupled" else torch.ones(count))
        own, other = rates.until_best, None if there is None else _RateSums.of(there).until_best
        columns["weight"] = weight
        for suffix, support in (("", fresh.support), ("_of_sample", top.support)):
            columns[f"predicted_in_the_limit{suffix}"] = limit_weight(support, weight)
            columns[f"predicted{suffix}"] = stage_weight(support, weight, composition.inertia, own, other)
    rest: dict[str, float | None] = {}
    if there is not None:
        moved_freely = gradients.step(_stored(there, model, source))
        columns["moved_freely"] = everything.along(gradients.products(moved_freely))
        columns["measured"] = columns["moved"] / columns["moved_freely"]
        rest = _rest(gradients, moved, moved_freely, columns["moved"], columns["moved_freely"], count)
    return {
        "stage": trained.number,
        "term": _named(term),
        "coupling": term.coupling if strength is not None else None,
        "weight": strength,
        "rho": gradients.rho(),
        "examples": gradients.examples,
        "at": at,
        "tokens": gradients.tokens,
        "free": None if free is None else str(free.root),
        "differences": differences,
        "directions": [
            {"direction": k + 1, **{name: float(values[k]) for name, values in columns.items()}}
            | _carriers(gradients.groups, composition.shares[k])
            for k in range(count)
        ],
        "rest": rest,
    }


# -- model and gradients of a stage ----------------------------------------------------------------------


def _require_anchor(workspace: Workspace) -> None:
    if not strategy_of(workspace).moves_one_adapter:
        known = [name for name, strategy in strategies().items() if strategy.moves_one_adapter]
        raise ConfigError(
            f"strategy {workspace.config.strategy.name} does not train the same adapter at every stage, so "
            f"directions are not defined; they are available for {', '.join(known)}"
        )


def _example_gradients(
    stage: RunStage, examples: int, at: At
) -> tuple[GenerativeModel, DistanceTerm, ExampleGradients, Source]:
    """The stage's model, the term anchored at its start, gradients of its targets, and the anchored
    parameters."""
    workspace, number = stage.workspace, stage.number
    config = workspace.config
    model = starting_model(stage)
    begin_new_codes(stage, model, learned=number)
    if not has_adapter(model):
        raise ConfigError(
            f"stage {number} of {workspace.root} trains all weights and has no adapter, so directions are "
            "not defined; choose a stage that trains an adapter (--stage)"
        )
    context = context_of(stage, model, stored_memory(stage.before))
    given = context.examples
    assert given is not None
    strategy = strategy_of(workspace)
    term = strategy.term or SoftmaxKL()
    if not term.has_decoupled_form:
        raise ConfigError(
            f"{type(term).__name__} is not a squared distance to the anchor: it has no metric H, so "
            "directions are not defined; choose a workspace whose anchor is one, as that of strategy peso"
        )
    term = cast(DistanceTerm, term)
    source: Source = model.backbone
    if strategy.term is not None:
        strategy.begin(context)  # anchors and calibrates as in training
        source = strategy.anchored(context)
    else:
        term.anchor(source)
    anchors = [group.snapshot().tensor for group in term.groups_of(source)]
    if at == "end":
        load_stage(stage, model)
    with threads(model, config.training.threads):
        losses = given.losses(number, examples)
        return model, term, ExampleGradients(term, source, losses, given.tokens, anchors), source


def _stored(stage: RunStage, model: GenerativeModel, source: Source) -> list[Tensor]:
    """Load a stage's weights into the model; returns copies of the anchored parameters."""
    load_stage(stage, model)
    return [group.tensor.detach().clone() for group in find_groups(source)]


def _differences(stage: RunStage, free: RunStage) -> list[str]:
    """Sentences on differences between two runs of a stage other than the anchor. Raises WorkspaceError if
    the two are not comparable."""
    number, configs = stage.number, (stage.workspace.config, free.workspace.config)
    named = f"stage {number} of {free.workspace.root}"
    if strategy_of(free.workspace).reference != "fine-tuning":
        raise WorkspaceError(
            f"{named} was trained with {configs[1].strategy.name}; use a workspace that trained it with "
            "`single`, which has no anchor"
        )
    for key, what in (("backbone_sha256", "weights of the backbone"), ("inputs", "data")):
        if stage.manifest[key] != free.manifest[key]:
            raise WorkspaceError(
                f"{named} was trained with other {what}; use a workspace with the same backbone and data"
            )
    found = []
    if stage.before.determined_by != free.before.determined_by:
        found.append(
            f"The two runs already differ at stage {number - 1} or earlier, so they do not start from the "
            "same state: the measurement mixes the anchors of this and earlier stages. At stage 1, with a "
            "common stage 0, it does not."
        )
    ours, theirs = (config.model_dump(mode="json") for config in configs)
    other = [key for key in ("training", "adapter", "prompt") if ours[key] != theirs[key]]
    if other or configs[0].seed_of_stage(number) != configs[1].seed_of_stage(number):
        found.append(f"The two runs differ in {', '.join(other) or 'seed'} too.")
    return found


@dataclass(frozen=True)
class _RateSums:
    """Sum of the learning rates of a stage, over all its steps and up to the end of its best epoch."""

    total: float
    until_best: float

    @classmethod
    def of(cls, stage: RunStage) -> _RateSums:
        best = stage.training["best_epoch"]
        steps = [record for record in stage.log if "learning_rate" in record]
        rates = [(record["learning_rate"], record["epoch"] <= best) for record in steps]
        return cls(sum(rate for rate, _ in rates), sum(rate for rate, kept in rates if kept))


def _strength(term: DistanceTerm, rates: _RateSums) -> float | None:
    """λ, or κ of the decoupled form."""
    return term.decay(rates.total) if term.coupling == "decoupled" else term.weight


def _rest(
    gradients: ExampleGradients,
    moved: Sequence[Tensor],
    there: Sequence[Tensor],
    along: Tensor,
    along_freely: Tensor,
    count: int,
) -> dict[str, float | None]:
    """Weights measured in the strongest directions, in the rest of the sample's span and outside it, and the
    share of the free movement in each."""
    whole, products = gradients.inner(there, there), along * along_freely
    supported = [float(along_freely[:count].square().sum()), float(along_freely[count:].square().sum())]
    outside = whole - sum(supported)
    held_outside = gradients.inner(moved, there) - float(products.sum())
    return {
        "share_of_directions": supported[0] / whole,
        "share_of_other_support": supported[1] / whole,
        "share_without_support": outside / whole,
        "measured_in_directions": float(products[:count].sum()) / supported[0],
        "measured_in_other_support": float(products[count:].sum()) / supported[1] if supported[1] else None,
        "measured_without_support": held_outside / outside,
    }


def _carriers(groups: Sequence[Group], shares: Tensor) -> dict[str, dict[str, float]]:
    """Shares of ‖q‖²_H by layer, by target and by factor, largest first."""

    def split(owner: Callable[[Group], str]) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for group, share in zip(groups, shares.tolist(), strict=True):
            sums[owner(group)] += share
        return dict(sorted(sums.items(), key=lambda pair: -pair[1]))

    return {
        "modules": split(lambda group: group.module),
        "layers": split(lambda group: layer_of(group.module)),
        "targets": split(lambda group: group.module.rpartition(".")[2]),
        "factors": split(lambda group: group.factor or group.module),
    }


def layer_of(module: str) -> str:
    """The layer number in a module's name; the name itself if there is none.

    >>> layer_of("model.layers.11.mlp.up_proj"), layer_of("tensor 0")
    ('11', 'tensor 0')
    """
    return next((part for part in module.split(".") if part.isdigit()), module)


def _named(term: Any) -> str:
    options = {"temperature": "τ", "groups": "groups", "reduction": "reduction"}
    shown = [f"{sign} {getattr(term, name)}" for name, sign in options.items() if hasattr(term, name)]
    return f"{type(term).__name__} ({', '.join(shown)})"


KEPT, OVERWRITTEN = 0.1, 0.9  # a direction is "kept" up to the first weight, "overwritten" from the second


def direction_sentences(found: Mapping[str, Any]) -> list[str]:
    """The result of :func:`stage_directions` in sentences, with its uncertainty."""
    rows, rest = found["directions"], found["rest"]
    sentences = list(found["differences"])
    if rest:
        sentences += [
            f"Along the directions with most support in the new data (1 to {len(rows)}), the adapter "
            f"moves {_percent(rest['measured_in_directions'])} of the distance that stage {found['stage']} "
            f"moves without an anchor: {_verdict(rest['measured_in_directions'])}.",
            "Along directions without support in the sample, it moves "
            f"{_percent(rest['measured_without_support'])}: {_verdict(rest['measured_without_support'])}.",
            "Of the free movement (squared, in the metric of the anchor), "
            f"{_percent(rest['share_of_directions'])} is along these directions, "
            f"{_percent(rest['share_of_other_support'])} in the rest of the sample's span, "
            f"{_percent(rest['share_without_support'])} outside it.",
        ]
    elif found["weight"] is None:
        sentences.append("The stage was trained without an anchor, so no direction was restrained.")
    if rows and "predicted" in rows[0]:
        limit, stage = rows[-1]["predicted_in_the_limit"], rows[-1]["predicted"]
        sentences.append(
            f"Predicted for direction {len(rows)}: {_percent(limit)} of the new optimum after infinite "
            f"training, {_percent(stage)} of the free movement at the end of a stage of this length."
        )
    first, last = rows[0], rows[-1]
    bias = [
        row["support_of_sample"] / row["support"] if row["support"] else float("inf") for row in (first, last)
    ]
    sentences.append(
        f"Supports are cross-validated on {found['examples']} single targets, and biased downward if at all; "
        f"those of the sample itself are biased upward, by a factor of at most {bias[0]:.2g} for direction 1 "
        f"and {bias[1]:.2g} for direction {last['direction']}."
    )
    return sentences


def _verdict(weight: float) -> str:
    if weight >= OVERWRITTEN:
        return "earlier knowledge is overwritten"
    if weight <= KEPT:
        return "earlier knowledge is kept"
    return "partly overwritten, partly kept"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


SHOWN = {
    "direction": "direction",
    "support": "support ρ",
    "support_standard_error": "±",
    "support_of_sample": "ρ, sample",
    "mean_share": "shared pull",
    "predicted_in_the_limit": "ρ/(ρ+λ)",
    "predicted": "predicted",
    "predicted_of_sample": "…, sample",
    "measured": "measured",
    "moved": "moved",
    "moved_freely": "moved freely",
}


def direction_tables(found: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """The result of :func:`stage_directions` as tables: title, columns, rows."""
    rows = found["directions"]
    shown = {name: title for name, title in SHOWN.items() if name in rows[0]}
    held = f"λ {found['weight']:.3g}, {found['coupling']}" if found["weight"] is not None else "no anchor"
    title = f"strongest directions of stage {found['stage']}: {found['term']}, {held}, ρ̄ {found['rho']:.3g}"
    carriers = [
        [row["direction"], *(_largest(row[kind]) for kind in ("modules", "layers", "targets", "factors"))]
        for row in rows
    ]
    return [
        (title, list(shown.values()), [[row[name] for name in shown] for row in rows]),
        ("distribution over modules", ["direction", "modules", "layers", "targets", "factors"], carriers),
    ]


def _largest(shares: Mapping[str, float], count: int = 3) -> str:
    return ", ".join(f"{name} {_percent(share)}" for name, share in list(shares.items())[:count])


def direction_plot(found: Mapping[str, Any]) -> Plot:
    """A plot of the predicted and measured weight of each direction.

    Raises:
        WorkspaceError: no weight was predicted or measured.
    """
    rows = found["directions"]
    x = np.array([row["direction"] for row in rows], dtype=np.float64)
    lines = {
        "predicted in the limit, ρ/(ρ+λ)": "predicted_in_the_limit",
        "predicted for a stage of this length": "predicted",
        "measured": "measured",
    }
    drawn = [
        Series(label, number, x, np.array([row[name] for row in rows]), dashed=number == 0)
        for number, (label, name) in enumerate(lines.items())
        if name in rows[0]
    ]
    if not drawn:
        raise WorkspaceError(
            "there is no weight to plot, because the stage had no anchor; choose another workspace or stage"
        )
    return Plot(
        "directions",
        f"Weight of the new optimum, stage {found['stage']}",
        "Predicted and measured weight of the new optimum along the strongest directions.",
        drawn,
        "direction, strongest support first",
        [(place, str(int(place))) for place in x],
    )

"""Steps after the training of a model with an item head: it counts transitions between items, corrects the
probability of new items, and chooses weights on validation cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peso.baselines.baseline import Setting
from peso.baselines.item_graph import ItemGraph
from peso.decoding.pool import SHARES, Candidates, best_weights
from peso.decoding.prompt import Prompt, run_prompts
from peso.events.histories import Cases
from peso.model.generative import GenerativeModel
from peso.model.item_head import LENGTHS
from peso.model.transitions import MOST_EDGES, Transitions, heaviest
from peso.runs.stage import RunStage
from peso.runs.validation import search_validation, validation_cases
from peso.runtime.progress import Observer

LARGEST = 5.0  # addition to the biases of new items
TUNED_ON = 2048  # validation cases of a stage, evenly spaced, if it has more


def choose_pool_weights(stage: RunStage, model: GenerativeModel, observer: Observer) -> dict[str, Any]:
    """Choose the weights of item head and codes. If configured, also count transitions up to the stage, and
    correct the probability of new items.

    All choices are made on the validation cases of the stage.

    Args:
        model: the model after training; changed in place.

    Returns:
        What was chosen, and what was tried, for ``metrics.json``.
    """
    config, figures = stage.workspace.config, dict[str, Any]()
    depth = min(10, config.decoding.beams)
    if config.head.transitions:
        model.transitions, figures["transitions"] = _count(stage, depth, observer)
    head = model.vocabulary.item_head
    assert head is not None
    cases = validation_cases(stage, TUNED_ON)
    if head.arrivals and stage.number:
        figures["arrivals"] = correct_arrivals(
            model, cases, stage.workspace.stream.first_stages() == stage.number, config.decoding.batch_size
        )
    lengths = torch.tensor([len(history) for history in cases.histories])
    parts, of_targets, order = list[Candidates](), list[Candidates](), list[np.ndarray]()

    def keep(users: np.ndarray, found: Candidates, target: Candidates | None) -> None:
        assert target is not None
        order.append(users)
        parts.append(found)
        of_targets.append(target)

    search_validation(stage, model, cases, "weigh item head and codes on validation", observer, keep)
    found, targets = Candidates.joined(parts), Candidates.joined(of_targets)
    chosen = best_weights(found, targets, lengths[np.concatenate(order)], depth)
    head.shares.copy_(torch.tensor(chosen.shares))
    if model.transitions is not None and chosen.prior is not None:
        model.transitions = replace(model.transitions, prior=chosen.prior)
        figures["prior"] = chosen.prior
    by_length = [*(f"to {length}" for length in LENGTHS), "longer"]
    figures["shares"] = dict(zip(by_length, chosen.shares, strict=True))
    figures[f"ndcg@{depth}"] = dict(zip(map(str, SHARES), chosen.means, strict=True))
    return figures


@torch.no_grad()
def correct_arrivals(
    model: GenerativeModel, cases: Cases, first_now: np.ndarray, batch_size: int | None = None
) -> dict[str, Any]:
    """Choose the addition to the biases of the items that the stage brings, and set it.

    The targets of training are older than those of validation and tests, so fewer of them are new items, and
    the model's probability of new items is too low. The addition δ corrects it for their share of the
    validation targets (Saerens et al. 2002, "Adjusting the Outputs of a Classifier to New a Priori
    Probabilities"): p(i) ∝ p_items(i) · exp(δ) for a new item. It maximizes the likelihood of the cases with
    a standard normal prior, which holds it near zero if there are few cases.

    Args:
        model: the model after training; changed in place.
        first_now: bool (items,), whether an item first occurs in the stage. Items that only validation and
            test cases have are not counted.
        batch_size: the number of cases to compute together; 64 by default.

    Returns:
        The number of new items, their mean probability, their share of the targets, and the addition.
    """
    from scipy.optimize import minimize_scalar

    head = model.vocabulary.item_head
    assert head is not None
    head.arrival_bias.zero_()
    arrived = torch.from_numpy(first_now).to(head.counts.device) & (head.counts > 0)
    figures: dict[str, Any] = {"items": int(arrived.sum())}
    if not arrived.any() or not len(cases):
        return figures
    mass = _mass(model, cases, arrived, batch_size or 64)
    new = arrived.cpu().numpy()[cases.targets]

    def loss(addition: float) -> float:
        likelihood = addition * new.sum() - np.log1p(mass * np.expm1(addition)).sum()
        return float(addition**2 / 2 - likelihood)

    found = float(minimize_scalar(loss, bounds=(-LARGEST, LARGEST), method="bounded").x)
    head.arrival_bias.copy_(arrived * found)
    return figures | {"probability": float(mass.mean()), "share": float(new.mean()), "addition": found}


@torch.no_grad()
def _mass(model: GenerativeModel, cases: Cases, items: Tensor, batch_size: int) -> np.ndarray:
    """float64 (cases,): the probability of these items together, bool (items,), under the item head."""
    result, training = np.zeros(len(cases)), model.training
    order = np.argsort([-len(history) for history in cases.histories], kind="stable")
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        last = run_prompts(model, [Prompt.cold(model, cases.histories[row]) for row in rows], 0).last
        of_items = model.item_log_probabilities(last)[:, items]
        result[rows] = of_items.double().logsumexp(1).exp().cpu().numpy()
    model.train(training)
    return result


def _count(stage: RunStage, depth: int, observer: Observer) -> tuple[Transitions, dict[str, Any]]:
    """Count the transitions of all events up to the stage, with the decays that the baseline ``item-graph``
    chooses; also returns the figures that it reports."""
    workspace, repeats = stage.workspace, not stage.leaves_out_seen
    window = workspace.config.prompt.window
    graph = ItemGraph(
        Setting(stage.semantic_ids.trie, window, depth=depth), repeats="keep" if repeats else "leave-out"
    )
    stages = [workspace.stream.stage(number) for number in range(stage.number + 1)]
    figures = graph.learn(stages, observer)
    counted = Transitions(heaviest(graph.edges, MOST_EDGES), graph.recency, window, repeats)
    return counted, figures

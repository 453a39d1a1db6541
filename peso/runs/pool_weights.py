"""Steps after the training of a model with an item head: it counts transitions between items, corrects the
probability of new items, and chooses weights on validation cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

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
from peso.model.transitions import MOST_EDGES, PRIOR, Transitions, heaviest
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


def correct_arrivals(
    model: GenerativeModel, cases: Cases, first_now: np.ndarray, batch_size: int | None = None
) -> dict[str, Any]:
    """Choose how much more probable the items become that the stage brings, and set it.

    The targets of training are older than those of validation and tests, so fewer of them are new items, and
    head and counts give new items too little probability. The addition δ corrects it for their share of the
    validation targets (Saerens et al. 2002, "Adjusting the Outputs of a Classifier to New a Priori
    Probabilities"). For a new item, p_items(i) ∝ p_items(i) · exp(δ), and G_i is multiplied by exp(δ). It
    maximizes the likelihood of the cases under both, with the weight of the prior before it is tuned and a
    standard normal prior on δ, which holds it near zero if there are few cases.

    Args:
        model: the model after training, whose transitions are counted; changed in place.
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
    of_new, of_target = _probabilities(model, cases, arrived, batch_size or 64)
    brought = arrived.cpu().numpy()
    new, counts = brought[cases.targets], _counts(model.transitions, cases, brought, batch_size or 64)

    def loss(addition: float) -> float:
        more = np.expm1(addition)
        prior = PRIOR * of_target / (1 + of_new * more)
        likelihood = np.log((counts.target + prior) / (counts.all + counts.new * more + PRIOR)).sum()
        return float(addition**2 / 2 - addition * new.sum() - likelihood)

    found = float(minimize_scalar(loss, bounds=(-LARGEST, LARGEST), method="bounded").x)
    head.arrival_bias.copy_(arrived * found)
    if model.transitions is not None:
        model.transitions = model.transitions.with_factors(np.exp(found * brought))
    before = (counts.new + PRIOR * of_new) / (counts.all + PRIOR)
    return figures | {
        "probability": float(before.mean()),
        "share": float(new.mean()),
        "addition": found,
    }


@torch.no_grad()
def _probabilities(
    model: GenerativeModel, cases: Cases, items: Tensor, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Under the item head, the probability of these items together, bool (items,), and that of each target:
    float64 (cases,) each."""
    of_items, of_targets, training = np.zeros(len(cases)), np.zeros(len(cases)), model.training
    order = np.argsort([-len(history) for history in cases.histories], kind="stable")
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        last = run_prompts(model, [Prompt.cold(model, cases.histories[row]) for row in rows], 0).last
        found = model.item_log_probabilities(last).double().exp()
        of_items[rows] = found[:, items].sum(1).cpu().numpy()
        of_targets[rows] = found.cpu().numpy()[np.arange(len(rows)), cases.targets[rows]]
    model.train(training)
    return of_items, of_targets


class _Counts(NamedTuple):
    """The evidence of each case: float64 (cases,) each."""

    target: np.ndarray  # for the target
    new: np.ndarray  # for all new items together
    all: np.ndarray  # for all items together


def _counts(transitions: Transitions | None, cases: Cases, new: np.ndarray, batch_size: int) -> _Counts:
    """The evidence of counted transitions; zero if the model does not count.

    Args:
        new: bool (items,), whether an item is new.
    """
    result = _Counts(*np.zeros((3, len(cases))))
    if transitions is None:
        return result
    for start in range(0, len(cases), batch_size):
        part = slice(start, start + batch_size)
        evidence = transitions.evidence(cases.histories[part]).astype(np.float64)
        result.target[part] = evidence[np.arange(len(evidence)), cases.targets[part]]
        result.new[part], result.all[part] = evidence[:, new].sum(1), evidence.sum(1)
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

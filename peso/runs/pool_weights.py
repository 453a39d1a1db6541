"""What a model with an item head chooses on validation cases after training: its counts and their weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from peso.baselines.baseline import Setting
from peso.baselines.item_graph import ItemGraph
from peso.decoding.beam import search
from peso.decoding.pool import SHARES, Candidates, best_weights
from peso.model.generative import GenerativeModel
from peso.model.item_head import LENGTHS
from peso.model.transitions import MOST_EDGES, Transitions, heaviest
from peso.runs.stage import RunStage
from peso.runtime.progress import Observer

TUNED_ON = 2048  # validation cases of a stage, evenly spaced, if it has more


def choose_pool_weights(stage: RunStage, model: GenerativeModel, observer: Observer) -> dict[str, Any]:
    """Count transitions up to the stage, if the model uses them, and weigh counts, item head and codes.

    All choices are made on the validation cases of the stage. The model is changed in place.

    Returns:
        What was chosen, and what was tried, for ``metrics.json``.
    """
    config, figures = stage.workspace.config, dict[str, Any]()
    depth = min(10, config.decoding.beams)
    if config.head.transitions:
        model.transitions, figures["transitions"] = _count(stage, depth, observer)
    head = model.vocabulary.item_head
    assert head is not None
    cases = stage.workspace.stream.stage(stage.number).validation_cases(config.prompt.window)
    rows = np.linspace(0, len(cases) - 1, min(len(cases), TUNED_ON)).astype(np.int64)
    cases = cases.take(np.unique(rows))
    lengths = torch.tensor([len(history) for history in cases.histories])
    parts, of_targets, order = list[Candidates](), list[Candidates](), list[np.ndarray]()

    def keep(users: np.ndarray, found: Candidates, target: Candidates | None) -> None:
        assert target is not None
        order.append(users)
        parts.append(found)
        of_targets.append(target)

    observer.begin(f"stage {stage.number}: weigh item head and codes on validation", len(cases), "users")
    search(
        model,
        cases.histories,
        beams=config.decoding.beams,
        batch_size=config.decoding.batch_size,
        exclude=cases.seen if stage.leaves_out_seen else None,
        targets=cases.targets,
        on_progress=observer.advance,
        on_candidates=keep,
    )
    observer.end()
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


def _count(stage: RunStage, depth: int, observer: Observer) -> tuple[Transitions, dict[str, Any]]:
    """Count the transitions of all events up to the stage, with the decays that the baseline ``item-graph``
    chooses; also returns the figures that it reports."""
    workspace, repeats = stage.workspace, not stage.leaves_out_seen
    window = workspace.config.prompt.window
    graph = ItemGraph(
        Setting(workspace.semantic_ids.trie, window, depth=depth), repeats="keep" if repeats else "leave-out"
    )
    stages = [workspace.stream.stage(number) for number in range(stage.number + 1)]
    figures = graph.learn(stages, observer)
    counted = Transitions(heaviest(graph.edges, MOST_EDGES), graph.recency, window, repeats)
    return counted, figures

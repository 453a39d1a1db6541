"""A model that has just been trained answers validation cases of its stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peso.decoding.beam import Beams, search
from peso.events.histories import Cases
from peso.model.generative import GenerativeModel
from peso.runs.stage import RunStage
from peso.runtime.progress import Observer


def validation_cases(stage: RunStage, most: int) -> Cases:
    """The validation cases of a stage, or ``most`` of them, evenly spaced, if it has more."""
    cases = stage.workspace.stream.stage(stage.number).validation_cases(stage.workspace.config.prompt.window)
    return cases.spread(most)


def search_validation(
    stage: RunStage,
    model: GenerativeModel,
    cases: Cases,
    why: str,
    observer: Observer,
    on_candidates: Callable[..., Any] | None = None,
) -> Beams:
    """The lists and the targets' log-probabilities for validation cases, with the search of the stage's test.

    Args:
        why: what the answers are for, which the progress shows.
        on_candidates: as for :func:`peso.decoding.search`.
    """
    decoding = stage.workspace.config.decoding
    observer.begin(f"stage {stage.number}: {why}", len(cases), "users")
    found = search(
        model,
        cases.histories,
        beams=decoding.beams,
        batch_size=decoding.batch_size,
        exclude=cases.seen if stage.leaves_out_seen else None,
        targets=cases.targets,
        on_progress=observer.advance,
        on_candidates=on_candidates,
    )
    observer.end()
    return found

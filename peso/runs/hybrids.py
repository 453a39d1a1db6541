"""Recommendations from a hybrid (a stage's model combined with baselines) that `peso baseline` has run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from peso.config.baselines import baseline_label
from peso.errors import ConfigError, WorkspaceError
from peso.events.histories import Cases
from peso.runs.baselines import BaselineRun, found_baselines
from peso.runs.workspace import Workspace

if TYPE_CHECKING:
    from peso.baselines.hybrid import Hybrid
    from peso.items.semantic_ids import SemanticIds

NOBODY = ""  # name of a user known only by the history


class HybridAnswers:
    """A hybrid with the weights that were tuned at a stage. Models are loaded on first use.

    Args:
        name: its label, or ``hybrid`` if the workspace has only one.

    Raises:
        ConfigError: the name matches no hybrid of the workspace, or several.
        WorkspaceError: the workspace has no hybrid, or this one was not run for this stage.
    """

    def __init__(self, workspace: Workspace, name: str, stage: int) -> None:
        self.workspace, self.stage = workspace, stage
        self._run = _find(workspace, name)
        if not self._run.is_done(stage):
            raise WorkspaceError(_not_run(self._run, stage))

    @property
    def label(self) -> str:
        """Its name in reports, for example ``hybrid partners=ease``."""
        return self._run.label

    @property
    def item_ids(self) -> Sequence[str]:
        """The ids in the stream of the catalog that the answers are from."""
        return self._run.ids(self.stage).stored_ids

    @property
    def determined_by(self) -> str:
        """Digest of everything that determines its predictions."""
        return self._run.determination(self.stage)

    @cached_property
    def models(self) -> Hybrid:
        """Partners and language model, with the tuned weights."""
        from peso.baselines.hybrid import Hybrid

        restored = self._run.restored(self.stage)
        assert isinstance(restored, Hybrid)
        return restored

    def recommend(
        self,
        users: Sequence[str | None],
        histories: Sequence[np.ndarray],
        k: int,
        *,
        out: Sequence[np.ndarray],
        ids: SemanticIds,
    ) -> list[list[tuple[str, float]]]:
        """The k best items of each user with their pooled log-probabilities, best first; fewer if ``out``
        leaves fewer. Items that share a semantic ID come in the order of the catalog.

        Args:
            users: names, for partners with user embeddings; None: only the history is used.
            histories: all item rows of each user, oldest first.
            out: for each user, the item rows that are not recommended.
            ids: the semantic IDs of the stage, with the names that the answers have.
        """
        if not len(histories):
            return []
        window = self.workspace.config.prompt.window
        hybrid = self.models.with_repeats(not any(map(len, out)))
        hybrid = replace(hybrid, candidates=max(hybrid.candidates, k))
        cases = Cases(
            [NOBODY if user is None else user for user in users],
            [history[-window:] for history in histories],
            np.zeros(len(histories), dtype=np.int32),  # targets are not used
            list(out),
        )
        found = hybrid.answer(cases, ids.trie.leaves, lambda done: None)
        result = []
        for leaves, scores, rows in zip(found.leaves, found.scores.tolist(), out, strict=True):
            never = set(rows.tolist())
            ranked = [
                (ids.item_ids[row], score)
                for leaf, score in zip(leaves[leaves >= 0], scores, strict=False)
                for row in ids.trie.items_of(leaf).tolist()
                if row not in never
            ]
            result.append(ranked[:k])
        return result


def hybrids_not_run(workspace: Workspace, stage: int) -> list[str]:
    """A sentence for each hybrid of the workspace that was not run for a stage, with the command that runs
    it."""
    runs = [BaselineRun(workspace, config) for config in found_baselines(workspace) if config.fused]
    return [_not_run(run, stage) for run in runs if not run.is_done(stage)]


def is_run(workspace: Workspace, label: str, stage: int) -> bool:
    """Whether a hybrid was run for a stage in its current state. Raises ConfigError if there is none."""
    return _find(workspace, label).is_done(stage)


def _not_run(run: BaselineRun, stage: int) -> str:
    options = run.config.model_dump(mode="json", exclude_defaults=True)
    given = json.dumps(options, ensure_ascii=False) if len(options) > 1 else options["name"]
    return (
        f"{run.label} was not run for stage {stage} in its current state; run "
        f"`peso baseline '{given}' -w {run.workspace.root}`"
    )


def _find(workspace: Workspace, name: str) -> BaselineRun:
    hybrids = {baseline_label(config): config for config in found_baselines(workspace) if config.fused}
    if not hybrids:
        raise WorkspaceError(
            f"{workspace.root} has no hybrid; run `peso baseline hybrid -w {workspace.root}`"
        )
    fitting = [label for label in hybrids if name in (label, hybrids[label].name)]
    if name not in hybrids and len(fitting) != 1:
        raise ConfigError(
            f"{workspace.root} has {'several hybrids' if fitting else f'no hybrid called {name!r}'}; "
            f"choose one of {', '.join(map(repr, hybrids))}, or run another with `peso baseline`"
        )
    return BaselineRun(workspace, hybrids[name if name in hybrids else fitting[0]])

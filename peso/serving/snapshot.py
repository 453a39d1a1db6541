"""Recommendations of the server from an immutable snapshot of one stage. All answers from one snapshot are
consistent."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import numpy as np

from peso.errors import DataError
from peso.runs.hybrids import HybridAnswers
from peso.runs.recommender import Recommender
from peso.runs.stage import RunStage
from peso.runtime.machine import threads
from peso.serving.messages import Answer, Item, Request, Source
from peso.serving.remembered import Key, RememberedAnswers, key_of
from peso.serving.stock import Stock

if TYPE_CHECKING:
    from peso.decoding.returning import PromptMemory, Returning
    from peso.items.names import ItemNames
    from peso.items.semantic_ids import SemanticIds
    from peso.model.generative import GenerativeModel

Identity = tuple[int, str, str]
Ranked = list[tuple[str, float]]  # items and scores, best first
EVERYTHING = Stock()


@dataclass(frozen=True)
class Question:
    """A request with the history of its user.

    Attributes:
        request: the request.
        history: the items of the user, oldest first; None: the user is unknown.
        snapshot: the stage that answers; None: the serving one.
        ahead: whether the answer is prepared before the user has asked.
    """

    request: Request
    history: Sequence[str] | None
    snapshot: Snapshot | None = None
    ahead: bool = False


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A stage with everything that is needed for recommendations.

    Attributes:
        stage: the number of the stage.
        identity: identifies the stage and the catalog, see :func:`identity`.
        semantic_ids: the semantic IDs of the stage.
        titles: the title of each item; None: it has none.
        popular: int64 (items,), item rows ordered by events in the newest stage of the stream, most first.
        shares: float64 (items,), the logarithm of each item's share of these events, with add-one smoothing.
        leaves_out_seen: whether items of the history are left out by default.
        beams: the width of the search, as in tests; longer lists have a wider search.
        threads: the setting ``training.threads``.
        hybrid: the hybrid that answers; None: the model alone answers.
        model: the model, or the language model of the hybrid; None while it is being loaded.
        prompts: the cache of prompts of returning users; None: no cache.
        answers: the answers that are kept, and the usual requests of users; None: none are kept.
        since: when the snapshot started to serve.
    """

    stage: int
    identity: Identity
    semantic_ids: SemanticIds
    titles: Sequence[str | None]
    popular: np.ndarray
    shares: np.ndarray
    leaves_out_seen: bool
    beams: int
    threads: int | Literal["auto"]
    hybrid: HybridAnswers | None = None
    model: GenerativeModel | None = None
    prompts: PromptMemory | None = None
    answers: RememberedAnswers | None = None
    since: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def of(cls, stage: RunStage, hybrid: str | None = None) -> Snapshot:
        """Make a snapshot of a stage without its model.

        Args:
            hybrid: the label of a hybrid, or ``hybrid`` if there is only one; None: no hybrid.

        Raises:
            WorkspaceError: the stage is not trained, the hybrid was not run for it, or a file is missing or
                damaged.
            ConfigError: there is no such hybrid.
        """
        workspace = stage.workspace
        recommender = Recommender(workspace, stage.number, live=True, hybrid=hybrid)
        stream, ids = workspace.stream, recommender.semantic_ids
        items = len(ids.item_ids)
        counts = stream.item_counts(stream.stages - 1)[:items]
        return cls(
            stage.number,
            identity(stage, recommender.hybrid),
            ids,
            stream.titles[:items],
            ids.rows(recommender.popular(items)),
            np.log((counts + 1) / (counts.sum() + items)),
            recommender.leaves_out_seen,
            workspace.config.decoding.beams,
            workspace.config.training.threads,
            recommender.hybrid,
        )

    def named(self, names: ItemNames) -> Snapshot:
        """The same snapshot with the current names of renamed items."""
        ids = self.semantic_ids.named(names)
        return self if ids is self.semantic_ids else replace(self, semantic_ids=ids)

    def known(self, items: Iterable[str]) -> tuple[list[str], list[str]]:
        """Split items into those that the stage knows, with their current names and in their order, and the
        others without duplicates."""
        items = list(items)
        known = [self.semantic_ids.name(item) for item in items if item in self.semantic_ids]
        others = dict.fromkeys(item for item in items if item not in self.semantic_ids)
        return known, list(others)

    def answer(self, questions: Sequence[Question], stock: Stock = EVERYTHING) -> list[Answer | DataError]:
        """The answer to each question, or the error.

        Args:
            stock: the filters for all questions.
        """
        stocked = stock.among(self.semantic_ids)
        result: dict[int, Answer | DataError] = {}
        asked: dict[tuple[int, bool], dict[int, _Resolved]] = {}
        for place, question in enumerate(questions):
            try:
                resolved = self._resolve(question, stocked, stock)
            except DataError as refusal:
                result[place] = refusal
                continue
            if resolved.reason is not None:
                result[place] = self._popular(resolved, stocked)
            elif (kept := self._kept(resolved)) is not None:
                result[place] = self._message(resolved, self.source, kept)
            else:  # grouped by the width of the search, so that an answer does not depend on other questions
                k = resolved.request.k
                width = max(self.beams, k) if self.hybrid is None else k
                key = width, resolved.allow is None
                asked.setdefault(key, {})[place] = resolved
        search = self._search if self.hybrid is None else self._pool
        for group in asked.values():
            found = search(list(group.values()), stocked)
            for (place, resolved), ranked in zip(group.items(), found, strict=True):
                result[place] = self._message(resolved, self.source, ranked)
                if self.answers is not None:
                    self.answers.keep(resolved.key, ranked, resolved.ahead)
        return [result[place] for place in range(len(questions))]

    @property
    def source(self) -> Source:
        """What answers if the history is known."""
        return "model" if self.hybrid is None else "hybrid"

    def usual(self, user: str) -> Request | None:
        """The request that a user is expected to send again; None if the user has not asked lately, or the
        prompt of the user is no longer kept."""
        if self.answers is None or (self.prompts is not None and user not in self.prompts):
            return None
        return self.answers.usual(user)

    def _kept(self, asked: _Resolved) -> list[tuple[str, float]] | None:
        """The answer if it is kept. Also remembers the request as the user's usual one."""
        if self.answers is None:
            return None
        if asked.request.user is not None and not asked.ahead:
            self.answers.asked(asked.request)
        return self.answers.find(asked.key, asked.ahead)

    def _resolve(self, question: Question, stocked: frozenset[str] | None, stock: Stock) -> _Resolved:
        request = question.request
        if request.k > (items := len(self.semantic_ids.item_ids)):
            raise DataError(f"k = {request.k} is more than the {items} items of the catalog; ask for fewer")
        history, unknown = self.known(question.history or ())
        allow, unknown_allowed = self.known(request.allow or ())
        deny, unknown_denied = self.known(request.deny or ())
        given = [] if request.user is not None else unknown  # a stored history is not the caller's mistake
        if request.unknown == "refuse" and (refused := [*given, *unknown_allowed, *unknown_denied]):
            raise DataError(
                f"the items {refused[:5]} are not known to stage {self.stage}; leave them out, or send "
                "unknown: skip"
            )
        leave_out = self.leaves_out_seen if request.exclude_seen is None else request.exclude_seen
        reason: _Reason = None
        if question.history is None and request.user is not None:
            self._forget(request.user)  # the user may have been erased
        if question.history is None:
            reason = "unknown_user"
        elif not history:
            reason = "empty_history"
        elif self.model is None:
            reason = "loading"
        return _Resolved(
            request,
            history,
            frozenset(deny) | (frozenset(history) if leave_out else frozenset()),
            None if request.allow is None else frozenset(allow if stocked is None else stocked & set(allow)),
            reason,
            list(dict.fromkeys([*unknown, *unknown_allowed, *unknown_denied])),
            key_of(request, history, leave_out, stock),
            question.ahead,
            # a stored history has the ids of the stream, which the caller has not sent
            self.semantic_ids.names.former(
                [*(request.history or ()), *(request.allow or ()), *(request.deny or ())]
            ),
        )

    def _forget(self, user: str) -> None:
        if self.prompts is not None:
            self.prompts.forget(user)
        if self.answers is not None:
            self.answers.forget(user)

    def _search(self, asked: Sequence[_Resolved], stocked: frozenset[str] | None) -> list[Ranked]:
        from peso.decoding import beam_search

        assert self.model is not None
        width = max(self.beams, asked[0].request.k)
        with threads(self.model, self.threads):
            found = beam_search(
                self.model,
                [each.history for each in asked],
                min(width, len(self.semantic_ids.item_ids)),
                beams=width,
                allow=[each.allow for each in asked if each.allow is not None] or stocked,
                deny=[each.out for each in asked],
                returning=[self._cached_prompt(each.request.user) for each in asked],
                ids=self.semantic_ids,
            )
        return [ranked[: each.request.k] for each, ranked in zip(asked, found, strict=True)]

    def _pool(self, asked: Sequence[_Resolved], stocked: frozenset[str] | None) -> list[Ranked]:
        """The answers of the hybrid."""
        assert self.hybrid is not None
        ids = self.semantic_ids
        out = [np.flatnonzero(~self._admitted(each, stocked)) for each in asked]
        return self.hybrid.recommend(
            [each.request.user for each in asked],
            [ids.rows(each.history) for each in asked],
            asked[0].request.k,
            out=out,
            ids=ids,
        )

    def _cached_prompt(self, user: str | None) -> Returning | None:
        """The cache entry of a user's prompt; None for requests with a history."""
        return None if user is None or self.prompts is None else self.prompts.of(user)

    def _admitted(self, asked: _Resolved, stocked: frozenset[str] | None) -> np.ndarray:
        """bool (items,): which items pass the filters."""
        ids, allowed = self.semantic_ids, stocked if asked.allow is None else asked.allow
        admitted = np.full(len(ids.item_ids), allowed is None)
        if allowed is not None:
            admitted[ids.rows(sorted(allowed))] = True
        admitted[ids.rows(sorted(asked.out))] = False
        return admitted

    def _popular(self, asked: _Resolved, stocked: frozenset[str] | None) -> Answer:
        """The most popular items that pass the filters."""
        ids, admitted = self.semantic_ids, self._admitted(asked, stocked)
        best = self.popular[admitted[self.popular]][: asked.request.k]
        ranked = [(ids.item_ids[row], float(self.shares[row])) for row in best]
        return self._message(asked, "popularity", ranked)

    def _message(self, asked: _Resolved, source: Source, ranked: Collection[tuple[str, float]]) -> Answer:
        items = [
            Item(item=item, score=score, title=self.title(item) if asked.request.titles else None)
            for item, score in ranked
        ]
        reason = asked.reason if source == "popularity" else None
        return Answer(
            stage=self.stage,
            source=source,
            reason=reason,
            items=items,
            unknown_items=asked.unknown,
            renamed_items=asked.renamed or None,
        )

    def title(self, item: str) -> str | None:
        """The title of an item that the stage knows; None if it has none."""
        return self.titles[self.semantic_ids.row(item)]


def answer_all(
    current: Snapshot, questions: Sequence[Question], stock: Stock = EVERYTHING
) -> list[Answer | DataError]:
    """The answer to each question, from its own snapshot or the current one."""
    groups: dict[Snapshot, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(question.snapshot or current, []).append(place)
    found: dict[int, Answer | DataError] = {}
    for snapshot, places in groups.items():
        found.update(zip(places, snapshot.answer([questions[p] for p in places], stock), strict=True))
    return [found[place] for place in range(len(questions))]


def identity(stage: RunStage, hybrid: HybridAnswers | None = None) -> Identity:
    """Everything an answer depends on: the number and the digest of the stage, the digest of the hybrid, and
    the catalog, which may have grown since the stage was trained."""
    catalog = stage.workspace.semantic_ids_manifest["files"]
    of_hybrid = "" if hybrid is None else f" {hybrid.determined_by}"
    return stage.number, f"{stage.determined_by}{of_hybrid}", str(sorted(catalog.items()))


_Reason = Literal["loading", "unknown_user", "empty_history"] | None


@dataclass(frozen=True)
class _Resolved:
    """A question whose items were looked up in one stage.

    Attributes:
        request: the request.
        history: the items of the history that the stage knows, by their current names.
        out: items to leave out.
        allow: the only items that may be recommended; None: no such filter.
        reason: why the model is not used; None: it is used.
        unknown: items that the stage does not know.
        key: identifies the answer among those that are kept.
        ahead: whether the answer is prepared before the user has asked.
        renamed: the current names of items that the request has by a former name.
    """

    request: Request
    history: list[str]
    out: frozenset[str]
    allow: frozenset[str] | None
    reason: _Reason
    unknown: list[str]
    key: Key
    ahead: bool
    renamed: dict[str, str]

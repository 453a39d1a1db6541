"""API routes of the explorer: explanations of an item's score, similar items, lists of users, drift."""

from __future__ import annotations

import asyncio
import threading
from typing import Annotated, Any

import numpy as np
from cachetools import LRUCache
from fastapi import FastAPI, Query
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from peso.runs.diagnosis import stream_drift
from peso.runs.workspace import Workspace
from peso.serving import messages
from peso.serving.explain import (
    By,
    ItemTexts,
    Likelihood,
    Near,
    likelihood,
    near_by_codes,
    near_by_head,
    reason,
)
from peso.serving.messages import (
    CodeChance,
    Drift,
    Explain,
    Explanation,
    KnownUser,
    NearItem,
    Request,
    ShownItem,
    StageDrift,
    StageView,
    Users,
)
from peso.serving.routes import Service, question_of, refusals
from peso.serving.snapshot import Snapshot

STAGES = 4  # number of stages whose event counts are cached


class StreamFacts:
    """Drift and event counts of a stream, computed on demand and cached until the stream changes.
    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._drift: tuple[list[str], list[dict[str, Any]]] | None = None
        self._counts: LRUCache[str, np.ndarray] = LRUCache(STAGES)  # by the fingerprint of the stage

    def drift(self, workspace: Workspace) -> list[dict[str, Any]]:
        """See :func:`peso.events.drift.drift`."""
        with self._lock:  # only one thread reads the stream, the others wait for the result
            stream = workspace.stream
            rests_on = [stream.fingerprint(number) for number in range(stream.stages)]
            if workspace.has_semantic_ids:
                rests_on.append(str(workspace.semantic_ids_manifest["items"]))
            if self._drift is None or self._drift[0] != rests_on:
                self._drift = rests_on, stream_drift(workspace, "duckdb")  # a server need not have Spark
            return self._drift[1]

    def events(self, workspace: Workspace, row: int, stages: set[int]) -> dict[int, int]:
        """The number of events of an item, given by its row, in each of these stages of the stream."""
        stream, found = workspace.stream, {}
        for number in sorted(stages):
            if number >= stream.stages:
                continue
            with self._lock:
                key = stream.fingerprint(number)
                if (counts := self._counts.get(key)) is None:
                    self._counts[key] = counts = stream.item_counts(number)
            found[number] = int(counts[row])
        return found


def add_insight(app: FastAPI, service: Service) -> None:
    """Add the routes to the application."""
    texts, facts = ItemTexts(), StreamFacts()

    @app.post(
        "/v1/explain",
        responses=refusals(400, 401, 404, 413, 422, 429, 503),
        summary="Explain the score of an item, and list similar items",
    )
    async def explain(body: Explain) -> Explanation:
        """Compares the serving stage with the previous one if the latter's model is loaded; `/v1/compare`
        loads it."""
        request = Request(user=body.user, history=body.history)
        history = list((await question_of(service, request)).history or ())
        before = await run_in_threadpool(service.before.find)
        return await _explained(service, texts, facts, body.item, history, before.snapshot)

    @app.get("/v1/users", responses=refusals(401, 422, 429, 503), summary="List users by name, with paging")
    async def users(
        prefix: Annotated[messages.Id | None, Query(description="Only users with this prefix.")] = None,
        after: Annotated[messages.Id | None, Query(description="`after` of the previous page.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Users:
        named = service.histories.users.named
        found = await run_in_threadpool(named, prefix or "", after or "", limit + 1)
        return Users(
            users=[KnownUser(user=name, items=items) for name, items in found[:limit]],
            after=found[limit - 1][0] if len(found) > limit else None,
        )

    @app.get("/v1/drift", responses=refusals(401, 429, 503), summary="Get the drift of the data by stage")
    async def drift() -> Drift:
        """The first request reads the whole stream."""
        workspace = service.live.workspace
        found = await run_in_threadpool(facts.drift, workspace)
        return Drift(
            stages=[StageDrift(**{key: each[key] for key in StageDrift.model_fields}) for each in found],
            high=workspace.config.gate.drift,
        )


def shown(snapshot: Snapshot, item: str, score: float | None = None) -> ShownItem:
    """An item for the explorer, with its current name; title and semantic ID only if the stage knows it."""
    if item not in snapshot.semantic_ids:
        return ShownItem(item=item, score=score)
    item, semantic_id = snapshot.semantic_ids.name(item), snapshot.semantic_ids.semantic_id(item)
    return ShownItem(item=item, title=snapshot.title(item), semantic_id=semantic_id, score=score)


async def _explained(
    service: Service,
    texts: ItemTexts,
    facts: StreamFacts,
    item: str,
    history: list[str],
    before: Snapshot | None,
) -> Explanation:
    """The explanation of an item. Raises HTTPException if neither stage knows it."""
    current, workspace = service.live.current, service.live.workspace
    known = current if item in current.semantic_ids or before is None else before
    if item not in known.semantic_ids:
        raise HTTPException(404, f"stage {current.stage} does not know the item {item!r}")
    item = known.semantic_ids.name(item)

    def with_models() -> tuple[Likelihood | None, Likelihood | None, Near | None]:
        then = None if before is None else likelihood(before, history, item)
        return likelihood(current, history, item), then, near_by_head(known, item)

    now, then, near = await asyncio.wrap_future(service.engine.run(with_models))
    by: By = "item head"
    if near is None:
        by, near = "texts", await run_in_threadpool(texts.near, workspace, known, item)
    if near is None:
        by, near = "codes", near_by_codes(known, item)
    numbers = {current.stage} | ({before.stage} if before is not None else set())
    events = await run_in_threadpool(facts.events, workspace, known.semantic_ids.row(item), numbers)
    return Explanation(
        item=item,
        serving=_view(current, item, now),
        before=None if before is None else _view(before, item, then),
        says=_says(current, "" if before is None else reason(item, (current, now), (before, then), events)),
        nearest_by=by,
        nearest=[
            NearItem(**shown(known, other).model_dump(), similarity=similarity) for other, similarity in near
        ],
        events={str(number): count for number, count in events.items()},
    )


def _says(current: Snapshot, why: str) -> str:
    """The reason; with a hybrid, also that the log-probabilities are not those of the list."""
    if current.hybrid is None:
        return why
    note = f"The list is that of {current.hybrid.label}; these log-probabilities are of its language model."
    return f"{why} {note}".strip()


def _view(snapshot: Snapshot, item: str, found: Likelihood | None) -> StageView:
    if found is None:
        return StageView(stage=snapshot.stage, score=None, codes=[])
    names = snapshot.semantic_ids.semantic_id(item)
    codes = [CodeChance(code=c, log_probability=p) for c, p in zip(names, found.codes, strict=True)]
    return StageView(stage=snapshot.stage, score=found.score, codes=codes, item_head=found.head)

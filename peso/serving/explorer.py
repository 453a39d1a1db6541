"""The explorer: a page at `/`, and the API routes that only it uses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated

from fastapi import Body, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from peso.errors import DataError
from peso.runs.hybrids import is_run
from peso.runs.served import previous, promote, rollback
from peso.runs.status import status
from peso.serving.insight import add_insight, shown
from peso.serving.messages import (
    Answer,
    Changed,
    Comparison,
    Lineage,
    Promote,
    Request,
    Rollback,
    ShownItem,
    ShownList,
    StageState,
)
from peso.serving.routes import Service, question_of, refusals
from peso.serving.snapshot import Question, Snapshot

SHOWN = 50  # number of newest history items shown
PAGE = {  # path → file and type; they need no token, because they contain no data of the workspace
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/chart.js": ("chart.js", "text/javascript; charset=utf-8"),
    "/page/stages.js": ("stages.js", "text/javascript; charset=utf-8"),
    "/page/insight.js": ("insight.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'"
)


def add_explorer(app: FastAPI, service: Service) -> None:
    """Add the page and its API routes to the application."""
    for path, (name, kind) in PAGE.items():
        _add_file(app, path, (files("peso.serving") / "page" / name).read_bytes(), kind)
    _add_queries(app, service)
    add_insight(app, service)
    _add_changes(app, service)


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def file() -> Response:
        return Response(content, media_type=kind, headers={"content-security-policy": POLICY})

    app.add_api_route(path, file, methods=["GET"], include_in_schema=False)


def _add_queries(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/compare",
        responses=refusals(400, 401, 413, 422, 429, 503),
        summary="Recommendations of the serving stage and of the previous one",
    )
    async def compare(body: Request) -> Comparison:
        """The first request starts loading the previous stage in the background; until it is loaded,
        `before_state` is `loading`."""
        question = await question_of(service, body)
        before = await run_in_threadpool(service.before.find)
        asked = [question]
        if before.snapshot is not None:
            asked.append(Question(body, question.history, before.snapshot))
        answers: list[Answer] = []
        for answer in await asyncio.wrap_future(service.engine.ask(asked)):
            if isinstance(answer, DataError):
                raise answer
            answers.append(answer)
        snapshot, history = service.live.current, list(question.history or ())
        return Comparison(
            history=[shown(snapshot, item) for item in history[-SHOWN:]],
            history_length=len(history),
            serving=_listed(snapshot, answers[0]),
            before=None if before.snapshot is None else _listed(before.snapshot, answers[1]),
            before_stage=before.stage,
            before_state=before.state,
        )

    @app.get(
        "/v1/stages",
        responses=refusals(401, 429, 503),
        summary="List the trained stages with their metrics and gate verdicts",
    )
    async def stages(http: HttpRequest) -> Lineage:
        found = await run_in_threadpool(status, service.live.workspace)
        serves = found["serves"]
        return Lineage(
            gate=found["gate"],
            previous=serves["previous"],
            since=serves["since"],
            by=serves["by"],
            reason=serves["reason"],
            stages=[
                StageState(**{key: each[key] for key in StageState.model_fields}) for each in found["stages"]
            ],
            refusal=_refusal(service, http),
        )


def _listed(snapshot: Snapshot, answer: Answer) -> ShownList:
    items: Sequence[ShownItem] = [shown(snapshot, each.item, each.score) for each in answer.items]
    return ShownList(stage=answer.stage, source=answer.source, reason=answer.reason, items=list(items))


def _add_changes(app: FastAPI, service: Service) -> None:
    codes = refusals(400, 401, 403, 404, 409, 413, 422, 429, 503, 507)

    @app.post("/v1/promote", responses=codes, summary="Make a stage the serving one")
    async def promote_stage(body: Annotated[Promote, Body()], http: HttpRequest) -> Changed:
        """Same as `peso promote`. Requires a token."""
        return await run_in_threadpool(_promote, service, body, _caller(service, http))

    @app.post(
        "/v1/rollback", responses=codes, summary="Make the previous serving stage the serving one again"
    )
    async def roll_back(body: Annotated[Rollback, Body()], http: HttpRequest) -> Changed:
        """Same as `peso rollback`. Requires a token."""
        return await run_in_threadpool(_roll_back, service, body, _caller(service, http))


def _refusal(service: Service, http: HttpRequest) -> str | None:
    """Why the caller may not change the serving stage; None if it may."""
    if service.received is None:
        return "the serving stage cannot be changed: this server was started with --read-only"
    if service.live.pinned is not None:
        return (
            f"the serving stage cannot be changed: this server was started with --stage {service.live.pinned}"
        )
    if getattr(http.state, "token", None) is None:
        return "the serving stage cannot be changed without a token: start the server with --token-file"
    return None


def _caller(service: Service, http: HttpRequest) -> str:
    """The name of the caller, for the record of a change. Raises HTTPException if the caller may not change
    anything."""
    if (refusal := _refusal(service, http)) is not None:
        raise HTTPException(403, refusal)
    return f"token {http.state.token + 1} over HTTP"


def _promote(service: Service, body: Promote, caller: str) -> Changed:
    workspace = service.live.workspace
    if body.stage not in workspace.finished_stages:
        raise HTTPException(404, f"there is no trained stage {body.stage}; GET /v1/stages lists them")
    stage = workspace.stage(body.stage)
    if stage.pruned is not None:
        raise HTTPException(
            409, f"the weights of stage {body.stage} were removed; promote a stage that has them"
        )
    _require_hybrid(service, body.stage)
    verdict = stage.verdict
    if not body.force and verdict is not None and verdict["decision"] != "passed":
        raise HTTPException(
            409,
            f"stage {body.stage} did not pass its gate ({verdict['says']}); send force: true to promote it "
            "anyway, which is recorded",
        )
    reason = f"{body.reason} ({caller})"
    changed = promote(workspace, body.stage, reason=reason, force=body.force)
    return Changed(stage=body.stage, changed=changed, reason=reason)


def _require_hybrid(service: Service, stage: int) -> None:
    """Raise HTTPException if the server answers with a hybrid that was not run for a stage."""
    label = service.live.hybrid
    if label is not None and not is_run(service.live.workspace, label, stage):
        raise HTTPException(
            409,
            f"this server answers with {label!r}, which was not run for stage {stage}; run it with `peso "
            "baseline`, then send the request again",
        )


def _roll_back(service: Service, body: Rollback, caller: str) -> Changed:
    workspace = service.live.workspace
    target = previous(workspace)
    if target is None:
        raise HTTPException(409, "no other stage served before the current one; promote one by its number")
    if body.stage not in (None, target):
        raise HTTPException(
            409,
            f"the target of a rollback is stage {target} now, not stage {body.stage}; send that number if it "
            "is right",
        )
    _require_hybrid(service, target)
    reason = f"{body.reason} ({caller})"
    return Changed(stage=rollback(workspace, reason=reason).stage, changed=True, reason=reason)

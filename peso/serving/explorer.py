"""The explorer: a page at `/`, and what it asks the server for beside the other paths."""

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

SHOWN = 50  # items of a history, the newest
PAGE = {  # paths, which need no token: the page has nothing of the workspace in it
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
    """Add the page and its paths to the application."""
    for path, (name, kind) in PAGE.items():
        _add_file(app, path, (files("peso.serving") / "page" / name).read_bytes(), kind)
    _add_looking(app, service)
    add_insight(app, service)
    _add_changing(app, service)


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def file() -> Response:
        return Response(content, media_type=kind, headers={"content-security-policy": POLICY})

    app.add_api_route(path, file, methods=["GET"], include_in_schema=False)


def _add_looking(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/compare",
        responses=refusals(400, 401, 413, 422, 429, 503),
        summary="Recommendations of the serving stage and of the one before it",
    )
    async def compare(body: Request) -> Comparison:
        """The first request loads the stage before in the background: `before_state` is then `loading`."""
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
        summary="The trained stages, their metrics and the verdicts of the gate",
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


def _add_changing(app: FastAPI, service: Service) -> None:
    codes = refusals(400, 401, 403, 404, 409, 413, 422, 429, 503, 507)

    @app.post("/v1/promote", responses=codes, summary="Let a stage serve from now on")
    async def promote_stage(body: Annotated[Promote, Body()], http: HttpRequest) -> Changed:
        """As `peso promote`; needs a token."""
        return await run_in_threadpool(_promote, service, body, _caller(service, http))

    @app.post("/v1/rollback", responses=codes, summary="Let the stage serve again that served before")
    async def roll_back(body: Annotated[Rollback, Body()], http: HttpRequest) -> Changed:
        """As `peso rollback`; needs a token."""
        return await run_in_threadpool(_roll_back, service, body, _caller(service, http))


def _refusal(service: Service, http: HttpRequest) -> str | None:
    """Why the caller may not change the stage that serves."""
    if service.received is None:
        return "this server changes no stage: it was started with --read-only"
    if service.live.pinned is not None:
        return f"this server changes no stage: it was started with --stage {service.live.pinned}"
    if getattr(http.state, "token", None) is None:
        return "this server changes no stage without a token: start it with --token-file"
    return None


def _caller(service: Service, http: HttpRequest) -> str:
    """Who makes a change, for its record. Raises HTTPException if they may not."""
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
    verdict = stage.verdict
    if not body.force and verdict is not None and verdict["decision"] != "passed":
        raise HTTPException(
            409,
            f"stage {body.stage} did not pass its gate ({verdict['says']}); send force: true to promote it "
            "all the same, which is recorded",
        )
    reason = f"{body.reason} ({caller})"
    changed = promote(workspace, body.stage, reason=reason, force=body.force)
    return Changed(stage=body.stage, changed=changed, reason=reason)


def _roll_back(service: Service, body: Rollback, caller: str) -> Changed:
    workspace = service.live.workspace
    target = previous(workspace)
    if target is None:
        raise HTTPException(409, "no other stage served before the current one; promote one by its number")
    if body.stage not in (None, target):
        raise HTTPException(
            409, f"a rollback leads to stage {target} now, not to stage {body.stage}; look again and decide"
        )
    reason = f"{body.reason} ({caller})"
    return Changed(stage=rollback(workspace, reason=reason).stage, changed=True, reason=reason)

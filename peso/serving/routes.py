"""The HTTP API: its routes, and the responses to errors."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import Body, FastAPI, Path
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from peso.errors import DataError, FullDisk, WorkspaceError
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.runs.served import served
from peso.runtime.failures import installed_version
from peso.serving import messages
from peso.serving.before import StageBefore
from peso.serving.engine import Engine, Overloaded
from peso.serving.histories import LiveHistories
from peso.serving.live import LiveStage
from peso.serving.messages import (
    Answer,
    Events,
    ItemDetails,
    Problem,
    Promotion,
    Received,
    Request,
    Requests,
    Status,
)
from peso.serving.meters import Meters
from peso.serving.snapshot import Question

log = logging.getLogger("peso.serving")
SHOWN = 5  # maximum number of errors of a request that the response lists


@dataclass
class Service:
    """The parts of a server that the routes use.

    Attributes:
        live: the serving stage.
        engine: the queue of questions.
        meters: the metrics.
        histories: the histories of users.
        received: the store of events; None if the server is read-only.
        before: the previous stage.
    """

    live: LiveStage
    engine: Engine
    meters: Meters
    histories: LiveHistories
    received: ReceivedEvents | None
    before: StageBefore


def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI descriptions of error responses with these status codes."""
    descriptions = {
        400: "The body is not JSON.",
        401: "The token is missing or invalid.",
        403: "The server does not accept events, or changes of the serving stage.",
        404: "Not found.",
        409: "The current state of the workspace does not allow this change; see `detail`.",
        413: "The body is too long.",
        422: "The body does not match the schema, or the request cannot be answered; see `detail`.",
        429: "Too many requests; `Retry-After` has the number of seconds to wait.",
        503: "The workspace cannot be used now; the reason is in the server's log.",
        507: "The server's disk is full; nothing is stored.",
    }
    return {code: {"model": Problem, "description": descriptions[code]} for code in codes}


def create_app(service: Service) -> FastAPI:
    """The application, without the middleware (:mod:`peso.serving.guard`)."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.live.start()
        threading.Thread(target=service.histories.prepare, name="peso histories", daemon=True).start()
        yield
        service.live.stop()
        service.before.stop()
        await run_in_threadpool(service.engine.stop)
        if service.received is not None:
            service.received.close()  # also merges SQLite's write-ahead log

    app = FastAPI(
        title="peso",
        version=installed_version(),
        description="Recommendations from the serving stage, and collection of events for the next one.",
        lifespan=running,
        docs_url=None,  # this page would load scripts from other hosts
        redoc_url=None,
    )
    app.add_exception_handler(RequestValidationError, _explain_mistakes)
    app.add_exception_handler(HTTPException, _explain_refusal)
    app.add_exception_handler(Overloaded, _explain_load)
    app.add_exception_handler(DataError, _explain_data)
    app.add_exception_handler(FullDisk, _explain_full_disk)
    app.add_exception_handler(WorkspaceError, _explain_workspace)
    app.add_exception_handler(Exception, _hide_defect)
    _add_recommendations(app, service)
    _add_events(app, service)
    _add_state(app, service)
    return app


def _add_recommendations(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/recommend",
        responses=refusals(400, 401, 413, 422, 429, 503),
        response_model_exclude_none=True,
        summary="Get recommendations for one or several users",
    )
    async def recommend(body: Annotated[Requests, Body(openapi_examples=EXAMPLES)]) -> Answer | list[Answer]:
        """A list of requests gets a list of answers in the same order, all from one stage."""
        requests = body if isinstance(body, list) else [body]
        questions = [await question_of(service, request) for request in requests]
        answers = await asyncio.wrap_future(service.engine.ask(questions))
        given: list[Answer] = []
        for place, answer in enumerate(answers):
            if isinstance(answer, DataError):
                where = f"request {place}: " if isinstance(body, list) else ""
                raise DataError(f"{where}{answer}")
            service.meters.answers.labels(answer.source, answer.reason or "").inc()
            given.append(answer)
        return given if isinstance(body, list) else given[0]

    @app.get(
        "/v1/items/{item:path}",
        responses=refusals(401, 404, 422, 429),
        summary="Get the title and the semantic ID of an item",
    )
    async def item(item: Annotated[messages.Id, Path(examples=["25"])]) -> ItemDetails:
        snapshot = service.live.current
        if item not in snapshot.semantic_ids:
            raise HTTPException(404, f"stage {snapshot.stage} does not know the item {item!r}")
        return ItemDetails(
            stage=snapshot.stage,
            item=snapshot.semantic_ids.name(item),
            title=snapshot.title(item),
            semantic_id=snapshot.semantic_ids.semantic_id(item),
        )


async def question_of(service: Service, request: Request) -> Question:
    """A question from a request, with the history of its user. A user that was merged into another one is
    replaced by that one."""
    if request.user is None:
        return Question(request, request.history)
    history = await run_in_threadpool(service.histories.of, request.user)
    user = service.histories.users.now(request.user)
    return Question(request.model_copy(update={"user": user}), history)


def _add_events(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/events",
        responses=refusals(400, 401, 403, 413, 422, 429, 503, 507),
        summary="Store events of users",
    )
    async def events(body: Annotated[Events, Body(openapi_examples=EVENT_EXAMPLES)]) -> Received:
        """The response is sent when all events are on disk; they are stored together or not at all. Later
        recommendations for these users include them. Events can be sent again without effect."""
        if service.received is None:
            raise HTTPException(403, "this server accepts no events: it was started with --read-only")
        time = messages.now()
        given = [
            ReceivedEvent(each.user, each.item, time if each.time is None else int(each.time), each.key or "")
            for each in (body if isinstance(body, list) else [body])
        ]
        new = await run_in_threadpool(service.received.add, given)
        if (answers := service.live.current.answers) is not None:
            users = {event.user for event, is_new in zip(given, new, strict=True) if is_new}
            service.engine.expect(user for user in users if user in answers)
        service.meters.events.labels("new").inc(sum(new))
        service.meters.events.labels("duplicate").inc(len(new) - sum(new))
        unknown = service.live.current.known(event.item for event in given)[1]
        return Received(new=sum(new), duplicates=len(new) - sum(new), unknown_items=unknown)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/status", responses=refusals(401, 429, 503), summary="Get the state of the server")
    async def status() -> Status:
        live = service.live
        snapshot = live.current
        newest, promotion = await run_in_threadpool(_stages, live)
        return Status(
            version=installed_version(),
            stage=snapshot.stage,
            stage_since=snapshot.since,
            pinned=live.pinned is not None,
            hybrid=live.hybrid,
            model="loading" if snapshot.model is None else "ready",
            problem=live.problem or live.lacks_hybrid,
            newest_stage=newest,
            promotion=promotion,
            read_only=service.received is None,
            items=len(snapshot.semantic_ids.item_ids),
            waiting=service.engine.waiting,
        )

    @app.get("/healthz", response_class=PlainTextResponse, summary="Check that the server is running")
    async def healthz() -> str:
        return "ok\n"

    @app.get(
        "/readyz",
        response_class=PlainTextResponse,
        responses={503: {"description": "The model is loading.", "content": {"text/plain": {}}}},
        summary="Check that the model is loaded",
    )
    async def readyz() -> Response:
        ready = service.live.is_ready
        return PlainTextResponse("ready\n" if ready else "loading\n", 200 if ready else 503)

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=refusals(401, 429),
        summary="Get metrics in the Prometheus text format",
    )
    async def metrics() -> Response:
        service.meters.waiting.set(service.engine.waiting)
        service.meters.describe(service.live.current)
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _stages(live: LiveStage) -> tuple[int | None, Promotion | None]:
    """The newest trained stage and the last promotion; None if they cannot be read (see
    :attr:`LiveStage.problem`)."""
    try:
        newest, latest = live.workspace.finished_stages[-1], served(live.workspace).latest
    except (WorkspaceError, IndexError):
        return None, None
    if latest is None:
        return newest, None
    time = datetime.fromisoformat(latest.time)
    return newest, Promotion(
        stage=latest.stage, time=time, by=latest.by, reason=latest.reason, pinned=latest.pinned
    )


EXAMPLES: Any = {
    "user": {"summary": "A user of the log", "value": {"user": "7", "k": 5}},
    "history": {"summary": "A history", "value": messages.EXAMPLE},
    "several": {"summary": "Several requests", "value": [{"user": "7"}, {"history": ["25"], "k": 3}]},
}

EVENT_EXAMPLES: Any = {
    "one": {"summary": "An event", "value": {"user": "7", "item": "311", "time": "2026-03-01T12:00:00Z"}},
    "several": {
        "summary": "Several events, one of them with an idempotency key",
        "value": [
            {"user": "7", "item": "311", "key": "order-5"},
            {"user": "8", "item": "25", "time": 1772366400},
        ],
    },
}


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    # a detail may repeat lone surrogates that the caller sent, which UTF-8 cannot encode
    return JSONResponse({"detail": detail.encode("utf-8", "backslashreplace").decode()}, status, headers)


async def _explain_mistakes(request: HttpRequest, error: Exception) -> Response:
    """Explain what is wrong with a request, without repeating the values that were sent."""
    assert isinstance(error, RequestValidationError)
    if request.method == "POST" and "json" not in request.headers.get("content-type", ""):
        return _problem(422, "send a body of JSON, with the header Content-Type: application/json")
    mistakes = []
    for mistake in error.errors():
        if mistake["type"] == "json_invalid":
            where, why = mistake["loc"][-1], mistake["ctx"]["error"]
            return _problem(400, f"the body is not JSON: {why} at character {where}")
        place = ".".join(str(part)[:40] for part in mistake["loc"] if part not in ("body", "one", "list"))
        message = str(mistake["msg"]).removeprefix("Value error, ")
        if mistake["type"] == "model_attributes_type":
            message = "must be a JSON object"
        mistakes.append(f"{place}: {message}" if place else message)
    more = f"; and {len(mistakes) - SHOWN} more" if len(mistakes) > SHOWN else ""
    return _problem(422, "; ".join(mistakes[:SHOWN]) + more)


async def _explain_refusal(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _explain_load(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Overloaded)
    return _problem(429, str(error), {"retry-after": str(error.seconds)})


async def _explain_data(request: HttpRequest, error: Exception) -> Response:
    return _problem(422, str(error))


async def _explain_full_disk(request: HttpRequest, error: Exception) -> Response:
    log.error("no space left", exc_info=error)
    return _problem(507, "the server's disk is full; nothing was stored, try again later")


async def _explain_workspace(request: HttpRequest, error: Exception) -> Response:
    """A file is damaged, or was locked for too long. The message may contain paths, so it is only logged."""
    log.error("the workspace cannot be used", exc_info=error)
    return _problem(
        503, "the server cannot use its workspace now; the reason is in its log", {"retry-after": "30"}
    )


async def _hide_defect(request: HttpRequest, error: Exception) -> Response:
    """Answer without details. The traceback is only logged."""
    log.error("a request failed", exc_info=error)
    return _problem(500, "internal server error; the reason is in the server's log")

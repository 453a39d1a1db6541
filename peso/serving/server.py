"""`peso serve`: builds the server and runs it until SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from peso.errors import UsageError
from peso.events.received import ReceivedEvents
from peso.serving.before import StageBefore
from peso.serving.engine import Engine
from peso.serving.explorer import PAGE, add_explorer
from peso.serving.guard import Guard, JsonLines
from peso.serving.histories import LiveHistories
from peso.serving.live import LiveStage
from peso.serving.meters import Meters
from peso.serving.remembered import RememberedAnswers
from peso.serving.routes import Service, create_app
from peso.serving.snapshot import Question, Snapshot, answer_all
from peso.serving.stock import StockFiles
from peso.serving.tokens import Tokens, require_tokens

log = logging.getLogger("peso.serving")
BACKLOG = 2048  # connections that wait to be accepted
PATIENCE = 10  # seconds for requests in progress at shutdown


@dataclass(frozen=True)
class Settings:
    """The options of `peso serve`.

    Attributes:
        host, port: the address; port 0: the system chooses a free one.
        stage: a fixed stage; None: the promoted one.
        read_only: accept no events and no change of the serving stage.
        rate: requests per second and caller; 0: no limit.
        queue: maximum number of requests waiting for the model.
        largest_body: maximum size of a request in bytes.
        prompt_memory: bytes for the cached prompts of returning users; 0: no cache.
        answer_memory: bytes for answers that are kept; 0: no answers are kept.
        prepare: after an event of a user, answer the user's usual request in idle time, and keep the answer.
        hybrid: the hybrid that answers, see :class:`peso.serving.live.LiveStage`.
        allow_file, deny_file: files with the only items that may be recommended, and with those that may not.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    stage: int | None = None
    read_only: bool = False
    rate: float = 1_000.0
    queue: int = 256
    largest_body: int = 4_000_000
    prompt_memory: int = 256 * 2**20
    answer_memory: int = 16 * 2**20
    prepare: bool = True
    hybrid: str | None = None
    allow_file: Path | None = None
    deny_file: Path | None = None


def make_service(root: Path, settings: Settings, trust: Iterable[str] = ()) -> Service:
    """Open the workspace and load the catalog. The model is loaded later.

    Args:
        trust: classes of custom strategies that may be imported.

    Raises:
        PesoError: there is no workspace, no trained stage or no such hybrid, or a file is damaged.
    """
    meters = Meters()

    def changed(snapshot: Snapshot) -> None:
        meters.changes.inc()
        log.info("stage answers", extra={"fields": {"stage": snapshot.stage}})

    def failed(problem: str) -> None:
        meters.problems.inc()
        log.error("stage not loaded", extra={"fields": {"problem": problem}})

    def remember() -> RememberedAnswers:
        return RememberedAnswers(settings.answer_memory, lambda how: meters.remembered.labels(how).inc())

    def prepare(user: str) -> None:
        snapshot = live.current
        if (request := snapshot.usual(user)) is not None:
            with meters.preparation.time():
                question = Question(request, histories.of(user), ahead=True)
                snapshot.answer([question], stock.current())

    live = LiveStage(
        root,
        stage=settings.stage,
        prompt_memory=settings.prompt_memory,
        remember=remember if settings.answer_memory else None,
        trust=trust,
        hybrid=settings.hybrid,
        on_change=changed,
        on_problem=failed,
        renew=lambda: histories.users.renew(),
    )
    stock = StockFiles(root, settings.allow_file, settings.deny_file)
    received = None if settings.read_only else ReceivedEvents(live.workspace.events_file)
    histories = LiveHistories(root, received, trust)
    engine = Engine(
        lambda questions: answer_all(live.current, questions, stock.current()),
        most=settings.queue,
        on_batch=meters.on_batch,
        prepare=prepare if settings.prepare and settings.answer_memory else None,
    )
    return Service(live, engine, meters, histories, received, StageBefore(live))


def guarded(service: Service, settings: Settings, tokens: Tokens | None) -> ASGIApp:
    """The application with its middleware.

    Raises:
        UsageError: other machines could call the server without a token.
    """
    require_tokens(settings.host, tokens)
    # without tokens, requests from web pages of other sites must be refused (DNS rebinding)
    names = {"localhost", "127.0.0.1", "[::1]", settings.host} if tokens is None else None
    app = create_app(service)
    add_explorer(app, service)
    return Guard(
        app,
        meters=service.meters,
        tokens=tokens,
        hosts=names,
        rate=settings.rate,
        largest_body=settings.largest_body,
        open_paths=PAGE,
    )


def serve(
    root: Path,
    settings: Settings,
    tokens: Tokens | None = None,
    *,
    trust: Iterable[str] = (),
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Requests in progress are completed.

    Args:
        tokens: the accepted tokens; None: no token is required.
        trust: classes of custom strategies that may be imported.
        on_listening: called with the address when requests are accepted.

    Raises:
        PesoError: the workspace cannot be served.
        UsageError: the address cannot be used, or tokens are missing.
    """
    require_tokens(settings.host, tokens)
    _log_as_json()
    with _listening(settings) as listener:
        service = make_service(root, settings, trust)
        config = uvicorn.Config(
            guarded(service, settings, tokens),
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=PATIENCE,
            ws="none",
        )
        if on_listening is not None:
            host, port = listener.getsockname()[:2]
            on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        with _ended_by_signals():
            uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """Bind the address before anything is loaded."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        # asyncio turns Nagle's algorithm off only for sockets that name their protocol; if it is on, a client
        # that delays its acknowledgments gets the body of an answer 40 ms after the headers
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((settings.host, settings.port))
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--host {settings.host} --port {settings.port}: cannot listen there ({reason}); choose another "
            "address or port"
        ) from None
    with listener:
        yield listener


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGINT end the server normally. After its shutdown, uvicorn raises the
    signal again, which is ignored here."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    # disable the command line's time limit after a signal, because requests in progress may take longer
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("peso.serving", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)

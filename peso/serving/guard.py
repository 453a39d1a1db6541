"""Middleware for all requests: host and token checks, rate and size limits, metrics, and the access log."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import Iterable

from cachetools import LRUCache
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peso.serving.meters import Meters
from peso.serving.tokens import Tokens

OPEN = ("/healthz", "/readyz")  # need no token
CALLERS = 10_000  # maximum number of callers whose rates are tracked
PATIENCE = 30  # maximum seconds until a body has arrived
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
log = logging.getLogger("peso.serving")


class Rates:
    """Rate limits by token bucket, one per caller, with a capacity of two seconds.

    Args:
        rate: requests per second; 0: no limit.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._left: LRUCache[object, tuple[float, float]] = LRUCache(CALLERS)  # requests left, and the time

    def wait(self, caller: object, now: float) -> float:
        """The seconds until the caller's next request is allowed; 0 if this request is allowed, which then
        counts.

        Args:
            caller: a token's index, or an address.
            now: the time in seconds, from a monotonic clock.
        """
        if not self.rate:
            return 0.0
        most = max(1.0, 2 * self.rate)
        left, then = self._left.get(caller, (most, now))
        left = min(most, left + (now - then) * self.rate)
        allowed = left >= 1
        self._left[caller] = (left - allowed, now)
        return 0.0 if allowed else (1 - left) / self.rate


class Guard:
    """ASGI middleware that checks and counts every request before the application answers it.

    Args:
        meters: receives the number and duration of requests.
        tokens: accepted tokens; None: no token is required.
        hosts: accepted names in the Host header, to prevent DNS rebinding; None: any.
        rate: requests per second of a token or, without tokens, of an address (:class:`Rates`).
        largest_body: maximum size of a body in bytes.
        open_paths: paths that need no token, in addition to :data:`OPEN`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        meters: Meters,
        tokens: Tokens | None,
        hosts: Iterable[str] | None,
        rate: float,
        largest_body: int,
        open_paths: Iterable[str] = (),
    ) -> None:
        self.app, self.meters, self.tokens = app, meters, tokens
        self.hosts = None if hosts is None else frozenset(hosts)
        self.rates, self.largest_body = Rates(rate), largest_body
        self.open = frozenset((*OPEN, *open_paths))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # websockets are closed
        started, number, status, method = time.monotonic(), secrets.token_hex(8), 500, scope["method"]
        # routes answer only GET; load balancers ask with HEAD, for which the HTTP server leaves out the body
        if method == "HEAD":
            scope = {**scope, "method": "GET"}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = number
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal(scope, receive, answer)
            else:
                await self._within_limits(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            took = time.monotonic() - started
            self.meters.requests.labels(route, str(status)).inc()
            self.meters.seconds.labels(route).observe(took)
            line = {"id": number, "method": method, "route": route, "status": status}
            log.info("request", extra={"fields": line | {"ms": round(1000 * took, 1)}})

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, path = Headers(scope=scope), scope["path"]
        if self.hosts is not None and _name(headers.get("host", "")) not in self.hosts:
            return _problem(421, f"use one of the host names {', '.join(sorted(self.hosts))}")
        if path in self.open:
            return None
        caller: object = (scope.get("client") or ("",))[0]
        if self.tokens is not None:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            caller = self.tokens.place(token.strip()) if scheme.lower() == "bearer" else None
            if caller is None:
                problem = _problem(401, "send a valid token: Authorization: Bearer TOKEN")
                problem.headers["www-authenticate"] = "Bearer"
                return problem
            scope.setdefault("state", {})["token"] = caller
        if wait := self.rates.wait(caller, time.monotonic()):
            problem = _problem(429, f"more than {self.rates.rate:g} requests per second; send fewer")
            problem.headers["retry-after"] = str(math.ceil(wait))
            return problem
        return None

    async def _within_limits(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body within the limits of time and size, then call the application."""
        try:
            async with asyncio.timeout(PATIENCE):
                body = await self._body(scope, receive)
        except TimeoutError:
            body = _problem(408, f"the body did not arrive within {PATIENCE} s; send it again")
        if body is None:
            return
        if isinstance(body, JSONResponse):
            body.headers["connection"] = "close"
            await body(scope, receive, send)
            return
        content, read = body, False

        async def receive_again() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app(scope, receive_again, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | JSONResponse | None:
        """The body, or a response that refuses it; None if the caller has disconnected."""
        refusal = _problem(413, f"the body is longer than {self.largest_body:,} bytes; split the request")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.largest_body:
            return refusal
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.largest_body:
                return refusal
            if not message.get("more_body", False):
                return bytes(body)


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def _problem(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


class JsonLines(logging.Formatter):
    """Formats each record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)

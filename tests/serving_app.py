"""The application of the server, as it runs, without a socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from peso.serving.server import Settings, guarded, make_service
from peso.serving.tokens import Tokens

ADDRESS = "http://127.0.0.1"


@contextmanager
def running(root: Path, tokens: Tokens | None = None, ready: bool = True, **settings) -> Iterator[TestClient]:
    """A client of the application as it runs; its ``service`` is what answers.

    Args:
        ready: whether the model is loaded; else it is only loaded at `service.live.refresh()`.
    """
    chosen = Settings(**settings)
    service = make_service(root, chosen)
    if ready:
        service.live.refresh()
    else:
        service.live.start = lambda: None  # type: ignore[method-assign]
    app = guarded(service, chosen, tokens)
    with TestClient(app, ADDRESS, raise_server_exceptions=False) as client:
        client.service = service
        yield client

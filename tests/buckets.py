"""On this machine: an S3 server (moto), an emulator of Google Cloud Storage, and a small HTTP server."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

SECRET = "secret-of-this-test"


@contextmanager
def running_s3() -> Iterator[str]:
    """The address of the server, without a bucket."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def use_s3(monkeypatch: pytest.MonkeyPatch, address: str) -> Any:
    """Let fsspec in this process use the server; returns its file system, with an empty bucket `shop`.

    All servers of a process have the same buckets.
    """
    import fsspec

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-this-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    system = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    if system.exists("shop"):
        system.rm("shop", recursive=True)
    system.mkdir("shop")
    return system


@contextmanager
def running_gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let fsspec in this process use a server; yields its file system, with an empty bucket `shop`."""
    import fsspec

    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="shop"):
        yield fsspec.filesystem("gs", skip_instance_cache=True, use_listings_cache=False)


@contextmanager
def running_http(files: dict[str, bytes], asked: list[str], refuse: int | None = None) -> Iterator[str]:
    """Serve files by path, with ETags; the methods and paths of requests are added to ``asked``. With
    ``refuse``, every answer has this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            if refuse or path not in files:
                return self.send_error(refuse or 404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[path])))
            self.send_header("ETag", hashlib.sha256(files[path]).hexdigest())
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(files[path])
            return None

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()

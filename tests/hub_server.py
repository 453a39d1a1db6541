"""A hub on this machine: the parts of the Hugging Face hub's API that its client calls.

Repositories are dictionaries of files; every commit is a new revision of ``main``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

USER, TOKEN = "me", "hf_of_this_test"


@dataclass
class Hub:
    """``repositories``: files by path, by ``models/owner/name`` or ``datasets/owner/name``."""

    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def revision(self, name: str) -> str:
        content = self.repositories[name]
        return hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let the client in this process use this hub, with a cache and a token of its own."""
        from huggingface_hub import constants

        url = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": USER}) if self._known() else self._refuse(401)
        if match := re.fullmatch(
            r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path
        ):
            return self._listing(*match.groups())
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            return self._file(f"{kind or 'models/'}{name}", revision, file)
        return self._refuse(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._known():
            return self._refuse(401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/(models/[^/]+/[^/]+)/(preupload|commit)/main", path)
        if match is None or match[1] not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound")
        if match[2] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._json({"files": files})
        return self._commit(match[1], [json.loads(line) for line in body.splitlines()])

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked["organization"] or USER
        name = f"models/{owner}/{asked['name']}"
        if owner != USER:
            return self._refuse(403)
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.endpoint}/{name[7:]}"}, 409)
        self.hub.repositories[name], self.hub.private[name] = {}, asked.get("visibility") == "private"
        return self._json({"url": f"{self.hub.endpoint}/{name[7:]}", "name": name[7:]})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        content = dict(self.hub.repositories[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del content[value["path"]]
        self.hub.repositories[name] = content
        revision = self.hub.revision(name)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name[7:]}/commit/{revision}", "commitOid": revision})

    def _listing(self, name: str, kind: str | None, revision: str | None) -> None:
        if name not in self.hub.repositories or (self.hub.private.get(name) and not self._known()):
            return self._refuse(404, "RepoNotFound")
        if revision not in (None, "main", self.hub.revision(name)):
            return self._refuse(404, "RevisionNotFound")
        content = self.hub.repositories[name]
        if kind == "tree":
            return self._json(
                [{"type": "file", "path": file, "oid": hashlib.sha1(held).hexdigest(), "size": len(held)}
                 for file, held in content.items()]
            )  # fmt: skip
        siblings = [{"rfilename": file, "size": len(held)} for file, held in content.items()]
        return self._json({"id": name.split("/", 1)[1], "sha": self.hub.revision(name), "siblings": siblings})

    def _file(self, name: str, revision: str, file: str) -> None:
        content = self.hub.repositories.get(name, {})
        if file not in content:
            return self._refuse(404, "EntryNotFound")
        etag = f'"{hashlib.sha256(content[file]).hexdigest()}"'
        return self._answer(200, content[file], {"ETag": etag, "X-Repo-Commit": self.hub.revision(name)})

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str = "") -> None:
        self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()

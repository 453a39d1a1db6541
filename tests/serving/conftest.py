"""A small workspace of two trained stages, and the application on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from serving_app import running
from small_runs import trained
from starlette.testclient import TestClient

from peso.runs.workspace import Workspace


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Not to be changed: copy it."""
    return trained(tmp_path_factory.mktemp("shop") / "w")[0]


@pytest.fixture
def copy(shop: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(shop.root, tmp_path / "w")
    return Workspace.open(tmp_path / "w")


@pytest.fixture(scope="module")
def client(shop: Workspace) -> Iterator[TestClient]:
    """Of a server that changes nothing."""
    with running(shop.root, read_only=True) as client:
        yield client


@pytest.fixture
def serving() -> Iterator[Callable[..., TestClient]]:
    """serving(root, …): as :func:`running`, until the test ends."""
    with ExitStack() as stack:
        yield lambda *arguments, **settings: stack.enter_context(running(*arguments, **settings))

"""What several tests of runs share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest

from peso.runs import recommend_all
from peso.runs.place import SERVED
from peso.runs.recommender import Recommender
from peso.runs.stage import FORMAT, VERDICT
from peso.runs.tasks import Call
from peso.runs.workspace import Workspace
from peso.runtime.manifest import take_out


@pytest.fixture
def root(tmp_path: Path, every_file: Path) -> Path:
    """No stage was promoted or judged, so the newest one serves."""
    root = shutil.copytree(every_file, tmp_path / "w")
    (root / SERVED).unlink()
    take_out(root / "stages" / "2", [VERDICT], FORMAT, {})
    (root / "stages" / "2" / VERDICT).unlink()
    return root


@pytest.fixture
def workspace(root: Path) -> Workspace:
    return Workspace.open(root)


@pytest.fixture
def forked_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of this machine are done by copies of a process that has imported everything."""
    monkeypatch.setattr(Call, "popen", forked.of_call)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Answers with a user's own last items instead of a model's; the histories that were asked for."""
    asked: list[list[str]] = []

    def search(self: Recommender, histories: Any, k: int, *, exclude_seen: Any, users: Any) -> Any:
        asked.extend(histories)
        return [[(item, -float(n)) for n, item in enumerate(items[-k:])] for items in histories]

    monkeypatch.setattr(Recommender, "search", search)
    monkeypatch.setattr(recommend_all, "AT_ONCE", 16)
    return asked


@pytest.fixture
def one_node() -> Iterator[Any]:
    """A Ray cluster of a node with one CPU."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def two_nodes(one_node: Any) -> Any:
    """Two such nodes."""
    one_node.add_node(num_cpus=1)
    one_node.wait_for_nodes()
    return one_node

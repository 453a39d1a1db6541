"""What several tests of faults share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from event_logs import write_log
from growing_shop import BY_CATEGORY, EVENTS, FRESH, LATER, PRODUCTS, TRAINED, WEEK, table

from peso.cli import app as cli
from peso.runs.workspace import Workspace


@pytest.fixture
def root(tmp_path: Path, every_file: Path) -> Path:
    return shutil.copytree(every_file, tmp_path / "w")


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    """A folder with the files of a shop: ``log.csv``, ``products.csv``, then ``week.csv``, ``later.csv``."""
    folder = tmp_path_factory.mktemp("logs")
    write_log(folder / "log.csv", EVENTS)
    write_log(folder / "week.csv", WEEK)
    write_log(folder / "later.csv", LATER)
    table(folder / "products.csv", [*PRODUCTS, *FRESH])
    table(folder / "old_products.csv", PRODUCTS)
    for name, items in (("trained", TRAINED), ("category", BY_CATEGORY)):
        (folder / f"{name}.yaml").write_text(
            "data:\n"
            "  format: csv\n  path: log.csv\n  stages: 2\n"
            "  items: {path: products.csv, columns: {title: title, category: category}}\n"
            f"{items}"
            "backbone: tiny\n"
            "strategy: single\nbaselines: []\n"
            "training: {epochs: 1, max_steps: 2, batch_size: 8}\n"
            "decoding: {beams: 5}\n"
            "evaluation: {k: [5]}\n"
        )
    return folder


def _call(*arguments: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["peso", *map(str, arguments)])
        patch.setattr("peso.runs.report.report", lambda workspaces, directory: None)
        cli.app(standalone_mode=False)


@pytest.fixture(scope="session")
def _trained(logs: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "shop"
    _call("run", logs / "trained.yaml", "-w", root)
    return root


@pytest.fixture(scope="session")
def _by_category(logs: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("category") / "shop"
    _call("ingest", logs / "category.yaml", "-w", root)
    _call("tokenize", "-w", root)
    return root


@pytest.fixture
def shop(_trained: Path, tmp_path: Path) -> Path:
    """A run with two trained stages and codebooks."""
    return shutil.copytree(_trained, tmp_path / "shop")


@pytest.fixture
def shelves(_by_category: Path, tmp_path: Path) -> Path:
    """A workspace with semantic IDs from category paths, nothing trained."""
    return shutil.copytree(_by_category, tmp_path / "shelves")


@pytest.fixture
def reports(monkeypatch) -> list[list[int]]:
    """The stages in every report that is written, instead of plots."""
    written: list[list[int]] = []

    def report(workspaces: list[Workspace], directory: Path) -> None:
        written.append(workspaces[0].finished_stages)
        directory.mkdir(exist_ok=True)
        (directory / "index.html").write_text(str(written[-1]))

    monkeypatch.setattr("peso.runs.report.report", report)
    return written

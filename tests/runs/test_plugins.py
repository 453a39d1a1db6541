"""A distribution of somebody else adds one part of each kind, and a run uses them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from plugins import Install

MODULE = '''
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from peso.adapters.proximal import DistanceTerm
from peso.adapters.proximal.metrics import DiagonalMetric
from peso.baselines.baseline import Baseline
from peso.evaluation.report.sections.section import Section
from peso.events.sources.tables import DataSet, ItemTable, Log, Source, csv_table, plain
from peso.training.strategies.strategy import Strategy


class Tape(DataSet):
    """Lines `time user item` in tape.txt, `item|title` in items.txt."""

    @staticmethod
    def open(path):
        items = csv_table([Path(path) / "items.txt"], "|", header=False)
        log = csv_table([Path(path) / "tape.txt"], " ", header=False)
        return Source(Log(log, "2", "3", "1"), ItemTable(items, "1", plain(items, "2")))


class Halfway(Strategy):
    """Go back a share of the way that a stage went."""

    class Options(Strategy.Options):
        share: float = Field(0.5, ge=0, le=1)

    def begin(self, context):
        self._before = {name: p.detach().clone() for name, p in context.trainable().items()}

    @torch.no_grad()
    def end(self, context):
        for name, p in context.trainable().items():
            p.lerp_(self._before[name], self.options.share)

    def figures(self):
        return {"share": self.options.share}


class Euclid(DistanceTerm):
    def metric(self, stack):
        return DiagonalMetric(stack.anchor.shape)


class Newest(Baseline):
    """Items by their number: later ones first."""

    class Options(Baseline.Options):
        step: float = 1.0

    def learn(self, stages, observer):
        return {"items": self.items}

    def scores(self, cases):
        return np.tile(self.options.step * np.arange(self.items, dtype=np.float32), (len(cases), 1))


def greeting(comparison):
    return Section("greeting", "Greeting", [f"{len(comparison.systems)} systems say hello."])
'''
ENTRIES = [
    "peso.data_sets tape = shop:Tape",
    "peso.strategies halfway = shop:Halfway",
    "peso.proximal_terms euclid = shop:Euclid",
    "peso.baselines newest = shop:Newest",
    "peso.report_sections greeting = shop:greeting",
]


UNTESTED = "evaluation.enabled=false"


@pytest.mark.slow
def test_one_part_of_each_kind_comes_from_another_distribution(
    peso: Callable[..., tuple[int, str, str]], install: Install, tmp_path: Path
) -> None:
    install("shop", MODULE, *ENTRIES)
    (tmp_path / "tape").mkdir()
    events = [(1_600_000_000 + 60 * n, f"u{n % 12}", f"i{n % 17}") for n in range(400)]
    (tmp_path / "tape" / "tape.txt").write_text("".join(f"{t} {u} {i}\n" for t, u, i in events))
    titles = "".join(f"i{n}|{'red' if n % 2 else 'blue'} thing {n}\n" for n in range(17))
    (tmp_path / "tape" / "items.txt").write_text(titles)
    config = {
        "data": {"format": "tape", "path": str(tmp_path / "tape"), "stages": 3},
        "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 4},
        "backbone": "tiny",
        "strategy": {"name": "halfway", "share": 0.25},
        "training": {"epochs": 1, "max_steps": 2},
        "baselines": [{"name": "newest", "step": 2.0}],
    }
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(config))

    def done(*arguments: str | Path) -> None:
        status, _, err = peso(*arguments)
        assert status == 0, err

    first, second = tmp_path / "first", tmp_path / "second"
    done("run", tmp_path / "shop.yaml", "-w", first)
    strategy = "strategy={name: peso, proximal: euclid, strength: 2}"
    done("run", tmp_path / "shop.yaml", "-w", second, "--base", first, "--set", strategy, "--set", UNTESTED)

    def told(run: Path) -> dict[str, object]:
        return json.loads((run / "stages" / "2" / "metrics.json").read_text())["training"]["strategy"]

    assert json.loads((first / "stream" / "manifest.json").read_text())["items"] == 17
    assert told(first) == {"share": 0.25}
    assert told(second)["strength"] == 2
    assert (first / "baselines" / "newest step=2" / "2" / "predictions.parquet").is_file()
    page = (first / "report" / "index.html").read_text()
    for text in ("halfway (share 0.25)", "newest step=2", "systems say hello"):
        assert text in page

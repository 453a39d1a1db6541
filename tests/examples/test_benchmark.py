"""examples/benchmark: frozen streams, and rows of the table from a comparison."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from reports import run

from peso.config import load_config
from peso.events.ingest import ingest
from peso.events.stream import Stream

FOLDER = Path(__file__).parents[2] / "examples" / "benchmark"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


streams, table = script("streams"), script("table")
FROZEN = json.loads((FOLDER / "streams.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video-games", "movietweetings"])
def test_the_streams_are_the_frozen_ones(
    name: str, release_dir: Path, movietweetings_dir: Path, tmp_path: Path
) -> None:
    if name == "video-games":
        data: dict[str, Any] = {"format": "peso-release", "path": str(release_dir)}
    else:
        data = {"format": "movietweetings", "path": str(movietweetings_dir)}
        data |= {"min_user": 5, "min_item": 5, "stages": 5}
    (tmp_path / "stream").mkdir()
    ingest(load_config({"data": data}).data, tmp_path / "stream")
    stream = Stream.open(tmp_path / "stream")
    found = [streams.digest_of_stage(stream.stage(n), stream.item_ids) for n in range(stream.stages)]
    assert found == FROZEN[name]["stages"]
    assert len(stream.item_ids) == FROZEN[name]["items"]


def test_every_change_of_a_stream_is_named() -> None:
    frozen = FROZEN["video-games"]
    assert list(streams.differences(frozen, frozen)) == []
    other = copy.deepcopy(frozen)
    other["semantic_ids"] = "another"
    assert list(streams.differences(other, frozen)) == []  # only its own comparison counts then
    other["stages"][2]["sha256"] = "0" * 64
    (said,) = streams.differences(other, frozen)
    assert said.startswith("stage 2: sha256 000")
    other["items"] = 7
    assert len(list(streams.differences(other, frozen))) == 2
    del other["stages"][4]
    assert "4 stages, not 5" in list(streams.differences(other, frozen))


def comparison(skills: dict[str, float], seeds: int) -> list[Any]:
    return [
        replace(run(name, name, skill, seed=seed), name=f"{name}/{seed}", seed=seed)
        for name, skill in skills.items()
        for seed in range(seeds)
    ]


def test_rows_have_the_means_the_paired_differences_and_a_verdict() -> None:
    skills = {"single": 0.5, "good": 1.5, "same": 0.5, "bad": -0.5}
    rows = {row["strategy"]: row for row in table.rows_of("games", comparison(skills, 3))}
    assert rows.keys() == skills.keys()
    assert all(set(row) <= set(table.COLUMNS) for row in rows.values())
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "single": "reference",
        "good": "better",
        "same": "not different",
        "bad": "worse",
    }
    # stages 1 to 4, each counted alike, as the made-up runs have them
    runs = [each for each in comparison(skills, 3) if each.strategy == "good"]
    means = [
        np.mean([run.stages[stage].predictions.target_log_probability.mean() for stage in (1, 2, 3, 4)])
        for run in runs
    ]
    assert rows["good"]["log_probability"] == pytest.approx(np.mean(means), abs=1e-3)
    assert rows["good"]["log_probability minus"] == pytest.approx(1.5, abs=0.05)
    good = rows["good"]
    assert good["log_probability low"] <= good["log_probability minus"] <= good["log_probability high"]
    assert rows["good"]["cases"] == 300 + 320 + 500 + 450


def test_fewer_seeds_are_a_trial_and_a_gain_that_costs_the_other_is_mixed() -> None:
    (single, good) = table.rows_of("games", comparison({"single": 0.5, "good": 1.5}, 2))
    assert (single["verdict"], good["verdict"]) == ("reference", "trial")
    row = {"strategy": "x", "seeds": 3}
    for metric, low, high in (("ndcg@10", 0.01, 0.02), ("hit@10", -1, 1), ("log_probability", -0.3, -0.1)):
        row |= {f"{metric} low": low, f"{metric} high": high, f"{metric} p": 0.001}
    assert table.verdict(row) == "mixed"
    row["log_probability p"] = 0.2
    assert table.verdict(row) == "better"


def test_without_the_reference_there_are_no_rows() -> None:
    with pytest.raises(ValueError, match="single is not among good"):
        table.rows_of("games", comparison({"good": 1.0}, 1))


def test_new_rows_replace_those_of_the_same_strategy_alone() -> None:
    old = [
        {"stream": stream, "strategy": strategy, "ndcg@10": "0.05"}
        for stream, strategy in (("a", "single"), ("a", "mine"), ("b", "mine"))
    ]
    found = table.merged(old, [{"stream": "a", "strategy": "mine", "ndcg@10": 0.07}])
    assert [(row["stream"], row["strategy"], float(row["ndcg@10"])) for row in found] == [
        ("a", "mine", 0.07),
        ("a", "single", 0.05),
        ("b", "mine", 0.05),
    ]


def test_the_table_has_the_columns_of_the_script() -> None:
    with (FOLDER / "table.csv").open(encoding="utf-8", newline="") as file:
        assert csv.DictReader(file).fieldnames == table.COLUMNS

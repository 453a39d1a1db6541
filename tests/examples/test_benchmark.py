"""examples/benchmark: frozen streams, and rows of the table from a comparison."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
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


sys.path.append(str(FOLDER))  # as for `python examples/benchmark/table.py`
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


def test_a_row_does_not_depend_on_which_other_strategies_ran() -> None:
    many = table.rows_of("s", comparison({"single": 0.5, "other": 0.55, "third": 0.51, "fourth": 0.49}, 3))
    few = table.rows_of("s", comparison({"single": 0.5, "other": 0.55}, 3))
    (one,), (alone,) = ([row for row in rows if row["strategy"] == "other"] for rows in (many, few))
    for metric in table.METRICS:
        assert one[f"{metric} p"] == pytest.approx(alone[f"{metric} p"], rel=0.2, abs=2e-3)


def test_without_the_reference_there_are_no_rows() -> None:
    with pytest.raises(ValueError, match="single is not among good"):
        table.rows_of("games", comparison({"good": 1.0}, 1))


@pytest.mark.parametrize(
    ("strategy", "seeds", "replaced"),
    [("mine", 1, False), ("mine", 2, True), ("single", 2, False), ("single", 3, True)],
)
def test_a_new_row_replaces_that_of_its_strategy_unless_it_has_fewer_seeds(
    strategy: str, seeds: int, replaced: bool
) -> None:
    """The reference needs more: differences of the other rows are from the old one."""
    old = [
        {"stream": stream, "strategy": name, "seeds": "2", "ndcg@10": "0.05"}
        for stream, name in (("a", "single"), ("a", "mine"), ("b", strategy))
    ]
    new = {"stream": "a", "strategy": strategy, "seeds": seeds, "ndcg@10": 0.07}
    found = {(row["stream"], row["strategy"]): float(row["ndcg@10"]) for row in table.merged(old, [new])}
    expected = {("a", "single"): 0.05, ("a", "mine"): 0.05, ("b", strategy): 0.05}
    assert found == expected | ({("a", strategy): 0.07} if replaced else {})
    assert table.merged([], [new]) == [new]


@pytest.mark.slow
def test_a_table_is_not_changed_by_runs_on_other_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small comparison as a stranger runs it, with a strategy from outside the package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside.py").write_text(
        "from peso import Strategy\n\n\nclass Mine(Strategy):\n    name = 'mine_of_the_benchmark'\n"
    )
    data = {"format": "simulate", "simulate": {"users": 60, "items": 40, "stages": 2}}
    tree = yaml.safe_load((FOLDER / "benchmark.yaml").read_text(encoding="utf-8"))
    tree |= {"data": data, "backbone": "tiny"}
    tree["training"] |= {"epochs": 1, "max_steps": 2, "precision": "float32"}
    tree["training"]["later"] = {"learning_rate": 1e-3, "epochs": 1}
    tree["compare"] |= {"data": {"video-games": data}, "seeds": [0], "workers": 1}
    Path("small.yaml").write_text(yaml.safe_dump(tree))
    added = "compare.strategies.mine={name: custom, module: outside.Mine}"
    command = [sys.executable, "-m", "peso", "compare", "small.yaml", "-w", "w", "--set", added]
    path = f"{tmp_path}{os.pathsep}{FOLDER.parents[1]}"
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True)
    rows = table.rows_of("video-games", table.runs_by_data(Path("w"), print)["video-games"])
    assert {row["strategy"] for row in rows} == {"none", "single", "mine"}
    said = list(table.unlike_frozen(Path("w")))
    assert said[0] == "video-games: 40 items, not 25,935"

    Path("table.csv").write_bytes((FOLDER / "table.csv").read_bytes())
    monkeypatch.setattr(sys, "argv", ["table.py", "w", "--to", "table.csv"])
    with pytest.raises(SystemExit) as ended:
        table.main()
    assert ended.value.code == 2
    assert "the table is of the frozen streams alone, but video-games: 40 items" in capsys.readouterr().err
    assert Path("table.csv").read_bytes() == (FOLDER / "table.csv").read_bytes()


def commands() -> dict[str, Any]:
    """Label → value of the commands in README.md, one per strategy."""
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [re.fullmatch(r"\| `([\w-]+)` \| `(.+)` \|", line) for line in lines]
    return {found[1]: yaml.safe_load(found[2]) for found in cells if found}


def test_there_is_a_command_for_every_row_and_it_is_that_of_the_claims() -> None:
    claims = yaml.safe_load((FOLDER.parent / "claims" / "smollm2_4_layers.yaml").read_text(encoding="utf-8"))
    own = yaml.safe_load((FOLDER / "benchmark.yaml").read_text(encoding="utf-8"))["compare"]["strategies"]
    with (FOLDER / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["strategy"] for row in csv.DictReader(file)}
    assert commands() | own == claims["compare"]["strategies"]
    assert rows <= set(commands()) | set(own)
    for value in commands().values():
        strategy = value["strategy"] if isinstance(value, dict) and "strategy" in value else value
        load_config({"data": "simulate", "strategy": strategy})


def test_the_table_has_the_columns_of_the_script() -> None:
    with (FOLDER / "table.csv").open(encoding="utf-8", newline="") as file:
        assert csv.DictReader(file).fieldnames == table.COLUMNS

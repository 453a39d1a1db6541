"""Items that a user has already had: one rule for tests, recommendations and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from peso.config import load_config
from peso.errors import DataError
from peso.evaluation.predictions import Predictions, read_predictions
from peso.runs import pipeline
from peso.runs.recommender import Recommender
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum

pytestmark = pytest.mark.slow

USERS, ITEMS = 24, 30


def write_log(path: Path, *, repeats: bool) -> Path:
    """Every user has nine of the items in an order of their own; with repeats one has an item twice."""
    rows = [
        (f"u{user}", f"i{(user * 7 + place * (1 + user % 3)) % ITEMS}", 1_700_000_000 + 100 * place + user)
        for place in range(9)
        for user in range(USERS)
    ]
    if repeats:
        rows.insert(USERS, ("u0", "i0", 1_700_000_099))
    lines = ["user,item,time", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(folder: Path, rule: str, *, repeats: bool = False) -> Workspace:
    log = write_log(folder / "log.csv", repeats=repeats)
    products = folder / "products.csv"
    products.write_text("item,title\n" + "".join(f"i{n},ware {n} of shelf {n % 5}\n" for n in range(ITEMS)))
    table = {"path": str(products), "columns": {"title": "title"}}
    config = load_config(
        {
            "data": {"format": "csv", "path": str(log), "stages": 2, "items": table},
            "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
            "backbone": {"name": "tiny", "layers": 1},
            "strategy": {"name": "peso", "examples": 8},
            "prompt": {"window": 3},  # shorter than what users have had
            "training": {"epochs": 1, "max_steps": 2},
            "decoding": {"repeats": rule},
            "baselines": ["popularity", "item-knn"],
        }
    )
    workspace = Workspace.create_or_open(folder / "w", config)
    with workspace.lock():
        pipeline.run(workspace)
    return workspace


def predictions(workspace: Workspace, stage: int) -> Predictions:
    return read_predictions(workspace.stage(stage).directory / "predictions.parquet")


def had(workspace: Workspace, stage: int) -> list[set[str]]:

    stream = workspace.stream
    names = stream.items.column("item_id").to_pylist()
    cases = stream.stage(stage).test_cases(workspace.config.prompt.window)
    assert max(map(len, cases.histories)) == 3 < max(map(len, cases.seen))
    return [{names[row] for row in rows} for rows in cases.seen]


@pytest.fixture(scope="module")
def auto(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return run(tmp_path_factory.mktemp("auto"), "auto")


def test_where_nobody_repeats_an_item_no_list_holds_one_that_its_user_has_had(auto: Workspace) -> None:
    for stage in (0, 1):
        found = predictions(auto, stage)
        for seen, items in zip(had(auto, stage), found.items, strict=True):
            assert not seen & set(items)
            assert len(items) >= 10  # as many as without the rule
        tested = auto.stage(stage).metrics["test"]
        assert tested["repeats"] == "leave-out"


def test_another_rule_is_tested_anew_and_trains_nothing(auto: Workspace, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(auto.root, tmp_path / "w")
    weights = {path: checksum(path) for path in (tmp_path / "w").glob("stages/*/*.safetensors")}
    with Workspace.change(tmp_path / "w", ["decoding.repeats=keep"]) as kept:
        pipeline.run(kept)
    assert {path: checksum(path) for path in (tmp_path / "w").glob("stages/*/*.safetensors")} == weights
    lists = zip(had(kept, 1), predictions(kept, 1).items, strict=True)
    assert any(seen & set(items) for seen, items in lists)
    page = (tmp_path / "w" / "report" / "index.html").read_text()
    assert "Systems differ in how they treat items that a user has already had" in page
    page = (auto.root / "report" / "index.html").read_text()
    assert "Items that a user has already had are left out of every list" in page


def test_where_somebody_repeats_an_item_all_are_recommended(tmp_path: Path) -> None:
    workspace = run(tmp_path, "auto", repeats=True)
    lists = zip(had(workspace, 1), predictions(workspace, 1).items, strict=True)
    assert any(seen & set(items) for seen, items in lists)
    assert Recommender(workspace).leaves_out_seen is False


def test_recommendations_follow_the_rule_unless_told_otherwise(auto: Workspace, tmp_path: Path, peso) -> None:
    recommender = Recommender(auto)
    history = recommender.history("u1")
    seen = set(history)
    assert len(seen) > auto.config.prompt.window
    assert not seen & {item for item, _ in recommender.recommend(user="u1", k=20)}
    assert seen & {item for item, _ in recommender.recommend(user="u1", k=20, exclude_seen=False)}
    status, out, err = peso("recommend", "-w", auto.root, "--all", "-k", "20", "-o", tmp_path / "r.parquet")
    assert status == 0, err
    assert "items of the history are left out (decoding.repeats: auto)" in out
    for row in pq.read_table(tmp_path / "r.parquet").to_pylist():
        assert not set(recommender.history(row["user"])) & set(row["items"])
    status, out, err = peso("recommend", "-w", auto.root, "--user", "u1", "-k", "20", "--json")
    found = json.loads(out)
    assert found["exclude_seen"] is True
    assert not seen & {row["item"] for row in found["recommendations"]}
    status, out, err = peso("recommend", "-w", auto.root, "--user", "u1", "-k", "20", "--include-seen")
    assert "items of the history are not left out" in err


def test_the_export_says_which_rule_it_was_tested_with(auto: Workspace, tmp_path: Path, peso) -> None:
    status, _, err = peso("export", "-w", auto.root, "--format", "merged", "-o", tmp_path / "m")
    assert status == 0, err
    assert json.loads((tmp_path / "m" / "prompt.json").read_text())["leaves_out_seen"] is True


def test_the_preset_of_the_paper_keeps_them() -> None:
    data = {"format": "peso-release", "path": "x"}
    assert load_config({"data": data, "strategy": "paper"}).decoding.repeats == "keep"
    given = load_config({"data": data, "strategy": "paper", "decoding": {"repeats": "auto"}})
    assert given.decoding.repeats == "auto"
    assert load_config({"data": data, "strategy": "single"}).decoding.repeats == "auto"


def test_an_unknown_item_of_a_history_is_named_with_a_cure(auto: Workspace) -> None:
    with pytest.raises(DataError, match=r"1 of 2 items .*: 'nope'; give ids as the log has them, or leave"):
        Recommender(auto).recommend(history=["i1", "nope"], k=2)

"""Retired items: from the next one on, no answer has them; histories and models keep them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_runs import trained

from peso import Recommender
from peso.errors import ConfigError, DataError, ExportError, WorkspaceError
from peso.runs import preparation
from peso.runs.baselines import run_baselines
from peso.runs.place import RETIRED
from peso.runs.retired import restore, retire, retired
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent
from peso.runtime.records import write_record

pytestmark = pytest.mark.slow  # a whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hybrid = {"name": "hybrid", "candidates": 5, "partners": ["item-graph"]}
    workspace, _ = trained(tmp_path_factory.mktemp("retired") / "w", f"baselines={json.dumps([hybrid])}")
    with workspace.lock():
        run_baselines(workspace, workspace.config.baselines, Silent())
    return workspace.root


@pytest.fixture
def workspace(run: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(run, tmp_path / "w")
    return Workspace.open(tmp_path / "w")


def items(ranked: list[tuple[str, float]]) -> list[str]:
    return [item for item, _ in ranked]


def test_an_untested_model_has_no_predictions_and_an_impossible_question_no_answer(run: Path) -> None:
    stage = Workspace.open(run).trained()
    with pytest.raises(WorkspaceError, match=r"not tested on the test cases of stage 1 yet; run `peso eval"):
        _ = stage.predictions
    with pytest.raises(WorkspaceError, match=r"validation cases of stage 0 yet; run `peso update"):
        _ = stage.on(0, "validation").predictions
    recommender = Recommender(stage.workspace)
    for k in (0, -1):
        with pytest.raises(ConfigError, match=f"k is {k}, but must be at least 1"):
            recommender.popular(k)
    with pytest.raises(ExportError, match=r"'onnx' is not a format; choose one of merged, peft"):
        recommender.export(run.parent / "exported", "onnx")
    assert not (run.parent / "exported").exists()
    with pytest.raises(DataError, match=r"a list of item ids, not a text: \['i4'\]"):
        recommender.recommend("i4")


@pytest.mark.parametrize("hybrid", [None, "hybrid"])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_the_next_answer_is_the_ranking_without_them(
    workspace: Workspace, hybrid: str | None, exclude_seen: bool
) -> None:
    recommender = Recommender(workspace, hybrid=hybrid)
    ids = workspace.semantic_ids.item_ids
    history, every = ids[:3], len(ids)
    whole = items(recommender.recommend(history, k=every, exclude_seen=exclude_seen))
    gone = [whole[0], whole[2], whole[7]]
    retire(workspace, gone)
    left = [item for item in whole if item not in gone]
    assert items(recommender.recommend(history, k=every, exclude_seen=exclude_seen)) == left
    assert items(recommender.recommend(history, k=4, exclude_seen=exclude_seen)) == left[:4]
    assert recommender.recommend([gone[0]], k=3)  # the model still reads them
    restore(workspace, gone)
    assert items(recommender.recommend(history, k=every, exclude_seen=exclude_seen)) == whole


def test_files_for_everybody_popular_items_and_exports_are_without_them(
    workspace: Workspace, tmp_path: Path
) -> None:
    recommender = Recommender(workspace)
    gone = recommender.popular(2)
    before = workspace.trained().determined_by
    retire(workspace, gone)
    assert not {*gone} & {*recommender.popular(len(recommender.semantic_ids.item_ids))}
    recommender.recommend_all(tmp_path / "all.parquet", k=5)
    answered = pq.read_table(tmp_path / "all.parquet")["items"].to_pylist()
    assert all(len(row) == 5 and not {*gone} & {*row} for row in answered)
    assert preparation.export_index(workspace, tmp_path / "index.json") == 2
    index = json.loads((tmp_path / "index.json").read_text())
    assert {*workspace.semantic_ids.item_ids} - {*index} == {*gone}
    assert preparation.export_index(workspace, tmp_path / "whole.json", with_retired=True) == 0
    assert {*gone} <= {*json.loads((tmp_path / "whole.json").read_text())}
    recommender.export(tmp_path / "merged")
    prompt = json.loads((tmp_path / "merged" / "prompt.json").read_text())
    assert prompt["retired"] == {item: "".join(recommender.semantic_id(item)) for item in gone}
    assert workspace.trained().determined_by == before  # no stage becomes another one


def test_what_cannot_be_retired_or_restored_is_named_and_changes_nothing(workspace: Workspace) -> None:
    ids = workspace.stream.item_ids
    with pytest.raises(DataError, match=r"1 of 2 items are not in the stream of .*: 'gone'"):
        retire(workspace, [ids[0], "gone"])
    with pytest.raises(DataError, match="would be retired; keep at least one"):
        retire(workspace, ids)
    assert retired(workspace.root) == {}
    assert retire(workspace, [ids[0], ids[0], ids[1]], reason="sold out") == ids[:2]
    assert retire(workspace, ids[1:3]) == [ids[2]]
    assert [told.reason for told in retired(workspace.root).values()] == ["sold out", "sold out", None]
    with pytest.raises(DataError, match=r"1 of 2 items are not retired: .*peso items list"):
        restore(workspace, [ids[0], ids[9]])
    assert list(retired(workspace.root)) == ids[:3]
    path = workspace.root / RETIRED
    path.write_text(path.read_text().replace("sold out", "sold in"))
    with pytest.raises(WorkspaceError, match=r"is damaged .*so it is not known which items are retired"):
        Recommender(workspace).recommend(ids[:2], k=3)
    write_record(path, 1, {"items": {}, "users": {}})
    with pytest.raises(WorkspaceError, match=r"is damaged \(it has other content than items"):
        retired(workspace.root)


def test_the_command(workspace: Workspace, tmp_path: Path, peso) -> None:
    ids, root = workspace.stream.item_ids, workspace.root
    (tmp_path / "list.txt").write_text(f"{ids[1]}\n\n{ids[2]}\n", encoding="utf-8-sig")  # with a BOM
    status, out, _ = peso("items", "retire", ids[0], "--file", tmp_path / "list.txt", "-w", root)
    assert (status, "3 items retired; 3 are retired now" in out) == (0, True)
    status, out, _ = peso("items", "retire", ids[0], "--reason", "again", "-w", root)
    assert (status, "0 items retired (1 were retired before); 3 are retired now" in out) == (0, True)
    status, out, _ = peso("items", "restore", ids[0], "-w", root)
    assert (status, "1 items restored; 2 are retired now" in out) == (0, True)
    status, out, _ = peso("items", "list", "-w", root, "--json")
    assert (status, list(json.loads(out)["retired"])) == (0, ids[1:3])
    status, out, err = peso("items", "retire", "-w", root)
    assert (status, "name items, or a file of items with --file" in err) == (2, True)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    status, out, err = peso("items", "retire", "--file", tmp_path / "latin.txt", "-w", root)
    assert (status, f"--file {tmp_path / 'latin.txt'} is not UTF-8 text" in err) == (2, True)
    status, out, _ = peso("recommend", "-w", root, "--history", ids[5], "-k", len(ids), "--json")
    answered = {row["item"] for row in json.loads(out)["recommendations"]}
    assert not answered & {*ids[1:3]}

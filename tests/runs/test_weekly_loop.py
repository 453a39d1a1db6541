"""The weekly loop: new events are appended, new items coded, the new stage learnt; what was there stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from event_logs import write_log

from peso.cli import app as cli
from peso.events.stream import Stream
from peso.items.semantic_ids import SemanticIds, read_semantic_ids
from peso.runs import pipeline, report
from peso.runs.recommender import Recommender
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum

pytestmark = pytest.mark.slow

T = 1_600_000_000
KINDS = ("tea", "cup", "pot", "spoon", "kettle")
EVENTS = [(f"u{k % 13}", f"i{(k * k + k // 7) % 24}", T + k * 3600) for k in range(260)]
WEEK = [(f"u{k % 9 + 8}", f"i{k % 30}", T + (300 + k) * 3600) for k in range(60)]  # users and items are new
PRODUCTS = [(f"i{k}", f"{KINDS[k % 5]} number {k}", f"ware {k % 3}") for k in range(30)]


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
    """Plots take longer than everything else here."""
    monkeypatch.setattr(report, "report", lambda workspaces, directory: None)


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A folder with a run, ``shop``, that has learnt two stages, and ``week.csv``."""
    folder = tmp_path_factory.mktemp("weekly")
    write_log(folder / "log.csv", EVENTS)
    write_log(folder / "week.csv", WEEK)
    write_log(folder / "products.csv", PRODUCTS, "item,title,kind")
    (folder / "shop.yaml").write_text(
        "data:\n"
        "  {format: csv, path: log.csv, stages: 2,\n"
        "   items: {path: products.csv, columns: {title: title, category: kind}}}\n"
        "items: {quantizer: rq-kmeans, levels: 3, codes: 8}\n"
        "backbone: tiny\nstrategy: {name: peso, examples: 8}\n"
        "training: {epochs: 1, max_steps: 3, learning_rate: 3e-3}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report", lambda workspaces, directory: None)
        patch.setattr("sys.argv", ["peso", "run", str(folder / "shop.yaml"), "-w", str(folder / "shop")])
        cli.app(standalone_mode=False)
    return folder


@pytest.fixture
def shop(started: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return shutil.copytree(started / "shop", tmp_path / "shop")


def files(root: Path, *folders: str) -> dict[str, str]:
    """Checksums of all that lies in these folders."""
    found = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): checksum(path) for path in found}


def test_append_tokenize_update_recommend(peso, started: Path, shop: Path) -> None:
    kept = files(shop, "stages", "stream/stage=0", "stream/stage=1")
    ids = read_semantic_ids(shop / "semantic_ids")

    status, out, err = peso("ingest", started / "week.csv", "--append", "-w", shop)
    assert status == 0, err
    assert "tokenize --append" in err
    status, _, err = peso("update", "-w", shop)
    assert status == 1
    assert "6 items of the stream" in err
    status, _, err = peso("evaluate", "-w", shop, "--stage", "1", "--on", "2")
    assert status == 1
    assert "peso tokenize --append" in err
    assert list(report.popularity(Workspace.open(shop)).stages) == [0, 1]  # new items have no ID to be hit
    status, out, err = peso("tokenize", "--append", "-w", shop)
    assert status == 0, err
    assert files(shop, "stages", "stream/stage=0", "stream/stage=1") == kept

    status, out, err = peso("update", "-w", shop)
    assert status == 0, err
    assert "stage 2 is trained" in out
    everything = files(shop, "stages", "stream/stage=0", "stream/stage=1")
    # the model before the update was tested on the new cases too, and its manifest lists those files
    assert {name for name in kept if everything[name] != kept[name]} == {"stages/1/manifest.json"}
    longer = read_semantic_ids(shop / "semantic_ids")
    assert longer.item_ids[:24] == ids.item_ids
    np.testing.assert_array_equal(longer.codes[:24], ids.codes)
    assert longer.sizes == ids.sizes

    status, out, err = peso("recommend", "-w", shop, "--history", "i29,i28", "-k", "30", "--json")
    assert status == 0, err
    assert {f"i{k}" for k in range(24, 30)} <= {row["item"] for row in json.loads(out)["recommendations"]}
    assert peso("recommend", "-w", shop, "--user", "u16", "-k", "3")[0] == 0  # who came this week

    # nothing is left to do, and the same command as ever says so
    workspace = Workspace.open(shop)
    assert list(pipeline.missing_steps(workspace, 3)) == []
    assert peso("run", started / "shop.yaml", "-w", shop)[0] == 0
    assert files(shop, "stages", "stream/stage=0", "stream/stage=1") == everything


def test_run_does_what_an_append_left_to_do(peso, started: Path, shop: Path) -> None:
    assert peso("ingest", started / "week.csv", "--append", "-w", shop)[0] == 0
    steps = [str(step) for step in pipeline.missing_steps(Workspace.open(shop), 3)]
    assert steps == ["tokenize", "learn stage 2", "test stage 2"]
    assert peso("run", started / "shop.yaml", "-w", shop)[0] == 0
    assert Workspace.open(shop).finished_stages == [0, 1, 2]


def test_earlier_stages_are_determined_as_before(peso, started: Path, shop: Path) -> None:
    workspace = Workspace.open(shop)
    before = [workspace.stage(stage).determination() for stage in (0, 1)]
    assert before == [workspace.stage(stage).determined_by for stage in (0, 1)]
    assert peso("ingest", started / "week.csv", "--append", "-w", shop)[0] == 0
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    workspace = Workspace.open(shop)
    assert [workspace.stage(stage).determination() for stage in (0, 1)] == before
    assert all(workspace.stage(stage).is_tested for stage in (0, 1))
    assert workspace.stage(2).determination() not in before


def test_a_stage_is_determined_by_the_codes_it_knew_and_no_others() -> None:
    codes = np.array([[0, 1], [1, 0], [1, 1]], np.int32)
    known = SemanticIds(["a", "b", "c"], codes, (2, 2)).fingerprint(2)
    other = np.array([[0, 1], [1, 0], [0, 0]], np.int32)  # the item that came later is another one
    assert SemanticIds(["a", "b", "d"], other, (2, 2)).fingerprint(2) == known
    assert SemanticIds(["a", "b", "c"], codes[::-1], (2, 2)).fingerprint(2) != known
    assert SemanticIds(["b", "a", "c"], codes, (2, 2)).fingerprint(2) != known
    assert SemanticIds(["a", "b", "c"], codes, (2, 3)).fingerprint(2) != known
    assert SemanticIds(["a", "b", "c"], codes, (2, 2)).fingerprint(3) != known


def test_an_earlier_stage_answers_beside_items_it_never_saw(peso, started: Path, shop: Path) -> None:
    old = Recommender.load(shop, stage=0)
    ranked = dict(old.recommend(history=["i1", "i2"], k=24))
    assert peso("ingest", started / "week.csv", "--append", "-w", shop)[0] == 0
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    beside = Recommender.load(shop, stage=0).recommend(history=["i1", "i2"], k=30)
    new = [item for item, _ in beside if item not in ranked]
    assert set(new) == {f"i{k}" for k in range(24, 30)}
    assert {item: score for item, score in beside if item in ranked} == pytest.approx(ranked)


def test_two_appends_and_a_folder_that_grows(peso, started: Path, tmp_path: Path) -> None:
    """The configured path is a folder: what is older than the stream is left out of each append."""
    (tmp_path / "logs").mkdir()
    write_log(tmp_path / "logs" / "0.csv", EVENTS)
    root = tmp_path / "w"
    arguments = ("--format", "csv", "-w", root, "--set", "data.stages=1", "--set", "backbone=tiny")
    assert peso("ingest", tmp_path / "logs", *arguments)[0] == 0
    for week in (1, 2):
        events = [(user, item, time + week * 70 * 3600) for user, item, time in WEEK]
        write_log(tmp_path / "logs" / f"{week}.csv", events)
        status, out, err = peso("ingest", "--append", "--on-error", "skip", "-w", root)
        assert status == 0, err
        assert "events older than the stream" in out
    stream = Stream.open(root / "stream")
    assert [count["events"] for count in stream.counts] == [260, 60, 60]
    assert [stream.items_known(stage) for stage in range(3)] == [24, 30, 30]
    assert Workspace.open(root).config.data.on_error == "fail"  # --append changes no configuration


def test_a_refused_append_leaves_everything_as_it_was(
    peso, started: Path, shop: Path, tmp_path: Path
) -> None:
    before = files(shop, ".")
    bad = write_log(tmp_path / "bad.csv", [("u1", "i1", "soon")])
    for arguments, words in (
        ((started / "log.csv",), "older than the last event"),
        ((bad,), "'soon'"),
        ((tmp_path / "absent.csv",), "absent.csv"),
        ((started / "week.csv", "--set", "training.epochs=2"), "training.epochs"),
    ):
        status, _, err = peso("ingest", *arguments, "--append", "-w", shop)
        assert status == (2 if "--set" in arguments else 1)
        assert words in err
        assert files(shop, ".") == before
    assert peso("ingest", started / "week.csv", "--append")[0] == 2  # no workspace


def test_a_new_path_in_the_configuration_is_told_of_append(peso, started: Path, shop: Path) -> None:
    status, _, err = peso(
        "run", started / "shop.yaml", "-w", shop, "--set", f"data.path={started / 'week.csv'}"
    )
    assert status == 1
    assert f"peso ingest NEW --append -w {shop}" in err


def test_simulated_data_go_on_with_a_log(peso, started: Path, tmp_path: Path) -> None:
    sizes = [f"data.simulate.{key}={value}" for key, value in (("users", 40), ("items", 30), ("stages", 2))]
    options = [text for size in sizes for text in ("--set", size)]
    assert peso("ingest", "--format", "simulate", "-w", tmp_path / "w", *options)[0] == 0
    status, _, err = peso("ingest", "--append", "-w", tmp_path / "w")
    assert status == 1
    assert "simulate data have no new events; name a log" in err
    late = write_log(tmp_path / "late.csv", [(u, i, t + 10**9) for u, i, t in WEEK])
    assert peso("ingest", late, "--format", "csv", "--append", "-w", tmp_path / "w")[0] == 0
    assert Stream.open(tmp_path / "w" / "stream").stages == 3


def test_no_new_item_is_no_new_index(peso, started: Path, shop: Path, tmp_path: Path) -> None:
    before = files(shop, "semantic_ids")
    week = write_log(tmp_path / "known.csv", [(u, f"i{k % 5}", t) for k, (u, _, t) in enumerate(WEEK)])
    assert peso("ingest", week, "--append", "-w", shop)[0] == 0
    assert peso("tokenize", "--append", "-w", shop)[0] == 0
    assert files(shop, "semantic_ids") == before
    assert peso("update", "-w", shop)[0] == 0


def test_ids_of_other_data_are_not_kept(peso, tmp_path: Path) -> None:
    root, log = tmp_path / "w", write_log(tmp_path / "log.csv", EVENTS)
    options = (
        "--set",
        "data.stages=2",
        "--set",
        "items={quantizer: category-path}",
        "--set",
        "backbone=tiny",
    )
    assert peso("ingest", log, "--format", "csv", "-w", root, *options)[0] == 0
    (root / "semantic_ids").mkdir()
    (root / "semantic_ids" / "manifest.json").write_text('{"format": 1, "files": {}, "items": 24}')
    assert peso("ingest", "-w", root)[0] == 0  # the same again
    assert (root / "semantic_ids").is_dir()
    write_log(log, [*EVENTS, *WEEK])
    status, _, err = peso("ingest", "-w", root)
    assert status == 0
    assert "made again" in err
    assert not (root / "semantic_ids").exists()


def test_a_crash_between_two_renames_loses_no_stream(shop: Path) -> None:
    before = files(shop, "stream")
    (shop / "stream").rename(shop / ".stream.old")
    workspace = Workspace.open(shop)
    with workspace.lock():
        assert files(shop, "stream") == before

"""Renamed items: one item under any of its names, everywhere; nothing that was trained changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from event_logs import histories, write_log
from small_runs import trained

from peso import Recommender
from peso.config import load_config
from peso.errors import DataError, UsageError, WorkspaceError
from peso.evaluation.comparison import Comparison
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.runs import preparation, report
from peso.runs import rename as renaming
from peso.runs.baselines import BaselineRun, run_baselines
from peso.runs.intake import cut_received
from peso.runs.names import item_names, renamings
from peso.runs.pairs import read_pairs
from peso.runs.place import NAMES
from peso.runs.rename import rename
from peso.runs.report import runs_of
from peso.runs.retired import restore, retire, retired
from peso.runs.undo import last_step, undo
from peso.runs.user_histories import UserHistories
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

T = 1_600_000_000
EVENTS = [(f"u{k % 7}", f"i{(k * 5 + k // 7) % 19}", T + k * 3600) for k in range(90)]
LAST = EVENTS[-1][2] * 1_000_000
PRODUCTS = [(f"i{k}", f"thing {k}") for k in range(19)]

OF_ITEMS = ("item", ("old", "new"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shops")
    write_log(folder / "log.csv", EVENTS)
    write_log(folder / "products.csv", PRODUCTS, "item,title")
    tree = {
        "data": {
            "format": "csv",
            "path": "log.csv",
            "stages": 2,
            "items": {"path": "products.csv", "columns": {"title": "title"}},
        },
        "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 4},
        "backbone": "tiny",
        "strategy": "single",
        "baselines": [],
    }
    workspace = Workspace.create_or_open(folder / "shop", load_config(tree, base=folder))
    with workspace.lock():
        preparation.ingest(workspace, Silent())
        preparation.tokenize(workspace, Silent())
    return folder


@pytest.fixture
def shop(made: Path, tmp_path: Path) -> Workspace:
    """A workspace with semantic IDs, in which nothing is trained."""
    return Workspace.open(shutil.copytree(made / "shop", tmp_path / "shop"))


def stream_files(workspace: Workspace) -> object:
    return workspace.stream.manifest["files"], workspace.semantic_ids_manifest["files"]


def append(workspace: Workspace, folder: Path, rows: list[tuple[str, str, float]]) -> None:
    log = write_log(folder / "new.csv", rows)
    data = workspace.config.data.model_copy(update={"path": str(log)})
    with workspace.lock():
        preparation.append(workspace, Silent(), data)


NEW = [(f"u{k % 3}", f"i{(k * k + 2) % 12}", LAST / 1e6 + 60 * (k + 1)) for k in range(12)]


def renamed_in(rows: list[tuple[str, str, float]], to: dict[str, str]) -> list[tuple[str, str, float]]:
    return [(user, to.get(item, item), time) for user, item, time in rows]


# -- what a name means ---------------------------------------------------------------------------------


def test_an_item_is_known_by_its_new_name_and_found_by_each_that_it_had(shop: Workspace) -> None:
    before, files, prints = shop.semantic_ids, stream_files(shop), shop.stage(0).determination()
    row = before.row("i3")
    rename(shop, [("i3", "b")])
    rename(shop, [("b", "c")])
    now = shop.semantic_ids
    assert now.item_ids == ["c" if item == "i3" else item for item in before.item_ids]
    assert [now.row(name) for name in ("i3", "b", "c")] == [row] * 3
    assert now.name("b") == now.name("c") == now.name("i3") == "c"
    assert (now.codes == before.codes).all()
    assert now.first(row + 1).name("b") == "c"
    assert (stream_files(shop), shop.stage(0).determination()) == (files, prints)  # no stage becomes another
    assert now.fingerprint(5) == before.fingerprint(5)


def test_a_renaming_can_be_taken_back_and_repeated(shop: Workspace) -> None:
    assert rename(shop, [("i3", "b")]).items == {"i3": "b"}
    again = rename(shop, [("i3", "b")])
    assert (again.items, again.same) == ({}, ["b"])
    rename(shop, [("b", "i3")])
    ids = shop.semantic_ids
    assert (ids.name("b"), ids.name("i3")) == ("i3", "i3")
    assert ids.item_ids == ids.stored_ids
    rename(shop, [("i3", "d")])
    assert [shop.semantic_ids.name(name) for name in ("i3", "b", "d")] == ["d"] * 3


@pytest.mark.parametrize("pairs", [[("i1", "x"), ("x", "y")], [("x", "y"), ("i1", "x")]])
def test_pairs_of_one_call_can_form_a_chain_in_any_order(shop: Workspace, pairs) -> None:
    assert rename(shop, pairs).items == {"i1": "y"}
    assert [shop.semantic_ids.name(name) for name in ("i1", "x", "y")] == ["y"] * 3
    assert rename(shop, pairs).same == ["y"]  # a list of all renamings so far can be given again


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        ([("gone", "x")], r"1 of 2 items to rename are not in the stream of .*: 'gone'; check the ids"),
        ([("i1", "x"), ("gone", "y")], r"1 of 3 items to rename .*: 'gone'"),
        ([("i1", "i2")], r"'i1' cannot be renamed to 'i2', which is another item; two items cannot become"),
        ([("i1", "i2"), ("i2", "x")], r"'i1' cannot be renamed to 'i2', which is another item"),
        ([("i1", "i2"), ("i2", "i1")], r"rename 'i1', 'i2' in a circle"),
        ([("i1", "x"), ("x", "i1")], r"rename 'i1', 'x' in a circle"),
        ([("i1", "x"), ("i1", "y")], r"'i1' would be renamed to both 'x' and 'y'"),
        ([("i1", "x"), ("i2", "x")], r"both 'i1' and 'i2' would be renamed to 'x'; two items cannot become"),
        (
            [("i1", "former")],
            r"'i1' cannot be renamed to 'former', which is an earlier name of the item 'now'",
        ),
        ([("i1", "i5")], r"'i1' cannot be renamed to 'i5', which is an earlier name of the item 'now'"),
        ([("i1", "now")], r"'i1' cannot be renamed to 'now', which is another item"),
        ([("i5", "x"), ("former", "y")], r"two of the pairs rename the item 'now'"),
        ([("i1", "")], r"'' cannot be the name of an item"),
        ([("i1", " x")], r"' x' cannot be the name of an item: a name has 1 to 256 visible characters"),
        ([("i1", "x\0")], r"cannot be the name of an item"),
        ([("i1", "x" * 257)], r"cannot be the name of an item"),
    ],
)
def test_pairs_that_cannot_be_are_refused_and_nothing_changes(shop: Workspace, pairs, why: str) -> None:
    rename(shop, [("i5", "former"), ("former", "now")])
    before = (shop.root / NAMES).read_bytes()
    with pytest.raises(DataError, match=why):
        rename(shop, [("i7", "good"), *pairs])
    assert (shop.root / NAMES).read_bytes() == before


def test_a_kill_while_writing_leaves_the_old_names(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    rename(shop, [("i3", "b")])
    before = item_names(shop.root)

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("peso.runtime.files.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            rename(shop, [("b", "c")])
    assert item_names(shop.root) == before
    assert rename(shop, [("b", "c")]).items == {"b": "c"}


def test_a_damaged_record_is_named(shop: Workspace) -> None:
    rename(shop, [("i3", "b")])
    path = shop.root / NAMES
    path.write_text(path.read_text().replace('"b"', '"c"'))
    for use in (lambda: shop.semantic_ids, lambda: rename(shop, [("i4", "d")])):
        with pytest.raises(WorkspaceError, match=r"names\.json is damaged .*which items are renamed"):
            use()


@pytest.mark.parametrize("kind", ["vectors", "index"])
def test_files_of_items_may_have_any_name(shop: Workspace, tmp_path: Path, kind: str) -> None:
    values = {item: [n % 5, n % 7] for n, item in enumerate(shop.stream.item_ids)}

    def codes(rows: dict[str, list[int]]) -> np.ndarray:
        path = tmp_path / f"{kind}.{'parquet' if kind == 'vectors' else 'json'}"
        if kind == "vectors":
            pq.write_table(pa.table({"item_id": [*rows], "vector": [*rows.values()]}), path)
            used = {"encoder": "vectors", "vectors": [str(path)]}
        else:
            path.write_text(json.dumps({item: [f"<a_{x}>", f"<b_{y}>"] for item, (x, y) in rows.items()}))
            used = {"index": str(path)}
        items = shop.config.items.model_copy(update=used)
        shop.config = shop.config.model_copy(update={"items": items})
        with shop.lock():
            preparation.tokenize(shop, Silent())
        return shop.semantic_ids.codes

    before = codes(values)
    rename(shop, [("i1", "one"), ("i2", "two"), ("two", "2nd"), ("2nd", "second"), ("i3", "three")])
    to = {"i1": "one", "i2": "two"}  # i2 by the name between, i3 by its first
    assert (codes({to.get(item, item): row for item, row in values.items()}) == before).all()
    newest = {"one": values["i1"], "second": values["i2"]}  # of several names, the newest counts
    other = {"i1": [4, 6], "i2": [4, 6], "two": [4, 6]}
    assert (codes({**values, **newest, **other}) == before).all()
    assert (codes({**values, "one": values["i1"], "2nd": values["i2"], **other}) == before).all()


# -- new data under any name -----------------------------------------------------------------------------


def test_a_log_under_new_and_old_names_gives_the_same_stage(shop: Workspace, tmp_path: Path) -> None:
    other = Workspace.open(shutil.copytree(shop.root, tmp_path / "other"))
    append(other, tmp_path, NEW)
    rename(shop, [("i2", "two"), ("i3", "three"), ("i6", "six")])
    write_log(tmp_path / "products.csv", [("two", "thing 2"), ("fresh", "new thing")], "item,title")
    append(shop, tmp_path, renamed_in(NEW, {"i2": "two", "i6": "six"}))
    assert histories(shop.stream) == histories(other.stream)
    assert shop.stream.items.equals(other.stream.items)  # no item twice
    assert shop.stream.manifest["files"] == other.stream.manifest["files"]


def test_product_tables_may_have_either_name(shop: Workspace, tmp_path: Path) -> None:
    rename(shop, [("i2", "two")])
    write_log(tmp_path / "products.csv", [("two", "second"), ("i3", "third")], "item,title")
    data = shop.config.data.model_copy(
        update={"items": shop.config.data.items.model_copy(update={"path": str(tmp_path / "products.csv")})}
    )
    with shop.lock():
        done = preparation.update_items(shop, data, Silent())
    assert (done["items_found"], done["titles"]) == (2, 2)
    titles = dict(zip(shop.stream.item_ids, shop.stream.titles, strict=True))
    assert (titles["i2"], titles["i3"]) == ("second", "third")


def test_received_events_under_either_name_are_of_one_item(shop: Workspace, monkeypatch) -> None:
    monkeypatch.setattr("peso.runs.intake.pipeline.unfinished", lambda workspace: (None, True))
    with ReceivedEvents(shop.events_file) as received:
        names = ["nine", "i2", "i9", "i4"]
        received.add([ReceivedEvent("u1", name, LAST + (n + 1) * 10**6) for n, name in enumerate(names)])
        users = UserHistories(shop)
        found = users.of("u1")
        assert found is not None
        assert (found.left_out, found.received) == (["nine"], 4)  # not known yet
        rename(shop, [("i9", "nine")])
        found = users.of("u1")
        assert found is not None
        assert (found.items[-4:], found.left_out) == (["i9", "i2", "i9", "i4"], [])
        with shop.lock():
            cut = cut_received(shop, Silent())
    assert (cut.stage, cut.events, cut.new_items, cut.waiting, cut.unknown_items) == (2, 4, 0, 0, 0)
    assert UserHistories(shop).of("u1").items == found.items
    with shop.lock():
        assert cut_received(shop, Silent()).why == "no event was received since the last stage"


def test_an_undone_append_can_be_repeated(shop: Workspace, tmp_path: Path) -> None:
    rows = [*NEW, ("u1", "fresh", LAST / 1e6 + 9999)]
    append(shop, tmp_path, rows)
    with shop.lock():
        preparation.tokenize_new(shop, Silent())
        rename(shop, [("fresh", "better")])
        before = stream_files(shop)
        undo(shop, last_step(shop), Silent())
        assert "fresh" not in shop.semantic_ids
    append(shop, tmp_path, renamed_in(rows, {"fresh": "better"}))
    with shop.lock():
        preparation.tokenize_new(shop, Silent())
    assert stream_files(shop) == before
    assert shop.semantic_ids.item_ids[-1] == "better"


def test_retired_items_stay_retired_under_their_new_name(shop: Workspace) -> None:
    retire(shop, ["i1", "i2"])
    rename(shop, [("i1", "one"), ("i3", "three")])
    assert retire(shop, ["three", "one"]) == ["three"]
    assert list(retired(shop.root)) == ["i1", "i2", "i3"]
    assert restore(shop, ["i1", "three"]) == ["one", "three"]
    assert list(retired(shop.root)) == ["i2"]


def test_exported_semantic_ids_have_the_new_names(shop: Workspace, tmp_path: Path) -> None:
    retire(shop, ["i1"])
    rename(shop, [("i1", "one"), ("i3", "three")])
    assert preparation.export_index(shop, tmp_path / "index.json") == 1
    names = [*json.loads((tmp_path / "index.json").read_text())]
    assert names == [{"i3": "three"}.get(item, item) for item in shop.stream.item_ids if item != "i1"]
    preparation.export_index(shop, tmp_path / "catalog", form="catalog", with_retired=True)
    table = pq.read_table(next((tmp_path / "catalog").glob("*.parquet")))
    assert table["item_id"].to_pylist() == shop.semantic_ids.item_ids
    told = json.loads((tmp_path / "catalog" / "catalog.json").read_text())
    assert told["earlier_ids"] == {"i1": "one", "i3": "three"}
    preparation.export_index(shop, tmp_path / "known", form="catalog")  # without the retired item
    assert json.loads((tmp_path / "known" / "catalog.json").read_text())["earlier_ids"] == {"i3": "three"}


# -- the command -------------------------------------------------------------------------------------------


def test_the_command(shop: Workspace, tmp_path: Path, peso) -> None:
    root = shop.root
    status, out, _ = peso("items", "rename", "i1", "one", "--dry-run", "-w", root)
    assert (status, "1 items would be renamed" in out, (root / NAMES).exists()) == (0, True, False)
    status, out, _ = peso("items", "rename", "i1", "one", "-w", root)
    assert (status, "1 items renamed" in out) == (0, True)
    (tmp_path / "pairs.csv").write_text('old,new\ni1,one\n\ni2,"two, or so"\n')
    status, out, _ = peso("items", "rename", "--file", tmp_path / "pairs.csv", "-w", root, "--json")
    assert json.loads(out) == {"renamed": {"i2": "two, or so"}, "unchanged": ["one"], "dry_run": False}
    status, out, _ = peso("items", "list", "-w", root, "--json")
    assert {item: told["name"] for item, told in json.loads(out)["renamed"].items()} == {
        "i1": "one",
        "i2": "two, or so",
    }
    for arguments, why in (
        ([], "name an item and its new id"),
        (["i1"], "give the old and the new id"),
        (["i3", "i4"], "peso items retire"),
    ):
        status, _, err = peso("items", "rename", *arguments, "-w", root)
        assert (status != 0, why in err) == (True, True), err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"i1,one\ni2\n", r"line 2: expected two ids \(old and new\) of items"),
        (b"i1,one\ni2,two,three\n", r"line 2: expected"),
        (b"i1\tone\ni2\t\n", r"line 2: expected"),
        (b"old,new\n", r"has no pair of ids"),
        (b"\xff\xfe", r"is not UTF-8 text; convert it"),
        (b"i1,one\n" + b"a" * 200_000, r"line 2: field larger than"),
        (b"i1,one\n" + b"a" * 100_000, r"line 2: expected .{1,150}$"),
    ],
)
def test_a_file_of_other_contents_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=why):
        read_pairs(path, *OF_ITEMS)
    with pytest.raises(UsageError, match="cannot be read"):
        read_pairs(tmp_path / "none.csv", *OF_ITEMS)


def test_many_items_are_renamed_at_once(shop: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{item}\tnew-{item}\n" for item in shop.stream.item_ids))
    assert len(rename(shop, read_pairs(path, *OF_ITEMS), dry_run=True).items) == 19
    assert not renamings(shop.root)
    rename(shop, read_pairs(path, *OF_ITEMS))
    assert shop.semantic_ids.item_ids == [f"new-{item}" for item in shop.stream.item_ids]
    assert renaming.MERGE  # the names of the old ids are not free
    with pytest.raises(DataError, match="earlier name"):
        rename(shop, [("new-i1", "i2")])


# -- trained models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hybrid = {"name": "hybrid", "candidates": 5, "partners": ["item-graph"]}
    more = [f"baselines={json.dumps([hybrid])}", "evaluation.enabled=true", "evaluation.k=[5]"]
    workspace, _ = trained(tmp_path_factory.mktemp("renamed") / "w", *more)
    with workspace.lock():
        run_baselines(workspace, workspace.config.baselines, Silent())
    return workspace.root


@pytest.fixture
def workspace(run: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(run, tmp_path / "w")
    return Workspace.open(tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [None, "hybrid"])
def test_the_next_answer_has_the_new_name_and_understands_the_old_one(
    workspace: Workspace, hybrid: str | None
) -> None:
    recommender = Recommender(workspace, hybrid=hybrid)
    ids = workspace.semantic_ids.item_ids
    before = recommender.recommend(ids[:3], k=len(ids), exclude_seen=False)
    popular, user = recommender.popular(9), next(iter(recommender.histories))
    history = recommender.history(user)
    to = {item: f"new {item}" for item in [ids[0], before[0][0], popular[0], history[0], history[-1]]}
    rename(workspace, list(to.items()))
    wanted = [(to.get(item, item), score) for item, score in before]
    now = [to.get(item, item) for item in ids[:3]]
    assert recommender.recommend(ids[:3], k=len(ids), exclude_seen=False) == wanted
    assert recommender.recommend(now, k=len(ids), exclude_seen=False) == wanted
    assert not {item for item, _ in recommender.recommend(ids[:3], k=9, exclude_seen=True)} & {*now}
    assert recommender.popular(9) == [to.get(item, item) for item in popular]
    assert recommender.history(user) == [to.get(item, item) for item in history]
    retire(workspace, [before[0][0]])
    left = recommender.recommend(now, k=len(ids) - 1, exclude_seen=False)
    assert [item for item, _ in left] == [item for item, _ in wanted[1:]]


@pytest.mark.slow
def test_a_report_matches_items_that_one_workspace_has_renamed(workspace: Workspace, tmp_path: Path) -> None:
    other = Workspace.open(shutil.copytree(workspace.root, tmp_path / "other"))
    target, kept = [*dict.fromkeys(workspace.trained().predictions.targets)][:2]
    rename(other, [(target, "other"), (kept, "aside")])
    rename(workspace, [(target, "mine")])
    for both in ([workspace, other], [other, workspace]):
        first, second, *_ = runs_of(both)
        assert Comparison([first, second], [5]).same_cases
        for number, stage in first.stages.items():
            assert second.stages[number].predictions.items == stage.predictions.items
        targets = second.stages[workspace.trained().number].predictions.targets
        assert {both[0].names.now(target), both[0].names.now(kept)} <= {*targets}


@pytest.mark.slow
def test_popularity_that_is_computed_for_a_report_has_the_new_names(workspace: Workspace) -> None:
    target = workspace.trained().predictions.targets[0]
    rename(workspace, [(target, "mine")])
    shutil.rmtree(workspace.root / "baselines", ignore_errors=True)
    run, popularity = runs_of([workspace])
    assert popularity.name == "popularity"
    for number, stage in popularity.stages.items():
        assert [*stage.predictions.targets] == [*run.stages[number].predictions.targets]


@pytest.mark.slow
def test_a_report_leaves_items_of_another_log_their_names(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Workspace.open(shutil.copytree(workspace.root, tmp_path / "other"))
    target = workspace.trained().predictions.targets[0]
    rename(other, [(target, "other")])
    rename(workspace, [(target, "mine")])
    for of_one_log, name in ((True, "mine"), (False, "other")):
        monkeypatch.setattr(report, "of_one_log", lambda *_, same=of_one_log: same)
        second = runs_of([workspace, other])[1]
        assert {*second.stages[other.trained().number].predictions.targets} & {"mine", "other"} == {name}


@pytest.mark.slow
def test_tests_and_models_stay_valid_and_have_the_new_names(workspace: Workspace, tmp_path: Path) -> None:
    stage = workspace.trained()
    target = stage.predictions.targets[0]
    baseline = BaselineRun(workspace, workspace.config.baselines[0])
    metrics = stage.metrics["test"]["metrics"]
    recommender = Recommender(workspace)
    _ = recommender.model  # loaded before the renaming
    rename(workspace, [(target, "better")])
    assert stage.predictions.targets[0] == "better"
    assert target not in {item for listed in stage.predictions.items for item in listed}
    assert baseline.summaries()[0].stages[stage.number].predictions.targets[0] == "better"
    assert (stage.is_tested, baseline.is_done(1)) == (True, True)
    assert stage.metrics["test"]["metrics"] == metrics
    stage.require_as_determined()
    recommender.export(tmp_path / "merged")
    names = [*json.loads((tmp_path / "merged" / "index.json").read_text())]
    assert names == workspace.semantic_ids.item_ids
    assert "better" in names
    assert target not in names
    recommender.recommend_all(tmp_path / "all.parquet", k=5)
    answered = pq.read_table(tmp_path / "all.parquet")["items"].to_pylist()
    assert target not in {item for row in answered for item in row}


@pytest.mark.slow
def test_a_history_with_an_old_name_is_answered_and_said_so(workspace: Workspace, peso) -> None:
    ids = workspace.semantic_ids.item_ids
    peso("items", "rename", ids[0], "better", "-w", workspace.root)
    asked = ("recommend", "-w", workspace.root, "--history", f"{ids[0]},{ids[1]}", "-k", "3")
    status, out, _ = peso(*asked, "--json")
    told = json.loads(out)
    assert (status, told["history"], told["renamed_items"]) == (0, ["better", ids[1]], {ids[0]: "better"})
    status, out, err = peso(*asked)
    assert f"{ids[0]} is better now" in out + err

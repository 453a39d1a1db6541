"""Whose events are training targets (`training.users`): for models and baselines, in digests and reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from event_logs import write_log as write_events

from peso.config import load_config
from peso.config.shape import changed_shape
from peso.errors import ConfigError, WorkspaceError
from peso.evaluation.catalogue import Catalogue
from peso.runs import pipeline, preparation
from peso.runs.baselines import BaselineRun
from peso.runs.card import card_of
from peso.runs.report import report
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow  # whole runs

USERS, ITEMS, FEW = 24, 30, 12
HOT = "hot"  # an item that, at stage 1, only users with two events in the stage have


def write_log(path: Path) -> None:
    """Users with six events in each stage, and at stage 1 as many events of users with two."""
    rows = [
        (f"u{user}", f"i{(user * 7 + place * (1 + user % 3)) % ITEMS}", 100 * place + user)
        for place in range(12)
        for user in range(USERS)
    ]
    rows += [(f"few{user}", HOT, 1_150 + user) for user in range(FEW)]
    rows += [(f"few{user}", f"i{user}", 1_050 + user) for user in range(FEW)]
    rows.append(("u0", HOT, 1))
    lines = ["user,item,time", *(f"{user},{item},{1_700_000_000 + time}" for user, item, time in rows)]
    path.write_text("\n".join(lines) + "\n")


def run(folder: Path, users: str) -> Workspace:
    write_log(folder / "log.csv")
    products = folder / "products.csv"
    names = [HOT, *(f"i{n}" for n in range(ITEMS))]
    products.write_text("item,title\n" + "".join(f"{n},ware {n} of shelf {len(n) % 5}\n" for n in names))
    table = {"path": str(products), "columns": {"title": "title"}}
    config = load_config(
        {
            "data": {
                "format": "csv",
                "path": str(folder / "log.csv"),
                "stages": {"boundaries": ["2023-11-14 22:23:20"]},  # 1,700,000,600
                "items": table,
            },
            "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
            "backbone": {"name": "tiny", "layers": 1},
            "head": "items",
            "strategy": "single",
            "training": {"epochs": 1, "users": users},
            "decoding": {"repeats": "keep"},
            "baselines": [{"name": "popularity", "last": 1}],
        }
    )
    workspace = Workspace.create_or_open(folder / "w", config)
    with workspace.lock():
        pipeline.run(workspace)
    return workspace


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return run(tmp_path_factory.mktemp("tested"), "tested")


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return run(tmp_path_factory.mktemp("all"), "all")


def test_the_model_learns_the_events_of_all_users(tested: Workspace, everyone: Workspace) -> None:
    few, more = (each.stage(1).training["targets"] for each in (tested, everyone))
    assert more == few + 2 * FEW  # one epoch
    assert tested.stage(0).training["targets"] == everyone.stage(0).training["targets"]


def test_so_do_the_counts_and_the_baselines(tested: Workspace, everyone: Workspace) -> None:
    row = {id_: n for n, id_ in enumerate(tested.stream.item_ids)}[HOT]
    assert tested.stream.stage(1).current.values.tolist().count(row) == FEW
    for workspace, expected in ((tested, 0), (everyone, FEW)):
        latest = workspace.stream.stage(1)
        targets = np.concatenate([s.items[s.first_target :] for s in latest.training_sequences()])
        assert (targets == row).sum() == expected
    first = {
        workspace: BaselineRun(workspace, workspace.config.baselines[0]).computed(1).predictions
        for workspace in (tested, everyone)
    }
    assert not np.array_equal(first[tested].target_log_probability, first[everyone].target_log_probability)


def test_the_popularity_of_an_item_follows(tested: Workspace, everyone: Workspace) -> None:
    row = tested.stream.item_ids.index(HOT)
    few, more = (Catalogue.of(each.stream, each.semantic_ids, {}).seen[1][row] for each in (tested, everyone))
    assert more == few + FEW


def test_the_cases_are_the_same(tested: Workspace, everyone: Workspace) -> None:
    for stage in (0, 1):
        one, other = (each.stage(stage).predictions for each in (tested, everyone))
        assert (one.users, one.targets) == (other.users, other.targets)
        assert not any(user.startswith("few") for user in one.users)


def test_the_report_says_whose_events_were_learned(
    tested: Workspace, everyone: Workspace, tmp_path: Path
) -> None:
    said = "The training data include the events of users with fewer than three events in a stage"
    report([everyone], tmp_path / "one")
    assert said in (tmp_path / "one" / "index.html").read_text()
    report([tested], tmp_path / "other")
    assert said not in (tmp_path / "other" / "index.html").read_text()
    report([tested, everyone], tmp_path / "both")
    page = (tmp_path / "both" / "index.html").read_text()
    assert "Systems differ in their training data" in page


def test_a_baseline_of_other_training_data_is_run_again(everyone: Workspace) -> None:
    tree = everyone.config.model_dump(mode="json", exclude_unset=True)
    changed = everyone.with_config(load_config(tree, ["training.users=tested"]))
    assert list(BaselineRun(changed, everyone.config.baselines[0]).missing()) == [0, 1]
    assert not list(BaselineRun(everyone, everyone.config.baselines[0]).missing())


def test_a_trained_stage_refuses_other_training_data(everyone: Workspace) -> None:
    tree = everyone.config.model_dump(mode="json", exclude_unset=True)
    with pytest.raises((ConfigError, WorkspaceError), match=r"training\.users"):
        Workspace.create_or_open(everyone.root, load_config(tree, ["training.users=tested"]))


def test_a_change_names_the_default_although_it_is_not_written(
    everyone: Workspace, tested: Workspace
) -> None:
    there, here = (each.config for each in (everyone, tested))
    assert changed_shape(there, here, 0)["training.users"] == ("all", "tested")
    assert changed_shape(here, there, 1)["training.users"] == ("tested", "all")


def test_the_card_counts_what_was_trained_on(tested: Workspace, everyone: Workspace) -> None:
    for workspace in (tested, everyone):
        card = card_of(workspace.stage(1), "merged")
        targets = sum(s.targets for s in workspace.stream.stage(1).training_sequences())
        counts = workspace.stream.counts[1]
        row = f"| 1 | {counts['events']} | {counts['users']} | {targets} | {counts['test']} |"
        assert row in card.splitlines()


def test_a_repeat_of_a_user_who_is_trained_on_counts(tmp_path: Path) -> None:
    """`decoding.repeats: auto` looks for repeats in the training data of the newest stage."""
    long = [(f"u{user}", f"i{user + place}", 100 * place + user) for place in range(8) for user in range(6)]
    twice = [("few", "i1", 750), ("few", "i1", 760)]
    log = write_events(tmp_path / "log.csv", [*long, *twice])
    for users, leaves_out in (("tested", True), ("all", False)):
        data = {"format": "csv", "path": str(log), "stages": {"fractions": [0.5, 0.5]}}
        tree = {"data": data, "items": {"behavior": {}}, "training": {"users": users}, "baselines": []}
        with Workspace.hold(tmp_path / users, load_config(tree)) as workspace:
            preparation.ingest(workspace, Silent())
        assert workspace.stage(1).leaves_out_seen is leaves_out


def test_a_user_without_a_history_is_learned_too(everyone: Workspace) -> None:
    """The first event of a new user is a target whose history is empty."""
    sequences = {s.user: s for s in everyone.stream.stage(1).training_sequences()}
    assert sequences["few0"].first_target == 0
    assert sequences["few0"].targets == 2

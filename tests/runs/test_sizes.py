"""`backbone: auto`: chosen once, when the stream is made; then it is a configuration like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparisons import do, plan_of
from event_logs import write_log
from small_runs import Notes

from peso.config import load_config
from peso.config.recipe import FEWEST
from peso.errors import ConfigError, DataError, WorkspaceError
from peso.runs import pipeline, preparation, sizes
from peso.runs.workspace import Workspace
from peso.runtime.files import write_atomically

pytestmark = pytest.mark.slow

SHORT = {"epochs": 1, "max_steps": 2, "later": {"learning_rate": 1e-3}}


def log(path: Path, users: int = 40, first: int = 0, length: int = 8, items: int = 12) -> Path:
    """Users with ``length`` events, in the order of time."""
    events = [
        (f"u{user}", f"i{(user + step) % items}", first + 1000 * step + user)
        for step in range(length)
        for user in range(users)
    ]
    return write_log(path, events)


def tree(path: Path, **sections: object) -> dict[str, object]:
    data = {"format": "csv", "path": str(path), "stages": 2}
    return {"data": data, "items": {"behavior": {}}, "backbone": "auto", "baselines": [], **sections}


def made(root: Path, path: Path, *overrides: str, **sections: object) -> tuple[Workspace, list[str]]:
    """A workspace with its stream, and what was noted."""
    notes = Notes()
    with Workspace.hold(root, load_config(tree(path, **sections), overrides)) as workspace:
        preparation.ingest(workspace, notes)
    return workspace, notes.notes


def test_sizes_are_chosen_with_the_stream_written_and_told(tmp_path):
    path = log(tmp_path / "log.csv")
    workspace, notes = made(tmp_path / "w", path, "training.epochs=4", "backbone.width=128")
    targets = workspace.stream.manifest["stages"][0]["training_targets"]
    assert notes[-1].startswith(f"backbone: auto: {targets:,} training targets in stage 0")
    assert notes[-1].endswith("instead, the configuration gives backbone.width 128, training.epochs 4")
    written = Workspace.open(tmp_path / "w").config
    assert written == workspace.config
    assert (written.backbone.name, written.backbone.width, written.backbone.layers) == ("scratch", 128, 2)
    assert (written.training.epochs, written.training.patience) == (4, 3)  # given, though it is the default
    assert written.training.learning_rate == pytest.approx(2e-3)  # for the given width
    assert written.head.name == "items"


def test_contents_are_suggested_where_items_have_texts(tmp_path):
    path = log(tmp_path / "log.csv")
    table = tmp_path / "items.csv"
    table.write_text("item_id,title\n" + "".join(f"i{n},red shoe {n}\n" for n in range(12)))

    def notes(name: str, with_texts: bool, **sections: object) -> list[str]:
        products = {"items": {"path": str(table), "columns": {"item": "item_id", "title": "title"}}}
        data = tree(path)["data"] | (products if with_texts else {})
        return made(tmp_path / name, path, data=data, **sections)[1]

    assert "--set head.contents=true" in notes("texts", True)[-1]
    silent = [("none", False, {}), ("codes", True, {"head": "codes"})]
    silent += [
        (f"given-{value}", True, {"head": {"name": "items", "contents": value}}) for value in (True, False)
    ]
    for name, with_texts, sections in silent:
        assert "head.contents=true" not in " ".join(notes(name, with_texts, **sections))


def test_the_choice_outlives_a_longer_log_and_another_rule(tmp_path, monkeypatch):
    path = log(tmp_path / "log.csv")
    workspace, _ = made(tmp_path / "w", path)
    new = log(tmp_path / "new.csv", users=80, first=10**6, items=30)
    with workspace.lock():
        preparation.append(
            workspace, Notes(), load_config({"data": {"format": "csv", "path": str(new)}}).data
        )
    assert sizes.Sizes.of(workspace.stream.manifest, load_config(tree(path))).items == 12
    rule = sizes.from_scratch

    def larger(events: int, items: int, given_head: str | None):
        sections, reason = rule(events, items, given_head)
        return {**sections, "backbone": {**sections["backbone"], "width": 256}}, reason

    monkeypatch.setattr(sizes, "from_scratch", larger)
    with Workspace.hold(tmp_path / "w", load_config(tree(path))) as again:
        assert again.config == workspace.config
    other, _ = made(tmp_path / "new", path)
    assert other.config.backbone.width == 256


def test_a_crash_between_stream_and_choice_loses_neither_the_choice_nor_what_was_given(tmp_path):
    path = log(tmp_path / "log.csv")
    workspace, _ = made(tmp_path / "w", path, "training.epochs=4")
    chosen = (workspace.root / "config.yaml").read_bytes()
    waiting = Workspace.create_or_open(tmp_path / "other", load_config(tree(path), ["training.epochs=4"]))
    assert Workspace.open(waiting.root).config.backbone.is_auto
    (workspace.root / "sizes.json").unlink()
    write_atomically(workspace.root / "config.yaml", (waiting.root / "config.yaml").read_bytes())
    assert Workspace.open(workspace.root).config == workspace.config  # in memory; nothing is written
    assert not (workspace.root / "sizes.json").exists()
    with Workspace.change(workspace.root) as opened:
        assert opened.config == workspace.config
    assert (workspace.root / "config.yaml").read_bytes() == chosen
    assert (workspace.root / "sizes.json").exists()


def test_other_data_in_the_same_workspace_are_chosen_for_again(tmp_path):
    path = log(tmp_path / "log.csv", users=300, length=20)
    made(tmp_path / "w", path, "training.patience=5")
    with Workspace.change(tmp_path / "w", ["training.weight_decay=0.2"]) as workspace:
        before = workspace.config.training
    log(path, users=40)
    notes = Notes()
    with Workspace.change(tmp_path / "w", anew="stream") as workspace:
        preparation.ingest(workspace, notes)
    now = Workspace.open(tmp_path / "w").config.training
    assert (before.batch_size, now.batch_size) == (64, 32)
    assert (now.patience, now.weight_decay) == (5, 0.2)
    assert notes.notes[-1].endswith(
        "instead, the configuration gives training.weight_decay 0.2, training.patience 5"
    )


def test_too_short_a_log_is_refused_and_its_workspace_stays_usable(tmp_path):
    path = log(tmp_path / "log.csv", users=8)
    with pytest.raises(DataError, match=f"needs at least {FEWEST}.*backbone: scratch"):
        made(tmp_path / "w", path)
    with Workspace.change(tmp_path / "w") as workspace:
        preparation.tokenize(workspace, Notes())
        with pytest.raises(DataError, match=f"needs at least {FEWEST}"):
            pipeline.learn(workspace.stage(0), Notes())
    with pytest.raises(DataError, match=f"needs at least {FEWEST}"):
        pipeline.run(workspace)
    assert workspace.finished_stages == []
    opened = Workspace.create_or_open(tmp_path / "w", load_config(tree(path, backbone="tiny")))
    assert opened.config.backbone.name == "tiny"


def test_sizes_count_the_targets_of_all_users_if_these_are_trained_on(tmp_path):
    few = [(f"few{n}", f"i{n % 12}", 10 + 1000 * (n % 5)) for n in range(300)]
    long = [
        (f"u{user}", f"i{(user + step) % 12}", 1000 * step + user) for step in range(8) for user in range(8)
    ]
    path = write_log(tmp_path / "log.csv", [*few, *long])
    with pytest.raises(DataError, match="stage 0 has 16 training targets"):
        made(tmp_path / "w", path)
    workspace, notes = made(tmp_path / "w2", path, "training.users=all")
    targets = sum(s.targets for s in workspace.stream.stage(0).training_sequences())
    assert targets >= FEWEST
    assert notes[-1].startswith(f"backbone: auto: {targets:,} training targets in stage 0")


def test_missing_data_are_told_before_anything_is_written(tmp_path, peso):
    (tmp_path / "c.yaml").write_text(f"data: {{format: csv, path: {tmp_path}/none.csv}}\nbackbone: auto\n")
    for arguments in ([], ["--dry-run"]):
        status, _, err = peso("run", tmp_path / "c.yaml", "-w", tmp_path / "w", *arguments)
        assert status == 1
        assert "none.csv" in err
        assert not (tmp_path / "w").exists()


def test_auto_is_for_new_workspaces_only(tmp_path):
    path = log(tmp_path / "log.csv")
    with Workspace.hold(tmp_path / "w", load_config(tree(path, backbone="tiny"))):
        pass
    changing = Workspace.change(tmp_path / "w", ["backbone=auto"])
    with pytest.raises(ConfigError, match="has them already"), changing:
        pass


def test_a_damaged_record_is_told(tmp_path):
    path = log(tmp_path / "log.csv")
    made(tmp_path / "w", path)
    record = tmp_path / "w" / "sizes.json"
    record.write_text(record.read_text().replace('"width": 64', '"width": 32'))
    with pytest.raises(WorkspaceError, match=r"sizes\.json is damaged"):
        Workspace.create_or_open(tmp_path / "w", load_config(tree(path)))
    Workspace.open(tmp_path / "w")  # which has its values


def test_a_run_with_auto_is_the_run_with_the_chosen_values(tmp_path):
    path = log(tmp_path / "log.csv")
    sections = {"training": SHORT, "head": "codes", "evaluation": {"enabled": False}, "strategy": "single"}
    runs = []
    for name, backbone in ("auto", "auto"), ("given", None):
        given = tree(path, **sections)
        config = load_config(given) if backbone else load_config(runs[0].root / "config.yaml")
        with Workspace.hold(tmp_path / name, config) as workspace:
            pipeline.run(workspace)
        runs.append(workspace)
    auto, given_values = runs
    assert auto.config.head.name == "codes"
    for stage in 0, 1:
        assert auto.stage(stage).determined_by == given_values.stage(stage).determined_by
    with Workspace.hold(auto.root, load_config(tree(path, **sections))) as again:  # resumed: nothing is left
        assert list(pipeline.missing_steps(again, again.stream.stages)) == []


def test_runs_of_a_comparison_share_the_choice_and_what_is_given_tells_them_apart(tmp_path):
    compare = {
        "strategies": {"none": "none", "single": "single"},
        "backbones": {"chosen": "auto", "four": {"backbone": "auto", "training": {**SHORT, "epochs": 4}}},
        "seeds": [0],
    }
    plan = plan_of(tmp_path, compare, training=SHORT, evaluation={"enabled": False})
    none, single, *four = plan.runs
    assert none.task.base.root == single.task.base.root
    assert four[0].task.base.root != none.task.base.root  # although 4 is the default
    do(single.task)
    base, run = (Workspace.open(task.root) for task in (single.task.base, single.task))
    assert run.config.backbone == base.config.backbone
    assert (run.config.backbone.name, run.config.backbone.width) == ("scratch", 64)
    assert run.stage(0).determined_by == base.stage(0).determined_by
    plan.refuse_changes()  # the same plan again, with sizes that are known by now

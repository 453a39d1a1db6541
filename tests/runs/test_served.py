"""Which stage serves: promotions and rollbacks are recorded, atomic, and what answers follows them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from peso.errors import WorkspaceError
from peso.events.received import ReceivedEvent, ReceivedEvents
from peso.runs.recommender import Recommender
from peso.runs.served import previous, promote, rollback, served, serving_stage
from peso.runs.stage import RunStage
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum

pytestmark = pytest.mark.slow

Call = Callable[..., tuple[int, str, str]]


def files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): checksum(path) for path in root.rglob("*") if path.is_file()}


def test_the_newest_stage_serves_until_one_is_promoted(workspace: Workspace) -> None:
    assert served(workspace).current is None
    assert serving_stage(workspace).number == Recommender(workspace).stage == 2
    assert previous(workspace) is None
    promote(workspace, 1, reason="as a trial")
    assert served(workspace).current == 1
    assert serving_stage(workspace).number == Recommender(workspace).stage == 1
    assert Recommender(workspace, 2).stage == 2
    (change,) = served(workspace).changes
    assert (change.stage, change.before, change.by, change.reason) == (1, 2, "promote", "as a trial")
    assert (change.forced, change.pinned) == (False, False)


def test_a_pinned_stage_answers_with_the_histories_of_now(workspace: Workspace) -> None:
    """Users who came later are known to the stage that serves, and not to a stage asked for by number."""
    promote(workspace, 0)
    serving, named = Recommender(workspace), Recommender(workspace, 0)
    assert set(named.histories) < set(serving.histories)
    assert set(serving.histories) == set(Recommender(workspace, 2).histories)


def test_a_promotion_of_what_serves_changes_nothing(workspace: Workspace) -> None:
    assert promote(workspace, 1)
    before = files(workspace.root)
    assert not promote(workspace, 1, reason="again")
    assert files(workspace.root) == before
    assert promote(workspace, 1, pinned=True)
    assert served(workspace).pinned
    assert served(workspace).earlier == [(2, None)]  # a pin is not a step to go back


def test_a_rollback_leads_back_step_by_step(workspace: Workspace) -> None:
    for stage in (0, 1, 2):
        promote(workspace, stage)
    assert rollback(workspace, reason="worse").before == 2
    assert served(workspace).current == 1
    assert rollback(workspace).stage == 0
    promote(workspace, 1)
    assert rollback(workspace).stage == 0
    assert rollback(workspace).stage == 2  # served before anything was promoted
    with pytest.raises(WorkspaceError, match=r"no other stage .* `peso promote -w .* --stage T`"):
        rollback(workspace)
    assert [change.by for change in served(workspace).changes[3:5]] == ["rollback", "rollback"]


def test_a_rollback_passes_over_what_is_gone_or_another(workspace: Workspace) -> None:
    for stage in (2, 1, 2, 0):
        promote(workspace, stage)
    path = workspace.root / "stages" / "2"
    shutil.rmtree(path)
    assert previous(workspace) == 1
    assert rollback(workspace).stage == 1
    assert previous(workspace) is None


def test_what_cannot_serve_is_not_promoted(workspace: Workspace, peso: Call) -> None:
    before = files(workspace.root)
    for stage in ("7", "-1"):
        status, _, err = peso("promote", "-w", workspace.root, "--stage", stage)
        assert status == 1
        assert stage in err
    assert files(workspace.root) == before
    weights = workspace.root / "stages" / "1" / "vocabulary.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(WorkspaceError, match=r"vocabulary\.safetensors is damaged"):
        promote(workspace, 1)
    assert served(workspace).current is None


def test_a_stage_that_is_removed_meanwhile_is_not_promoted(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undo may come between the check of the weights and the change."""
    monkeypatch.setattr(RunStage, "require_intact_weights", lambda stage: shutil.rmtree(stage.directory))
    with pytest.raises(WorkspaceError, match="removed meanwhile"):
        promote(workspace, 2)
    assert served(workspace).current is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"stage": 1', '"stage": 2'),
        lambda text: json.dumps({**json.loads(text), "changes": "none"}),
        lambda text: json.dumps({"format": 1}),
        lambda text: "[]",
        lambda text: "",
        lambda text: text.replace('"format": 1', '"format": "1"'),
    ],
)
def test_a_damaged_record_is_named_and_nothing_answers(
    workspace: Workspace, peso: Call, change: Callable[[str], str]
) -> None:
    promote(workspace, 1)
    path = workspace.root / "served.json"
    path.write_text(change(path.read_text()))
    calls: list[tuple[str, ...]] = [
        ("status",),
        ("rollback",),
        ("promote", "--stage", "1"),
        ("recommend", "--user", "u1"),
        ("undo", "--yes"),
    ]
    for name, *options in calls:
        status, _, err = peso(name, "-w", workspace.root, *options)
        assert status == 1
        assert f"{path} is damaged" in err
        assert "peso promote" in err
    assert Recommender(workspace, 1).stage == 1  # a stage that is asked for by number is not looked up
    path.unlink()
    promote(workspace, 1)


def test_a_record_of_a_newer_version_is_refused(workspace: Workspace) -> None:
    (workspace.root / "served.json").write_text(json.dumps({"format": 2, "slots": []}))
    with pytest.raises(WorkspaceError, match="written by a newer version of peso"):
        served(workspace)


def test_the_stage_that_serves_is_not_undone(workspace: Workspace, peso: Call) -> None:
    promote(workspace, 1)
    promote(workspace, 2)
    before = files(workspace.root)
    status, _, err = peso("undo", "--yes", "-w", workspace.root)
    assert status == 1
    assert "stage 2" in err
    assert f"peso rollback -w {workspace.root}" in err
    assert files(workspace.root) == before
    assert peso("rollback", "-w", workspace.root)[0] == 0
    assert peso("undo", "--yes", "-w", workspace.root)[0] == 0
    assert workspace.finished_stages == [0, 1]
    assert serving_stage(workspace).number == 1


def test_a_stage_that_was_trained_again_does_not_serve_in_its_place(workspace: Workspace) -> None:
    promote(workspace, 2)
    path = workspace.root / "served.json"
    told = json.loads(path.read_text())
    other = [{**told["changes"][0], "determined_by": "0" * 64}]
    from peso.runtime.files import digest

    path.write_text(json.dumps({"format": 1, "changes": other, "sha256": digest({"changes": other})}))
    with pytest.raises(WorkspaceError, match="removed or trained again"):
        Recommender(workspace)


class Killed(BaseException):
    pass


def kills(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Iterator[None]:
    """The work, killed at its first, second, … call that changes the file system."""
    moment = 0
    while True:
        moment += 1
        calls = 0

        def deadly(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == moment:  # noqa: B023 - it is called in this round
                    raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "fsync"):
                patch.setattr(os, name, deadly(getattr(os, name)))
            patch.setattr(Path, "replace", deadly(Path.replace))
            try:
                work()
            except Killed:
                pass
            else:
                break
        yield
    assert moment > 2


@pytest.mark.parametrize("name", ["promote", "rollback"])
def test_killed_at_any_moment_the_old_stage_serves_or_the_new_one(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    promote(workspace, 0)
    promote(workspace, 1)
    before = served(workspace)
    work = (lambda: promote(workspace, 2)) if name == "promote" else (lambda: rollback(workspace))
    new = 2 if name == "promote" else 0
    for _ in kills(monkeypatch, work):
        found = served(workspace)
        assert found == before or (found.current == new and found.changes[:-1] == before.changes)
        if found != before:
            (workspace.root / "served.json").unlink()
            promote(workspace, 0)
            promote(workspace, 1)
            before = served(workspace)
    assert served(workspace).current == new


def test_promotions_at_once_are_all_recorded(workspace: Workspace) -> None:
    """Also while another process trains: the lock of the workspace is not needed."""
    with workspace.lock(), ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda stage: promote(workspace, stage % 3, reason=str(stage)), range(12)))
    changes = served(workspace).changes
    assert all(one.stage == two.before for one, two in pairwise(changes))
    assert len({change.reason for change in changes}) == len(changes) > 1
    assert not (workspace.root / ".served.lock").exists()


def test_a_promotion_says_what_it_changed(workspace: Workspace, peso: Call) -> None:
    def told(stage: int, *more: str) -> str:
        return (
            peso("promote", "-w", workspace.root, "--stage", stage, *more)[1].splitlines()[0].split(": ")[1]
        )

    assert told(2) == "stage 2, which has served as the newest one, now serves until another is promoted"
    assert told(2).startswith("stage 2 has been serving since")
    assert told(1) == "stage 1 now serves instead of stage 2"
    assert told(1, "--pin") == "stage 1 still serves and is now pinned"
    assert told(1) == "stage 1 still serves and is now not pinned"


def test_status_in_every_state(workspace: Workspace, peso: Call, tmp_path: Path) -> None:
    def told() -> dict:
        status, out, err = peso("status", "-w", workspace.root, "--json")
        assert status == 0, err
        answer: dict = json.loads(out)
        status, text, _ = peso("status", "-w", workspace.root)
        assert status == 0
        assert f"stage {answer['serves']['stage']} has been serving since" in text
        return answer

    first = told()
    assert first["serves"]["stage"] == 2
    assert first["serves"]["by"] is None
    assert "no stage was promoted" in first["serves"]["reason"]
    assert [stage["parent"] for stage in first["stages"]] == [None, 0, 1]
    assert [stage["serves"] for stage in first["stages"]] == [False, False, True]
    assert all("ndcg@10" in stage["metrics"] for stage in first["stages"])

    peso("promote", "-w", workspace.root, "--stage", "1", "--reason", "by hand", "--pin")
    second = told()["serves"]
    assert (second["stage"], second["by"], second["reason"]) == (1, "promote", "by hand")
    assert (second["pinned"], second["previous"]) == (True, 2)

    assert first["waiting"] == {"stages": [], "items_without_id": 0, "received": None}
    with ReceivedEvents(workspace.events_file) as received:
        received.add([ReceivedEvent("u1", "i1", 1_600_000_000_000_000)])

    shutil.rmtree(workspace.root / "stages" / "2")
    third = told()
    assert third["waiting"] == {"stages": [2], "items_without_id": 0, "received": 1}
    assert third["serves"]["previous"] is None

    shutil.rmtree(workspace.root / "stages" / "1")
    fourth = told()
    assert "was removed or trained again" in fourth["serves"]["problem"]
    assert "warning: stage 1" in peso("status", "-w", workspace.root)[1]

    (workspace.root / "served.json").unlink()
    shutil.rmtree(workspace.root / "stages")
    status, out, _ = peso("status", "-w", workspace.root)
    assert status == 0
    assert "no stage serves, because none is trained yet" in out
    nothing = json.loads(peso("status", "-w", workspace.root, "--json")[1])["serves"]
    assert nothing.keys() == first["serves"].keys()
    assert not any(nothing.values())
    status, _, err = peso("status", "-w", tmp_path / "nothing")
    assert status == 1
    assert "is not a workspace" in err


def test_every_answer_names_the_stage_that_gave_it(workspace: Workspace, peso: Call) -> None:
    promote(workspace, 1)
    for options, stage in (((), 1), (("--stage", "2"), 2)):
        status, out, err = peso("recommend", "-w", workspace.root, "--history", "i1,i2", "--json", *options)
        assert status == 0, err
        assert json.loads(out)["stage"] == stage


def test_output_does_not_overwrite_the_record(workspace: Workspace, peso: Call) -> None:
    status, _, err = peso("export", "-w", workspace.root, "-o", workspace.root / "served.json")
    assert status == 1
    assert "belongs to the workspace" in err

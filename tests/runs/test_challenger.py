"""Updates behind a gate: who is judged against whom, what is promoted, recorded and left alone."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peso.config import load_config
from peso.errors import WorkspaceError
from peso.evaluation import verdict as verdicts
from peso.runs import challenger, pipeline, preparation
from peso.runs.baselines import run_baselines
from peso.runs.hybrids import hybrids_not_run
from peso.runs.served import promote, rollback, served
from peso.runs.workspace import Workspace
from peso.runtime.files import digest
from peso.runtime.manifest import replace_file
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

TREE = {
    "data": {"format": "simulate", "simulate": {"users": 40, "items": 30, "stages": 4}},
    "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
    "backbone": {"name": "tiny", "layers": 1},
    "adapter": {"rank": 2, "targets": ["q_proj"]},
    "training": {"epochs": 1, "max_steps": 2, "batch_size": 64},
    "strategy": "single",
    "baselines": [],
    "gate": {"enabled": True, "metric": "log_probability"},
}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(workspaces: list[Workspace], directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "index.html").write_text("")

    monkeypatch.setattr("peso.runs.report.report", write)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 0 alone, in a stream of four."""
    workspace = Workspace.create_or_open(tmp_path_factory.mktemp("gate") / "w", load_config(TREE))
    preparation.ingest(workspace, Silent())
    preparation.tokenize(workspace, Silent())
    pipeline.learn(workspace.stage(0), Silent())
    return workspace.root


@pytest.fixture
def workspace(base: Path, tmp_path: Path) -> Workspace:
    return Workspace.open(shutil.copytree(base, tmp_path / "w"))


@pytest.fixture(scope="module")
def tested(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 0 serves, stage 1 is trained, and all is tested that the gate needs."""
    workspace = Workspace.open(shutil.copytree(base, tmp_path_factory.mktemp("tested") / "w"))
    challenger.keep_serving(workspace)
    pipeline.learn(workspace.stage(1), Silent())
    challenger._test(workspace.stage(1), workspace.stage(0), Silent())
    return workspace.root


@pytest.fixture
def unjudged(tested: Path, tmp_path: Path) -> Workspace:
    return Workspace.open(shutil.copytree(tested, tmp_path / "w"))


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """outcome("failed"): what every comparison of the gate ends with from now on."""

    def set_outcome(wanted: str) -> None:
        monkeypatch.setattr(verdicts, "_outcome", lambda found, metric: (wanted, "as the test wants it"))

    return set_outcome


def files_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_passes_serves_and_what_does_not_leaves_the_champion(
    workspace: Workspace, outcome: Callable[[str], None]
) -> None:
    """The champion is the stage that serves, not the one before."""
    outcome("passed")
    assert pipeline.update(workspace, Silent()) == 1
    assert served(workspace).current == 1
    first, second = served(workspace).changes
    assert (first.stage, first.before, first.by) == (0, None, "gate")
    assert (second.stage, second.before, second.by) == (1, 0, "gate")
    assert "log_probability" in str(second.reason)

    outcome("failed")
    assert pipeline.update(workspace, Silent()) == 2
    assert served(workspace).current == 1
    verdict: Any = workspace.stage(2).verdict
    assert (verdict["decision"], verdict["champion"]) == ("refused", 1)

    outcome("undecided")
    assert pipeline.update(workspace, Silent()) == 3  # trained from stage 2, judged against stage 1
    assert served(workspace).current == 1
    verdict = workspace.stage(3).verdict
    assert (verdict["decision"], verdict["champion"]) == ("undecided", 1)
    assert workspace.stage(3).manifest["parent"]["stage"] == 2
    assert verdict["determined_by"]["champion"] == workspace.stage(1).determined_by

    before = files_of(workspace.root)
    assert pipeline.update(workspace, Silent()) is None
    assert files_of(workspace.root) == before
    assert served(workspace).current == 1


def test_a_stage_has_its_hybrids_before_the_gate_promotes_it(
    tested: Path, tmp_path: Path, outcome: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome("passed")
    hybrid = (
        '[popularity, {"name": "hybrid", "weight": 0.5, "partners": [{"name": "popularity", "last": 1}]}]'
    )
    root, there = shutil.copytree(tested, tmp_path / "w"), list[list[str]]()

    def promote_and_look(workspace: Workspace, stage: int, **options: Any) -> bool:
        there.append(hybrids_not_run(workspace, stage))
        return promote(workspace, stage, **options)

    monkeypatch.setattr(challenger, "promote", promote_and_look)
    with Workspace.change(root, [f"baselines={hybrid}"]) as workspace:
        run_baselines(workspace, workspace.config.baselines[1:], Silent())
        shutil.rmtree(next((root / "baselines").glob("hybrid*")) / "1")
        assert hybrids_not_run(workspace, 1)
        assert pipeline.update(workspace, Silent()) == 1
    assert there == [[]]
    assert served(workspace).current == 1


def test_a_verdict_tells_all_that_it_rests_on(unjudged: Workspace) -> None:
    """Of the same cases for both models: validation decides, test is reported."""
    pipeline.update(unjudged, Silent())
    verdict: Any = unjudged.stage(1).verdict
    assert {"settings", "conditions", "test", "time", "says"} <= verdict.keys()
    assert verdict["settings"]["delta"] == 0.05  # also what is at its default
    assert verdict["settings"]["cases"] == "validation"
    names = [condition["name"] for condition in verdict["conditions"]]
    assert names == ["log_probability", "coverage"]
    old, new = (unjudged.stage(stage).on(1, "validation").predictions for stage in (0, 1))
    assert (old.users, old.targets) == (new.users, new.targets)
    cases = unjudged.stream.stage(1).validation_cases(20)
    ids = unjudged.semantic_ids.item_ids
    assert new.targets == [ids[target] for target in cases.targets]
    figures = verdict["conditions"][0]["figures"]
    assert figures["challenger"] == pytest.approx(new.target_log_probability.mean())
    assert figures["champion"] == pytest.approx(old.target_log_probability.mean())
    tested = unjudged.stage(1).on(1).predictions
    assert verdict["test"]["challenger"] == pytest.approx(tested.target_log_probability.mean())
    first = unjudged.stage(0).on(0).predictions
    assert verdict["earlier"]["cases"] == len(first)
    assert verdict["earlier"]["champion"] == pytest.approx(first.target_log_probability.mean())


def test_test_cases_decide_where_they_are_to(base: Path, tmp_path: Path) -> None:
    root = shutil.copytree(base, tmp_path / "w")
    with Workspace.change(root, ["gate.cases=test"]) as workspace:
        pipeline.update(workspace, Silent())
    verdict: Any = workspace.stage(1).verdict
    assert verdict["conditions"][0]["figures"] == verdict["test"]
    assert not list(root.rglob("validation"))


def test_without_a_gate_nothing_is_judged_or_recorded(base: Path, tmp_path: Path) -> None:
    root = shutil.copytree(base, tmp_path / "w")
    with Workspace.change(root, ["gate.enabled=false"]) as workspace:
        pipeline.update(workspace, Silent())
    assert not (root / "served.json").exists()
    assert workspace.stage(1).verdict is None
    assert served(workspace).current is None
    # turned on later, it judges what comes after
    with Workspace.change(root, ["gate.enabled=true"]) as workspace:
        assert pipeline.update(workspace, Silent()) == 2
    verdict: Any = workspace.stage(2).verdict
    assert verdict["champion"] == 1


def test_a_stage_that_missed_its_gate_is_promoted_by_force_alone(
    unjudged: Workspace, outcome: Callable[[str], None], peso: Call
) -> None:
    outcome("failed")
    pipeline.update(unjudged, Silent())
    status, _, err = peso("promote", "-w", unjudged.root, "--stage", "1")
    assert status == 1
    assert "did not pass its gate" in err
    assert "--force" in err
    assert served(unjudged).current == 0
    assert peso("promote", "-w", unjudged.root, "--stage", "1", "--force", "--reason", "new shop")[0] == 0
    latest = served(unjudged).latest
    assert latest is not None
    assert (latest.stage, latest.forced, latest.reason) == (1, True, "new shop")
    status, out, _ = peso("status", "-w", unjudged.root)
    assert "forced: it had not passed its gate" in out
    assert "stage 1 was refused against stage 0" in out
    assert json.loads(peso("status", "-w", unjudged.root, "--json")[1])["serves"]["forced"] is True
    rollback(unjudged)
    promote(unjudged, 0, force=True)
    latest = served(unjudged).latest
    assert latest is not None
    assert not latest.forced  # nothing had to be forced


def test_no_gate_replaces_a_pinned_stage(unjudged: Workspace, outcome: Callable[[str], None]) -> None:
    outcome("passed")
    promote(unjudged, 0, pinned=True)
    pipeline.update(unjudged, Silent())
    verdict: Any = unjudged.stage(1).verdict
    assert (verdict["decision"], verdict["promote"], verdict["pinned"]) == ("passed", False, True)
    assert served(unjudged).current == 0
    promote(unjudged, 0)  # no longer pinned; what was decided stays decided
    assert pipeline.update(unjudged, Silent()) == 2
    assert served(unjudged).current == 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["test", "promote"])
def test_an_update_that_was_killed_is_finished_and_nothing_unjudged_serves(
    workspace: Workspace, outcome: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    outcome("passed")

    def die(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"peso.runs.challenger.{where}", die)
        with pytest.raises(Killed):
            pipeline.update(workspace, Silent())
    assert workspace.finished_stages == [0, 1]
    assert served(workspace).current == 0
    assert pipeline.update(workspace, Silent()) == 1
    assert served(workspace).current == 1
    assert [change.stage for change in served(workspace).changes] == [0, 1]


def test_without_its_record_no_stage_serves_that_the_gate_refused(
    workspace: Workspace, outcome: Callable[[str], None], peso: Call
) -> None:
    outcome("failed")
    pipeline.update(workspace, Silent())
    path = workspace.root / "served.json"
    path.unlink()
    calls: list[tuple[str, ...]] = [("recommend", "--user", "u1"), ("update",), ("prune", "--keep", "1")]
    for name, *options in calls:
        status, _, err = peso(name, "-w", workspace.root, *options)
        assert status == 1, name
        assert f"{path} is missing" in err
        assert "peso promote" in err
    assert workspace.finished_stages == [0, 1]  # the update has trained nothing
    status, out, _ = peso("status", "-w", workspace.root)
    assert status == 0
    assert f"warning: {path} is missing" in " ".join(out.split())
    told = json.loads(peso("status", "-w", workspace.root, "--json")[1])
    assert told["serves"]["stage"] is None
    assert "is missing" in told["serves"]["problem"]
    with pytest.raises(WorkspaceError, match="did not pass its gate"):
        promote(workspace, 1)
    promote(workspace, 0)
    (change,) = served(workspace).changes
    assert (change.stage, change.before) == (0, None)
    assert peso("recommend", "-w", workspace.root, "--user", "u1")[0] == 0


def test_a_verdict_on_a_stage_that_was_undone_is_not_taken_for_that_on_the_next(
    unjudged: Workspace, outcome: Callable[[str], None], peso: Call
) -> None:
    """Trained again alike and judged, but killed before the promotion: the earlier one does not count."""
    outcome("passed")
    pipeline.update(unjudged, Silent())
    rollback(unjudged)
    assert peso("undo", "--yes", "-w", unjudged.root)[0] == 0
    path = unjudged.root / "served.json"
    aged = json.loads(path.read_text())
    for change in aged["changes"]:
        change["time"] = "2026-01-01T00:00:00+00:00"
    aged["sha256"] = digest({"changes": aged["changes"]})
    path.write_text(json.dumps(aged))
    before = path.read_bytes()
    pipeline.update(unjudged, Silent())
    assert served(unjudged).current == 1
    path.write_bytes(before)  # as if killed just before
    assert served(unjudged).current == 0
    assert pipeline.update(unjudged, Silent()) == 1
    assert served(unjudged).current == 1


def test_a_change_by_hand_wins_over_a_gate_that_is_deciding(
    unjudged: Workspace, outcome: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome("passed")
    pipeline.update(unjudged, Silent())
    decide = challenger._decide

    def meanwhile(*arguments: Any) -> None:
        decide(*arguments)
        rollback(unjudged)

    monkeypatch.setattr(challenger, "_decide", meanwhile)
    pipeline.update(unjudged, Silent())
    assert served(unjudged).current == 0


def test_a_damaged_verdict_is_named(unjudged: Workspace, outcome: Callable[[str], None]) -> None:
    outcome("failed")
    pipeline.update(unjudged, Silent())
    path = unjudged.root / "stages" / "1" / "gate.json"
    path.write_text(path.read_text().replace("refused", "passed"))
    with pytest.raises(WorkspaceError, match=r"gate\.json is damaged: .* `peso update"):
        promote(unjudged, 1)
    assert served(unjudged).current == 0


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"decision": "passed"}', b"\xff"])
def test_a_verdict_that_is_none_is_named(every_file: Path, tmp_path: Path, content: bytes) -> None:
    """Also where the manifest was rewritten with it, as whoever made the workspace can do."""
    workspace = Workspace.open(shutil.copytree(every_file, tmp_path / "w"))
    with replace_file(workspace.stage(2).directory, "gate.json", 1) as aside:
        aside.write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"stages/2/gate\.json is damaged"):
        promote(workspace, 2)


def test_undo_takes_the_verdict_and_its_answers_along(
    workspace: Workspace, outcome: Callable[[str], None], peso: Call
) -> None:
    before = files_of(workspace.root / "stages")
    outcome("failed")
    pipeline.update(workspace, Silent())
    assert (workspace.root / "stages/0/on=1/validation/predictions.parquet").is_file()
    assert peso("undo", "--yes", "-w", workspace.root)[0] == 0
    left = files_of(workspace.root / "stages") - before
    assert left == {"0/predictions.parquet"}  # its own test cases


# -- alerts ------------------------------------------------------------------------------------------


@pytest.fixture
def alert(tmp_path: Path) -> tuple[str, Callable[[], list[dict[str, Any]]]]:
    """A command that keeps what it is told, and what it was told so far."""
    script, told = tmp_path / "keep it.py", tmp_path / "told.jsonl"
    script.write_text(
        "import sys\n"
        f"with open({str(told)!r}, 'a') as file:\n"
        "    file.write(sys.stdin.read() + chr(10))\n"
        "sys.exit(int(sys.argv[1]))\n"
    )

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []

    return f"{sys.executable} '{script}'", read


def test_an_alert_is_sent_where_the_champion_stays_or_the_update_fails(
    workspace: Workspace, outcome: Callable[[str], None], peso: Call, alert
) -> None:
    command, told = alert
    outcome("passed")
    assert peso("update", "-w", workspace.root, "--alert", f"{command} 0")[0] == 0
    assert told() == []
    outcome("failed")
    status, out, err = peso(
        "update", "-w", workspace.root, "--alert", f"{command} 0", "--set", "gate.drift=1e-6"
    )
    assert status == 0, err
    assert "gate: stage 2 against stage 1: refused" in out
    drift, refused = told()
    assert (drift["event"], drift["stage"]) == ("drift", 2)
    assert (refused["event"], refused["stage"]) == ("refused", 2)
    assert refused["verdict"] == workspace.stage(2).verdict
    assert refused["workspace"] == str(workspace.root)
    status, _, err = peso("update", "-w", workspace.root, "--alert", f"{command} 0", "--set", "seed=5")
    assert status == 1
    (failed,) = told()[2:]
    assert failed["event"] == "failed"
    assert failed["message"] in err


def test_an_alert_that_fails_changes_nothing_else(
    unjudged: Workspace, outcome: Callable[[str], None], peso: Call, alert
) -> None:
    command, told = alert
    outcome("failed")
    status, _, err = peso("update", "-w", unjudged.root, "--alert", f"{command} 3")
    assert status == 0
    assert "warning: the alert command ended with status 3" in err
    assert len(told()) == 1


def test_an_alert_that_cannot_be_run_is_refused_before_anything_is_trained(
    workspace: Workspace, peso: Call
) -> None:
    for text in ("no-such-program --now", "", "mail 'unfinished"):
        status, _, err = peso("update", "-w", workspace.root, "--alert", text)
        assert status == 2
        assert "--alert" in err
    assert workspace.finished_stages == [0]

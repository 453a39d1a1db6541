"""Weights of old stages go; whatever rests on a stage goes on."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from every_file import EVERY_FILE

from peso.config import BackboneConfig, load_config
from peso.errors import DataError, WorkspaceError
from peso.runs import pipeline, preparation, reuse
from peso.runs import prune as pruning_of
from peso.runs.prune import prune, pruning
from peso.runs.recommender import Recommender
from peso.runs.served import previous, promote, rollback
from peso.runs.status import status
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

STRATEGIES = ("sum_lora", "retrain")


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than everything else here."""
    monkeypatch.setattr("peso.runs.report.report", lambda workspaces, directory: None)


def weights(workspace: Workspace, number: int) -> list[str]:
    folder = workspace.stage(number).directory
    return [str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")]


def pruned(workspace: Workspace, keep: int) -> list[int]:
    with workspace.lock():
        return prune(workspace, keep).stages


def test_old_weights_go_and_everything_that_was_measured_stays(workspace: Workspace) -> None:
    kept = {
        path: path.read_bytes()
        for path in workspace.root.rglob("*")
        if path.name in ("metrics.json", "predictions.parquet", "log.jsonl", "config.yaml")
    }
    assert weights(workspace, 1)
    wanted = pruning(workspace, 1)
    assert wanted.stages == [1]
    assert wanted.kept == {0: "the backbone was trained there"}
    assert wanted.bytes == sum(
        (workspace.stage(1).directory / n).stat().st_size for n in workspace.stage(1).weight_files
    )
    assert pruned(workspace, 1) == [1]
    assert weights(workspace, 1) == []
    assert {path: path.read_bytes() for path in kept} == kept
    assert pruned(workspace, 1) == []
    again = Workspace.open(workspace.root)
    assert [stage.number for stage in again.stages] == [0, 1, 2]
    for stage in again.stages:
        stage.require_as_determined()
        stage.require_answers()
        assert stage.is_tested
    assert [stage["pruned"] is not None for stage in status(again)["stages"]] == [False, True, False]
    Recommender(again).recommend(history=[], k=1)


def test_a_stage_without_weights_says_so(
    peso: Callable[..., tuple[int, str, str]], workspace: Workspace
) -> None:
    pruned(workspace, 1)
    for command in (
        ("recommend", "-w", workspace.root, "--history", "", "--stage", "1"),
        ("export", "-w", workspace.root, "--stage", "1", "-o", workspace.root.parent / "x"),
        ("promote", "-w", workspace.root, "--stage", "1"),
        ("evaluate", "-w", workspace.root, "--stage", "1", "--on", "0"),
    ):
        code, _, error = peso(*command)
        assert code == 1
        assert "the weights of stage 1" in error, command
        assert "were removed by `peso prune`" in error
    code, _, error = peso("undo", "-w", workspace.root, "--yes")
    assert code == 1
    assert "stage 2 of" in error
    assert "would be trained again, were removed by `peso prune`" in error
    assert workspace.finished_stages == [0, 1, 2]


def test_what_serves_and_what_a_rollback_leads_to_keep_their_weights(workspace: Workspace) -> None:
    promote(workspace, 1)
    assert pruning(workspace, 1).kept == {0: "the backbone was trained there", 1: "it serves"}
    promote(workspace, 2)
    assert pruning(workspace, 1).kept[1] == "it is the target of a rollback"
    assert pruned(workspace, 1) == []
    rollback(workspace)
    assert Recommender(workspace).stage == 1


def test_nothing_is_removed_if_a_stage_that_is_kept_cannot_be_used(workspace: Workspace) -> None:
    newest = workspace.stage(workspace.trained().number)
    path = next(newest.directory / name for name in newest.weight_files)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WorkspaceError, match=f"nothing was removed.*of stage {newest.number}.*is damaged"):
        pruned(workspace, 1)
    assert all(stage.pruned is None and weights(workspace, stage.number) for stage in workspace.stages)


def test_a_rollback_passes_over_what_was_pruned(workspace: Workspace) -> None:
    for number in (1, 0, 2):
        promote(workspace, number)
    assert previous(workspace) == 0
    assert pruned(workspace, 1) == [1]
    assert rollback(workspace).stage == 0
    assert previous(workspace) == 2, "which served before stage 1"


@pytest.mark.parametrize("keep", [0, -3])
def test_the_newest_stage_keeps_its_weights(workspace: Workspace, keep: int) -> None:
    with pytest.raises(DataError, match=f"keep = {keep}, but the newest stage is needed"):
        pruning(workspace, keep)
    assert pruned(workspace, 7) == []


@pytest.mark.parametrize("moment", ["before the manifest", "after the manifest"])
def test_an_interrupted_call_can_be_repeated(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def killed(*given: object, **also: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if moment == "before the manifest":
            patch.setattr(pruning_of, "take_out", killed)
        else:
            patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            pruned(workspace, 1)
    Recommender(workspace).recommend(history=[], k=1)
    assert pruned(workspace, 1) == [1]
    assert weights(workspace, 1) == []
    recorded = workspace.stage(1).pruned
    assert recorded is not None
    assert "vocabulary.safetensors" in recorded["files"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_updates_after_pruning_are_those_without(tmp_path: Path, strategy: str) -> None:
    """What a strategy needs of earlier stages is stored with the newest."""
    tree = {**EVERY_FILE, "strategy": strategy, "baselines": [], "evaluation": {"enabled": False}}
    tree["data"] = {"format": "simulate", "simulate": {"users": 60, "items": 40, "stages": 4}}
    whole = Workspace.create_or_open(tmp_path / "whole", load_config(tree))
    with whole.lock():
        preparation.ingest(whole, Silent())
        preparation.tokenize(whole, Silent())
        for number in range(3):
            pipeline.learn(whole.stage(number), Silent())
    less = Workspace.open(shutil.copytree(whole.root, tmp_path / "less"))
    assert pruned(less, 1) == [1]
    for workspace in (whole, less):
        with workspace.lock():
            assert pipeline.update(workspace, Silent()) == 3
    made, expected = less.stage(3), whole.stage(3)
    assert made.weight_files
    assert [made.manifest["files"][name] for name in made.weight_files] == [
        expected.manifest["files"][name] for name in expected.weight_files
    ]
    assert Recommender(less).recommend(history=[], k=5) == Recommender(whole).recommend(history=[], k=5)


def test_a_base_without_weights_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    base = Workspace.open(shutil.copytree(workspace.root, tmp_path / "base"))
    pruned(base, 1)
    other = Workspace.create_or_open(tmp_path / "other", base.config)
    with other.lock():
        reuse.take_data(other, base, Silent())
        reuse.take_base(other, base, Silent())
    assert other.finished_stages == [0], "stage 1 cannot be taken over, nor what comes after it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackboneConfig, "trained_at_base", False)  # as with a backbone from elsewhere
        pruned(base, 1)
    third = Workspace.create_or_open(tmp_path / "third", base.config)
    with third.lock():
        reuse.take_data(third, base, Silent())
        with pytest.raises(
            WorkspaceError, match=r"the weights of stage 0 of .* were removed by `peso prune`"
        ):
            reuse.take_base(third, base, Silent())


def test_an_update_goes_on_where_old_tests_no_longer_fit(
    peso: Callable[..., tuple[int, str, str]], workspace: Workspace
) -> None:
    """Other beams make every test stale; those of pruned stages stay as they are."""
    pruned(workspace, 1)
    code, _, error = peso("evaluate", "-w", workspace.root, "--set", "decoding.beams=12")
    assert code == 0, error
    opened = Workspace.open(workspace.root)
    assert not opened.stage(1).is_tested
    assert opened.stage(2).is_tested
    with opened.lock():
        assert pipeline.update(opened, Silent()) == 2, "finishes what is not reported yet"
        opened.report_directory.mkdir()
        (opened.report_directory / "index.html").write_text("as of now")
        assert pipeline.update(opened, Silent()) is None
    assert [str(step) for step in pipeline.missing_steps(opened, 3)] == ["test stage 0"]


def test_the_command_asks_and_says_what_stays(
    peso: Callable[..., tuple[int, str, str]], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("typer.confirm", lambda text, **also: asked.append(text))
    code, out, _ = peso("prune", "-w", workspace.root, "--keep", "1")
    assert code == 0
    assert "remove the weights of stages [1] (" in asked[0]
    assert "nothing was removed" in out
    assert weights(workspace, 1)
    code, out, _ = peso("prune", "-w", workspace.root, "--keep", "1", "--yes")
    assert "removed the weights of stages [1]" in out
    assert "stage 0 keeps its weights: the backbone was trained there" in out
    code, out, _ = peso("prune", "-w", workspace.root, "--keep", "1", "--yes")
    assert "no older stage has weights to remove" in out
    code, out, _ = peso("status", "-w", workspace.root)
    assert "no weights (pruned)" in out


@pytest.mark.parametrize(
    ("command", "nothing"),
    [
        (("prune", "--keep", "1"), "nothing was removed"),
        (("undo",), "nothing was removed"),
        (("forget", "--user"), "nothing was erased"),
    ],
)
def test_without_an_answer_to_its_question_a_command_changes_nothing(
    workspace: Workspace,
    peso: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    nothing: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())  # as with </dev/null
    users = workspace.stream.stage(0).users
    before = {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}
    asked = (*command, *users[:1]) if command[-1] == "--user" else command
    status, _, err = peso(*asked, "-w", workspace.root)
    assert status == 2
    assert f"no answer: {nothing}; use --yes" in err
    assert {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()} == before

"""The workspace: whole or absent, one writer, nothing changed behind a finished step's back."""

from __future__ import annotations

import errno
import json
import multiprocessing
import pickle
import resource
import signal
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from peso.config import load_config
from peso.errors import WorkspaceError
from peso.items.names import ItemNames
from peso.items.semantic_ids import SemanticIds, write_semantic_ids
from peso.runs.stage import FORMAT
from peso.runs.workspace import Workspace
from peso.runtime.files import commit_directory, write_aside, write_atomically
from peso.runtime.manifest import write_manifest
from peso.runtime.provenance import provenance

SIMULATED = {"data": "simulate", "backbone": "tiny"}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace.create_or_open(tmp_path / "w", load_config(SIMULATED))


def finish_stage(workspace: Workspace, stage: int) -> None:
    for made in (workspace.stream_directory, workspace.semantic_ids_directory):
        if not made.is_dir():
            with commit_directory(made) as directory:
                write_manifest(directory, 1, {"stages": [{}]})
    with commit_directory(workspace.stage(stage).directory) as directory:
        configuration = Workspace.open(workspace.root).config.model_dump(mode="json")
        write_manifest(directory, FORMAT, {"stage": stage, "configuration": configuration})


def finish_stream(workspace: Workspace) -> None:
    with commit_directory(workspace.stream_directory) as directory:
        write_manifest(directory, 1, {"stages": [{}]})


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    def fail() -> None:
        with commit_directory(tmp_path / "d") as aside:
            (aside / "half").write_text("written")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with commit_directory(tmp_path / "d") as aside:
        (aside / "whole").write_text("written")
        assert not (tmp_path / "d").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "whole"]


def test_a_replaced_directory_keeps_its_old_content_when_the_new_one_fails(tmp_path):
    for content in ("old", None):
        try:
            with commit_directory(tmp_path / "d") as aside:
                (aside / "file").write_text(content)
        except TypeError:
            pass
    assert (tmp_path / "d" / "file").read_text() == "old"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_atomically(tmp_path / "f", b"old")

    def fail() -> None:
        with write_aside(tmp_path / "f") as aside:
            aside.write_bytes(b"ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, number):
    said = pytest.raises(WorkspaceError, match=r"no space left.*d.*continues where it stopped")
    with said, commit_directory(tmp_path / "d"):
        raise OSError(number, "full")
    assert list(tmp_path.iterdir()) == []


def _write_beyond_the_limit(directory, queue):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        with commit_directory(directory / "d") as aside:
            (aside / "large").write_bytes(bytes(100_000))
    except WorkspaceError as error:
        queue.put(str(error))


def test_a_write_that_the_system_refuses_midway_leaves_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_write_beyond_the_limit, args=(tmp_path, queue))
    process.start()
    message = queue.get(timeout=300)
    process.join()
    assert "no space left" in message
    assert list(tmp_path.iterdir()) == []


def _hold(workspace, held, release):
    with workspace.lock():
        held.set()
        release.wait(30)


def test_a_second_writer_is_refused_and_told_who_writes(workspace):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(workspace, held, release))
    process.start()
    assert held.wait(30)
    with pytest.raises(WorkspaceError, match=f"written by another process.*{process.pid}"), workspace.lock():
        pass
    release.set()
    process.join()
    with workspace.lock():  # free again
        pass


def test_keys_may_change_until_something_depends_on_them(workspace):
    root = workspace.root
    Workspace.create_or_open(root, load_config(SIMULATED, ["seed=3"]))  # nothing is done yet
    finish_stream(workspace)
    Workspace.create_or_open(root, load_config(SIMULATED, ["seed=3", "training.epochs=2"]))
    with pytest.raises(WorkspaceError, match=r"seed.*new workspace with -w"):
        Workspace.create_or_open(root, load_config(SIMULATED, ["seed=4"]))
    finish_stage(workspace, 0)
    Workspace.create_or_open(root, load_config(SIMULATED, ["seed=3", "training.epochs=2", "strategy=single"]))
    with pytest.raises(WorkspaceError, match=r"training\.epochs"):
        Workspace.create_or_open(root, load_config(SIMULATED, ["seed=3", "training.epochs=9"]))
    finish_stage(workspace, 1)
    kept = ["seed=3", "training.epochs=2"]
    with pytest.raises(WorkspaceError, match=r"strategy\.name"):
        Workspace.create_or_open(root, load_config(SIMULATED, [*kept, "strategy=none"]))


def test_evaluation_decoding_and_report_keys_may_always_change(workspace):
    finish_stream(workspace)
    finish_stage(workspace, 0)
    finish_stage(workspace, 1)
    changes = ["decoding.beams=20", "evaluation.k=[1,20]", "report.title=x"]
    changed = Workspace.create_or_open(workspace.root, load_config(SIMULATED, changes))
    assert Workspace.open(workspace.root).config == changed.config


def test_a_refused_change_changes_nothing(workspace):
    finish_stream(workspace)
    before = (workspace.root / "config.yaml").read_bytes()
    with pytest.raises(WorkspaceError):
        Workspace.create_or_open(workspace.root, load_config(SIMULATED, ["seed=5"]))
    assert (workspace.root / "config.yaml").read_bytes() == before


def test_a_workspace_of_a_newer_version_is_refused(workspace):
    finish_stage(workspace, 0)
    manifest = workspace.stage(0).directory / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": FORMAT + 1}))
    with pytest.raises(WorkspaceError, match=r"newer version.*update peso"):
        Workspace.open(workspace.root)


def test_a_damaged_manifest_is_named(workspace):
    finish_stage(workspace, 0)
    (workspace.stage(0).directory / "manifest.json").write_text('{"format": 1, "fi')
    with pytest.raises(WorkspaceError, match=r"manifest\.json is damaged"):
        Workspace.open(workspace.root)


def test_a_directory_that_is_no_workspace_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(WorkspaceError, match="not a workspace"):
        Workspace.create_or_open(tmp_path, load_config(SIMULATED))
    with pytest.raises(WorkspaceError, match=r"no config\.yaml"):
        Workspace.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_the_main_process_can_send_a_workspace_to_the_others_of_a_run(workspace):
    assert workspace.names == ItemNames()  # what it has read goes along
    sent = pickle.loads(pickle.dumps(workspace))
    assert sent.root == workspace.root
    assert sent.config == workspace.config
    assert sent.names == workspace.names


def test_the_newest_stage_is_the_default_and_an_unknown_one_is_named(workspace):
    with pytest.raises(WorkspaceError, match="no trained stage"):
        workspace.trained()
    finish_stage(workspace, 0)
    finish_stage(workspace, 1)
    assert workspace.trained().number == 1
    with pytest.raises(WorkspaceError, match=r"stage 7.*\[0, 1\]"):
        workspace.trained(7)


def test_a_source_tree_that_is_not_installed_can_still_say_with_what_it_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(package: str) -> str:
        if package == "peso":
            raise PackageNotFoundError(package)
        return "1.2"

    monkeypatch.setattr("peso.runtime.provenance.version", missing)
    found = provenance()
    assert found["versions"]["peso"] is None
    assert found["versions"]["torch"] == "1.2"
    assert "accelerator" in found["hardware"]


# -- what a workspace hands out -------------------------------------------------------------------


def index(workspace: Workspace, *codes: int) -> None:
    ids = SemanticIds([f"i{n}" for n in range(len(codes))], np.array(codes, dtype=np.int32)[:, None], (8,))
    with commit_directory(workspace.semantic_ids_directory) as directory:
        write_semantic_ids(ids, directory)


def test_semantic_ids_are_read_once_and_again_when_they_change(workspace):
    finish_stream(workspace)
    index(workspace, 1, 2)
    first = workspace.semantic_ids
    assert workspace.semantic_ids is first
    assert workspace.with_config(workspace.config).semantic_ids is first
    index(workspace, 1, 2, 3)
    assert workspace.semantic_ids.codes.tolist() == [[1], [2], [3]]


def test_semantic_ids_that_changed_behind_their_manifest_are_refused(workspace):
    finish_stream(workspace)
    index(workspace, 1, 2)
    file = workspace.semantic_ids_directory / "index.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(WorkspaceError, match=r"index\.parquet is damaged"):
        _ = workspace.semantic_ids


def test_what_is_missing_is_named_with_the_command_that_makes_it(workspace):
    for part in ("stream", "semantic_ids", "semantic_ids_manifest"):
        with pytest.raises(WorkspaceError, match="no stream yet; run `peso ingest"):
            getattr(workspace, part)
    finish_stream(workspace)
    with pytest.raises(WorkspaceError, match="no semantic IDs yet; run `peso tokenize"):
        _ = workspace.semantic_ids


def test_a_stage_tells_of_its_training_and_checks_every_file_that_it_reads(workspace):
    finish_stage(workspace, 0)
    stage = workspace.stage(0)
    assert (stage.metrics, stage.training, stage.log, stage.is_tested) == ({}, {}, [], False)
    manifest = stage.manifest
    (stage.directory / "metrics.json").write_text('{"training": {"seconds": 3.0}}')
    (stage.directory / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    write_manifest(stage.directory, FORMAT, manifest)
    assert (stage.training["seconds"], [record["step"] for record in stage.log]) == (3.0, [1, 2])
    assert stage.config == workspace.config
    (stage.directory / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(WorkspaceError, match=r"log\.jsonl is damaged"):
        _ = stage.log
    assert not workspace.stage(1).is_trained

"""What is written to a workspace and beside it: by one process, never by a refused command, never over
something else."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from every_file import EVERY_FILE

from peso.config import load_config
from peso.errors import ExportError, WorkspaceError
from peso.runs.place import require_place
from peso.runs.recommender import Recommender
from peso.runs.workspace import Workspace
from peso.runtime.files import commit_directory, only_writer, write_aside

TREE = EVERY_FILE


# -- one writer, and only when it is not refused -----------------------------------------------------


@contextmanager
def held_elsewhere(directory: Path) -> Iterator[None]:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with only_writer(directory):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    try:
        yield
    finally:
        release.set()
        thread.join()


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


REFUSED = [
    "evaluate --set evaluation.k=[1] --stage 7",
    "evaluate --set evaluation.k=[1] --on 7",
    "baseline easy --set evaluation.k=[1]",
    "tokenize --set report.title=x",
    "train --set report.title=x",
    "ingest --set report.title=x",
    "ingest --append --set report.title=x",
]
LOCKED = ["run CONFIG --set evaluation.k=[1]", "update --set report.title=x", "baseline popularity", *REFUSED]


@pytest.mark.parametrize("command", LOCKED)
def test_a_locked_workspace_is_left_alone(
    peso: Callable[..., tuple[int, str, str]], root: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "CONFIG").write_text(yaml.safe_dump(TREE))
    with held_elsewhere(root):
        before = everything(root)
        status, _, error = peso(*command.replace("CONFIG", str(tmp_path / "CONFIG")).split(), "-w", root)
        assert status == 1
        assert "easy" in command or "another process" in error
        assert everything(root) == before


@pytest.mark.parametrize("lock", [None, "77"])
@pytest.mark.parametrize("command", REFUSED)
def test_a_refused_command_has_written_nothing(
    peso: Callable[..., tuple[int, str, str]], root: Path, command: str, lock: str | None
) -> None:
    if lock is not None:  # as earlier versions left it
        (root / ".lock").write_text(lock)
    before = everything(root)
    assert peso(*command.split(), "-w", root)[0] in (1, 2)
    assert everything(root) == before  # the lock file, too


@pytest.mark.parametrize("part", ["stream", "semantic_ids"])
def test_a_part_that_stages_were_trained_on_is_missed(
    peso: Callable[..., tuple[int, str, str]], root: Path, part: str
) -> None:
    shutil.rmtree(root / part)
    before = everything(root)
    for command in ("report", "update", "undo --yes", "tokenize", "ingest", "recommend --user u1"):
        status, _, error = peso(*command.split(), "-w", root)
        assert status == 1
        assert f"{root / part} is missing, on which stages [0, 1, 2] were trained" in error
    assert everything(root) == before


def test_who_holds_a_workspace_is_said(root: Path) -> None:
    import os

    with held_elsewhere(root), pytest.raises(WorkspaceError, match=rf"another process \(pid {os.getpid()}\)"):
        Workspace.create_or_open(root, load_config(TREE))


def test_a_mistaken_first_call_leaves_nothing(
    peso: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "log.csv").write_text("nothing,of,use\n1,2,3\n")
    for command in (["ingest", tmp_path / "log.csv"], ["ingest", tmp_path / "nowhere.csv"]):
        assert peso(*command, "-w", tmp_path / "new" / "w")[0] == 1
        assert not (tmp_path / "new" / "w").exists()
    (tmp_path / "empty").mkdir()
    assert peso("ingest", tmp_path / "log.csv", "-w", tmp_path / "empty")[0] == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_lock_that_is_a_directory_is_named(root: Path) -> None:
    (root / ".lock").mkdir()
    with pytest.raises(WorkspaceError, match=r"\.lock cannot be written"), Workspace.change(root):
        pass


# -- writing aside -----------------------------------------------------------------------------------


def test_two_that_write_one_place_do_not_meet(tmp_path: Path) -> None:
    with commit_directory(tmp_path / "d") as one, commit_directory(tmp_path / "d") as two:
        (one / "file").write_text("one")
        (two / "file").write_text("two")
    assert (tmp_path / "d" / "file").read_text() == "one"  # the last to finish
    with write_aside(tmp_path / "f") as one, write_aside(tmp_path / "f") as two:
        one.write_text("one")
        two.write_text("two")
    assert {path.name for path in tmp_path.iterdir()} == {"d", "f"}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(tmp_path / "d",))
    process.start()
    process.join()
    assert len(list(tmp_path.iterdir())) == 1
    with commit_directory(tmp_path / "d"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def _die_writing(target: Path) -> None:
    import os

    with commit_directory(target):
        os._exit(0)


@pytest.mark.parametrize("place", ["/proc/x.parquet", "folder", "x" * 300, "file/below", "/dev/null"])
def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder" / "full").mkdir(parents=True)
    (tmp_path / "file").touch()
    for write in (write_aside, *([commit_directory] if place != "folder" else [])):
        worked = False
        with pytest.raises(WorkspaceError, match="cannot be written"), write(tmp_path / place):
            worked = True
        assert not worked
    assert Path("/dev/null").is_char_device()
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("write", [write_aside, commit_directory, only_writer])
def test_a_read_only_file_system_is_said(
    tmp_path: Path, monkeypatch, write: Callable[[Path], object]
) -> None:

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(WorkspaceError, match="cannot be written: Read-only file system"),
        write(tmp_path / "x"),
    ):
        pass


# -- output ------------------------------------------------------------------------------------------


def test_recommendations_for_everybody_in_the_format_that_the_ending_names(
    root: Path, tmp_path: Path
) -> None:
    recommender = Recommender.load(root)
    users = [
        recommender.recommend_all(tmp_path / f"r.{ending}", k=3) for ending in ("parquet", "csv", "JSONL")
    ]
    assert len(set(users)) == 1
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [json.loads(line) for line in (tmp_path / "r.JSONL").read_text().splitlines()] == rows
    with (tmp_path / "r.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    flat = [(r["user"], str(n), item) for r in rows for n, item in enumerate(r["items"], 1)]
    assert [(row["user"], row["rank"], row["item"]) for row in table] == flat
    assert [float(row["score"]) for row in table] == [score for r in rows for score in r["scores"]]
    assert recommender.recommend_all(tmp_path / "r.csv", k=3, force=True) == users[0]


@pytest.mark.parametrize("name", ["r", "r.txt", "r.parquet.gz", "there.csv"])
def test_other_endings_and_files_that_are_there_are_refused(
    peso: Callable[..., tuple[int, str, str]], root: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "there.csv").write_text("precious")
    status, _, error = peso("recommend", "--all", "-o", tmp_path / name, "-w", root)
    assert status == 1
    assert ("--force" if name == "there.csv" else ".parquet, .csv or .jsonl") in error
    assert {path.name for path in tmp_path.iterdir()} == {"there.csv", "w"}
    assert (tmp_path / "there.csv").read_text() == "precious"


@pytest.mark.parametrize(
    "command",
    [
        "recommend --all --force -o {w}/stages/1/x.csv",
        "recommend --all --force -o {w}/report/x.csv",
        "recommend --all --force -o {w}/stages/../stages/1/predictions.parquet",
        "recommend --all --force -o {link}/predictions.parquet",
        "export -o {w}/stages/7",
        "export -o {w}/report",
        "export --format index -o {w}/semantic_ids/index.json",
        "report -o {w}/stages/7",
        "report -o {w}/baselines/x",
        "report -o {w}",
        "diagnose --directions 2 --plot {w}/stages/1/x.svg",
    ],
)
def test_output_never_goes_into_a_workspace(
    peso: Callable[..., tuple[int, str, str]], root: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "link").symlink_to(root / "stages" / "1")
    before = everything(root)
    status, _, error = peso(*command.format(w=root, link=tmp_path / "link").split(), "-w", root)
    assert status == 1
    assert "workspace" in error or "not part of a report" in error
    assert everything(root) == before


def test_a_file_called_config_yaml_makes_no_workspace(root: Path, tmp_path: Path) -> None:
    """A report may lie beside it, and replace the one of before."""
    (tmp_path / "config.yaml").write_text("data: {format: simulate}\n")
    require_place(tmp_path / "report")
    (tmp_path / "report").mkdir()
    require_place(tmp_path / "report")
    with pytest.raises(ExportError, match="belongs to the workspace"):
        require_place(root / "report")

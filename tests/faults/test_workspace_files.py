"""Files of a workspace are checked when they are read."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from every_file import EVERY_FILE

from peso.config import load_config
from peso.errors import PesoError, TrainingError, WorkspaceError
from peso.runs import evaluate, pipeline, report, reuse
from peso.runs.baselines import baseline_summaries, found_baselines
from peso.runs.recommender import Recommender
from peso.runs.stage import FORMAT
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum
from peso.runtime.manifest import KINDS, NULL, Manifest, intact, read_manifest, replace_file, write_manifest
from peso.runtime.progress import Silent
from peso.training.checkpoint import Checkpoint, TrainingLog

TREE = EVERY_FILE


def flip(path: Path, place: float = 0.5, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def serve(root: Path) -> object:
    return Recommender.load(root).recommend(history=["i1", "i2"], k=5)


def results(root: Path) -> object:
    workspace = Workspace.open(root)
    return report.run_table(report.runs_of([workspace]), workspace.config.evaluation.k)


# -- what is read is what was written ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "use"),
    [
        ("stages/0/backbone/model.safetensors", serve),
        ("stages/0/backbone/config.json", serve),
        ("stages/2/adapter/adapter_model.safetensors", serve),
        ("stages/2/adapter/adapter_config.json", serve),
        ("stages/2/vocabulary.safetensors", serve),
        ("stages/2/state.safetensors", serve),
        ("semantic_ids/index.parquet", serve),
        ("semantic_ids/manifest.json", serve),
        ("stages/1/manifest.json", serve),
        ("stages/1/predictions.parquet", results),
        ("stages/1/metrics.json", results),
        ("stages/1/log.jsonl", results),
        ("stages/1/on=2/predictions.parquet", results),
        ("stages/1/on=2/metrics.json", results),
        ("stages/2/gate.json", results),
        ("stream/stage=1/users.parquet", results),
        ("stream/manifest.json", results),
        ("baselines/popularity/1/predictions.parquet", results),
        ("baselines/popularity/1/static.parquet", results),
        ("baselines/popularity/1/manifest.json", results),
    ],
)
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_file_that_changed_is_named(root: Path, file: str, use: Callable[[Path], object], how: str) -> None:
    path = root / file
    if how == "flipped":
        flip(path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(PesoError, match=Path(file).name) as raised:
        use(root)
    assert str(path.parent) in str(raised.value)
    assert not str(raised.value).rstrip().endswith(";")  # a cure follows


def test_a_test_writes_no_checksum_of_a_file_that_it_did_not_write(root: Path) -> None:
    adapter = root / "stages/1/adapter/adapter_model.safetensors"
    flip(adapter)
    before = json.loads((root / "stages/1/manifest.json").read_text())["files"]
    with Workspace.change(root, ["evaluation.k=[1,3]"]) as workspace:
        evaluate.test(workspace.stage(1).on(1), Silent())  # from the stored answers
    after = json.loads((root / "stages/1/manifest.json").read_text())["files"]
    assert {name for name in after if after[name] != before.get(name)} == {"metrics.json"}
    with pytest.raises(WorkspaceError, match=r"adapter_model\.safetensors is damaged"):
        Recommender.load(root, stage=1)


def test_damaged_answers_are_not_measured_again(root: Path) -> None:
    flip(root / "stages/1/predictions.parquet")
    with (
        pytest.raises(WorkspaceError, match=r"predictions\.parquet is damaged.*peso evaluate .*--stage 1"),
        Workspace.change(root, ["evaluation.k=[1,3]"]) as workspace,
    ):
        evaluate.test(workspace.stage(1).on(1), Silent())


@pytest.mark.parametrize("file", ["predictions.parquet", "on=2/predictions.parquet", "on=2/metrics.json"])
def test_answers_that_are_missing_are_made_again(root: Path, file: str) -> None:
    path = root / "stages/1" / file
    before = checksum(path)
    path.unlink()
    workspace = Workspace.open(root)
    evaluate.test(workspace.stage(1).on(2 if "on=" in file else 1), Silent())
    assert checksum(path) == before


def test_a_stage_copied_over_another_is_noticed(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "stages/2")
    shutil.copytree(root / "stages/1", root / "stages/2")
    with pytest.raises(WorkspaceError, match=r"stages/2 contains stage 1, not stage 2"):
        Workspace.open(root)


def test_a_stage_of_another_run_is_noticed(root: Path) -> None:
    path = root / "stages/1"
    manifest = dict(read_manifest(path, FORMAT))
    write_manifest(path, FORMAT, {**manifest, "determined_by": "other"}, manifest["files"])
    with pytest.raises(WorkspaceError, match=r"stages/2 was not trained from .*stages/1"):
        Workspace.open(root)


def test_a_baselines_stage_copied_over_another_is_noticed(root: Path) -> None:
    shutil.rmtree(root / "baselines/popularity/2")
    shutil.copytree(root / "baselines/popularity/1", root / "baselines/popularity/2")
    workspace = Workspace.open(root)
    with pytest.raises(WorkspaceError, match=r"popularity/2 contains stage 1 of popularity, not stage 2"):
        baseline_summaries(workspace, found_baselines(workspace))


@pytest.mark.parametrize("directory", ["stages/1", "baselines/popularity/1", "baselines/popularity/0"])
def test_a_stage_that_is_gone_is_not_left_out_of_a_report(root: Path, directory: str) -> None:
    shutil.rmtree(root / directory)
    with pytest.raises(WorkspaceError, match=rf"{directory}.*is missing"):
        results(root)


def test_a_file_that_no_manifest_lists_is_not_loaded(root: Path) -> None:
    shutil.copytree(root / "stages/0/backbone", root / "stages/2/backbone")
    with pytest.raises(WorkspaceError, match=r"does not belong there"):
        serve(root)


def test_a_baselines_model_is_checked(root: Path) -> None:
    (model,) = (root / "baselines").glob("two-tower*/1/model/*.safetensors")
    flip(model)
    workspace = Workspace.open(root)
    shutil.rmtree(model.parents[2] / "2")
    with workspace.lock(), pytest.raises(WorkspaceError, match=rf"{model.name} is damaged"):
        pipeline._conclude(workspace, Silent())


def test_taking_over_a_damaged_stage_is_refused(root: Path, tmp_path: Path) -> None:
    flip(root / "stages/1/vocabulary.safetensors")
    other = Workspace.create_or_open(tmp_path / "other", load_config(TREE))
    base = Workspace.open(root)
    reuse.take_data(other, base, Silent())
    with pytest.raises(WorkspaceError, match=r"stages/1/vocabulary\.safetensors is damaged"):
        reuse.take_base(other, base, Silent())
    assert other.finished_stages == [0]


def test_damaged_weights_do_not_change_what_a_report_says(root: Path) -> None:
    workspace = Workspace.open(root)
    before = report.stage_cost(workspace.stage(2))
    (root / "stages/2/vocabulary.safetensors").write_bytes(b"")
    assert report.stage_cost(workspace.stage(2)) == before
    (root / "stages/2/vocabulary.safetensors").unlink()
    assert report.stage_cost(workspace.stage(2)).bytes_on_disk is None


def test_a_checkpoint_is_checked(tmp_path: Path) -> None:
    import torch

    checkpoint = Checkpoint(tmp_path, "digest")
    checkpoint.save(tensors={"a": torch.arange(1000)})
    flip(checkpoint.path)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt cannot be read.*sha256"):
        checkpoint.load()
    torch.save({"digest": "digest", "step": 3}, checkpoint.path)  # as older versions wrote it
    assert checkpoint.load() == {"step": 3}


def test_the_log_of_a_training_that_goes_on_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with TrainingLog(path, keep=0) as log:
        log.write(step=1, loss=1.25)
        kept, sha256 = log.sync(), log.sha256
        log.write(step=2, loss=1.0)
    TrainingLog(path, kept, sha256)
    flip(path)
    with pytest.raises(TrainingError, match=r"log\.jsonl is damaged"):
        TrainingLog(path, kept, sha256)


# -- manifests ---------------------------------------------------------------------------------------


def test_a_manifest_is_checked_by_its_content_and_not_by_its_spaces(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(tmp_path, 1, {"title": 'of "ä", {1}', "value": float("nan"), "stages": [{"users": 3}]})
    text, written = path.read_text(), read_manifest(tmp_path, 1)
    path.write_text(json.dumps(written))
    assert read_manifest(tmp_path, 1) == written
    further = text.replace(',\n  "sha256"', ',\n  "sizes": [1],\n  "sha256"')
    after = text.replace('"\n}\n', '",\n  "sizes": [1]\n}\n')
    assert len({text, further, after}) == 3
    for changed in (text.replace(": 3", ": 4"), json.dumps({**written, "title": "of b"}), further, after):
        path.write_text(changed)
        with pytest.raises(WorkspaceError, match="does not match its own sha256"):
            read_manifest(tmp_path, 1)


def test_manifests_of_the_version_before_are_read(root: Path) -> None:
    expected = serve(root), results(root)
    for path in root.rglob("manifest.json"):
        content = json.loads(path.read_text())
        del content["sha256"]
        path.write_text(json.dumps(content, indent=2))
    for path in root.rglob("metrics.json"):
        content = json.loads(path.read_text())
        if isinstance(content.get("test"), dict) and content["test"].pop("predictions", None):
            path.write_text(json.dumps(content))
    for directory in [*root.glob("stages/[0-9]"), *root.glob("baselines/*/[0-9]")]:
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["files"] = {name: checksum(directory / name) for name in manifest["files"]}
        (directory / "manifest.json").write_text(json.dumps(manifest))
    assert (serve(root), results(root)) == expected


@pytest.mark.parametrize("key", ["determined_by", "backbone_sha256", "trained_parameters", "files", "format"])
def test_a_key_that_a_manifest_lacks_is_named(root: Path, key: str) -> None:
    path = root / "stages/1/manifest.json"
    content = json.loads(path.read_text())
    del content[key], content["sha256"]  # as if an older version had written it so
    path.write_text(json.dumps(content))
    with pytest.raises(PesoError):
        serve(root), results(root), Recommender.load(root, stage=1).recommend(history=["i1"])


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b"{", b'{"format": 1, "format": 1, "files": {}}']
)
def test_a_manifest_that_cannot_be_read_is_named(root: Path, content: bytes) -> None:
    (root / "stages/1/manifest.json").write_bytes(content)
    with pytest.raises(WorkspaceError, match=r"stages/1/manifest\.json is damaged"):
        Workspace.open(root)


@pytest.mark.parametrize("directory", ["stream", "semantic_ids", "stages/1", "baselines/popularity/1"])
def test_a_value_of_another_kind_in_a_manifest_is_named(root: Path, directory: str) -> None:
    """Of an older version's manifest, which has no sha256 of its own content."""
    path = root / directory / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    looked = 0
    for kind, keys in KINDS.items():
        for key in set(keys) & content.keys():
            for value in ([], None, "x" if kind is not str else 7, True):
                if value is None and key in NULL:
                    continue
                path.write_text(json.dumps({**content, key: value}))
                with pytest.raises(WorkspaceError, match=rf"is damaged \({key} has an invalid value"):
                    read_manifest(path.parent, FORMAT)
                looked += 1
    assert looked > 10
    for value in ([], None, 7):
        path.write_text(json.dumps({**content, "source": value}))
        with pytest.raises(WorkspaceError, match=r"manifest\.json is damaged \(source has an invalid"):
            read_manifest(path.parent, FORMAT)
    path.write_text(json.dumps(content))
    read_manifest(path.parent, FORMAT)


def test_a_configuration_that_is_gone_can_be_restored(root: Path) -> None:
    (root / "config.yaml").unlink()
    with pytest.raises(WorkspaceError, match=r"config\.yaml is missing; restore it: the manifest of each"):
        Workspace.open(root)
    stage = json.loads((root / "stages" / "1" / "manifest.json").read_text())
    (root / "config.yaml").write_text(yaml.safe_dump(stage["configuration"]))
    assert Workspace.open(root).finished_stages


@pytest.mark.parametrize("name", ["manifest.json", "metrics.json"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nobody is to remove a stage for want of a permission, or for a network disk that is away."""
    path, opened = root / "stages" / "1" / name, Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WorkspaceError, match=rf"{name}: permission denied; check the owner") as error:
        intact(path.parent, "metrics.json", read_manifest(path.parent, FORMAT))
    assert "remove" not in str(error.value)


def test_a_manifest_names_the_key_that_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"manifest\.json is damaged \(no 'items'\)"):
        Manifest(tmp_path, {})["items"]


@pytest.mark.parametrize("step", ["before the file", "after the file"])
def test_killed_while_a_file_is_replaced_nothing_disagrees(tmp_path: Path, monkeypatch, step: str) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "file").write_text("old")
    write_manifest(tmp_path, 1, {})
    original, calls = Path.replace, []

    def killed(self: Path, target: Path) -> Path:  # the manifest, the file, the manifest again
        calls.append(target)
        if len(calls) == (2 if step == "before the file" else 3):
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt), replace_file(tmp_path, "file", 1) as aside:
        aside.write_text("new")
    monkeypatch.undo()
    from peso.runtime.manifest import intact

    there = intact(tmp_path, "file", read_manifest(tmp_path, 1)).read_text()
    assert there == ("old" if step == "before the file" else "new")
    with replace_file(tmp_path, "file", 1) as aside:
        aside.write_text("newest")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"] == {name: checksum(tmp_path / name) for name in ("file", "kept")}
    assert "replacing" not in manifest


@pytest.mark.parametrize("name", ["²", "1 copy", "01", ".3.unfinished"])
def test_what_is_no_stage_is_left_alone(root: Path, name: str) -> None:
    (root / "stages" / name).mkdir()
    assert Workspace.open(root).finished_stages == [0, 1, 2]

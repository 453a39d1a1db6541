"""Models at work: precision, threads, users for whom little is left to recommend."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from event_logs import write_log
from strategy_runs import Runs
from transformers import AutoModelForCausalLM

from peso.config import load_config
from peso.errors import BackboneError, PesoError
from peso.runs import evaluate, pipeline, report
from peso.runs.models import backbone_fingerprint, starting_model
from peso.runs.stage import FORMAT
from peso.runs.workspace import Workspace
from peso.runtime.device import Precision
from peso.runtime.machine import threads
from peso.runtime.manifest import write_manifest
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

ROUNDED = "training.precision=bfloat16"


def copy(workspace: Workspace, root: Path) -> Workspace:
    return Workspace.open(shutil.copytree(workspace.root, root))


def edit_manifest(workspace: Workspace, stage: int, **values: Any) -> None:
    manifest = workspace.stage(stage).manifest
    write_manifest(workspace.stage(stage).directory, FORMAT, {**manifest, **values}, manifest["files"])


# -- the identity of a backbone is that of its files --------------------------------------------------


@pytest.mark.parametrize("strategy", ["single", "full"])
def test_a_rounded_backbone_goes_through_every_stage(runs: Runs, strategy: str) -> None:
    workspace = runs(strategy, ROUNDED, backbone="tiny")
    assert workspace.finished_stages == [0, 1, 2, 3]
    later = workspace.stage(3).model()
    assert later.dtype == (torch.float32 if strategy == "full" else torch.bfloat16)
    assert torch.isfinite(later.vocabulary.input_rows).all()


def test_the_identity_does_not_depend_on_the_precision(runs: Runs) -> None:
    rounded, exact = (runs("none", *options) for options in ((ROUNDED,), ()))
    manifests = [run.stage(stage).manifest for run in (rounded, exact) for stage in (0, 1)]
    assert len({manifest["backbone_sha256"] for manifest in manifests}) == 1
    assert starting_model(rounded.stage(2)).dtype == torch.bfloat16


def test_a_stage_continues_on_a_device_of_another_precision(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``auto`` is float32 here and bfloat16 on a GPU: a stage of each, answered by the other."""
    workspace = copy(runs("none", backbone="tiny"), tmp_path / "w")
    for stage in (1, 2, 3):
        shutil.rmtree(workspace.stage(stage).directory)
    of = Precision.of
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(Precision, "of", lambda precision, device: of("bfloat16", device))
        pipeline.learn(workspace.stage(1), Silent())
        assert workspace.stage(1).answering_model().dtype == torch.bfloat16
    pipeline.learn(workspace.stage(2), Silent())
    for stage in workspace.stages[1:]:
        assert stage.answering_model().dtype == torch.float32


def test_workspaces_of_earlier_versions_open(runs: Runs, tmp_path: Path) -> None:
    """They noted the sha256 of the rounded weights where training was rounded."""
    workspace = copy(runs("none", ROUNDED), tmp_path / "w")
    model = workspace.stage(1).model()
    rounded = backbone_fingerprint(model, torch.bfloat16)
    assert rounded != backbone_fingerprint(model)
    edit_manifest(workspace, 1, backbone_sha256=rounded)
    assert workspace.stage(1).model().dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), 0.125])
def test_another_backbone_is_refused_in_either_precision(
    runs: Runs, tmp_path: Path, precision: str, value: float
) -> None:
    workspace = runs("none", *([ROUNDED] if precision == "bfloat16" else []))
    folder = Path(workspace.config.backbone.name)
    shutil.copytree(folder, tmp_path / "kept")
    causal_lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        causal_lm.get_input_embeddings().weight[3] = value
    try:
        causal_lm.save_pretrained(folder)
        with pytest.raises(BackboneError, match="is refused" if value != value else "other weights"):
            workspace.stage(1).model()
    finally:
        shutil.copytree(tmp_path / "kept", folder, dirs_exist_ok=True)


def test_damaged_weights_of_stage_0_are_refused_when_rounded(runs: Runs, tmp_path: Path) -> None:
    workspace = copy(runs("single", ROUNDED, backbone="tiny"), tmp_path / "w")
    folder = workspace.stage(0).directory / "backbone"
    causal_lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        causal_lm.get_input_embeddings().weight[3] = float("nan")
    causal_lm.save_pretrained(folder)
    for stage in (0, 1):
        with pytest.raises(PesoError):
            workspace.stage(stage).model()


# -- users who have had nearly everything --------------------------------------------------------------


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A log in which ``bot`` has had everything, ``fan`` all but two of twelve items, others three or four.
    The window is short, the beams are more than the catalogue has IDs."""
    folder = tmp_path_factory.mktemp("heavy")
    items = [f"i{k}" for k in range(12)]
    events = [("bot", item, 1_700_000_000 + 60 * n) for n, item in enumerate([*items, *items])]
    events += [("fan", item, 1_700_000_010 + 60 * n) for n, item in enumerate([*items[:10], *items[:10]])]
    events += [(f"u{n % 6}", items[n * 5 % 12], 1_700_000_020 + 60 * n) for n in range(24)]
    products = [(item, f"ware {n} of shelf {n % 3}") for n, item in enumerate(items)]
    table = {"path": str(write_log(folder / "p.csv", products, "item,title")), "columns": {"title": "title"}}
    log = str(write_log(folder / "log.csv", events))
    config = load_config(
        {
            "data": {"format": "csv", "path": log, "stages": 2, "items": table},
            "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 4},
            "backbone": {"name": "tiny", "layers": 1},
            "strategy": {"name": "peso", "examples": 8},
            "prompt": {"window": 4},
            "training": {"epochs": 1, "max_steps": 2},
            "decoding": {"beams": 20},
            "evaluation": {"k": [5]},
            "baselines": [
                "popularity",
                "item-knn",
                {"name": "hybrid", "candidates": 20, "two_tower": {"epochs": 1}},
            ],
        }
    )
    workspace = Workspace.create_or_open(folder / "w", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report", lambda workspaces, directory: None)
        pipeline.run(workspace)
    return workspace


def test_a_user_gets_as_many_items_as_are_left(heavy: Workspace, tmp_path: Path, peso: Any) -> None:
    status, out, err = peso(
        "recommend", "-w", heavy.root, "--all", "--exclude-seen", "-o", tmp_path / "r.parquet", "-k", "5"
    )
    assert status == 0, err
    assert "2 of 8 users got fewer than 5 items" in err
    assert "user 'bot' got the fewest, 0" in err
    lists = {row["user"]: row["items"] for row in pq.read_table(tmp_path / "r.parquet").to_pylist()}
    assert lists["bot"] == []
    assert set(lists["fan"]) == {"i10", "i11"}  # none of those before the window
    assert {len(items) for user, items in lists.items() if user.startswith("u")} == {5}
    for user, count in (("bot", 0), ("fan", 2)):
        status, out, err = peso(
            "recommend", "-w", heavy.root, "--user", user, "--exclude-seen", "-k", "5", "--json"
        )
        assert status == 0, err
        assert len(json.loads(out)["recommendations"]) == count
        assert f"{count} of 5 items: the history of user '{user}' contains all other items" in err
    status, _, err = peso("recommend", "-w", heavy.root, "--user", "bot", "-k", "13")
    assert status == 1
    assert "the 12 items of the catalog" in err


def test_every_model_answers_everybody_from_a_small_catalogue(heavy: Workspace) -> None:
    runs = report.runs_of([heavy])
    # the hybrid brings its two-tower model; item-knn as it is by default is shown with updates only
    updated = {run.name for run in runs if not run.name.endswith(" (static)")}
    assert len(updated) == 1 + 4
    static = {f"{name} (static)" for name in updated - {"w", "item-knn"}}
    assert {run.name for run in runs} == updated | static
    for run in runs:
        for found in run.stages.values():
            assert all(len(items) == 12 for items in found.predictions.items)
            assert found.predictions.depth == 20


# -- threads -------------------------------------------------------------------------------------------


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    begin = advance = end = lambda self, *arguments, **figures: None


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What PyTorch would take, and nobody having decided otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    for name in ("OMP_NUM_THREADS", "PESO_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("peso.runtime.machine._told", 0)
    yield
    assert torch.get_num_threads() == 3  # whatever happened, as before
    torch.set_num_threads(before)


SMALL, LARGE = torch.nn.Linear(10, 10), torch.nn.Linear(1000, 1000)


@pytest.mark.parametrize(
    ("network", "number", "environment", "expected"),
    [
        (SMALL, "auto", {}, 1),
        (LARGE, "auto", {}, 3),
        (SMALL, 2, {}, 2),
        (LARGE, 2, {"OMP_NUM_THREADS": "3"}, 2),
        (SMALL, "auto", {"OMP_NUM_THREADS": "3"}, 3),  # the user's choice
        (SMALL, "auto", {"OMP_NUM_THREADS": "3", "PESO_THREADS": "at most"}, 1),  # a share of `peso compare`
        (LARGE, "auto", {"OMP_NUM_THREADS": "3", "PESO_THREADS": "at most"}, 3),
    ],
)
def test_threads_go_by_the_size_of_the_model_unless_someone_decides(
    three_threads: None,
    monkeypatch: pytest.MonkeyPatch,
    network: torch.nn.Module,
    number: Any,
    environment: dict[str, str],
    expected: int,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = Told()
    for _ in range(2):
        with threads(network, number, told):
            assert torch.get_num_threads() == expected
    (note,) = told.notes  # once
    assert note.startswith(f"{expected} thread")


def test_a_number_holds_for_everything_within(three_threads: None) -> None:
    with threads(number=2), threads(SMALL):
        assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads(number=2), threads(LARGE):
        raise KeyError
    with threads(SMALL):
        assert torch.get_num_threads() == 1


def test_the_number_may_change_at_any_time_and_results_differ_by_rounding_alone(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    finished = runs("none", backbone="tiny")
    losses = []
    for number in ("auto", "2"):
        root = shutil.copytree(finished.root, tmp_path / number)
        for stage in (1, 2, 3):
            shutil.rmtree(root / "stages" / str(stage))
        config = load_config(root / "config.yaml", [f"training.threads={number}", "strategy=single"])
        workspace = Workspace.create_or_open(root, config)
        pipeline.learn(workspace.stage(1), Silent())
        metrics = workspace.stage(1).metrics
        losses.append(metrics["training"]["validation_losses"])
        assert ("threads" in (root / "config.yaml").read_text()) == (number != "auto")
        assert workspace.stage(1).determination() == workspace.stage(1).determined_by
        other = Workspace(root, load_config(root / "config.yaml", ["training.threads=7"]))
        assert other.stage(1).determination() == workspace.stage(1).determination()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_it_is_said_once_how_many_threads_it_takes(
    heavy: Workspace, tmp_path: Path, three_threads: None
) -> None:
    workspace = copy(heavy, tmp_path / "w")
    shutil.rmtree(workspace.stage(1).directory)
    told = Told()
    pipeline.learn(workspace.stage(1), told)
    evaluate.test(workspace.stage(1).on(1), told)
    (note,) = [note for note in told.notes if "thread" in note]
    assert re.fullmatch(r"1 thread \(the model has [\d,]+ parameters; training\.threads changes it\)", note)


def test_waiting_threads_sleep() -> None:
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"

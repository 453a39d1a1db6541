"""Learning rates of later stages that are ``auto``: for every strategy, also in an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_runs

from peso.config import load_config
from peso.config.shape import stage_shape
from peso.errors import ConfigError
from peso.runs.phases import training_of
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum
from peso.runtime.manifest import read_manifest
from peso.runtime.progress import Silent
from peso.training.strategies.retrain import Retrain
from peso.training.strategies.strategy import Strategy

pytestmark = pytest.mark.slow

TREE: dict[str, Any] = {
    "data": {"simulate": {"users": 60, "items": 40, "stages": 2}},
    "items": {"quantizer": "rq-kmeans", "levels": 2, "codes": 8},
    "backbone": {"name": "tiny", "layers": 1},
    "head": "items",
    "training": {
        "epochs": 1,
        "batch_size": 4,
        "max_steps": 16,
        "learning_rate": 1e-2,
        "later": {"learning_rate": "auto", "trials": {"scales": [0.01, 1.0]}},
    },
    "evaluation": {"enabled": False},
    "baselines": [],
}
FIXED = "training.later={learning_rate: %r}"


class Heard(Silent):
    """Notes what it is told; stops the run, as Ctrl-C does, at a step of a piece of work."""

    def __init__(self, title: str = "", step: int = 0) -> None:
        self.notes, self.titles = list[str](), list[str]()
        self.title, self.step = title, step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, title: str, total: int, unit: str) -> None:
        self.titles.append(title)

    def advance(self, done: int, **_: Any) -> None:
        if self.title and self.titles[-1].startswith(self.title) and done == self.step:
            raise KeyboardInterrupt


def run(root: Path, strategy: Any, *overrides: str, base: Path | None = None, **heard: Any) -> Workspace:
    workspace = Workspace.create_or_open(root, load_config({**TREE, "strategy": strategy}, overrides))
    return small_runs.run(workspace, base, **heard)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("base") / "w", "none").root


def training(workspace: Workspace) -> dict[str, Any]:
    return workspace.stage(1).training


def weights(workspace: Workspace) -> list[str]:
    return [checksum(path) for path in sorted(workspace.stage(1).directory.rglob("*.safetensors"))]


def test_a_stage_chooses_its_rate_and_says_so(base: Path, tmp_path: Path) -> None:
    heard = Heard()
    auto = run(tmp_path / "auto", "single", base=base, observer=heard)
    (choice,) = training(auto)["trials"]
    assert set(choice) == {"phase", "learning_rate", "rows", "trials"}
    assert choice["phase"] == ""
    assert {trial["learning_rate"] for trial in choice["trials"]} == {1e-4, 1e-2}
    best = min(choice["trials"], key=lambda trial: trial["loss"])
    assert training(auto)["learning_rate"] == choice["learning_rate"] == best["learning_rate"]
    (said,) = [note for note in heard.notes if "learning rate" in note]
    begins = f"stage 1: learning rate {best['learning_rate']:g}, the best of 2 in trials of up to "
    assert said.startswith(begins)
    assert said.endswith(" one was tried (training.later.trials.scales)")
    assert [title for title in heard.titles if "trial" in title] == [
        "stage 1: trial of learning rate 0.0001",
        "stage 1: trial of learning rate 0.01",
    ]
    manifest = read_manifest(auto.stage(1).directory, 1)
    assert manifest["chosen_by_trials"] == [{k: choice[k] for k in ("phase", "learning_rate", "rows")}]
    fixed = run(tmp_path / "fixed", "single", FIXED % best["learning_rate"], base=base)
    assert weights(auto) == weights(fixed)
    assert "trials" not in training(fixed)
    assert auto.stage(1).determined_by != fixed.stage(1).determined_by
    assert not auto.stage(1).unfinished.exists()


@pytest.mark.parametrize(
    ("strategy", "phases"),
    [
        ({"name": "peso", "strength": 1.0, "vocabulary": True, "examples": 8}, [""]),
        ("sum_lora", [""]),
        ("full", [""]),
        ("retrain", [""]),
        ("lsat", ["long-term", "short-term"]),
    ],
    ids=str,
)
def test_every_strategy_is_tried_from_its_own_start(
    base: Path, tmp_path: Path, strategy: Any, phases: list[str]
) -> None:
    auto = run(tmp_path / "auto", strategy, base=base)
    chosen = training(auto)["trials"]
    assert [choice["phase"] for choice in chosen] == phases
    if strategy in ("retrain", "lsat"):  # begin anew at stage 0's rate unless it is chosen
        return
    fixed = run(tmp_path / "fixed", strategy, FIXED % chosen[0]["learning_rate"], base=base)
    assert weights(auto) == weights(fixed)


@pytest.mark.parametrize(
    ("strategy", "title"),
    [
        ("single", "stage 1: trial of learning rate 0.01"),
        ("sum_lora", "learn stage 1"),
        ("lsat", "learn stage 1, short-term"),
    ],
    ids=str,
)
def test_an_interrupted_stage_ends_the_same(base: Path, tmp_path: Path, strategy: str, title: str) -> None:
    whole = run(tmp_path / "whole", strategy, base=base)
    stops = Heard(title, 15 if title.startswith("learn") else 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", strategy, base=base, observer=stops)
    parts = run(tmp_path / "parts", strategy, base=base)
    assert weights(parts) == weights(whole)
    for one, two in zip(training(parts)["trials"], training(whole)["trials"], strict=True):
        assert one["learning_rate"] == two["learning_rate"]
        assert [t["loss"] for t in one["trials"]] == [t["loss"] for t in two["trials"]]


def test_rows_may_be_tried_too(base: Path, tmp_path: Path) -> None:
    later = (
        "training.later={learning_rate: 0.001, rows_learning_rate_scale: auto, trials: {rows: [0.001, 9]}}"
    )
    auto = run(tmp_path / "w", "single", later, base=base)
    (choice,) = training(auto)["trials"]
    assert {(t["learning_rate"], t["rows"]) for t in choice["trials"]} == {(1e-3, 0.001), (1e-3, 9)}
    assert training(auto)["rows_learning_rate_scale"] == choice["rows"]


def test_candidates_are_the_numbers_that_one_would_write() -> None:
    training = {**TREE["training"], "learning_rate": 3e-3, "later": {"learning_rate": "auto"}}
    config = load_config({**TREE, "training": training})
    for phase, strategy in (("", Strategy()), ("", Retrain())):
        settings, rates = training_of(config, strategy, 1, phase)
        assert [each.learning_rate for each in rates] == [3e-4, 9e-4, 3e-3, 9e-3]
        assert {each.rows for each in rates} == {1.0}
        assert settings.epochs == 1
    _, rates = training_of(config, Strategy(), 0, "")
    assert [each.learning_rate for each in rates] == [3e-3]


def test_what_is_tried_determines_later_stages_and_not_the_base() -> None:
    plain, wider = load_config(TREE), load_config(TREE, ["training.later.trials.budget=2"])
    assert stage_shape(plain, 1) != stage_shape(wider, 1)
    assert stage_shape(plain, 0) == stage_shape(wider, 0)
    # what was tried is written out, defaults included
    tree = load_config(TREE, ["training.later={learning_rate: auto}"]).model_dump(mode="json")
    assert tree["training"]["later"]["trials"] == {
        "scales": [0.1, 0.3, 1.0, 3.0],
        "rows": [0.3, 1.0, 3.0],
        "budget": 1.0,
    }
    for wrong in ("scales=[0.1]", "scales=[0, 1]", "budget=0", "rate=1", "rows=1"):
        with pytest.raises(ConfigError, match=r"training\.later\.trials\."):
            load_config(TREE, [f"training.later.trials.{wrong}"])
    with pytest.raises(ConfigError, match=r"training\.later\.learning_rate.*'best'"):
        load_config(TREE, ["training.later.learning_rate=best"])

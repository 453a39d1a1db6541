"""Does the anchor hold: an answer for either coupling, while a stage is learnt and when it is done."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path

import pytest
from small_runs import trained

from peso.adapters import anchor_report
from peso.adapters.anchor_report import AnchorMonitor, anchor_effect, taken_back
from peso.runs.diagnosis import diagnose
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow

STEPS = "training.max_steps=40"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("hold") / "base", "strategy=single", STEPS)[0].root


def run(root: Path, base: Path, options: str) -> tuple[Workspace, dict, list[str]]:
    workspace, notes = trained(root, f"strategy={options}", STEPS, base=base)
    metrics = workspace.stage(1).metrics
    return workspace, metrics["training"]["anchor"], notes


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_a_decoupled_anchor_takes_back_what_its_strength_says(base, tmp_path: Path, strength: float) -> None:
    """1 − exp(−s) of a displacement present at the start; measured at every eighth step."""
    options = f"{{name: peso, proximal: l2, strength: {strength}, examples: 4}}"
    _, told, notes = run(tmp_path / "w", base, options)
    assert told["taken_back"] == pytest.approx(1 - math.exp(-strength), rel=1e-3)
    assert told["gradient_ratio"] is None
    assert 0 < told["pull_ratio"] < 1
    assert len(told["pull_ratios"]) == len(told["distances"]) == 4
    assert told["finding"] is None
    assert told["says"] in notes
    assert not any("warning" in note for note in notes)


def test_a_decoupled_anchor_that_does_nothing_is_warned_of_once(base, tmp_path: Path) -> None:
    _, told, notes = run(tmp_path / "w", base, "{name: peso, proximal: l2, strength: 2e-3, examples: 4}")
    assert "no measurable effect" in told["finding"]
    assert told["taken_back"] == pytest.approx(2e-3, rel=0.05)
    assert sum("warning" in note for note in notes) == 1


def test_a_weak_weight_is_warned_of_while_it_is_learnt(base, tmp_path: Path) -> None:
    workspace, told, notes = run(tmp_path / "w", base, "{name: peso, weight: 2, examples: 4}")
    (warning,) = [note for note in notes if note.startswith("warning")]
    assert "the anchor had no measurable effect at this weight; strength 0.7 would be weight" in warning
    assert warning.endswith("(after 10 of 40 steps)")
    assert notes.index(warning) < notes.index(told["says"])
    (entry,) = diagnose(workspace)["anchor"]
    assert entry["finding"] == told["finding"] == told["says"]
    assert entry["strategy"]["rho_standard_error"] > 0
    assert told["pull_ratio"] is told["taken_back"] is None
    assert len(told["gradient_ratios"]) == 4


def test_nothing_is_said_of_a_stage_without_an_anchor(base) -> None:
    told = json.loads((base / "stages/1/metrics.json").read_text())["training"]["anchor"]
    assert told["says"] is told["finding"] is told["gradient_ratio"] is told["pull_ratio"] is None
    assert all(distance > 0 for distance in told["distances"])


def pulled(step: int, share: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0, "learning_rate": 0.1, "gradient_norm": 1.0, "step_norm": 0.1,
            "pull_norm": share, "distance": 1 - share}  # fmt: skip


def test_steps_that_were_not_measured_shrink_at_the_measured_rate() -> None:
    unmeasured = [{"step": k, "loss": 1.0, "learning_rate": 0.05} for k in range(2, 6)]
    assert taken_back([pulled(1, 0.1), *unmeasured]) == pytest.approx(1 - 0.9**3)
    assert taken_back([pulled(1, 1.0), pulled(9, 0.2)]) == 1.0
    assert taken_back([pulled(1, 0.0)]) is None


def test_the_monitor_speaks_once_after_a_tenth_and_is_silent_where_the_anchor_holds() -> None:
    weak = {"loss": 1.0, "gradient_norm": 1.0, "penalty_gradient_norm": 1e-4, "learning_rate": 0.1}
    monitor = AnchorMonitor(3, 100, rho=2.0)
    said = [monitor.add({**weak, "step": step}) for step in range(1, 101)]
    assert [step for step, text in enumerate(said, 1) if text] == [10]
    assert "stage 3" in str(said[9])
    assert "strength 0.7 would be weight 1.4" in str(said[9])
    for strong in ({**weak, "penalty_gradient_norm": 0.1}, {**weak, "penalty_gradient_norm": 0.0}):
        monitor = AnchorMonitor(3, 100)
        assert not any(monitor.add({**strong, "step": step}) for step in range(1, 101))


def test_reports_of_logs_without_the_newer_figures() -> None:
    step = {"loss": 1.0, "gradient_norm": 1.0}
    old = [{**step, "step": k, "penalty_gradient_norm": 0.1 * k} for k in range(1, 9)]
    told = anchor_effect(1, [*old, {"validation_loss": 2.0}])
    assert told["distances"] is told["taken_back"] is None
    assert told["gradient_ratios"] == pytest.approx([0.15, 0.35, 0.55, 0.75])
    assert not doctest.testmod(anchor_report).failed

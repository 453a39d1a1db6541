"""A model that has learned nothing is said to be bad when its training ends; a good one is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from event_logs import write_log
from small_runs import Notes

from peso.config import load_config
from peso.runs import pipeline
from peso.runs.health import Rivals, check_health, known_warnings
from peso.runs.validation import validation_cases
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow

USERS, LENGTH = 72, 10
NOTHING = {"training.max_steps": 1, "training.learning_rate": 1e-9}


def tree(path: Path) -> dict[str, object]:
    """A shop in which everyone goes round a circle of products; two of three users round the smaller one."""
    events = []
    for user in range(USERS):
        first, size = (0, 15) if user % 3 else (15, 45)
        items = [first + (7 * user + step) % size for step in range(LENGTH)]
        events += [(f"u{user:02}", f"i{item}", 1000 * step + user) for step, item in enumerate(items)]
    return {
        "data": {"format": "csv", "path": str(write_log(path, events)), "stages": 2, "min_item": 1},
        "items": {"behavior": {}, "quantizer": "rq-kmeans", "levels": 2, "codes": 8},
        "backbone": {"name": "tiny", "layers": 1},
        "head": {"name": "items"},
        "strategy": "single",
        "training": {"epochs": 30, "batch_size": 32, "max_steps": 120, "learning_rate": 1e-2},
        "baselines": [],
    }


def run(root: Path, config: dict[str, object], **overrides: object) -> tuple[Workspace, list[str]]:
    notes = Notes()
    loaded = load_config(config, [f"{key}={value}" for key, value in overrides.items()])
    with Workspace.hold(root, loaded) as workspace:
        pipeline.run(workspace, observer=notes)
    return workspace, notes.notes


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, list[str]]:
    """Without counts, which know everything about these circles."""
    folder = tmp_path_factory.mktemp("good")
    return run(folder / "w", tree(folder / "log.csv"), **{"head.transitions": "false"})


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("counting")
    return run(folder / "w", tree(folder / "log.csv"))[0]


def test_a_good_model_raises_no_warning(good: tuple[Workspace, list[str]]) -> None:
    workspace, notes = good
    found = workspace.stage(0).training["health"]
    assert found["warnings"] == {}
    assert found["cases"] >= 30
    assert found["ndcg@10"] > max(found["ease"], found["popularity"]) > 0
    assert not [note for note in notes if "warning: stage 0" in note]


def test_every_warning_fires_on_a_model_made_to_collapse(good: tuple[Workspace, list[str]]) -> None:
    stage, notes = good[0].stage(0), Notes()
    model = stage.model()
    with torch.no_grad():
        for parameter in model.vocabulary.parameters():
            parameter.zero_()
    found = check_health(stage, model, notes)
    assert [*found["warnings"]] == ["first_items", "items", "popularity", "ease"]
    assert found["first_items"] < 3
    assert len(notes.notes) == 4
    assert all(note.startswith("warning: stage 0, on ") for note in notes.notes)


def test_a_model_that_has_only_its_counts_is_told_so(counting: Workspace) -> None:
    stage, notes = counting.stage(0), Notes()
    model = stage.model()
    assert model.transitions is not None
    counted = check_health(stage, model, notes)["counts"]
    with torch.no_grad():
        for parameter in model.vocabulary.parameters():
            parameter.zero_()
    found = check_health(stage, model, notes)
    assert "counts" in found["warnings"]
    assert found["ndcg@10"] <= counted == found["counts"]


def test_a_stage_whose_users_were_all_erased_has_uniform_frequencies(good):
    stage = good[0].stage(1)
    cases = validation_cases(stage, 8)
    rivals = Rivals(stage, cases, 10)
    rivals.__dict__["_known"] = [SimpleNamespace(training_sequences=list)]
    for item_head, size in ((True, len(stage.semantic_ids.item_ids)), (False, stage.semantic_ids.sizes[0])):
        assert rivals.log_frequencies(item_head) == pytest.approx([-math.log(size)] * len(cases))


def test_the_order_of_counted_evidence(counting: Workspace) -> None:
    stage = counting.stage(0)
    transitions = stage.model().transitions
    assert transitions is not None
    cases = validation_cases(stage, 40)
    ranks = Rivals(stage, cases, 10).count_ranks(transitions)
    evidence = transitions.evidence(cases.histories)
    assert ranks.any()
    for row, (rank, target) in enumerate(zip(ranks, cases.targets, strict=True)):
        order = sorted(range(evidence.shape[1]), key=lambda item: (-evidence[row, item], item))
        expected = order.index(target) + 1
        assert rank == (expected if expected <= 10 and evidence[row, target] else 0)


def test_what_learned_nothing_is_told_in_terminal_metrics_and_first_in_the_report(tmp_path: Path) -> None:
    config = tree(tmp_path / "log.csv") | {"head": "codes"}
    workspace, notes = run(tmp_path / "w", config, **NOTHING)
    told = json.loads((workspace.root / "stages" / "1" / "metrics.json").read_text())
    of_ease = told["training"]["health"]["warnings"]["ease"]
    assert any(note.endswith(of_ease) and "warning: stage 1, on" in note for note in notes)
    assert told["test"]["warnings"]
    said = known_warnings(workspace.stage(1))
    assert said[: len(told["test"]["warnings"])] == told["test"]["warnings"]
    assert said[-1].endswith(of_ease)
    page = (workspace.report_directory / "index.html").read_text()
    assert '<div id="summary">\n<p>Warning: ' in page
    assert page.index("EASE, a linear model") < page.index(" is best with ")


def test_without_tests_nothing_is_checked(tmp_path: Path) -> None:
    workspace, notes = run(
        tmp_path / "w", tree(tmp_path / "log.csv"), **NOTHING, **{"evaluation.enabled": "false"}
    )
    assert "health" not in workspace.stage(0).training
    assert not [note for note in notes if "warning" in note]

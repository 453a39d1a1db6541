"""`peso diagnose`, and what ingest and tokenize print: the figures of manifests and logs, and warnings."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest
from event_logs import write_log
from small_runs import TREE, trained

from peso.adapters import anchor_report
from peso.adapters.anchor_report import NO_EFFECT, anchor_finding, gradient_ratio
from peso.config import load_config
from peso.errors import ConfigError, WorkspaceError
from peso.events.drift import drift
from peso.runs import preparation
from peso.runs.diagnosis import diagnose
from peso.runs.directions import stage_directions
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

SENTENCE = "the anchor had no measurable effect at this weight"


@pytest.fixture(scope="module")
def weak(tmp_path_factory) -> tuple[Workspace, list[str]]:
    return trained(tmp_path_factory.mktemp("runs") / "weak", "strategy={name: peso, weight: 2, examples: 8}")


@pytest.fixture(scope="module")
def free(weak, tmp_path_factory) -> Workspace:
    """The stage of `weak` learnt without an anchor."""
    return trained(tmp_path_factory.mktemp("runs") / "single", "strategy=single", base=weak[0].root)[0]


def test_the_anchor_s_ratio_is_the_mean_over_the_steps(weak) -> None:
    workspace, notes = weak
    lines = (workspace.stage(1).directory / "log.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    ratios = [record["penalty_gradient_norm"] / record["gradient_norm"] for record in steps]
    (anchor,) = diagnose(workspace)["anchor"]
    assert anchor["gradient_ratio"] == pytest.approx(sum(ratios) / len(ratios))
    assert 0 < anchor["gradient_ratio"] < NO_EFFECT
    assert anchor["distance"] > 0
    # said when the stage was learnt, and whenever one asks
    assert anchor["finding"] in notes
    assert anchor["finding"] in diagnose(workspace)["warnings"]
    assert SENTENCE in anchor["finding"]


def test_an_anchor_that_holds_and_none_at_all_give_no_warning(weak, tmp_path: Path) -> None:
    for name, override in (
        ("heavy", "strategy={name: peso, weight: 1e6, examples: 8}"),
        ("single", "strategy=single"),
    ):
        workspace, notes = trained(tmp_path / name, override, base=weak[0].root)
        (anchor,) = diagnose(workspace)["anchor"]
        assert anchor["finding"] is None
        assert (anchor["gradient_ratio"] is None) == (name == "single")
        assert not any(SENTENCE in note for note in notes)
    none, _ = trained(tmp_path / "none", "strategy=none", base=weak[0].root)
    assert diagnose(none)["anchor"] == []


def test_findings_of_ratios() -> None:
    assert anchor_finding(2, NO_EFFECT) is anchor_finding(2, None) is None
    assert "stage 2: the penalty's gradient was 0.03 %" in str(anchor_finding(2, 0.0003))
    assert gradient_ratio([{"gradient_norm": None, "penalty_gradient_norm": 0.0}]) is None
    assert doctest.testmod(anchor_report).attempted > 2
    assert not doctest.testmod(anchor_report).failed


def test_drift_and_codes_are_those_of_the_workspace(weak) -> None:
    workspace, _ = weak
    stream = workspace.stream
    codes = workspace.semantic_ids.codes
    found = diagnose(workspace)
    assert found["stream"] == drift(stream, codes[:, 0])
    manifest = json.loads((workspace.semantic_ids_directory / "manifest.json").read_text())
    assert found["semantic_ids"]["fitness"] == manifest["fitness"]
    assert found["semantic_ids"]["items_without_id"] == 0


def test_whatever_is_there_is_shown(peso, tmp_path: Path) -> None:
    root = tmp_path / "w"
    workspace = Workspace.create_or_open(root, load_config(TREE))
    with pytest.raises(WorkspaceError, match="peso ingest"):
        diagnose(workspace)
    preparation.ingest(workspace, Silent())
    status, out, _ = peso("diagnose", "-w", root, "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["semantic_ids"], found["anchor"], found["warnings"]) == (None, [], [])
    assert [stage["code_divergence"] for stage in found["stream"]] == [None, None]
    status, out, _ = peso("diagnose", "-w", root)
    assert status == 0
    assert "continuing" in out


def test_diagnose_prints_tables_and_warnings(peso, weak) -> None:
    status, out, _ = peso("diagnose", "-w", weak[0].root)
    assert status == 0
    for words in ("JS first codes", "new in stage 1", "effect of the anchor"):
        assert words in out
    assert f"warning: {diagnose(weak[0])['warnings'][-1]}" in out


def test_tokenize_prints_how_good_the_ids_are(peso, tmp_path: Path) -> None:
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(TREE))
    preparation.ingest(workspace, Silent())
    status, out, _ = peso("tokenize", "-w", workspace.root)
    assert status == 0
    status, printed, _ = peso("tokenize", "-w", workspace.root, "--json")
    assert status == 0
    manifest = json.loads(printed)
    assert manifest == json.loads((workspace.semantic_ids_directory / "manifest.json").read_text())
    quality = manifest["quality"]
    for words in ("collision rate", "perplexity", "reconstruction error", "10 nearest"):
        assert words in out
    assert f"{quality['levels'][0]['perplexity']:.4g}" in out
    assert f"items under {''.join(quality['sample']['prefix'])}" in out
    assert quality["sample"]["items"][0]["title"] in out


def test_ingest_prints_the_funnel_and_what_was_left_out(peso, tmp_path: Path) -> None:
    events = [(f"u{k % 4}", f"i{k % 5}", 1_600_000_000 + 60 * k) for k in range(40)]
    log = write_log(tmp_path / "log.csv", [*events, ("u1", "i1", "soon"), *events[:3]])
    arguments = ("-w", tmp_path / "w", "--set", "data.stages=2")  # that it is CSV its name says
    status, _, err = peso("ingest", log, *arguments)
    assert status == 1
    assert "'soon'" in err
    status, out, _ = peso("ingest", log, *arguments, "--on-error", "skip")
    assert status == 0
    assert "times read as seconds: 2020-09-13" in out
    assert "1 unreadable rows" in out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["read", "44", "–", "–"] in lines
    assert ["readable", "43", "4", "5"] in lines
    assert ["duplicates kept once", "40", "4", "5"] in lines


# -- directions ----------------------------------------------------------------------------------------


def test_directions_of_a_free_run_against_itself_have_weight_one(free) -> None:
    found = stage_directions(free, 3, examples=24, free=free)
    assert found["weight"] is None
    assert all(row["measured"] == pytest.approx(1) for row in found["directions"])
    assert all("predicted" not in row for row in found["directions"])
    for part in ("in_directions", "in_other_support", "without_support"):
        assert found["rest"][f"measured_{part}"] == pytest.approx(1)
    shares = [
        found["rest"][f"share_{part}"] for part in ("of_directions", "of_other_support", "without_support")
    ]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    # carried shares are of one whole, and of the modules that the adapter has
    for row in found["directions"]:
        for kind in ("modules", "layers", "targets", "factors"):
            assert sum(row[kind].values()) == pytest.approx(1)
        assert set(row["factors"]) == {"A", "B"}


@pytest.mark.parametrize("coupling", ["loss", "decoupled"])
def test_a_stronger_anchor_predicts_and_measures_less_of_the_new_optimum(
    weak, free, tmp_path, coupling
) -> None:
    weights = []
    for number, value in enumerate(("1e-3", "30") if coupling == "decoupled" else ("1e-6", "1e4")):
        key = "strength" if coupling == "decoupled" else "weight"
        options = f"strategy={{name: peso, proximal: l2, {key}: {value}, coupling: {coupling}, examples: 8}}"
        held, _ = trained(tmp_path / f"{coupling}{number}", options, base=weak[0].root)
        found = stage_directions(held, 2, examples=24, free=free)
        assert found["differences"] == []
        assert found["coupling"] == coupling
        rows, rest = found["directions"], found["rest"]
        weights.append(
            [rows[0]["predicted"], rows[0]["predicted_in_the_limit"], rest["measured_in_directions"]]
        )
    for weak_anchor, strong_anchor in zip(*weights, strict=True):
        assert weak_anchor == pytest.approx(1, abs=0.02)
        assert strong_anchor < 0.5


def test_the_weight_is_the_one_that_the_stage_was_learnt_with(weak, tmp_path: Path) -> None:
    options = "strategy={name: peso, strength: 0.5, coupling: loss, examples: 8}"
    held, _ = trained(tmp_path / "strength", options, base=weak[0].root)
    metrics = held.stage(1).metrics
    found = stage_directions(held, 1, examples=20)
    assert found["weight"] == pytest.approx(metrics["training"]["strategy"]["weight"], rel=1e-6)
    assert "measured" not in found["directions"][0]


def test_runs_that_are_no_comparison_are_refused(weak, tmp_path: Path) -> None:
    workspace = weak[0]
    with pytest.raises(WorkspaceError, match="trained with peso"):
        stage_directions(workspace, 2, examples=20, free=workspace)
    with pytest.raises(WorkspaceError, match="stage 0 has no previous state"):
        stage_directions(workspace, 2, stage=0)
    none, _ = trained(tmp_path / "none", "strategy=none", base=workspace.root)
    with pytest.raises(ConfigError, match="none does not train the same adapter"):
        stage_directions(none, 2)
    other, _ = trained(tmp_path / "other", "strategy=single", "seed=7", "data_seed=0")
    with pytest.raises(WorkspaceError, match="other weights of the backbone"):
        stage_directions(workspace, 2, examples=20, free=other)
    longer, _ = trained(
        tmp_path / "longer", "strategy=single", "training.later_learning_rate_scale=0.5", base=workspace.root
    )
    assert stage_directions(workspace, 2, examples=20, free=longer)["differences"] == [
        "The two runs differ in training too."
    ]


def test_a_plot_of_nothing_is_refused_before_anything_is_computed(peso, free, tmp_path: Path) -> None:
    file = tmp_path / "d.svg"
    status, _, err = peso("diagnose", "-w", free.root, "--directions", "3", "--plot", file)
    assert status == 2
    assert "there is nothing to plot, because the strategy single has no anchor" in err
    assert not file.exists()


def test_diagnose_prints_and_draws_directions(peso, weak, tmp_path: Path) -> None:
    arguments = ("diagnose", "-w", weak[0].root, "--directions", "3", "--examples", "24")
    status, out, _ = peso(*arguments, "--at", "end", "--plot", tmp_path / "d.svg")
    assert status == 0
    for words in (
        "strongest directions of stage 1",
        "distribution over modules",
        "ρ/(ρ+λ)",
        "cross-validated",
    ):
        assert words in out
    assert (tmp_path / "d.svg").read_bytes().startswith(b"<?xml")
    status, out, _ = peso(*arguments, "--json")
    assert status == 0
    found = json.loads(out)
    assert [row["direction"] for row in found["directions"]] == [1, 2, 3]
    assert found["sentences"]
    for wrong, code in ((("--plot", "d.pdf"), 2), (("--free", weak[0].root), 1)):
        status, _, err = peso(*arguments, *wrong)
        assert status == code
        assert "error" in err
    status, _, err = peso("diagnose", "-w", weak[0].root, "--stage", "1")
    assert status == 2
    assert "--directions" in err

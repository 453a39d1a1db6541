"""examples/claims: stage 0 is in an adapter, learned once per stream, and every strategy is tuned alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from peso.config import load_config
from peso.runs.compare.plan import Plan, make_plan
from peso.training.strategies.strategy import strategies

EXAMPLES = Path(__file__).parents[2] / "examples"
BED = "smollm2_4_layers"


@pytest.fixture(scope="module")
def plans(release_dir: Path, movietweetings_dir: Path) -> dict[str, Plan]:
    if not (EXAMPLES.parents[1] / "shared" / "data").is_dir():
        pytest.skip("the examples read real data from ../../shared/data, which is not there")
    root = Path("runs/claims")
    files = {name: EXAMPLES / "claims" / f"{name}.yaml" for name in (BED, "anchors", "finalists")}
    files["benchmark"] = EXAMPLES / "benchmark" / "benchmark.yaml"
    return {name: make_plan(path, root) for name, path in files.items()}


def test_stage_0_is_learned_in_the_adapter_and_once_per_stream(plans: dict[str, Plan]) -> None:
    for name, plan in plans.items():
        assert all(not run.task.config.backbone.trained_at_base for run in plan.runs)
        bases = {run.task.base.root for run in plan.runs}
        assert len(bases) == (6 if name == "finalists" else 2)
    shared = [{run.task.base.root for run in plans[name].runs} for name in ("smollm2_4_layers", "anchors")]
    assert shared[0] == shared[1]


def test_every_strategy_but_distill_is_compared(plans: dict[str, Plan]) -> None:
    known = set(strategies()) - {"custom", "average", "distill"}
    assert {run.task.config.strategy.name for run in plans[BED].runs} == known


def test_rates_are_tuned_with_the_same_trials_for_all(plans: dict[str, Plan]) -> None:
    for name, plan in plans.items():
        for run in plan.runs:
            later = run.task.config.training.later
            tenth = run.strategy.endswith("-tenth")
            assert later.learning_rate == (1e-4 if tenth else "auto"), (name, run.name)
        tuned = [run.task.config.training.later for run in plan.runs if not run.strategy.endswith("-tenth")]
        assert all(later == tuned[0] for later in tuned), name


def test_the_fast_bed_takes_the_backbone_of_its_source(tmp_path: Path) -> None:
    source = load_config(EXAMPLES / "claims" / "small_source.yaml").backbone
    assert source.trained_at_base
    (tmp_path / "source").mkdir()
    lines = (EXAMPLES / "claims" / "small_adapter.yaml").read_text(encoding="utf-8").splitlines()
    lines = lines[: lines.index("compare:")]
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\n")
    bed = load_config(tmp_path / "c.yaml", ["backbone.pretrained=source"]).backbone
    assert not bed.trained_at_base
    assert bed.layers == source.layers

"""examples/paper: what its files say is what would run, and what they have in common is done once."""

from __future__ import annotations

from pathlib import Path

import pytest

from peso.runs.compare.plan import Plan, make_plan

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = ["compare.seeds=[0,1,2,3,4]"]


@pytest.fixture(scope="module")
def plans(release_dir: Path, movietweetings_dir: Path) -> dict[str, Plan]:
    if not (EXAMPLES.parents[1] / "shared" / "data").is_dir():
        pytest.skip("the examples read real data from ../../shared/data, which is not there")
    root = Path("runs/paper")
    named = {path.stem: make_plan(path, root) for path in (EXAMPLES / "paper").glob("*.yaml")}
    experiment = EXAMPLES / "experiment"
    return named | {
        "strategies": make_plan(experiment / "strategies.yaml", root, SHARED),
        "anchors": make_plan(experiment / "anchors.yaml", root),
    }


def test_one_directory_holds_all_of_them_and_nothing_is_two_things(plans: dict[str, Plan]) -> None:
    found = {}
    for name, plan in plans.items():
        for run in plan.runs:
            before, config = found.setdefault(run.task.root, (name, run.task.config))
            assert config == run.task.config, f"{run.name} differs between {before} and {name}"


def test_stage_0_is_learnt_once_per_stream_and_split(plans: dict[str, Plan]) -> None:
    bases = {run.task.base.root for plan in plans.values() for run in plan.runs if not run.candidates}
    assert len(bases) == 4


def test_table_1_is_table_2_on_the_natural_split(plans: dict[str, Plan]) -> None:
    natural = {run.task.root for run in plans["table1"].runs if not run.data.endswith("disjoint")}
    assert natural <= {run.task.root for run in plans["strategies"].runs}
    assert len(natural) * 2 == len(plans["table1"].runs) == 2 * 2 * 6 * 5


def test_the_curve_has_the_papers_weights_and_the_strengths_of_the_experiment(plans: dict[str, Plan]) -> None:
    curve = plans["lambda"].runs
    weights = {getattr(run.task.config.strategy, "weight", None) for run in curve}
    assert weights == {None, 0.5, 1, 2, 5, 8}
    first = {run.task.root for run in curve if run.seed == 0 and run.strategy.startswith("softmax[")}
    assert len(first) == 2 * 6
    assert first <= {run.task.root for run in plans["anchors"].runs}

"""The dry run: that what repeats data, trains twice or answers with two models is told to take longer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from peso.config import load_config
from peso.config.baselines import read_baseline
from peso.runs import estimate, preparation
from peso.runs.baselines import BaselineRun
from peso.runs.estimate import Estimate, Speed
from peso.runs.models import starting_model
from peso.runs.workspace import Workspace
from peso.runtime.manifest import read_manifest, write_manifest
from peso.runtime.progress import Silent
from peso.training.plan import StageExamples

pytestmark = pytest.mark.slow

TREE = {
    "data": {"format": "simulate", "simulate": {"users": 150, "items": 60, "stages": 4}},
    "backbone": {"name": "tiny"},
    "training": {"epochs": 1, "batch_size": 8},
}
SPEED = Speed(step=1.0, validation=0.0, test=1.0, memory_gib=0.0, trained_bytes=0, most_targets=None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace.create_or_open(tmp_path_factory.mktemp("w"), load_config(TREE))
    preparation.ingest(workspace, Silent())
    preparation.tokenize(workspace, Silent())
    return workspace


def steps_of(source: Workspace, strategy: object, baselines: Sequence[object] = ()) -> list[Estimate]:
    config = load_config({**TREE, "strategy": strategy, "baselines": list(baselines)})
    # every step takes a second, and nothing is measured
    return estimate.estimate(Workspace(source.root, config), {True: SPEED, False: SPEED})


def minutes(found: list[Estimate], name: str, stage: int) -> float:
    (step,) = [each for each in found if (each.step.name, each.step.stage) == (name, stage)]
    assert step.minutes is not None
    return step.minutes


def test_strategies_that_learn_from_more_than_the_stage_take_longer(source: Workspace) -> None:
    single = [minutes(steps_of(source, "single"), "learn", stage) for stage in range(4)]

    def learn(strategy: object, stage: int = 3) -> float:
        return minutes(steps_of(source, strategy), "learn", stage)

    everything = pytest.approx(sum(single), rel=0.05)  # a batch that is not full more or less
    assert learn("retrain") == everything
    assert learn("lsat") == pytest.approx(sum(single) + single[3], rel=0.05)
    assert learn({"name": "replay", "budget": 10**6}) == everything
    assert single[3] < learn({"name": "replay", "budget": 20}) < 0.9 * sum(single)
    assert learn("distill") == pytest.approx(1.4 * single[3])
    assert learn("retrain", 0) == learn("lsat", 0) == learn("distill", 0) == single[0]


def test_trials_of_learning_rates_are_counted(source: Workspace) -> None:
    def learn(later: object, strategy: str = "single") -> Estimate:
        training = {**TREE["training"], "later": later}
        config = load_config({**TREE, "strategy": strategy, "training": training})
        steps = estimate.estimate(Workspace(source.root, config), {True: SPEED, False: SPEED})
        return next(each for each in steps if (each.step.name, each.step.stage) == ("learn", 2))

    def longer(budget: float, strategy: str = "single") -> float:
        auto = learn({"learning_rate": "auto", "trials": {"budget": budget}}, strategy)
        plain = learn({"learning_rate": 1e-3}, strategy)
        assert auto.minutes is not None
        assert plain.minutes
        assert "in trials of the learning rate" in auto.note
        assert "trials" not in plain.note
        return auto.minutes / plain.minutes

    # four candidates: three of them for an eighth of the budget, and one for two eighths more
    assert longer(2.0) == pytest.approx(1 + 2 * 5 / 8, abs=0.1)
    assert longer(4.0) == pytest.approx(
        1 + (3 * 4 / 8 + 4 / 8), abs=0.1
    )  # no longer than the training itself
    assert longer(2.0, "retrain") == pytest.approx(1 + 2 * 5 / 8, abs=0.1)


def test_what_answers_with_two_models_is_tested_twice_as_long(source: Workspace) -> None:
    def test(strategy: object) -> float:
        return minutes(steps_of(source, strategy), "test", 2)

    assert test("lsat") == 2 * test("single")
    assert test({"name": "lsat", "fusion": "arithmetic"}) == test("single")


def test_the_steps_are_those_that_a_run_takes(source: Workspace, tmp_path: Path) -> None:
    """What a strategy is told of the data here and in a real run is the same."""
    found = estimate._trainings(source, source.stream)
    for number in (1, 3):
        config = load_config({**TREE, "strategy": "retrain"})
        (training,) = estimate._trainings(Workspace(source.root, config), source.stream)[number]
        model = starting_model(Workspace(source.root, config).stage(0))
        stream = source.stream
        examples = StageExamples(model, stream.stage, number, config.training, 0)
        every = [each for stage in range(number + 1) for each in examples.of(stage)]
        assert [each.user for each in training.sequences] == [each.user for each in every]
        (own,) = found[number]
        assert [each.user for each in own.sequences] == [each.user for each in examples.of(number)]


def test_a_baseline_takes_for_a_stage_what_it_took_for_those_that_are_done(
    source: Workspace, tmp_path: Path
) -> None:
    names = ["popularity", "hybrid"]
    found = [each for each in steps_of(source, "single", names) if each.step.stage is None]
    assert [(str(each.step), each.minutes) for each in found] == [
        ("baseline popularity", None),
        ("baseline hybrid", None),
    ]
    workspace = Workspace(Path(shutil.copytree(source.root, tmp_path / "w")), source.config)
    run = BaselineRun(workspace, read_baseline({"name": "popularity"}))
    for stage, seconds in ((0, 60.0), (1, 180.0)):
        run.learn_and_test(stage, Silent())
        manifest = read_manifest(run.stage_directory(stage), 1)
        write_manifest(run.stage_directory(stage), 1, {**manifest, "seconds": seconds}, manifest["files"])
    left = estimate.baseline_estimate(workspace, run.config)
    assert left is not None
    assert left.minutes == pytest.approx(2 * 2)  # two of four stages are left, at two minutes each
    for stage in (2, 3):
        run.learn_and_test(stage, Silent())
    assert estimate.baseline_estimate(workspace, run.config) is None

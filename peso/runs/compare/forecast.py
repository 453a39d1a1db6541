"""`peso compare --dry-run`: estimates how long the missing tasks will take."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from peso.config.shape import stage_shape
from peso.config.strategy import UNCHANGED
from peso.runs.compare.plan import Plan, Task
from peso.runs.compare.progress import is_done, pairs_across, progress_of
from peso.runs.estimate import Estimate, Speed, baseline_estimate, estimate, readable
from peso.runs.sizes import sizes_for
from peso.runs.workspace import Workspace
from peso.runtime.files import digest
from peso.runtime.progress import Silent


@dataclass(frozen=True)
class Expected:
    """A task and its estimate. ``minutes``: None if not known yet; ``note`` has the reason."""

    name: str
    state: str
    minutes: float | None
    note: str


def forecast(plan: Plan, threads: int) -> list[Expected]:
    """Estimates of all tasks in the order of their start, including those that are done.

    Raises:
        PesoError: as the runs themselves would, for invalid data or an unusable backbone.
    """
    import torch

    torch.set_num_threads(threads)
    tasks: dict[tuple[Path, bool], tuple[Task, str]] = {}

    def add(task: Task, name: str) -> None:
        for need in task.needs:
            add(need, str(need.root.relative_to(plan.root)))
        tasks.setdefault(task.key, (task, name))

    for run in plan.all:
        for candidate in run.candidates:
            add(candidate.trial, str(candidate.trial.root.relative_to(plan.root)))
        add(run.task, run.name)
    with ExitStack() as temporary:
        measured = Measured(temporary)
        return [_expected(task, name, measured) for task, name in tasks.values()]


@dataclass
class Measured:
    """Measurements that tasks share: estimates for all seeds, speeds for all seeds and strategies.

    Attributes:
        temporary: closes the temporary workspaces into which data are read.
        data: for the directory of each data task, a workspace with its data, and the seconds that each step
            took.
    """

    temporary: ExitStack
    data: dict[Path, tuple[Workspace, dict[str, float]]] = field(default_factory=dict)
    steps: dict[str, list[Estimate]] = field(default_factory=dict)
    speeds: dict[str, dict[bool, Speed]] = field(default_factory=dict)

    def data_of(self, task: Task) -> tuple[Workspace, dict[str, float]]:
        if task.root not in self.data:
            source = readable(task.workspace, Silent())
            self.data[task.root] = self.temporary.enter_context(source)
        return self.data[task.root]


def _expected(task: Task, name: str, measured: Measured) -> Expected:
    if is_done(task):
        return Expected(name, "done", 0.0, "")
    if task.last_stage == -1:
        seconds = measured.data_of(task)[1]
        note = "data" if "tokenize" in seconds else "data; item texts are not encoded for an estimate"
        return Expected(name, "missing", sum(seconds.values()) / 60, note)
    at = progress_of(task)
    if task.kind == "baseline":
        state = f"{at.done} of {at.stages} stages" if at.done else "missing"
        assert task.baseline is not None
        left = baseline_estimate(task.workspace, task.baseline)
        return Expected(name, state, left.minutes if left else 0.0, left.note if left else "")
    steps = _steps(task, measured)
    if task.kind == "transfer":
        return _across(task, name, steps)
    first = 0 if task.base is None else 1
    counted = [
        e
        for e in steps
        if e.step.stage is not None
        and max(first, at.done) <= e.step.stage <= (task.last_stage if task.last_stage is not None else 10**9)
        and (e.step.name == "learn" or task.config.evaluation.enabled)
    ]
    if any(e.minutes is None for e in steps):
        return Expected(name, "missing", None, next(e.note for e in steps if e.minutes is None))
    state = f"{at.done} of {at.stages} stages" if at.done else "missing"
    sizes = None
    if task.base is None and task.data is not None:
        sizes = sizes_for(measured.data_of(task.data)[0].root, task.config)
    note = "" if sizes is None else f"backbone: auto: {sizes.reason}"
    return Expected(name, state, sum(e.minutes or 0.0 for e in counted), note)


def _across(task: Task, name: str, steps: list[Estimate]) -> Expected:
    """The estimate of the missing tests on cases of other stages. Each takes as long as the test of the model
    of those cases' own stage."""
    tests = {e.step.stage: e.minutes for e in steps if e.step.name == "test" and e.step.stage is not None}
    if not tests or any(minutes is None for minutes in tests.values()):
        return Expected(name, "missing", None, next((e.note for e in steps if e.minutes is None), ""))
    workspace = task.workspace
    pairs = pairs_across(len(tests))
    missing = [(i, j) for i, j in pairs if not workspace.stage(i).on(j).is_done]
    state = f"{len(pairs) - len(missing)} of {len(pairs)} tests" if len(missing) < len(pairs) else "missing"
    return Expected(name, state, sum(tests[j] or 0.0 for _, j in missing), f"{len(missing)} tests")


def _steps(task: Task, measured: Measured) -> list[Estimate]:
    """Estimates of all steps of a run like this one, starting with its data."""
    while task.kind == "transfer" and task.base is not None:
        task = task.base
    assert task.data is not None
    source = measured.data_of(task.data)[0]
    workspace = Workspace(source.root, task.config.model_copy(update={"baselines": []}))
    shape = stage_shape(workspace.config, 1) | {"seed": None}
    like = digest(shape | {"strategy": task.config.strategy.name == UNCHANGED}, str(task.data.root))
    key = digest(shape, str(task.data.root))
    if key not in measured.steps:
        measured.steps[key] = estimate(workspace, measured.speeds.setdefault(like, {}))
    return measured.steps[key]

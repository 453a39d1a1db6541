"""The plan of a comparison: its runs and baselines, and the tasks that they share (data, base stages).

The workspace of a shared task is named by a digest of everything that determines it, so that it is done once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from peso.config import (
    AdapterConfig,
    Config,
    DecodingConfig,
    EvaluationConfig,
    HeadConfig,
    LaterTrainingConfig,
    PromptConfig,
    TrainingConfig,
    load_config,
    strategy_options,
)
from peso.config.baselines import BaselineOptions, baseline_label, is_random
from peso.config.compare import MOST_VARIANTS, CompareConfig, Variant, grid, load_comparison, variants
from peso.config.reading import given, leaves, matching
from peso.config.shape import is_later, stage_shape
from peso.config.strategy import UNCHANGED
from peso.errors import ConfigError, DataError, PesoError, WorkspaceError
from peso.runs.checks import check_configuration, check_sources, check_surroundings, rehearse
from peso.runs.place import CONFIG
from peso.runs.workspace import Workspace
from peso.runtime.files import digest
from peso.runtime.machine import require_memory
from peso.runtime.remote import is_remote

Kind = Literal["strategy", "transfer", "baseline"]
PROCESS = 300 * 2**20  # minimum memory of a process with PyTorch, bytes


@dataclass(frozen=True)
class Task:
    """Work in one workspace that one process does.

    Attributes:
        root: the workspace.
        config: its configuration.
        last_stage: the last stage to train; -1: only data and semantic IDs; None: all stages of the stream.
        data: the task from which stream and semantic IDs are taken over; None: they are made.
        base: the task from which stage 0, and later stages if identical, are taken over; None: trained.
        kind: ``strategy``: train and test the stages. ``transfer``: test each stage of ``base``, which has
            the same workspace, on the cases of the other stages. ``baseline``: learn and test ``baseline`` in
            its own workspace (a hybrid takes over all stages of ``base``).
    """

    root: Path
    config: Config
    last_stage: int | None = None
    data: Task | None = None
    base: Task | None = None
    kind: Kind = "strategy"
    baseline: BaselineOptions | None = None

    @property
    def key(self) -> tuple[Path, bool]:
        """Identifies the task."""
        return self.root, self.kind == "transfer"

    @property
    def workspace(self) -> Workspace:
        """The workspace, which need not exist yet."""
        return Workspace(self.root, self.config)

    @property
    def needs(self) -> list[Task]:
        return [task for task in (self.data, self.base) if task is not None]


@dataclass(frozen=True)
class Candidate:
    """Candidate options of a tuned strategy: the trial that rates them, and the run with these options."""

    label: str
    options: Mapping[str, Any]
    trial: Task
    task: Task


@dataclass(frozen=True)
class Run:
    """One cell of the comparison.

    Attributes:
        strategy: its name in the configuration file; for a baseline, its label.
        seed: None if nothing is random: strategy ``none`` after a shared base stage, and counting baselines.
        task: the work to do; for a tuned strategy, that of the first candidate until one is chosen.
        options: the options set by a grid, by dotted key.
        candidates: of a tuned strategy that is not chosen yet, else empty.
    """

    data: str
    backbone: str
    strategy: str
    seed: int | None
    task: Task
    options: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()

    @property
    def kind(self) -> Kind:
        return self.task.kind

    @property
    def name(self) -> str:
        seed = [] if self.seed is None else [f"seed={self.seed}"]
        before = ["baselines"] if self.kind == "baseline" else []
        after = ["transfer"] if self.kind == "transfer" else []
        return "/".join([self.data, self.backbone, *before, self.strategy, *seed, *after])

    def with_choice(self, candidate: Candidate) -> Run:
        """The run with the options of a candidate."""
        return replace(self, task=candidate.task, options=candidate.options, candidates=())


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison, see :attr:`all`."""

    root: Path
    runs: Sequence[Run]
    common: Config
    compare: CompareConfig
    baselines: Sequence[Run] = ()
    transfers: Sequence[Run] = ()

    @property
    def all(self) -> list[Run]:
        """All runs in the order of execution: strategies and baselines with the first seed, then with the
        second, and so on; at the end the tests on cases of other stages."""
        order: dict[int | None, int] = {seed: place for place, seed in enumerate(self.compare.seeds)}
        by_seed = sorted([*self.runs, *self.baselines], key=lambda run: order.get(run.seed, 0))
        return [*by_seed, *self.transfers]

    @property
    def is_begun(self) -> bool:
        """Whether any run has a workspace."""
        return any((run.task.root / CONFIG).exists() for run in self.all)

    def refuse_changes(self) -> None:
        """Raise WorkspaceError if an existing run has another configuration than in this plan, or if the
        directory is not that of a comparison."""
        if (self.root / CONFIG).exists():
            raise WorkspaceError(f"{self.root} is the workspace of one run; choose another place with -w")
        if self.root.exists() and not self.root.is_dir():
            raise WorkspaceError(f"{self.root} is a file; choose another place with -w")
        self._of_each(lambda task: Workspace.preview(task.root, task.config))

    def check(self) -> None:
        """Check the configuration of every run, see :mod:`peso.runs.checks`.

        Raises:
            PesoError: a check failed; the message names the run.
        """
        self._of_each(lambda task: check_configuration(task.config))
        baselines = [run.task.baseline for run in self.baselines if run.task.baseline is not None]
        for baseline in {each.model_dump_json(): each for each in baselines}.values():
            check_configuration(self.common.model_copy(update={"baselines": [baseline]}))
        if self.compare.executor.name == "processes" and self.compare.workers != "auto":
            workers = min(self.compare.workers, len(self.all))
            require_memory(PROCESS * workers, f"compare.workers: {workers:,} processes at once")

    def check_surroundings(self, models: bool = True) -> None:
        """Check the first lines of every data set that is not read yet, and the environment of training.

        Raises:
            PesoError: a file or a column is missing, or as :func:`peso.runs.checks.check_surroundings`; the
                message names the data set or run.
        """
        for run in {run.task.data.root: run for run in self.runs if run.task.data is not None}.values():
            assert run.task.data is not None
            if not Workspace(run.task.data.root, run.task.data.config).has_stream:
                try:
                    check_sources(run.task.config)
                except PesoError as error:
                    raise type(error)(f"data set {run.data}: {error}") from None
        self._of_each(lambda task: check_surroundings(task.workspace, data=False, models=models))

    def rehearse(self) -> None:
        """Check that every run can be trained, see :func:`peso.runs.checks.rehearse`.

        Raises:
            PesoError: a check failed; the message names the run.
        """
        seen = set[str]()

        def rehearsed(task: Task) -> None:
            workspace = task.workspace
            if 0 not in workspace.finished_stages:
                rehearse(workspace, seen)

        self._of_each(rehearsed)

    def _of_each(self, look: Callable[[Task], object]) -> None:
        """Call ``look`` with the task of every run, or with its trials."""
        for run in self.runs:
            for task in [run.task] if not run.candidates else [c.trial for c in run.candidates]:
                try:
                    look(task)
                except PesoError as error:
                    raise type(error)(f"{run.name}: {error}") from None


def make_plan(source: Path, root: Path, overrides: Sequence[str] = ()) -> Plan:
    """Make the plan of a comparison from its configuration file.

    Args:
        source: the configuration file.
        root: the output directory.
        overrides: as for ``--set``.

    Raises:
        ConfigError: an unknown key, an empty grid, two runs with the same name, or an invalid value.
        DataError: a data set does not exist.
    """
    tree, compare = load_comparison(source, overrides)
    common = load_config(tree, base=source.parent)
    seeds = {"data_seed": common.seed_of_data}
    if compare.share_base:
        seeds["base_seed"] = common.seed_of_stage(0)
    data = variants(compare.data, "data", "compare.data") or [Variant(_data_name(common))]
    backbones = variants(compare.backbones, "backbone", "compare.backbones")
    backbones = backbones or [Variant(_plain(common.backbone.name))]
    strategies = variants(compare.strategies, "strategy", "compare.strategies")
    for wide in variants(compare.grid, "strategy", "compare.grid"):
        strategies += grid(wide, f"compare.grid.{wide.name}")
    tuned = _trials(variants(compare.tune, "strategy", "compare.tune"))

    def resolve(seed: int, *chosen: Variant) -> Config:
        varied = tree
        for variant in chosen:
            varied = variant.apply(varied)
        try:
            return load_config({**varied, "seed": seed, **seeds}, base=source.parent)
        except ConfigError as error:
            raise ConfigError(f"{', '.join(variant.name for variant in chosen)}: {error}") from None

    runs, plain = [], dict[tuple[str, str, int], Config]()
    without = variants({UNCHANGED: UNCHANGED}, "strategy", "compare.strategies")[0]
    count = len(compare.seeds) * len(data) * len(backbones) * (len(strategies) + len(tuned))
    if count > MOST_VARIANTS:
        raise ConfigError(f"compare: {count:,} runs; at most {MOST_VARIANTS:,} can be compared at once")
    for seed, of_data, of_backbone in ((s, d, b) for s in compare.seeds for d in data for b in backbones):
        cell = (of_data.name, of_backbone.name)
        plain[(*cell, seed)] = resolve(seed, of_data, of_backbone, without)
        for strategy in strategies:
            config = resolve(seed, of_data, of_backbone, strategy)
            fixed = config.strategy.name == UNCHANGED and compare.share_base
            if fixed and seed != compare.seeds[0]:
                continue  # identical to the run with the first seed
            task = _task(root, "runs", (*cell, strategy.name), config)
            runs.append(Run(*cell, strategy.name, None if fixed else seed, task, strategy.options))
        for name, choices in tuned.items():
            candidates = []
            for choice in choices:
                trial = resolve(compare.seeds[0], of_data, of_backbone, choice)
                trial = trial.model_copy(update={"evaluation": EvaluationConfig(enabled=False)})
                tried = _task(root, "trials", (*cell, choice.name), trial)
                task = _task(root, "runs", (*cell, name), resolve(seed, of_data, of_backbone, choice))
                task = replace(task, base=tried) if seed == compare.seeds[0] else task
                label = choice.name.removeprefix(name).strip("[]")
                candidates.append(Candidate(label, choice.options, tried, task))
            runs.append(Run(*cell, name, seed, candidates[0].task, candidates=tuple(candidates)))
    _require_distinct(runs)
    for run in {run.data: run for run in runs}.values():
        _require_data(run)
    learning = [run for run in runs if run.task.config.strategy.name != UNCHANGED]
    names = {run.strategy for run in runs}
    fused = _named(compare.hybrid_with, names, "hybrid_with") if compare.hybrid_with else None
    fused = fused or {(learning or runs)[0].strategy}
    if compare.transfer is True:
        across = names - {name for name in names if "[" in name}
    else:
        across = _named(compare.transfer or [], names, "transfer")
    asked = compare.baselines
    return Plan(
        root,
        runs,
        common,
        compare,
        _baseline_runs(root, runs, plain, common.baselines if asked is None else asked, fused),
        [
            _transfer(run)
            for run in runs
            if run.strategy in across
            and run.seed in (None, compare.seeds[0])
            and run.task.config.evaluation.enabled
        ],
    )


def _named(asked: Sequence[str], names: Set[str], key: str) -> set[str]:
    """The strategies with these names; a grid's name stands for all its variants.

    Raises:
        ConfigError: there is no such strategy.
    """
    found = set[str]()
    for name in asked:
        meant = {one for one in names if one == name or one.startswith(f"{name}[")}
        if not meant:
            raise ConfigError(
                f"compare.{key}: {name!r} is not a strategy of this comparison; there are "
                f"{', '.join(sorted(names))}"
            )
        found |= meant
    return found


def _transfer(run: Run) -> Run:
    """The run that tests a run's models on the cases of the other stages."""

    def across(task: Task) -> Task:
        return Task(task.root, task.config, base=task, kind="transfer")

    candidates = tuple(replace(candidate, task=across(candidate.task)) for candidate in run.candidates)
    return replace(run, task=across(run.task), candidates=candidates)


def _baseline_runs(
    root: Path,
    runs: Sequence[Run],
    plain: Mapping[tuple[str, str, int], Config],
    configs: Sequence[BaselineOptions],
    fused: Set[str],
) -> list[Run]:
    """Each baseline on every data set and backbone: once if it is not random, else with each seed.

    Args:
        plain: for each data set, backbone and seed, the configuration without what strategies change.
    """
    cells: dict[tuple[str, str, int | None], Run] = {}
    for run in runs:
        cells.setdefault((run.data, run.backbone, run.seed), run)
    seeded = {key: run for key, run in cells.items() if key[2] is not None} or cells
    first = {(data, backbone): run for (data, backbone, _), run in reversed(seeded.items())}
    found = []

    def of(run: Run) -> Config:
        return plain[run.data, run.backbone, run.task.config.seed]

    for config in configs:
        if config.fused:
            found += [_hybrid(root, run, config) for run in runs if run.strategy in fused]
        elif is_random(config):
            found += [
                _plain_baseline(root, run, of(run), config, run.task.config.seed) for run in seeded.values()
            ]
        else:
            found += [_plain_baseline(root, run, of(run), config, None) for run in reversed(first.values())]
    return found


def _plain_baseline(root: Path, run: Run, plain: Config, config: BaselineOptions, seed: int | None) -> Run:
    """A baseline that needs only the data of a run; runs with other backbones share it. It is trained and
    tested as the configuration ``plain`` says, whatever the strategy of the run changes."""
    theirs, data = run.task.config, run.task.data
    assert data is not None
    own = Config(
        data=theirs.data,
        items=theirs.items,
        prompt=PromptConfig(window=plain.prompt.window),
        strategy=strategy_options(UNCHANGED),
        training=TrainingConfig(device=plain.training.device, users=plain.training.users),
        decoding=DecodingConfig(beams=plain.decoding.beams),
        evaluation=EvaluationConfig(k=plain.evaluation.k),
        seed=theirs.seed_of_data if seed is None else seed,
        data_seed=theirs.seed_of_data,
    )
    label = baseline_label(config)
    shaping = own.model_dump(mode="json", include={"prompt", "decoding", "seed"})
    # the other value is not written, as in earlier versions
    users = {} if own.training.users == "tested" else {"users": own.training.users}
    of_all = digest(str(data.root.name), shaping | users)
    place = root / "baselines" / run.data / _plain(label) / of_all[:8]
    task = Task(place, own, None, data, kind="baseline", baseline=config)
    return Run(run.data, run.backbone, label, seed, task)


def _hybrid(root: Path, run: Run, config: BaselineOptions) -> Run:
    """A hybrid with the model of a run; it takes over all stages of that run."""
    label = f"{baseline_label(config)} with {run.strategy}"

    def with_hybrid(task: Task) -> Task:
        place = root / "baselines" / run.data / _plain(label) / digest(str(task.root.relative_to(root)))[:8]
        return Task(place, task.config, None, task.data, task, "baseline", config)

    candidates = tuple(replace(candidate, task=with_hybrid(candidate.task)) for candidate in run.candidates)
    return replace(run, strategy=label, task=with_hybrid(run.task), options={}, candidates=candidates)


def _trials(tuned: Sequence[Variant]) -> dict[str, list[Variant]]:
    """The candidates of every tuned strategy. Raises ConfigError unless all have the same number, so that
    every strategy has the same budget."""
    trials = {wide.name: grid(wide, f"compare.tune.{wide.name}") for wide in tuned}
    if len({len(choices) for choices in trials.values()}) > 1:
        counts = ", ".join(f"{name} {len(choices)}" for name, choices in trials.items())
        raise ConfigError(
            f"compare.tune gives some strategies more trials than others ({counts}); give all as many"
        )
    return trials


def _task(root: Path, folder: str, names: tuple[str, str, str], config: Config) -> Task:
    """The task of a run, with the shared tasks for its data and base stage."""
    # with head.contents, semantic IDs are kept with the items' content vectors
    head = HeadConfig(name="items", contents=True) if config.head.contents else HeadConfig()
    data_config = Config(data=config.data, items=config.items, head=head, seed=config.seed_of_data)
    of_data = digest(data_config.model_dump(mode="json", include={"data", "items", "head", "seed"}))
    data = Task(root / "data" / names[0] / of_data[:8], data_config, -1)
    of_base = digest(of_data, stage_shape(config, 0), *_given(config))
    base = Task(root / "base" / names[0] / names[1] / of_base[:8], _base_config(config), 0, data)
    own = root / folder / names[0] / names[1] / _plain(names[2]) / f"seed={config.seed}"
    return Task(own, config, None, data, base)


def _given(config: Config) -> list[str]:
    """With ``backbone: auto``, the keys that are not chosen, because they differ from the chosen values even
    if they are given as the default."""
    if not config.backbone.is_auto:
        return []
    return [key for key, _ in leaves(given(config)) if not is_later(key)]


def _base_config(config: Config) -> Config:
    """The configuration of a shared base stage: settings of later stages have their defaults, so that it is
    equal for all runs that share it."""
    later = TrainingConfig().model_dump(include={"later_learning_rate_scale"}) | {
        "later": LaterTrainingConfig()
    }
    return config.model_copy(
        update={
            "adapter": AdapterConfig() if config.backbone.trained_at_base else config.adapter,
            "strategy": strategy_options(UNCHANGED),
            "training": config.training.model_copy(update=later),
            "evaluation": EvaluationConfig(k=config.evaluation.k),
            "seed": config.seed_of_stage(0),
            "data_seed": config.seed_of_data,
            "base_seed": None,
        }
    )


def _require_distinct(runs: Sequence[Run]) -> None:
    times = Counter(run.task.root for run in runs)
    twice = [run.name for run in runs if times[run.task.root] > 1]
    if twice:
        raise ConfigError(f"compare makes several runs called {twice[0]}; give each a different name")


def _require_data(run: Run) -> None:
    path = run.task.config.data.path
    if path is not None and not is_remote(path) and not Path(path).exists() and not matching(path):
        raise DataError(f"data set {run.data}: {path} does not exist; correct the path")


def _data_name(config: Config) -> str:
    path = config.data.path
    return _plain(Path(path).name if path else config.data.format)


def _plain(name: str) -> str:
    """A name without characters that are special in a shell: ``peso[weight=3]`` becomes ``peso,weight=3``."""
    return re.sub(r"[^\w.+=,-]+", "-", name.replace("[", ",").removesuffix("]")).strip("-")

"""Learning and testing the baselines of a workspace, stage by stage, skipping what is done.

    W/baselines/{label}/{t}/   model/ (of a network), predictions.parquet (after learning stage t),
                               static.parquet (of the state after stage 0), metrics.json, manifest.json

A stage's directory is written atomically. A run that is interrupted and started again gives the same
predictions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peso.config import Config
from peso.config.baselines import BASELINES, BaselineOptions, baseline_label, is_random, read_baseline
from peso.errors import ConfigError, WorkspaceError
from peso.evaluation.metrics import default_metrics, stage_metrics
from peso.evaluation.predictions import (
    Predictions,
    label_cases,
    make_predictions,
    read_predictions,
    write_predictions,
)
from peso.evaluation.run_summary import RunSummary, StageCost, StageSummary
from peso.events.histories import Stage
from peso.events.stream import Stream
from peso.items.semantic_ids import SemanticIds
from peso.runs.evaluate import require_enough_ids
from peso.runs.stage import METRICS, PREDICTIONS
from peso.runs.workspace import Workspace
from peso.runtime.files import commit_directory, digest, read_json_object, restore, size_of, write_json
from peso.runtime.machine import require_memory, threads
from peso.runtime.manifest import Manifest, all_intact, intact, read_manifest, write_manifest
from peso.runtime.progress import Observer, Silent
from peso.runtime.provenance import provenance

if TYPE_CHECKING:
    from peso.baselines.baseline import Answerer, Baseline, BaselineAnswers, Fusion

FORMAT = 1  # of the directory of a stage
STATIC, MODEL = "static.parquet", "model"


def check_data(config: Config, stream: Stream) -> None:
    """Check a configuration against the size of the log.

    Args:
        stream: the stream of the log.

    Raises:
        ConfigError: ``evaluation.k`` exceeds the number of items, or a baseline needs more memory than the
            machine has.
    """
    items, users = int(stream.manifest["items"]), max(int(stage["users"]) for stage in stream.counts)
    if config.evaluation.enabled and (asked := max(config.evaluation.k)) > items:
        raise ConfigError(f"evaluation.k asks for {asked} items, but the log has {items:,}; ask for fewer")
    window = config.prompt.window
    for options in config.baselines:
        what = f"baselines: {baseline_label(options)} for {items:,} items and {users:,} users"
        require_memory(options.memory(items, users, window), what)


class BaselineRun:
    """One baseline of a workspace, on the stages whose items have semantic IDs.

    Args:
        workspace: the workspace; methods that write need its lock.
        config: the baseline and its options.

    Raises:
        WorkspaceError: there are no semantic IDs yet.
    """

    def __init__(self, workspace: Workspace, config: BaselineOptions) -> None:
        self.workspace, self.config, self.label = workspace, config, baseline_label(config)
        self.directory = _directory(workspace, config)
        self.stream = workspace.stream
        self._known_ids: dict[int, SemanticIds] = {}  # by stage
        known = len(workspace.semantic_ids.item_ids)
        self.stages = [
            number
            for number, counts in enumerate(self.stream.counts)
            if self.stream.items_known(number) <= known and counts["test"]
        ]

    def stage_directory(self, stage: int) -> Path:
        return self.directory / str(stage)

    def is_done(self, stage: int) -> bool:
        """Whether there are predictions, made with these data, options and models.

        Raises:
            WorkspaceError: the directory of the stage is damaged, incomplete, or of another stage.
        """
        if not self.stage_directory(stage).exists():
            return False
        manifest = self._manifest(stage)
        for name in manifest["files"]:
            # weights may be missing: a run may be kept for its predictions only
            if not (manifest.directory / name).is_file() and not name.startswith(f"{MODEL}/"):
                raise WorkspaceError(
                    f"{manifest.directory / name} is missing; restore it from a copy, or remove "
                    f"{manifest.directory} and run the baseline again"
                )
        return manifest["determined_by"] == self.determination(stage)

    def _manifest(self, stage: int) -> Manifest:
        manifest = read_manifest(self.stage_directory(stage), FORMAT)
        config = read_baseline(manifest["baseline"])
        # an earlier version had other defaults, so another label, and one before it did not record the label
        labelled = config.name == self.config.name and manifest.get("label", self.label) == self.label
        same = config == self.config or labelled
        if not same or manifest["stage"] != stage:
            raise WorkspaceError(
                f"{manifest.directory} contains stage {manifest['stage']} of {baseline_label(config)}, not "
                f"stage {stage} of {self.label}; restore it from a copy, or remove it and run the baseline "
                "again"
            )
        return manifest

    def _file(self, stage: int, name: str) -> Path:
        return intact(self.stage_directory(stage), name, self._manifest(stage))

    def determination(self, stage: int) -> str:
        """Digest of everything that determines the predictions for a stage."""
        config = self.workspace.config
        result = digest(
            self.config.model_dump(mode="json"),
            config.seed,
            config.prompt.window,
            config.decoding.beams,
            [self.stream.fingerprint(number) for number in range(stage + 1)],
            self.ids(stage).fingerprint(self.stream.items_known(stage)),
        )
        revisions = [BASELINES.find(each.name).revision for each in (self.config, *self.config.fused)]
        if any(revisions):
            result = digest(result, revisions)
        if config.training.users != "tested":  # earlier versions did not have this key
            result = digest(result, config.training.users)
        if not self.config.fused:
            return result
        models = [self.workspace.stage(number) for number in sorted({0, stage})]
        return digest(result, [model.determined_by if model.is_trained else None for model in models])

    # -- learning and testing --------------------------------------------------------------------

    def run(self, observer: Observer) -> None:
        """Learn and test the stages that are not done.

        Raises:
            PesoError: as :meth:`prepare`.
        """
        self.prepare(observer)
        for stage in self.missing():
            self.learn_and_test(stage, observer)

    def prepare(self, observer: Observer) -> None:
        """Check the configuration, and run the partners of a hybrid.

        Raises:
            ConfigError: the log has fewer items than ``evaluation.k``, or the machine too little memory.
            DataError: there are fewer distinct semantic IDs than ``evaluation.k``.
            WorkspaceError: the baseline is a hybrid, and the workspace's model is not trained.
        """
        check_data(self.workspace.config.model_copy(update={"baselines": [self.config]}), self.stream)
        require_enough_ids(self.workspace.config, self.ids(0))
        if self.config.fused:
            self.workspace.trained(0)
            for partner in self.config.fused:
                BaselineRun(self.workspace, partner).run(observer)

    def missing(self) -> Iterator[int]:
        """The stages that are not done, in order. Lazy: a stage is checked when the iterator reaches it."""
        for stage in self.stages:
            model = self.workspace.stage(stage)
            if self.config.fused and (not model.is_trained or model.pruned is not None):
                continue
            restore(self.stage_directory(stage))
            if not self.is_done(stage):
                yield stage

    def learn_and_test(self, stage: int, observer: Observer) -> None:
        """Learn and test one stage, after the earlier ones, and commit its directory."""
        observer.begin(f"baseline {self.label}: stage {stage}", 0, "")
        number = self.workspace.config.training.threads
        with threads(number=number), commit_directory(self.stage_directory(stage)) as aside:
            began = time.perf_counter()
            learned: Answerer
            if self.config.fused:
                learned, figures = self._fused(stage, observer), dict[str, Any]()
            else:
                learned, figures = self._learn(stage, aside, observer)
            seconds = time.perf_counter() - began
            answers = {PREDICTIONS: self._test(learned, stage, observer)}
            if stage:
                answers[STATIC] = self._test(self.restored(0), stage, observer, state=0)
            metrics = default_metrics(self.workspace.config.evaluation.k)
            tests = {
                Path(name).stem: {
                    metric: estimate.as_json() for metric, estimate in stage_metrics(found, metrics).items()
                }
                for name, found in answers.items()
            }
            for name, found in answers.items():
                write_predictions(aside / name, found)
            write_json(aside / METRICS, {"stage": stage, "learning": figures, **tests})
            content = {
                "stage": stage,
                "baseline": self.config.model_dump(mode="json"),
                "label": self.label,
                "settings": learned.settings,
                "determined_by": self.determination(stage),
                "seconds": seconds,
                "bytes_on_disk": size_of(aside / MODEL),
                "seed": self.workspace.config.seed,
                **provenance(),
            }
            write_manifest(aside, FORMAT, content)

    def computed(self, stage: int) -> StageSummary:
        """The predictions for a stage of a baseline that needs no earlier state; nothing is stored."""
        learned, _ = self._learn(stage, None, Silent())
        found = self._test(learned, stage, Silent()).named(self.workspace.names)
        return self._summary(found, leaves_out_seen=not learned.repeats)

    def _summary(
        self, predictions: Predictions, cost: StageCost | None = None, *, leaves_out_seen: bool
    ) -> StageSummary:
        users = self.workspace.config.training.users
        return StageSummary(predictions, cost, leaves_out_seen=leaves_out_seen, target_users=users)

    def _learn(
        self, stage: int, aside: Path | None, observer: Observer
    ) -> tuple[BaselineAnswers, dict[str, Any]]:
        """Learn a stage from the state after the previous one, and store the result in ``aside`` if given."""
        from peso.baselines.baseline import BaselineAnswers, repeats_occur

        stages = self._until(stage)
        baseline = self._make(stage)
        if stage != self.stages[0] and aside is not None and baseline.continues:
            before = max(number for number in self.stages if number < stage)
            baseline.restore(self._model(before), stages[: before + 1])
        figures = baseline.learn(stages, observer)
        if aside is not None:
            (aside / MODEL).mkdir()
            baseline.save(aside / MODEL)
        validation = stages[-1].validation_cases(self.workspace.config.prompt.window)
        asked = baseline.options.repeats
        repeats = repeats_occur(stages) if asked == "auto" else asked == "keep"
        return BaselineAnswers.fitted(baseline, self.ids(stage).trie, validation, repeats=repeats), figures

    def _fused(self, stage: int, observer: Observer) -> Fusion:
        """The combination of the models after a stage, tuned on its validation cases."""
        fused = self._fusion(stage, {})
        if not fused.tunes:
            return fused
        settings = self.workspace.config
        cases = self.stream.stage(stage).validation_cases(settings.prompt.window)
        observer.begin(f"{self.label}: tune on validation of stage {stage}", len(cases), "users")
        tuned = fused.tuned(cases, settings.decoding.beams, observer.advance)
        observer.end()
        return tuned

    def restored(self, stage: int) -> Answerer:
        """The baseline in its state after a stage that is done."""
        from peso.baselines.baseline import BaselineAnswers

        settings = self._manifest(stage)["settings"]
        if self.config.fused:
            return self._fusion(stage, settings)
        baseline = self._make(stage)
        baseline.restore(self._model(stage), self._until(stage))
        return BaselineAnswers(baseline, self.ids(stage).trie, **settings)

    def ids(self, stage: int) -> SemanticIds:
        """The semantic IDs that the model of a stage uses, with which a hybrid combines the baseline. Later
        changes of the workspace do not change them."""
        if stage not in self._known_ids:
            self._known_ids[stage] = self.workspace.stage(stage).semantic_ids
        return self._known_ids[stage]

    def _model(self, stage: int) -> Path:
        """The directory of the stored state; every file is checked."""
        directory = self.stage_directory(stage)
        all_intact(directory, (MODEL,), self._manifest(stage))
        return directory / MODEL

    def _fusion(self, stage: int, settings: dict[str, Any]) -> Fusion:
        partners = [BaselineRun(self.workspace, partner).restored(stage) for partner in self.config.fused]
        model = self.workspace.stage(stage).answering_model()
        batch = self.workspace.config.decoding.batch_size
        return BASELINES.find(self.config.name).of(self.config, partners, model, settings, batch)

    def _make(self, stage: int) -> Baseline:
        from peso.baselines.baseline import Setting
        from peso.runtime.device import Precision

        settings = self.workspace.config
        device = Precision.of("float32", settings.training.device).device
        depth = settings.decoding.beams
        setting = Setting(self.ids(stage).trie, settings.prompt.window, settings.seed, device, depth)
        return BASELINES.find(self.config.name).of(self.config, setting)

    def _until(self, stage: int) -> list[Stage]:
        return [self.stream.stage(number) for number in range(stage + 1)]

    def _test(
        self, answerer: Answerer, number: int, observer: Observer, state: int | None = None
    ) -> Predictions:
        """Test the state after a stage (by default the same) on the cases of a stage."""
        settings = self.workspace.config
        *earlier, stage = self._until(number)
        cases = stage.test_cases(settings.prompt.window)
        observer.begin(f"{self.label}: test on stage {number}", len(cases), "users")
        found = answerer.answer(cases, settings.decoding.beams, observer.advance)
        observer.end()
        absent = ((0, 0), (0, settings.decoding.beams - found.leaves.shape[1]))  # if the catalog is small
        return make_predictions(
            cases,
            label_cases(earlier, stage),
            np.pad(found.leaves, absent, constant_values=-1),
            np.pad(found.scores, absent, constant_values=-np.inf),
            found.target_log_probability,
            self.ids(number if state is None else state),
        )

    def seconds(self, stage: int) -> float:
        """Time that learning took, for a stage that is done."""
        return float(self._manifest(stage)["seconds"])

    # -- results ---------------------------------------------------------------------------------

    def metrics(self, stage: int) -> Mapping[str, Any]:
        """The metrics of a stage that is done, by name."""
        return read_json_object(self._file(stage, METRICS))[Path(PREDICTIONS).stem]

    def _predictions(self, stage: int, name: str) -> Predictions:
        return read_predictions(self._file(stage, name)).named(self.workspace.names)

    def summaries(self) -> list[RunSummary]:
        """Summaries for a report: the baseline updated at every stage, and its state after stage 0
        (``static``).

        Only stages that are done are included; the list is empty if there are none.

        Raises:
            WorkspaceError: a file is damaged, or missing before the last stage that is there.
        """
        there = [stage for stage in self.stages if self.stage_directory(stage).exists()]
        for stage in self.stages:
            if there and stage < there[-1]:
                self._manifest(stage)  # raises if it is missing
        done = [stage for stage in self.stages if self.is_done(stage)]
        continual, static = {}, {}
        for stage in done:
            manifest = self._manifest(stage)
            size = manifest.get("bytes_on_disk", size_of(manifest.directory / MODEL))
            cost = StageCost(manifest["seconds"], bytes_on_disk=size)
            left_out = not manifest["settings"].get("repeats", True)
            continual[stage] = self._summary(
                self._predictions(stage, PREDICTIONS), cost, leaves_out_seen=left_out
            )
            static[stage] = continual[stage]
            if stage:
                static[stage] = self._summary(
                    self._predictions(stage, STATIC), leaves_out_seen=static[0].leaves_out_seen
                )
        seed = self.workspace.config.seed if is_random(self.config) else None
        frozen = f"{self.label} (static)"
        answers = {self.label: continual, **({frozen: static} if any(static) else {})}
        contains = bool(self.config.fused)
        return [
            RunSummary(name, name, stages, seed=seed, baseline=True, contains_model=contains)
            for name, stages in answers.items()
            if stages
        ]


def _directory(workspace: Workspace, config: BaselineOptions) -> Path:
    """The directory of a baseline, named by its label, or by the label that an earlier version with other
    defaults gave it."""
    root = workspace.root / "baselines"
    own = root / baseline_label(config)
    if not own.exists():
        for stage in sorted(root.glob(f"{config.name}*/0")):
            if read_baseline(read_manifest(stage, FORMAT)["baseline"]) == config:
                return stage.parent
    return own


def found_baselines(workspace: Workspace) -> list[BaselineOptions]:
    """The baselines with results in ``baselines/``, whether configured or not, in the order of their labels.

    Raises:
        WorkspaceError: a damaged manifest, or one of another baseline.
    """
    found = []
    for directory in sorted({stage.parent for stage in (workspace.root / "baselines").glob("[!.]*/[0-9]*")}):
        config = read_baseline(read_manifest(directory / "0", FORMAT)["baseline"])
        if directory.name.split()[0] != config.name:
            raise WorkspaceError(
                f"{directory / '0'} contains the baseline {config.name}; restore it from a copy, or remove "
                f"{directory} and run the baseline again"
            )
        found.append(config)
    return found


def run_cheap_baselines(workspace: Workspace, observer: Observer) -> None:
    """Run the configured baselines that take seconds (those without a random seed) up to the newest stage."""
    run_baselines(workspace, [c for c in workspace.config.baselines if not is_random(c)], observer)


def run_baselines(workspace: Workspace, configs: Sequence[BaselineOptions], observer: Observer) -> None:
    """Learn and test the missing stages of each baseline. The caller holds the workspace's lock."""
    for config in configs:
        BaselineRun(workspace, config).run(observer)


def baseline_summaries(workspace: Workspace, configs: Sequence[BaselineOptions]) -> list[RunSummary]:
    """The summaries of all baselines, for the stages that are done."""
    return [run for config in configs for run in BaselineRun(workspace, config).summaries()]

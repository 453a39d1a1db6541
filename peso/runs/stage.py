"""One stage of a workspace: its files, checked against their sha256 when read, its tests, its model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from peso.config import Config
from peso.config.reading import with_earlier_defaults
from peso.config.shape import moved, stage_shape
from peso.errors import WorkspaceError
from peso.events.histories import Cases, Part
from peso.runtime.files import digest, read_json_lines, read_json_object
from peso.runtime.machine import require_device
from peso.runtime.manifest import MANIFEST, REPLACING, Manifest, intact, is_listed, read_manifest

if TYPE_CHECKING:
    from peso.evaluation.predictions import Predictions
    from peso.model.generative import GenerativeModel
    from peso.runs.workspace import Workspace

VALIDATION: Part = "validation"  # also the folder of tests on validation cases
VERDICT = "gate.json"  # of the gate (peso.runs.challenger)
PREDICTIONS, METRICS, LOG = "predictions.parquet", "metrics.json", "log.jsonl"
ERASURES = "erasures"  # in the manifest: how many users had been erased when the stage was trained
PRUNED = "pruned"  # in the manifest: when the weights were removed, and their checksums
FORMAT = 1  # of a stage directory; a higher number was written by a newer version


@dataclass(frozen=True)
class RunStage:
    """A stage of a workspace, trained or not. Every member that reads files raises WorkspaceError where one
    is missing or damaged."""

    workspace: Workspace
    number: int

    @property
    def directory(self) -> Path:
        return self.workspace.root / "stages" / str(self.number)

    @property
    def unfinished(self) -> Path:
        """Where the stage keeps its checkpoints during training; gone once it is committed."""
        return self.workspace.root / "stages" / f".{self.number}.unfinished"

    @property
    def is_trained(self) -> bool:
        return self.number in self.workspace.finished_stages

    @property
    def before(self) -> RunStage:
        return replace(self, number=self.number - 1)

    # -- how it was trained ----------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """
        Raises:
            WorkspaceError: also where it is of another stage or run: something was copied over it.
        """
        manifest = read_manifest(self.directory, FORMAT)
        cure = (
            "restore it from a copy, or remove it and the stages after it from "
            f"{self.workspace.root} and train again"
        )
        if (number := manifest.get("stage", self.number)) != self.number:
            raise WorkspaceError(f"{self.directory} holds stage {number}, not stage {self.number}; {cure}")
        if (parent := manifest.get("parent")) is not None:
            before = read_manifest(self.before.directory, FORMAT)
            if parent["determined_by"] != before["determined_by"]:
                raise WorkspaceError(
                    f"{self.directory} was not trained from {before.directory}, but from a stage of another "
                    f"run; {cure}"
                )
        return manifest

    @property
    def config(self) -> Config:
        """The configuration that the stage was trained with."""
        try:
            return Config.model_validate(with_earlier_defaults(self.manifest["configuration"]))
        except (KeyError, ValidationError):
            raise WorkspaceError(
                f"{self.directory / MANIFEST} is damaged: it does not hold the configuration of the stage; "
                f"remove {self.directory} and the stages after it, and train again"
            ) from None

    @property
    def weight_files(self) -> list[str]:
        """Names of the files of its model, and of what its strategy keeps."""
        others = (LOG, METRICS, PREDICTIONS, VERDICT)
        return [name for name in self.manifest["files"] if not name.endswith(others)]

    @property
    def pruned(self) -> dict[str, Any] | None:
        """Of a stage whose weights `peso prune` has removed: ``time`` and ``files``."""
        pruned: dict[str, Any] | None = self.manifest.get(PRUNED)
        return pruned

    def require_weights(self) -> None:
        """Raise WorkspaceError if the weights were pruned."""
        if (pruned := self.pruned) is not None:
            raise WorkspaceError(
                f"the weights of stage {self.number} of {self.workspace.root} were removed by `peso prune` "
                f"({pruned['time']}); take a stage that has its weights (`peso status -w "
                f"{self.workspace.root}`), or restore {self.directory} from a copy"
            )

    @property
    def as_trained(self) -> RunStage:
        """The stage in a workspace with the configuration that the stage was trained with, on the device and
        with the place of the backbone of now."""
        return replace(self, workspace=self.workspace.with_config(moved(self.config, self.workspace.config)))

    @property
    def determined_by(self) -> str:
        """The digest that :meth:`determination` gave when the stage was trained."""
        return str(self.manifest["determined_by"])

    def determination(self, like: Config | None = None) -> str:
        """Digest of all that determines the stage: configuration, its data, the codes, and the stage before.

        Args:
            like: a configuration whose device and place of the backbone are put in place of those here.

        Stages of equal digest have equal files, on the same hardware and versions. Of the codes those count
        that the catalog had when the stage came: items that are appended later change no earlier stage. No
        model is loaded.
        """
        before = None
        if self.number:
            trained = self.before.is_trained
            before = self.before.determined_by if trained else self.before.determination(like)
        stream = self.workspace.stream
        codes = self.workspace.semantic_ids.fingerprint(stream.items_known(self.number))
        config = self.workspace.config
        shape = stage_shape(moved(config, like or config), self.number)
        # users who were erased after the stage was trained do not make it another one
        erasures = int(self.manifest.get(ERASURES, 0)) if self.is_trained else stream.erasures
        less = [[stream.fingerprint(n, erasures) for n in range(self.number + 1)]] if erasures else []
        return digest(shape, stream.fingerprint(self.number, erasures), codes, before, *less)

    def require_as_determined(self) -> None:
        """Raise WorkspaceError if data, semantic IDs, configuration or stage before are not those that the
        stage was trained with."""
        if self.determined_by != self.as_trained.determination(like=self.config):
            raise WorkspaceError(
                f"{self.directory} was not trained with the stream, the semantic IDs and the stages before "
                f"it that are in {self.workspace.root}: a part was exchanged or edited. Restore it, or "
                "remove the stage and those after it, and train again"
            )

    @property
    def leaves_out_seen(self) -> bool:
        """Whether its model recommends no item that the user has had (``decoding.repeats``)."""
        rule, stream = self.workspace.config.decoding.repeats, self.workspace.stream
        if rule != "auto":
            return rule == "leave-out"
        known = tuple(stream.fingerprint(n) for n in range(min(self.number + 1, stream.stages)))
        return not _repeats_occur(stream.directory, known)

    # -- what it left ----------------------------------------------------------------------------

    def file(self, name: str) -> Path | None:
        """A file of the stage, checked; None where the stage has no such file."""
        manifest = self.manifest
        if not is_listed(self.directory, name, manifest):
            return None
        return intact(self.directory, name, manifest, self._cure(name))

    @property
    def metrics(self) -> dict[str, Any]:
        """``metrics.json``: of its training and its test on its own cases; {} where there is none."""
        return self.on(self.number).metrics

    @property
    def verdict(self) -> dict[str, Any] | None:
        """``gate.json``, what the gate decided about it (:mod:`peso.runs.challenger`); None: it was not
        judged."""
        from peso.evaluation.verdict import read_verdict

        path = self.file(VERDICT)
        return None if path is None else read_verdict(path)

    @property
    def training(self) -> dict[str, Any]:
        """What its metrics say of its training, {} where nothing was trained."""
        return self.metrics.get("training") or {}

    @property
    def predictions(self) -> Predictions:
        """Its answers to its own test cases."""
        return self.on(self.number).predictions

    @property
    def log(self) -> list[dict[str, Any]]:
        """The records of ``log.jsonl``, [] where nothing was trained."""
        path = self.file(LOG)
        return [] if path is None else read_json_lines(path)

    def on(self, cases: int, part: Part = "test") -> StageTest:
        """The test of the stage's model on the test (or validation) cases of a stage."""
        return StageTest(self, cases, part)

    @property
    def is_tested(self) -> bool:
        """Whether its model is tested on its own cases, see :meth:`StageTest.is_done`."""
        return self.on(self.number).is_done

    def require_answers(self) -> None:
        """Raise WorkspaceError if a file that a report needs is missing. (Weights may be: a run is sometimes
        kept for its answers alone.)"""
        for name in self.manifest["files"]:
            path = self.directory / name
            if (
                VALIDATION not in name.split("/")
                and name.endswith((LOG, METRICS, PREDICTIONS))
                and not path.is_file()
            ):
                raise WorkspaceError(f"{path} is missing; {self._cure(name)}")

    def _cure(self, name: str) -> str:
        """What to do if a file is missing or damaged."""
        on, _, file = name.rpartition("/")
        if name == VERDICT or VALIDATION in on.split("/"):
            return (
                "restore it from a copy, or remove it, and the gate decides again where this stage is the "
                f"newest: `peso update -w {self.workspace.root}`"
            )
        if on.startswith("on=") or file == PREDICTIONS:
            again = (
                f"peso evaluate -w {self.workspace.root} --stage {self.number} {on.replace('on=', '--on ')}"
            )
            return f"restore it from a copy, or remove it and evaluate again: `{again.strip()}`"
        return f"restore it from a copy, or remove {self.directory} and those after it, and train again"

    def model(self, device: str | None = None) -> GenerativeModel:
        """The model as it stood after the stage, in evaluation mode, on ``device`` (default: as configured).

        Raises:
            WorkspaceError: the stage is not trained, or its files are damaged.
            BackboneError: the backbone cannot be loaded or is not the one that the stage was trained on.
        """
        require_device(device or self.workspace.config.training.device)
        from peso.runs.models import trained_model

        return trained_model(self, device)

    def answering_model(self, device: str | None = None) -> GenerativeModel:
        """As :meth:`model`, without adapters, which answers faster (:mod:`peso.model.inference`)."""
        from peso.model.inference import for_inference

        answering: GenerativeModel = for_inference(self.model(device))
        return answering


@dataclass(frozen=True)
class StageTest:
    """The test of a stage's model on the test cases of stage ``cases``, or on its validation cases; it need
    not be made yet."""

    stage: RunStage
    cases: int
    part: Part = "test"

    def name(self, file: str) -> str:
        """Of one of its files, as the stage's manifest lists it."""
        folder = "" if self.cases == self.stage.number else f"on={self.cases}/"
        return f"{folder}{VALIDATION}/{file}" if self.part == VALIDATION else f"{folder}{file}"

    @property
    def is_own(self) -> bool:
        """Whether it shares ``metrics.json`` with the stage's training."""
        return self.name(METRICS) == METRICS

    @property
    def has_cases(self) -> bool:
        """Whether there are cases to test on; :mod:`peso.runs.forget` may have erased all of a stage."""
        return self.stage.workspace.stream.counts[self.cases][self.part] > 0

    def read_cases(self, window: int) -> Cases:
        """The cases themselves."""
        return self.stage.workspace.stream.stage(self.cases).cases(self.part, window)

    def path(self, file: str) -> Path:
        return self.stage.directory / self.name(file)

    @property
    def metrics(self) -> dict[str, Any]:
        """Its ``metrics.json``, {} where there is none. Raises WorkspaceError if it is damaged or missing."""
        path = self.stage.file(self.name(METRICS))
        return {} if path is None else read_json_object(path)

    @property
    def known_metrics(self) -> dict[str, Any]:
        """As :attr:`metrics`; what a test alone has written can be missing: it is then made again."""
        if not self.is_own and not self.path(METRICS).is_file():
            return {}
        return self.metrics

    @property
    def predictions(self) -> Predictions:
        """Raises WorkspaceError if they are damaged or missing."""
        from peso.evaluation.predictions import read_predictions

        path = self.stage.file(self.name(PREDICTIONS))
        assert path is not None
        return read_predictions(path)

    @property
    def determination(self) -> str:
        """Digest of all that determines the predictions."""
        workspace = self.stage.workspace
        data = workspace.stream.fingerprint(self.cases)
        # earlier versions, whose answers stay, kept what users had had
        rule = ["leave-out"] if self.stage.leaves_out_seen else []
        part = [] if self.part == "test" else [self.part]
        return digest(self.stage.determined_by, data, workspace.config.decoding.beams, *rule, *part)

    @property
    def is_predicted(self) -> bool:
        """Whether predictions are there that belong to this model, these cases and this search."""
        tested = self.known_metrics.get("test", {})
        manifest, name = self.stage.manifest, self.name(PREDICTIONS)
        return bool(
            tested
            and tested["determined_by"] == self.determination
            and self.path(PREDICTIONS).is_file()
            # a step that was killed may have left answers of its own; older metrics do not tell theirs
            and name in manifest["files"]
            and name not in manifest.get(REPLACING, {})
            and tested.get("predictions", manifest["files"][name]) == manifest["files"][name]
        )

    @property
    def is_done(self) -> bool:
        """Whether predictions and metrics are there and belong to this model, these cases and this search.

        Raises:
            WorkspaceError: metrics.json is damaged.
        """
        if not self.stage.is_trained or not self.is_predicted:
            return False
        return set(self.stage.workspace.config.evaluation.k) == set(self.known_metrics["test"]["k"])


@lru_cache(maxsize=64)
def _repeats_occur(directory: Path, fingerprints: tuple[str, ...]) -> bool:
    """Of the first stages of a stream, as many as there are fingerprints."""
    from peso.baselines.baseline import has_repeats
    from peso.events.stream import Stream

    stream, newest = Stream.open(directory), len(fingerprints) - 1
    return any(
        has_repeats(users, trained_on=number == newest)
        for number in range(len(fingerprints))
        for users in stream.pieces(number)
    )

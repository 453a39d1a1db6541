"""One stage of a workspace: its files (checked against their sha256 when read), tests and model."""

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
from peso.events.histories import Cases, Part, TargetUsers
from peso.runtime.files import digest, read_json_lines, read_json_object
from peso.runtime.machine import require_device
from peso.runtime.manifest import MANIFEST, REPLACING, Manifest, intact, is_listed, read_manifest
from peso.runtime.processes import ALONE, Processes

if TYPE_CHECKING:
    from peso.evaluation.predictions import Predictions
    from peso.items.semantic_ids import SemanticIds
    from peso.model.generative import GenerativeModel
    from peso.runs.workspace import Workspace

VALIDATION: Part = "validation"  # also the name of the folder of tests on validation cases
VERDICT = "gate.json"  # written by peso.runs.challenger
PREDICTIONS, METRICS, LOG = "predictions.parquet", "metrics.json", "log.jsonl"
# manifest keys, with items.refresh: see RunStage.codes_of, and how many items changed codes
CODES_OF, CHANGED_CODES = "codes_of", "changed_codes"
ERASURES = "erasures"  # manifest key: number of users that had been erased when the stage was trained
PRUNED = "pruned"  # manifest key: when the weights were removed, and their checksums
FORMAT = 1  # of a stage directory; newer versions may write higher numbers


@dataclass(frozen=True)
class RunStage:
    """A stage of a workspace, trained or not. Members that read a file raise WorkspaceError if it is missing
    or damaged.

    Attributes:
        workspace: the workspace.
        number: the stage's number, from 0.
    """

    workspace: Workspace
    number: int

    @property
    def directory(self) -> Path:
        return self.workspace.root / "stages" / str(self.number)

    @property
    def unfinished(self) -> Path:
        """The directory of checkpoints during training; removed when the stage is committed."""
        return self.workspace.root / "stages" / f".{self.number}.unfinished"

    @property
    def is_trained(self) -> bool:
        return self.number in self.workspace.finished_stages

    @property
    def before(self) -> RunStage:
        return replace(self, number=self.number - 1)

    @property
    def codes_of(self) -> int:
        """The stage whose semantic IDs the model uses. It is another one only if the codes are refreshed and
        the strategy trains nothing: the model then keeps the codes that it was trained with."""
        if not self.number or self.workspace.config.items.refresh is None:
            return self.number
        stage = self
        if self.is_trained:
            if (known := self.manifest.get(CODES_OF)) is not None:
                return int(known)
            stage = self.as_trained  # taken over from a workspace without items.refresh
        from peso.runs.trust import strategy_of

        learns = strategy_of(stage.workspace).learns(self.number)
        return self.number if learns else self.before.codes_of

    @property
    def semantic_ids(self) -> SemanticIds:
        """The semantic IDs that the model of the stage uses. Raises WorkspaceError if there are none yet."""
        return self.workspace.semantic_ids_at(self.codes_of)

    # -- how it was trained ----------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """The manifest of the stage.

        Raises:
            WorkspaceError: it is missing or damaged, or belongs to another stage or run.
        """
        manifest = read_manifest(self.directory, FORMAT)
        cure = (
            "restore it from a copy, or remove it and the stages after it from "
            f"{self.workspace.root} and train again"
        )
        if (number := manifest.get("stage", self.number)) != self.number:
            raise WorkspaceError(f"{self.directory} contains stage {number}, not stage {self.number}; {cure}")
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
        """The configuration with which the stage was trained."""
        try:
            return Config.model_validate(with_earlier_defaults(self.manifest["configuration"]))
        except (KeyError, ValidationError):
            raise WorkspaceError(
                f"{self.directory / MANIFEST} is damaged: it has no valid configuration of the stage; "
                f"remove {self.directory} and the stages after it, and train again"
            ) from None

    @property
    def weight_files(self) -> list[str]:
        """Names of the files of its model and of its strategy's memory."""
        others = (LOG, METRICS, PREDICTIONS, VERDICT)
        return [name for name in self.manifest["files"] if not name.endswith(others)]

    @property
    def pruned(self) -> dict[str, Any] | None:
        """``time`` and ``files`` if `peso prune` has removed the weights; else None."""
        pruned: dict[str, Any] | None = self.manifest.get(PRUNED)
        return pruned

    def require_weights(self) -> None:
        """Raise WorkspaceError if the weights were pruned."""
        if (pruned := self.pruned) is not None:
            raise WorkspaceError(
                f"the weights of stage {self.number} of {self.workspace.root} were removed by `peso prune` "
                f"({pruned['time']}); choose a stage that has its weights (`peso status -w "
                f"{self.workspace.root}`), or restore {self.directory} from a copy"
            )

    def require_intact_weights(self) -> None:
        """Raise WorkspaceError if the weights were pruned, or one of their files is missing or damaged."""
        self.require_weights()
        manifest = self.manifest
        for name in self.weight_files:
            intact(self.directory, name, manifest)

    @property
    def as_trained(self) -> RunStage:
        """The stage, in a workspace with the configuration with which it was trained, except for the current
        device and path of the backbone."""
        return replace(self, workspace=self.workspace.with_config(moved(self.config, self.workspace.config)))

    @property
    def determined_by(self) -> str:
        """The value of :meth:`determination` when the stage was trained."""
        return str(self.manifest["determined_by"])

    def determination(self, like: Config | None = None) -> str:
        """Digest of everything that determines the stage: configuration, data, semantic IDs of the items
        known at this stage, and the previous stage.

        Stages with equal digests have equal files, on the same hardware and versions. No model is loaded.

        Args:
            like: a configuration from which device and path of the backbone are taken instead.
        """
        before = None
        if self.number:
            trained = self.before.is_trained
            before = self.before.determined_by if trained else self.before.determination(like)
        stream = self.workspace.stream
        ids, known = self.semantic_ids, stream.items_known(self.number)
        config, codes = self.workspace.config, ids.fingerprint(known)
        contents = [["contents", ids.fingerprint_of_contents(known)]] if config.head.contents else []
        shape = stage_shape(moved(config, like or config), self.number)
        # users that were erased after the stage was trained do not change its digest
        erasures = int(self.manifest.get(ERASURES, 0)) if self.is_trained else stream.erasures
        less = [[stream.fingerprint(n, erasures) for n in range(self.number + 1)]] if erasures else []
        return digest(shape, stream.fingerprint(self.number, erasures), codes, before, *less, *contents)

    def require_as_determined(self) -> None:
        """Raise WorkspaceError if data, semantic IDs or earlier stages are not those with which the stage was
        trained."""
        if self.determined_by != self.as_trained.determination(like=self.config):
            raise WorkspaceError(
                f"{self.directory} was not trained with the stream, the semantic IDs and the earlier stages "
                f"in {self.workspace.root}: a part was replaced or edited. Restore it, or remove the stage "
                "and those after it, and train again"
            )

    @property
    def leaves_out_seen(self) -> bool:
        """Whether the model does not recommend items that the user has had (``decoding.repeats``)."""
        rule, stream = self.workspace.config.decoding.repeats, self.workspace.stream
        if rule != "auto":
            return rule == "leave-out"
        known = tuple(stream.fingerprint(n) for n in range(min(self.number + 1, stream.stages)))
        return not _repeats_occur(stream.directory, known, stream.target_users)

    # -- results ---------------------------------------------------------------------------------

    def file(self, name: str) -> Path | None:
        """The checked path of a file of the stage; None if its manifest does not list it."""
        manifest = self.manifest
        if not is_listed(self.directory, name, manifest):
            return None
        return intact(self.directory, name, manifest, self._cure(name))

    @property
    def metrics(self) -> dict[str, Any]:
        """``metrics.json``: of its training and its test on its own cases; {} if there is none."""
        return self.on(self.number).metrics

    @property
    def verdict(self) -> dict[str, Any] | None:
        """``gate.json``, the verdict of the gate (:mod:`peso.runs.challenger`); None: it was not judged."""
        from peso.evaluation.verdict import read_verdict

        path = self.file(VERDICT)
        return None if path is None else read_verdict(path)

    @property
    def training(self) -> dict[str, Any]:
        """The part ``training`` of its metrics; {} if nothing was trained."""
        return self.metrics.get("training") or {}

    @property
    def predictions(self) -> Predictions:
        """Its predictions on its own test cases."""
        return self.on(self.number).predictions

    @property
    def log(self) -> list[dict[str, Any]]:
        """The records of ``log.jsonl``; [] if nothing was trained."""
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
        """Raise WorkspaceError if a file that a report needs is missing. Weights may be missing: a run may be
        kept for its predictions only."""
        for name in self.manifest["files"]:
            path = self.directory / name
            if (
                VALIDATION not in name.split("/")
                and name.endswith((LOG, METRICS, PREDICTIONS))
                and not path.is_file()
            ):
                raise WorkspaceError(f"{path} is missing; {self._cure(name)}")

    def _cure(self, name: str) -> str:
        """The fix, for messages, if a file is missing or damaged."""
        on, _, file = name.rpartition("/")
        if name == VERDICT or VALIDATION in on.split("/"):
            return (
                "restore it from a copy, or remove it; if this stage is the newest, the gate then decides "
                f"again: `peso update -w {self.workspace.root}`"
            )
        if on.startswith("on=") or file == PREDICTIONS:
            again = (
                f"peso evaluate -w {self.workspace.root} --stage {self.number} {on.replace('on=', '--on ')}"
            )
            return f"restore it from a copy, or remove it and evaluate again: `{again.strip()}`"
        return f"restore it from a copy, or remove {self.directory} and those after it, and train again"

    def model(self, device: str | None = None) -> GenerativeModel:
        """The model after the stage, in evaluation mode, on ``device`` (default: as configured).

        Raises:
            WorkspaceError: the stage is not trained, or its files are damaged.
            BackboneError: the backbone cannot be loaded or is not the one that the stage was trained on.
        """
        require_device(device or self.workspace.config.training.device)
        from peso.runs.models import trained_model

        return trained_model(self, device)

    def answering_model(self, device: str | None = None, processes: Processes = ALONE) -> GenerativeModel:
        """As :meth:`model`, with merged adapters for faster inference (:mod:`peso.model.inference`).

        Args:
            processes: the processes that answer together, each of which calls this. With
                ``training.sharding: full``, they share the weights.
        """
        require_device(device or self.workspace.config.training.device)
        from peso.runs.models import answering_model

        return answering_model(self, device, processes)


@dataclass(frozen=True)
class StageTest:
    """The test of a stage's model on the test (or validation) cases of a stage, done or not.

    Attributes:
        stage: the stage whose model is tested.
        cases: the number of the stage whose cases are used.
        part: ``test`` or ``validation``.
    """

    stage: RunStage
    cases: int
    part: Part = "test"

    def name(self, file: str) -> str:
        """The name of one of its files in the stage's manifest."""
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
        """The cases, with the last ``window`` items of each history."""
        return self.stage.workspace.stream.stage(self.cases).cases(self.part, window)

    def path(self, file: str) -> Path:
        return self.stage.directory / self.name(file)

    @property
    def metrics(self) -> dict[str, Any]:
        """Its ``metrics.json``, {} if not listed. Raises WorkspaceError if it is damaged or missing."""
        path = self.stage.file(self.name(METRICS))
        return {} if path is None else read_json_object(path)

    @property
    def known_metrics(self) -> dict[str, Any]:
        """As :attr:`metrics`, but {} if the file is missing and can be computed again."""
        if not self.is_own and not self.path(METRICS).is_file():
            return {}
        return self.metrics

    @property
    def predictions(self) -> Predictions:
        """The predictions, with the current names of renamed items; their file has the ids of the stream.

        Raises:
            WorkspaceError: the test is not done, or the file is damaged or missing.
        """
        from peso.evaluation.predictions import read_predictions

        path = self.stage.file(self.name(PREDICTIONS))
        if path is None:
            number, root = self.stage.number, self.stage.workspace.root
            again = f"peso evaluate -w {root} --stage {number} --on {self.cases}"
            raise WorkspaceError(
                f"stage {number} of {root} is not tested on the {self.part} cases of stage {self.cases} yet; "
                f"run `{again if self.part == 'test' else f'peso update -w {root}'}` first"
            )
        return read_predictions(path).named(self.stage.workspace.names)

    @property
    def determination(self) -> str:
        """Digest of everything that determines the predictions."""
        workspace = self.stage.workspace
        data = workspace.stream.fingerprint(self.cases)
        # only if set, so that predictions of earlier versions, which had no such rule, stay valid
        rule = ["leave-out"] if self.stage.leaves_out_seen else []
        part = [] if self.part == "test" else [self.part]
        return digest(self.stage.determined_by, data, workspace.config.decoding.beams, *rule, *part)

    @property
    def is_predicted(self) -> bool:
        """Whether there are predictions made with this model, these cases and this search."""
        tested = self.known_metrics.get("test", {})
        manifest, name = self.stage.manifest, self.name(PREDICTIONS)
        return bool(
            tested
            and tested["determined_by"] == self.determination
            and self.path(PREDICTIONS).is_file()
            # a killed evaluation may have replaced the file; metrics of old versions do not have its checksum
            and name in manifest["files"]
            and name not in manifest.get(REPLACING, {})
            and tested.get("predictions", manifest["files"][name]) == manifest["files"][name]
        )

    @property
    def is_done(self) -> bool:
        """Whether there are predictions and metrics for this model, these cases and this search.

        Raises:
            WorkspaceError: metrics.json is damaged.
        """
        if not self.stage.is_trained or not self.is_predicted:
            return False
        return set(self.stage.workspace.config.evaluation.k) == set(self.known_metrics["test"]["k"])


@lru_cache(maxsize=64)
def _repeats_occur(directory: Path, fingerprints: tuple[str, ...], users: TargetUsers) -> bool:
    """Whether a user has an item twice in the first stages of a stream, as many as there are fingerprints."""
    from peso.baselines.baseline import has_repeats
    from peso.events.stream import Stream

    stream, newest = Stream.open(directory, users), len(fingerprints) - 1
    return any(
        has_repeats(piece, trained_on=number == newest)
        for number in range(len(fingerprints))
        for piece in stream.pieces(number)
    )

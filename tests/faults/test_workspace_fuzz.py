"""Files of a finished workspace, damaged at random: a command gives the result of before, or an error that
says what is the matter; never another result, never a traceback.

``config.yaml`` is left out: it is the user's to edit. What differs there from the finished stages is refused
(test_configuration.py).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from fuzzing import ALL_SECONDS, at_most, fuzz_settings
from hypothesis import given
from hypothesis import strategies as st

from peso.errors import PesoError
from peso.model.export import export_merged
from peso.runs import evaluate, report
from peso.runs.diagnosis import diagnose
from peso.runs.recommender import Recommender
from peso.runs.workspace import Workspace
from peso.runtime.files import checksum
from peso.runtime.progress import Silent

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(int(ALL_SECONDS * 4) + 300)]
NOT_CHECKED = ("config.yaml", ".lock", "report/")


@dataclass(frozen=True)
class Damage:
    """``file`` and ``other`` are places in the list of files, ``at`` a place within the file."""

    kind: str
    file: float
    other: float
    at: float
    bit: int

    def do(self, root: Path) -> str:
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        files = [name for name in files if not name.startswith(NOT_CHECKED)]
        path, other = (root / files[int(place * len(files))] for place in (self.file, self.other))
        content = bytearray(path.read_bytes())
        place = int(self.at * len(content))
        if self.kind == "flip" and content:
            content[place] ^= 1 << self.bit
        if self.kind == "cut":
            del content[place:]
        if self.kind == "copy":
            content = bytearray(other.read_bytes())
        path.write_bytes(content)
        if self.kind == "remove":
            path.unlink()
        return f"{self.kind} {path.relative_to(root)}"


unit = st.floats(0, 1, exclude_max=True)
damages = st.builds(
    Damage, st.sampled_from(["flip", "flip", "cut", "remove", "copy"]), unit, unit, unit, st.integers(0, 7)
)


def recommended(root: Path) -> Any:
    return Recommender.load(root).recommend(history=["i1", "i2"], k=5)


def reported(root: Path) -> Any:
    runs = report.runs_of([Workspace.open(root)])
    return [
        (
            run.name,
            run.drift,
            run.semantic_ids,
            [dict(manifest) for manifest in run.manifests],
            {
                # a run may be kept without its weights: then their size is not known
                stage: (
                    told.cost and replace(told.cost, bytes_on_disk=None),
                    told.anchor,
                    repr(told.curve),
                    told.predictions.scores,
                )
                for stage, told in run.stages.items()
            },
            {pair: answers.items for pair, answers in run.across.items()},
        )
        for run in runs
    ], report.run_table(runs, [5, 10])


def exported(root: Path) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        export_merged(Recommender.load(root, stage=1).model, Path(directory) / "model")
        return {path.name: checksum(path) for path in Path(directory).rglob("*") if path.is_file()}


def evaluated(root: Path) -> Any:
    workspace = Workspace.open(root)
    return [evaluate.test(workspace.stage(stage).on(on), Silent()) for stage, on in ((1, 1), (1, 2), (2, 2))]


# the last one may write what is missing
USES: tuple[Callable[[Path], Any], ...] = (
    recommended,
    reported,
    lambda root: diagnose(Workspace.open(root)),
    exported,
    evaluated,
)


@cache
def expected(root: Path) -> list[str]:
    return [repr(use(root)) for use in USES]


@given(done=st.lists(damages, min_size=1, max_size=3))
@fuzz_settings(ALL_SECONDS, most_a_second=4)
@partial(at_most, ALL_SECONDS)
def test_damage_is_said_or_changes_nothing(every_file: Path, done: list[Damage]) -> None:
    before = expected(every_file)
    with tempfile.TemporaryDirectory() as directory:
        root = shutil.copytree(every_file, Path(directory) / "w")
        what = [damage.do(root) for damage in done]
        for use, result in zip(USES, before, strict=True):
            try:
                found = repr(use(root))
            except PesoError:
                continue
            assert found == result, what

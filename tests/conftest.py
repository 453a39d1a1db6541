"""Where tests find real data, and models small enough to build for each of them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from peso.cli import app as cli  # before PyTorch: peso decides how threads wait

# isort: split
import pytest
import torch
from browser import browser  # noqa: F401 - a fixture
from catalogs import random_semantic_ids
from every_file import make_every_file
from hypothesis import HealthCheck, settings
from plugins import install  # noqa: F401 - a fixture
from strategy_runs import Runs

from peso.evaluation.report import page, plots
from peso.model.backbone import byte_tokenizer, small_llama
from peso.model.generative import GenerativeModel
from peso.model.layout import make_layout
from peso.model.vocabulary import SemanticVocabulary

# ranx would compile its metrics for minutes, and processes that fill numba's cache at once fail
os.environ["NUMBA_DISABLE_JIT"] = "1"
# no test depends on how fast the machine is
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Full collections of garbage, which servers ask for at every new stage, pass over what imports made."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries check at exit that nothing of theirs is left


ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PESO_DATA", ROOT.parent / "shared" / "data"))


def _folder(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"real data not at hand: {folder} (set PESO_DATA to the folder that holds it)")
    return folder


@pytest.fixture(scope="session")
def release_dir() -> Path:
    return _folder("peso_release/Video_Games_cl_0.6_0_5_3_0")


@pytest.fixture(scope="session")
def movietweetings_dir() -> Path:
    return _folder("movietweetings_100k")


@pytest.fixture(scope="session")
def industrial_dir() -> Path:
    return _folder("industrial")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("strategies"))


@pytest.fixture(scope="session")
def every_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: copy it."""
    return make_every_file(tmp_path_factory.mktemp("files") / "w")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True, scope="session")
def _no_seeds_for_absent_devices() -> Iterator[None]:
    """For each kind of device that is not in use yet, `torch.manual_seed` keeps the seed and a stack trace,
    which takes as long as a step of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _not_forced_to_disk() -> Iterator[None]:
    """No test cuts the power, and waiting for the disk takes as long as half of the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def nothing_is_drawn() -> Iterator[None]:
    """Reports have no plots, whose drawing takes half of the time of a small run. A module that looks at
    plots replaces this fixture; a test has `drawn`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "files", lambda plot: {})
        patch.setattr(page, "svg_element", lambda plot: "<svg></svg>")
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "files", plots.files)
    monkeypatch.setattr(page, "svg_element", plots.svg_element)


@pytest.fixture
def peso(monkeypatch, capsys):
    """peso("run", …) → (exit status, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peso", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GenerativeModel]:
    """make_model(layout=…, loss_vocabulary=…, items=…, sizes=…, window=…, seed=…): a random tiny model.

    Rows are drawn wide (× 8) so that a random model's predictions differ from item to item.
    """

    def make(
        layout: str = "stream",
        loss_vocabulary: str = "full",
        items: int = 50,
        sizes: tuple[int, ...] = (5, 6, 7),
        window: int = 20,
        width: int = 32,
        layers: int = 2,
        seed: int = 0,
        tied: bool = True,
    ) -> GenerativeModel:
        tokenizer = byte_tokenizer()
        backbone = small_llama(width, layers, seed, tied=tied)
        vocabulary = SemanticVocabulary(len(tokenizer), sizes, width)
        embedding = backbone.get_input_embeddings().weight
        vocabulary.initialise(embedding * 8, embedding * 8, seed)
        model = GenerativeModel(
            backbone,
            tokenizer,
            vocabulary,
            make_layout(layout, tokenizer, window),
            random_semantic_ids(items, sizes, seed),
            loss_vocabulary,
        )
        return model.eval()

    return make

"""The Python examples of README and docs run as they stand, each page from top to bottom.

What a page leaves to the reader (a trained workspace, a model, batches) is given to it here, by the names
that the page uses. A page that is not known here gets nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from catalogs import setting
from event_logs import write_log
from reports import example_runs
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import peso
from peso.model.backbone import small_llama
from peso.training.strategies.strategy import Strategy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if "```python" in page.read_text(encoding="utf-8")
)
ITEMS = 400
Given = Callable[[pytest.FixtureRequest], dict[str, Any]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with items "0" to "399", three levels of codes and an item head."""
    root = tmp_path_factory.mktemp("shop")
    events = [(f"u{n % 40}", n * 7 % ITEMS, 1_600_000_000 + n) for n in range(2400)]
    titles = "".join(f"{n},{'red' if n % 3 else 'blue'} thing {n % 20} of {n}\n" for n in range(ITEMS))
    (root / "items.csv").write_text(f"item,title\n{titles}")
    tree = {
        "data": {
            "format": "csv",
            "path": str(write_log(root / "log.csv", events)),
            "items": {"path": str(root / "items.csv"), "columns": {"title": "title"}},
            "stages": 2,
        },
        "items": {"quantizer": "rq-kmeans", "levels": 3, "codes": 8},
        "backbone": {"name": "tiny", "layers": 1},
        "strategy": {"name": "peso", "examples": 8},
        "head": "items",
        "training": {"epochs": 1, "max_steps": 2},
        "evaluation": {"enabled": False},
        "baselines": "none",
    }
    return peso.run(tree, root / "workspace").root


def lora(_: Any = None) -> dict[str, Any]:
    """A PEFT model in a training loop."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small_llama(32, 1, 0), config)
    ids = torch.randint(0, 30, (2, 6))
    batches = [{"input_ids": ids, "labels": ids} for _ in range(2)]

    def losses() -> Iterator[torch.Tensor]:
        for row in torch.randint(0, 30, (4, 1, 6)):
            yield model(input_ids=row, labels=row).loss

    class Losses:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return losses()

    from transformers import Trainer

    return {
        "peso": peso,
        "model": model,
        "batches": batches,
        "batch": batches[0],
        "rates": [1e-3, 1e-3],
        "losses": Losses(),
        "outputs": model(**batches[0]),
        "Trainer": Trainer,
    }


def answering(request: pytest.FixtureRequest) -> dict[str, Any]:
    shop = peso.Recommender.load(request.getfixturevalue("shop"))
    return {"model": shop.model, "histories": [["25"], ["311", "7"]], "in_stock": [str(n) for n in range(50)]}


def exported(request: pytest.FixtureRequest) -> dict[str, Any]:
    shop = peso.Recommender.load(request.getfixturevalue("shop"))
    shop.export("exported")
    shop.export("catalog", "catalog")
    shop.export("other", format="peft")
    for part in ("backbone", "adapter"):
        shutil.move(f"other/{part}", "exported")
    return {}


def item_tables(request: pytest.FixtureRequest) -> dict[str, Any]:
    workspace = peso.Workspace.open(request.getfixturevalue("shop"))
    items = workspace.stream.items
    for name in ("ids", "more"):
        Path(name).mkdir()
    return {
        "peso": peso,
        "items": items.slice(0, 300),
        "more_items": items,
        "config": workspace.config,
        "directory": Path("ids"),
        "another_directory": Path("more"),
        "cache": None,
    }


def two_systems(_: pytest.FixtureRequest) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    users = [np.arange(50), np.arange(20, 60)]
    values = {name: generator.random((2, 90)) for name in ("single", "peso")}
    return {"users_of_stage_1": users[0], "users_of_stage_2": users[1], "seeds": [0, 1], "values": values}


GIVEN: dict[str, Given] = {
    "README.md": lora,
    "docs/how-to/use-a-proximal-term.md": lora,
    "docs/explanation/strength.md": lora,
    "docs/explanation/decoding.md": answering,
    "docs/explanation/significance.md": two_systems,
    "docs/how-to/export.md": exported,
    "docs/reference/items.md": item_tables,
}


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(
    page: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in set(re.findall(r'"runs/(\w+)"', text)):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(request.getfixturevalue("shop"))
        shutil.copy(request.getfixturevalue("shop") / "config.yaml", tmp_path / f"{name}.yaml")
    document = Document.parse(str(ROOT / page), PythonCodeBlockParser())
    document.namespace["__name__"] = f"examples_of_{Path(page).stem}"
    document.namespace |= GIVEN.get(page, lambda _: {})(request)
    examples = list(document.examples())
    assert len(examples) == text.count("```python")
    for example in examples:
        example.evaluate()
    CHECKS.get(page, lambda _: None)(SimpleNamespace(**document.namespace))


# -- what the parts that a page adds do ------------------------------------------------------------------


def back_to_base(page: Any) -> None:
    assert issubclass(page.BackToBase, Strategy)
    assert page.BackToBase().options.strength == 0.1


def last_items(page: Any) -> None:
    from peso.events.histories import Cases, Ragged, Stage
    from peso.runtime.progress import Silent

    model = page.LastItems(setting(items=4, window=2), decay=0.5)
    stage = Stage(0, ["u"], Ragged.of([[]]), Ragged.of([[0, 3, 3, 3, 1]]))
    assert model.learn([stage], Silent()) == {"events": 3}
    scores = model.scores(Cases(["u"], [np.array([3, 0, 1])], np.array([2])))[0]
    assert np.argsort(-scores).tolist() == [1, 0, 3, 2]


def arcade(page: Any) -> None:
    rows = [f"u{n % 2},g{n % 4},2024-01-{n + 1:02},{n}" for n in range(25)]
    Path("reviews.csv").write_text("\n".join(["user,game,date,hours", *rows]))
    Path("games.tsv").write_text("".join(f"g{n}\tGame {n}\tfun\n" for n in range(4)))
    data = peso.load_config({"data": {"format": "arcade", "path": ".", "min_rating": 1, "stages": 2}}).data
    from peso.events.ingest import ingest

    Path("stream").mkdir()
    manifest = ingest(data, Path("stream"))
    assert manifest["items"] == 4
    assert manifest["items_without_title"] == 0
    assert sum(stage["events"] for stage in manifest["stages"]) == 24  # one was played for 0 hours


def gap(page: Any) -> None:
    section = page.gap(page.Comparison(example_runs(), [5, 10]))
    assert section.title.startswith("Distance from")
    assert section.tables[0].rows


def log_cosh(page: Any) -> None:
    term = page.LogCosh(weight=1.0)
    term.anchor([torch.zeros(3)])
    assert float(term([torch.ones(3)])) == pytest.approx(3 * float(torch.cosh(torch.tensor(1.0)).log()))


CHECKS: dict[str, Callable[[Any], None]] = {
    "docs/how-to/add-a-strategy.md": back_to_base,
    "docs/how-to/add-a-baseline.md": last_items,
    "docs/how-to/add-a-data-set.md": arcade,
    "docs/how-to/add-a-report-section.md": gap,
    "docs/how-to/use-a-proximal-term.md": log_cosh,
}


@pytest.fixture(autouse=True)
def _no_parts_stay(install: Any) -> None:
    """Parts that a page defines are forgotten afterwards."""

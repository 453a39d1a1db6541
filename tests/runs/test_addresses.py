"""The same results from data at an address as from files, and outputs at an address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from buckets import SECRET, running_gs, running_http, running_s3, use_s3
from event_logs import write_log
from hub_server import Hub, running_hub
from small_runs import trained

from peso.runs.forget import own_files_with
from peso.runs.recommender import Recommender
from peso.runs.workspace import Workspace
from peso.runtime.remote import local

pytestmark = pytest.mark.slow  # whole runs

EVENTS = [(f"u{n % 20}", f"i{n * 7 % 12}", 1_600_000_000 + 3600 * n) for n in range(400)]
LATER = [(f"u{n % 20}", f"i{n * 5 % 12}", 1_700_000_000 + 3600 * n) for n in range(100)]
COLUMNS = ["--set", "data.items.columns.title=title", "--set", "data.stages=2"]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))
    with running_s3() as address:
        yield use_s3(monkeypatch, address)


@pytest.fixture
def web() -> Iterator[str]:
    pytest.importorskip("aiohttp")
    titles = "item,title\n" + "".join(f"i{n},thing {n}\n" for n in range(12))
    with running_http({"/products.csv": titles.encode()}, []) as address:
        yield f"{address}/products.csv"


def write(path: Path, events: list[tuple[str, str, int]]) -> bytes:
    return write_log(path, events).read_bytes()


def test_a_log_in_a_bucket_and_products_on_the_web_give_the_same_stream(
    bucket: Any, web: str, tmp_path: Path, peso: Any
) -> None:
    content = write(tmp_path / "log.csv", EVENTS)
    bucket.pipe_file("shop/logs/log.csv", content)
    (tmp_path / "products.csv").write_bytes(Path(local(web)).read_bytes())
    for name, log, items in (
        ("local", str(tmp_path / "log.csv"), str(tmp_path / "products.csv")),
        ("remote", "s3://shop/logs/log.csv", web),
    ):
        status, _, err = peso("ingest", log, "--items", items, "-w", tmp_path / name, *COLUMNS)
        assert status == 0, err
        assert SECRET not in err
    streams = [Workspace.open(tmp_path / name).stream for name in ("local", "remote")]
    assert streams[0].manifest["files"] == streams[1].manifest["files"]
    config = Workspace.open(tmp_path / "remote").config.data
    assert config.path == "s3://shop/logs/log.csv"
    assert config.items is not None
    assert config.items.path == web
    held = own_files_with(Workspace.open(tmp_path / "remote"), "u3")
    assert held == ["s3://shop/logs/log.csv", local("s3://shop/logs/log.csv")]
    assert own_files_with(Workspace.open(tmp_path / "remote"), "nobody") == []

    bucket.pipe_file("shop/logs/week_2.csv", write(tmp_path / "week_2.csv", LATER))
    status, _, err = peso("ingest", "s3://shop/logs/week_2.csv", "--append", "-w", tmp_path / "remote")
    assert status == 0, err
    assert Workspace.open(tmp_path / "remote").stream.stages > streams[1].stages

    status, _, err = peso("ingest", "s3://shop/nothing.csv", "-w", tmp_path / "no")
    assert status != 0
    assert "s3://shop/nothing.csv cannot be read" in err
    assert not (tmp_path / "no").exists()


def test_init_writes_addresses_and_recognizes_a_folder(
    bucket: Any, web: str, tmp_path: Path, peso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe_file("shop/logs/a.csv", write(tmp_path / "a.csv", EVENTS[:200]))
    bucket.pipe_file("shop/logs/b.csv", write(tmp_path / "b.csv", EVENTS[200:]))
    monkeypatch.chdir(tmp_path)
    status, _, err = peso(
        "init", "s3://shop/logs/", "--items", web, "-o", "c.yaml", "--set", "evaluation.k=[5]"
    )
    assert status == 0, err
    data = yaml.safe_load((tmp_path / "c.yaml").read_text())["data"]
    assert (data["path"], data["items"]["path"]) == ("s3://shop/logs/", web)
    status, _, err = peso("ingest", "c.yaml", "-w", "w")
    assert status == 0, err
    assert sum(row["events"] for row in Workspace.open("w").stream.counts) == 400


def test_a_data_set_of_the_hub_is_ingested_by_its_name(
    tmp_path: Path, peso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write(tmp_path / "log.csv", EVENTS)
    with running_hub() as hub:
        hub.use(monkeypatch, tmp_path / "hub")
        hub.repositories["datasets/owner/shop"] = {"README.md": b"#", "data/train.csv": content}
        status, _, err = peso(
            "ingest", "hf://datasets/owner/shop", "-w", tmp_path / "w", "--set", "data.stages=2"
        )
        assert status == 0, err
        _offline(hub, monkeypatch)
        status, _, err = peso(
            "ingest", "hf://datasets/owner/shop/data/*.csv", "-w", tmp_path / "x", "--set", "data.stages=2"
        )
        assert status == 0, err
        assert hub.asked == []
        status, _, err = peso("ingest", "hf://datasets/owner/other", "-w", tmp_path / "y")
        assert status != 0
        assert "owner/other is not in the cache, and HF_HUB_OFFLINE" in err
    streams = [Workspace.open(tmp_path / name).stream for name in "wx"]
    assert streams[0].manifest["files"] == streams[1].manifest["files"]


def _offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()


def test_google_storage_takes_the_whole_loop(
    web: str, tmp_path: Path, peso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny = ["--set", "backbone.name=tiny", "--set", "training.max_steps=2", "--set", "data.stages=1"]
    with running_gs(monkeypatch) as system:
        system.pipe_file("shop/logs/log.csv", write(tmp_path / "log.csv", EVENTS))
        system.pipe_file("shop/later.csv", write(tmp_path / "later.csv", LATER))
        system.pipe_file("shop/products.csv", Path(local(web)).read_bytes())
        for command in (
            ("init", "gs://shop/logs/", "--items", "gs://shop/products.csv", "-o", "c.yaml", *tiny),
            ("run", "c.yaml", "-w", "w"),
            ("ingest", "gs://shop/later.csv", "--append", "-w", "w"),
            ("recommend", "-w", "w", "--all", "-o", "gs://shop/out/r.jsonl"),
            ("recommend", "-w", "w", "--all", "-o", "r.jsonl"),
            ("export", "-w", "w", "-o", "gs://shop/out/model"),
        ):
            status, _, err = peso(*command)
            assert status == 0, err
        assert system.cat_file("shop/out/r.jsonl") == Path("r.jsonl").read_bytes()
        assert system.exists("shop/out/model/model.safetensors")
        again = ("recommend", "-w", "w", "--all", "-o", "gs://shop/out/r.jsonl")
        assert "gs://shop/out/r.jsonl already exists" in peso(*again)[2]
        assert peso(*again, "--force")[0] == 0
    data = Workspace.open("w").config.data
    assert data.path == "gs://shop/logs/"
    assert data.items is not None
    assert data.items.path == "gs://shop/products.csv"


def test_predictions_and_exports_go_to_a_bucket(bucket: Any, tmp_path: Path, peso: Any) -> None:
    root = trained(tmp_path / "w", "baselines=none")[0].root
    for where in ("s3://shop/out/", f"{tmp_path}/"):
        for command in (
            ("recommend", "-w", root, "--all", "-o", f"{where}recommendations.jsonl"),
            ("export", "-w", root, "--format", "index", "-o", f"{where}index.json"),
            ("export", "-w", root, "-o", f"{where}model"),
        ):
            status, _, err = peso(*command)
            assert status == 0, err
    for name in ("recommendations.jsonl", "index.json", "model/model.safetensors", "model/prompt.json"):
        assert bucket.cat_file(f"shop/out/{name}") == (tmp_path / name).read_bytes()
    assert json.loads(bucket.cat_file("shop/out/model/index.json"))

    recommender = Recommender.load(root)
    assert recommender.export("s3://shop/python/index.json", "index") == "s3://shop/python/index.json"
    assert recommender.recommend_all("s3://shop/python/r.jsonl") == 100
    for there, here in (("python/index.json", "index.json"), ("python/r.jsonl", "recommendations.jsonl")):
        assert bucket.cat_file(f"shop/{there}") == (tmp_path / here).read_bytes()
    assert not Path("s3:").exists()

    again = ("recommend", "-w", root, "--all", "-o", "s3://shop/out/recommendations.jsonl")
    status, _, err = peso(*again)
    assert status != 0
    assert "already exists" in err
    assert peso(*again, "--force")[0] == 0
    status, _, err = peso("export", "-w", root, "-o", "s3://shop/out/model")
    assert status != 0
    assert "s3://shop/out/model already exists" in err

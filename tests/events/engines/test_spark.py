"""`data.engine: spark` writes the same files as DuckDB, and names what it needs."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import duckdb
import numpy as np
import pytest
from event_logs import data_config, write_log

from peso.config import Config, load_config
from peso.config.shape import changed_data
from peso.errors import ConfigError, DataError, FullDisk, NothingLeft
from peso.events import stage_writer
from peso.events.append import extend_stream
from peso.events.drift import drift
from peso.events.engines.engine import open_engine
from peso.events.ingest import ingest
from peso.events.stream import Stream
from peso.runs import preparation
from peso.runs.merge_users import merge
from peso.runs.rename import rename
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow  # starts Spark

DAY = 86_400
T = 1_600_000_000


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A session with several partitions, so that their order matters; ingestion leaves it open."""
    if find_spec("pyspark") is None or which("java") is None:
        missing = "Spark needs the extra `spark` and Java 17"
        if os.environ.get("PESO_REQUIRE_SPARK"):
            pytest.fail(missing)
        pytest.skip(missing)
    from pyspark.sql import SparkSession

    options = {
        "spark.master": "local[2]",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
        "spark.sql.shuffle.partitions": "3",
        "spark.sql.codegen.wholeStage": "false",  # compiling takes longer than running on so few events
        "spark.sql.adaptive.coalescePartitions.enabled": "false",
        # for the same reason Java compiles quickly rather than well, and collects garbage with one thread
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    }
    session = SparkSession.builder.config(map=options).getOrCreate()
    yield
    session.stop()


def log(path: Path, first: int, days: int, events: int = 3000) -> Path:
    """Events of some hundred users, many of them at the same time, of two types and with ratings."""
    rng = random.Random(first)
    rows = [
        (
            f"u{int(400 * rng.random() ** 2)}",
            f"i{int(150 * rng.random() ** 2)}",
            first + DAY * rng.randrange(days),
            rng.randint(1, 5),
            rng.choice(["view", "buy"]),
        )
        for _ in range(events)
    ]
    return write_log(path, rows, "user,item,time,stars,type")


def files(directory: Path) -> dict[str, Any]:
    """All files of a stream; the manifest without the times and places of this run."""
    found: dict[str, Any] = {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    manifest = json.loads(found.pop("manifest.json"))
    assert ".ingest" not in "".join(found), "temporary files are gone"
    return {**found, "manifest.json": {key: manifest[key] for key in manifest if key != "created"}}


def with_both(tmp_path: Path, fill: Any, **data: Any) -> dict[str, Any]:
    """The files that both engines write, which are the same."""
    made = []
    for engine in ("duckdb", "spark"):
        directory = tmp_path / f"{engine} [x]{{y}}*"  # Spark takes paths for patterns
        directory.mkdir(parents=True)
        fill(data_config(engine=engine, **data), directory)
        made.append(files(directory))
    assert made[0] == made[1]
    return made[0]


def test_an_ingestion_and_an_append_give_the_same_files(
    tmp_path: Path, spark: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_writer, "SLICE", 500)  # several slices of users
    core = {"format": "csv", "min_user": 4, "min_item": 3}
    first = log(tmp_path / "a.csv", T, 60)
    written = with_both(tmp_path / "first", ingest, path=str(first), stages=3, **core)
    assert "stage=0/rare.parquet" in written

    def append(data: Any, directory: Path) -> None:
        extend_stream(data, tmp_path / "first" / "duckdb [x]{y}*", directory)

    new = log(tmp_path / "b.csv", T + 57 * DAY, 30)
    further = {"repeats": "drop", "on_error": "skip", "stages": {"every": "10 days", "from": T}}
    longer = with_both(tmp_path / "longer", append, path=str(new), **core, **further)
    steps = [row["step"] for row in longer["manifest.json"]["appended"][0]["funnel"]]
    assert "not older than the stream" in steps
    assert "repeats of earlier stages dropped" in steps


def test_earlier_and_new_ids_of_items_and_users_give_the_files_of_one_id(tmp_path: Path, spark: None) -> None:
    data = {"format": "csv", "path": str(log(tmp_path / "a.csv", T, 9, 600)), "stages": 2, "min_user": 3}
    shop = Workspace.create_or_open(tmp_path / "shop", load_config({"data": data}))
    items, users = {"i0": "new 0", "i3": "new 3", "i7": "new 7"}, {"u0": "u1", "u2": "u1", "u3": "u5"}
    with shop.lock():
        preparation.ingest(shop, Silent())
        rename(shop, [*items.items()])
        merge(shop, [*users.items()], Silent())
    header, *lines = log(tmp_path / "b.csv", T + 9 * DAY, 3, 300).read_text().splitlines()
    given = [tuple(line.split(",")) for line in lines]
    mixed = [
        (user, items.get(item, item) if n % 2 else item, *rest) for n, (user, item, *rest) in enumerate(given)
    ]
    one = [(users.get(user, user), item, *rest) for user, item, *rest in given]

    def append(data: Any, directory: Path) -> None:
        extend_stream(data, shop.stream_directory, directory, aliases=preparation.aliases(shop))

    rules = {"format": "csv", "repeats": "drop"}
    path = write_log(tmp_path / "mixed.csv", mixed, header)
    written = with_both(tmp_path / "mixed", append, path=str(path), **rules)
    path = write_log(tmp_path / "one.csv", one, header)
    (tmp_path / "one").mkdir()
    append(data_config(path=str(path), **rules), tmp_path / "one")
    wanted = files(tmp_path / "one")
    assert "stage=1/merged.parquet" in wanted
    for found in (written, wanted):
        del found["manifest.json"]  # has the path of the log
    assert written == wanted


def test_types_ratings_repeats_and_boundaries_give_the_same_files(tmp_path: Path, spark: None) -> None:
    written = with_both(
        tmp_path,
        ingest,
        format="csv",
        path=str(log(tmp_path / "log.csv", T, 9)),
        columns={"rating": "stars"},
        min_rating=2.5,
        events={"column": "type", "keep": ["buy", "it's"]},
        repeats="drop",
        stages={"boundaries": [T + 4 * DAY, T + 6 * DAY]},
    )
    left = [row["events"] for row in written["manifest.json"]["funnel"]]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == len(left) - 1, "every step but the first removes events"


def test_movietweetings_gives_the_same_files(tmp_path: Path, spark: None, movietweetings_dir: Path) -> None:
    with_both(tmp_path, ingest, format="movietweetings", path=str(movietweetings_dir), min_item=5)


def test_the_drift_of_a_stream_is_the_same(tmp_path: Path, spark: None) -> None:
    data = data_config(format="csv", path=str(log(tmp_path / "log.csv", T, 60)), stages=3)
    (tmp_path / "stream").mkdir()
    ingest(data, tmp_path / "stream")
    stream = Stream.open(tmp_path / "stream")
    codes = np.arange(len(stream.item_ids)) % 7
    by_duckdb, by_spark = (drift(stream, codes, engine) for engine in ("duckdb", "spark"))
    assert by_duckdb == by_spark
    assert json.loads(json.dumps(by_spark)) == by_spark, "plain numbers"


def test_an_error_leaves_nothing(tmp_path: Path, spark: None) -> None:
    path = log(tmp_path / "log.csv", T, 60, events=200)
    directory = tmp_path / "stream"
    directory.mkdir()
    columns = {"rating": "stars"}
    data = data_config(format="csv", path=str(path), engine="spark", columns=columns, min_rating=6)
    with pytest.raises(NothingLeft, match="rating of 6 or more"):
        ingest(data, directory)
    assert not list(directory.iterdir())


@pytest.mark.parametrize(
    ("text", "kind", "cure"),
    [
        ("java.lang.OutOfMemoryError: Java heap space", DataError, r"spark\.driver\.memory"),
        ("java.io.IOException: No space left on device", FullDisk, "Free some space"),
    ],
)
def test_a_failure_of_spark_names_the_cure(text: str, kind: type[Exception], cure: str) -> None:
    errors = pytest.importorskip("pyspark.errors")
    from peso.events.engines.spark import _explained

    with pytest.raises(kind, match=cure), _explained():
        raise errors.PySparkException(text)


def start(tmp_path: Path) -> None:
    with duckdb.connect() as connection:
        (tmp_path / ".ingest").mkdir()
        with open_engine("spark", connection, tmp_path):
            pass


def test_a_missing_pyspark_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peso.events.engines.spark.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs pyspark and pandas.*pip install 'peso\[spark\]'"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("java", "said"),
    [
        (None, "has no bin/java"),
        ('openjdk version "11.0.2" 2019-01-15', "is 11.0.2"),
        ('java version "1.8.0_392"', "is 1.8.0_392"),
        ("no version at all", "is not a Java"),
    ],
)
def test_a_missing_or_old_java_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, java: str | None, said: str
) -> None:
    pytest.importorskip("pyspark")
    from pyspark.sql import SparkSession

    home = tmp_path / "java"
    (home / "bin").mkdir(parents=True)
    if java is not None:
        (home / "bin" / "java").write_text(f"#!/bin/sh\necho '{java}' >&2\n")
        (home / "bin" / "java").chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(home))
    monkeypatch.setattr(SparkSession, "getActiveSession", staticmethod(lambda: None))
    with pytest.raises(ConfigError, match=said) as raised:
        start(tmp_path)
    assert "apt-get install openjdk-17-jre-headless" in str(raised.value)


def test_an_unknown_engine_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.engine") as raised:
        data_config(format="simulate", engine="polars")
    assert "duckdb" in str(raised.value)
    assert "spark" in str(raised.value)


def test_a_released_stream_has_no_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.engine has no meaning for data\.format: peso-release"):
        data_config(format="peso-release", path=str(tmp_path), engine="spark")


def test_another_engine_is_no_change_of_the_data() -> None:
    def config(**data: Any) -> Config:
        return load_config({"data": {"format": "csv", "path": "/log.csv", **data}})

    assert "engine" not in config().model_dump()["data"], "earlier versions do not have this key"
    source = {"source": {"format": "csv", "path": "/log.csv"}}
    assert not changed_data(source, config(engine="spark"))
    assert changed_data(source, config(engine="spark", min_user=3))

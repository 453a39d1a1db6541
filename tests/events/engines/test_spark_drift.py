"""The drift of a stream is the same with Spark."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from event_logs import data_config
from test_spark import T, log, spark  # noqa: F401 - a fixture

from peso.events.drift import drift
from peso.events.ingest import ingest
from peso.events.stream import Stream

pytestmark = pytest.mark.slow  # starts Spark


def test_the_figures_of_both_engines_are_the_same(tmp_path: Path, spark: None) -> None:  # noqa: F811
    data = data_config(format="csv", path=str(log(tmp_path / "log.csv", T, 60)), stages=3)
    (tmp_path / "stream").mkdir()
    ingest(data, tmp_path / "stream")
    stream = Stream.open(tmp_path / "stream")
    codes = np.arange(len(stream.item_ids)) % 7
    by_duckdb, by_spark = (drift(stream, codes, engine) for engine in ("duckdb", "spark"))
    assert by_duckdb == by_spark
    assert json.loads(json.dumps(by_spark)) == by_spark, "plain numbers"

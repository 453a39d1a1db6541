"""Columns of users and items as segments of the report, from the configuration; the index as of a stage."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peso.config import load_config
from peso.errors import ConfigError, DataError
from peso.events.stream import Stream
from peso.runs import pipeline, preparation, report
from peso.runs.report import of_merged, read_user_table
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

TREE = {
    "data": {"format": "simulate", "simulate": {"users": 60, "items": 40, "stages": 2}},
    "backbone": "tiny",
    "baselines": [],
}


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "jsonl"])
def test_every_kind_of_file_reads_the_same(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"users.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"user_id": ["007", "b"], "country": ["de", None]}), path)
    elif ending == "jsonl":
        path.write_text('{"user_id": "007", "country": "de"}\n{"user_id": "b"}\n')
    else:
        between = "\t" if ending == "tsv" else ","
        path.write_text(f"user_id{between}country\n007{between}de\nb{between}\n")
    assert read_user_table(path) == {"country": {"007": "de"}}


def test_a_bad_user_table_is_refused_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "no.csv").write_text("who,country\na,de\n")
    (tmp_path / "twice.csv").write_text("user_id,country\na,de\nb,fr\na,fr\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, words in {
        "no.csv": "no column 'user_id'; it has who, country",
        "twice.csv": "two rows for user 'a'",
        "broken.parquet": "not readable Parquet",
        "gone.csv": "gone.csv is missing",
        "users.xls": "must end in .csv",
    }.items():
        with pytest.raises(DataError, match=words):
            read_user_table(tmp_path / name)


def test_users_who_are_one_person_share_the_row_of_one(tmp_path: Path) -> None:
    into = {"a": "c", "b": "c", "d": "e", "f": "g"}
    table = {"country": {"a": "de", "b": "fr", "d": "it", "e": "es", "x": "pl"}, "age": {"c": "30"}}
    known = of_merged(table, into)
    assert known["country"] == {**table["country"], "c": "de"}  # own values stay
    assert known["age"] == {"a": "30", "b": "30", "c": "30"}
    assert of_merged(table, {}) == table


def test_segments_of_a_run_are_known_or_refused_before_anything_is_learnt(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("user_id,country\n1,de\n")
    (tmp_path / "config.yaml").write_text(json.dumps({**TREE, "report": {"users": "users.csv"}}))
    config = load_config(tmp_path / "config.yaml", ["report.segments=[country,colour]"])
    workspace = Workspace.create_or_open(tmp_path / "w", config)
    with pytest.raises(ConfigError, match=r"'colour'.*country"):
        pipeline.run(workspace)
    assert workspace.finished_stages == []
    workspace = Workspace.create_or_open(tmp_path / "known", load_config(tmp_path / "config.yaml"))
    preparation.ingest(workspace, Silent())
    preparation.tokenize(workspace, Silent())
    assert report.catalogue(workspace).user_columns == {"country": {"1": "de"}}


def test_the_index_of_a_stage_holds_the_items_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(TREE))
    preparation.ingest(workspace, Silent())
    preparation.tokenize(workspace, Silent())
    monkeypatch.setattr(Stream, "items_known", lambda stream, stage: 12 if stage == 0 else 40)
    found = {}
    for name, stage in {"all": None, "0": 0, "1": 1}.items():
        preparation.export_index(workspace, tmp_path / name, stage)
        found[name] = json.loads((tmp_path / name).read_text())
    assert found["all"] == found["1"]
    assert list(found["0"].items()) == list(found["all"].items())[:12]
    with pytest.raises(DataError, match="no stage 7"):
        preparation.export_index(workspace, tmp_path / "7", 7)
    assert not (tmp_path / "7").exists()

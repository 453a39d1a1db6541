"""The data section of the configuration: what it takes, what it refuses and in which words."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from peso.config import Config, dump_config, load_config
from peso.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(**data: Any) -> Config:
    return load_config({"data": {"format": "csv", "path": "log.csv", **data}})


def test_a_number_of_stages_is_the_papers_share_and_equal_parts() -> None:
    assert load(stages=5).data.stages.fractions == pytest.approx([0.6, 0.1, 0.1, 0.1, 0.1])
    assert load(stages=1).data.stages.fractions == [1.0]
    assert load().data.stages.fractions == [0.6, 0.1, 0.1, 0.1, 0.1]


def test_a_calendar_reads_dates_and_from_is_start() -> None:
    stages = load(stages={"every": "1 week", "from": date(2013, 6, 1)}).data.stages
    assert (stages.every, stages.start) == ("1 week", "2013-06-01")
    assert stages == load(stages={"every": "1 week", "start": "2013-06-01"}).data.stages


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"stages": {"every": "1 month", "from": "2013-06-01"}},
        {"stages": {"boundaries": [10, date(2013, 6, 1), "2013-07-01 12:00"]}},
        {"columns": {"user": 1, "item": "asin"}, "separator": "::"},
        {"items": {"path": "products.csv", "columns": {"text": ["brand", "description"]}}},
    ],
)
def test_the_resolved_section_reads_back_as_itself(data: dict[str, Any]) -> None:
    config = load(**data)
    assert load_config(yaml.safe_load(dump_config(config))) == config


def test_a_pattern_of_times_needs_no_quotes_on_the_command_line() -> None:
    source = {"data": {"format": "csv", "path": "log.csv"}}
    assert load_config(source, ["data.time_format=%d/%m/%Y"]).data.time_format == "%d/%m/%Y"


def test_the_product_tables_path_is_taken_from_beside_the_configuration(tmp_path) -> None:
    (tmp_path / "products.csv").touch()
    (tmp_path / "peso.yaml").write_text(
        "data: {format: csv, path: log.csv, items: {path: products.csv, columns: {text: description}}}"
    )
    config = load_config(tmp_path / "peso.yaml")
    assert config.data.items is not None
    assert config.data.items.path == str(tmp_path / "products.csv")
    assert config.data.items.columns.text == ["description"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stages": 0}, "data.stages: there must be at least one stage; got 0"),
        ({"stages": {}}, "data.stages: give exactly one of"),
        ({"stages": {"fractions": [0.5, 0.4]}}, "fractions sum to 0.9"),
        ({"stages": {"every": "1 wek", "from": 0}}, "not '1 wek'"),
        ({"stages": {"every": "1 week"}}, "every and from"),
        ({"stages": {"boundaries": [1], "fractions": [1.0]}}, "given: fractions, boundaries"),
        ({"stages": {"boundaries": [True]}}, "a time must be ISO text"),
        (
            {"columns": {"user": 0}},
            "data.columns.user: a column must be a name or, if a CSV file has no header, a number",
        ),
        (
            {"columns": {"usr": "u"}},
            "unknown key 'data.columns.usr'.*nearest valid key is 'data.columns.user'",
        ),
        ({"min_rating": 3}, "data.min_rating needs data.columns.rating"),
        ({"time_format": "fortnights"}, "data.time_format must be one of auto, seconds"),
        ({"format": "yelp", "separator": ","}, "data.separator has no meaning for data.format: yelp"),
        ({"format": "peso-release", "min_user": 5}, "data.min_user has no meaning"),
        ({"format": "jsonl", "encoding": "latin-1"}, "data.encoding has no meaning"),
        ({"on_error": "ignore"}, "data.on_error: Input should be 'fail' or 'skip'; got 'ignore'"),
        ({"min_item": 0}, "data.min_item"),
    ],
)
def test_a_wrong_value_names_its_key_and_the_cure(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**data)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid_configurations(path: Path) -> None:
    assert load_config(path).data.format in path.read_text()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="resolved without an error, and refused as no file")
def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "loop.csv"
    link.symlink_to(link)
    with pytest.raises(ConfigError, match=r"loop\.csv is a symbolic link that leads to itself"):
        load(path=str(link))

"""The section `items` of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from peso.config import ItemsConfig, dump_config, load_config
from peso.errors import ConfigError


def load(items: dict[str, Any], base: Path | None = None):
    return load_config({"data": "simulate", "items": items}, base=base).items


def test_the_defaults_are_those_of_the_design() -> None:
    items = ItemsConfig()
    assert (items.encoder, items.quantizer, items.levels, items.codes) == ("hashing", "rq-vae", 4, 256)


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    items = {"template": "{title}: {text}", "rq_vae": {"steps": 7}, "collisions": "allow"}
    config = load_config({"data": "simulate", "items": items})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            {"template": "{titel}"},
            "only the fields {title}, {text} and {category}, and needs at least one; got '{titel}'",
        ),
        ({"template": "no field"}, "can contain only the fields"),
        ({"template": "{title"}, "'{title' is not a template"),
        ({"encoder": "vectors"}, "items.encoder: vectors needs files in items.vectors"),
        ({"quantiser": "rq-vae"}, "the nearest valid key is 'items.quantizer'"),
        ({"quantizer": "vq"}, "items.quantizer: .*'rq-kmeans'.*got 'vq'"),
        ({"codes": 1}, "items.codes: .*got 1"),
        ({"levels": 26}, "items.levels: .*got 26"),
        ({"rq_vae": {"step": 1}}, "the nearest valid key is 'items.rq_vae.steps'"),
        ({"vectors": "a.npz"}, r"items.vectors is a list: write it in brackets.*got .a.npz."),
        ({"behavior": True}, r"a section: give its keys \(weight, dimensions, window, shift\) below it"),
        (
            {"refresh": {"foo": 1}},
            r"key is 'items.refresh.\w+'; items.refresh has the keys every, drift, support",
        ),
        ({"behavior": {"weight": 0}}, "items.behavior.weight: .*greater than 0; got 0"),
        ({"behavior": {"weight": 1}}, "items.behavior.weight: .*less than 1; got 1"),
        ({"behavior": {"window": 0}}, "items.behavior.window: .*got 0"),
        ({"behavior": {"window": 101}}, "items.behavior.window: .*got 101"),
        ({"behavior": {"dimensions": 1}}, "items.behavior.dimensions: .*got 1"),
        ({"behavior": {"shift": 0.5}}, "items.behavior.shift: .*got 0.5"),
        ({"behavior": {"weigth": 0.5}}, "the nearest valid key is 'items.behavior.weight'"),
        (
            {"behavior": {}, "quantizer": "rq-vae", "index": "i.json"},
            "no meaning with items.index.*remove one",
        ),
        ({"refresh": {}, "quantizer": "rq-kmeans"}, "so it needs items.behavior"),
        (
            {"refresh": {}, "behavior": {}, "quantizer": "rq-kmeans", "fit": "all"},
            "items.refresh has no meaning with items.fit: all.*remove one",
        ),
        (
            {"refresh": {"depth": 5}, "behavior": {}, "quantizer": "rq-kmeans"},
            "items.refresh.depth 5 is more than items.levels 4",
        ),
        ({"refresh": {"drift": 0}}, "items.refresh.drift: .*greater than 0; got 0"),
        ({"refresh": {"share": 2}}, "items.refresh.share: .*got 2"),
        ({"refresh": {"every": "week"}}, "items.refresh.every"),
        ({"behavior": {}}, "no meaning with items.quantizer: category-path.*such as rq-kmeans"),
    ],
)
def test_what_cannot_be_is_named(items: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(items)


def test_behavior_is_off_unless_its_section_is_given_and_is_then_written() -> None:
    plain = load_config({"data": "simulate"})
    assert plain.items.behavior is None
    assert "behavior" not in dump_config(plain)
    given = load_config({"data": "simulate", "items": {"quantizer": "rq-kmeans", "behavior": {}}})
    assert given.items.behavior is not None
    assert given.items.behavior.weight == 0.5
    assert load_config(yaml.safe_load(dump_config(given))) == given


def test_refresh_is_off_unless_its_section_is_given_and_is_then_written() -> None:
    assert "refresh" not in dump_config(load_config({"data": "simulate"}))
    items = {"quantizer": "rq-kmeans", "behavior": {}, "refresh": {"every": 3}}
    given = load_config({"data": "simulate", "items": items})
    assert given.items.refresh is not None
    assert [stage for stage in range(7) if given.items.refresh.is_due(stage)] == [3, 6]
    assert load_config(yaml.safe_load(dump_config(given))) == given


def test_behavior_and_data_with_semantic_ids_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"no meaning for data.format: peso-release, .*remove it"):
        load_config({"data": {"format": "peso-release", "path": "x"}, "items": {"behavior": {}}})


def test_paths_are_taken_from_where_the_configuration_stands(tmp_path: Path) -> None:
    (tmp_path / "image.npy").touch()
    (tmp_path / "model").mkdir()
    items = load({"vectors": ["image.npy"], "encoder": "./model"}, base=tmp_path)
    assert items.vectors == [str(tmp_path / "image.npy")]
    assert items.encoder == str(tmp_path / "model")
    assert load({"encoder": "owner/model"}, base=tmp_path).encoder == "owner/model"

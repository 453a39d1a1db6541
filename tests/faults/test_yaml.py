"""YAML: what is ambiguous, of another type or made to hang is refused, in a short sentence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from peso.config import load_config
from peso.config.compare import load_comparison
from peso.config.parsing import parse
from peso.errors import ConfigError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: simulate\nseed: 1\nseed: 2\n",
            r"line 3.*'seed' occurs twice \(first in line 2\)",
        ),
        ("data: simulate\ntraining: {epochs: 1}\ntraining: {epochs: 2}\n", "line 3.*'training'.*line 2"),
        ("data: simulate\ntraining: {epochs: 1, epochs: 1}\n", "line 2.*'epochs'"),
        ("data: simulate\nstrategy:\n  custom: {a: 1}\n  custom: {a: 2}\n", "line 4.*'custom'.*line 3"),
        (LAUGHS, "50,000 values"),
        ("a: " + "[" * 100_000, "levels deep"),
        ("a: " + "{b: " * 1_000, "levels deep"),
        ("a: &a [*a]", "an alias that refers to a value that contains it"),
        ("a: &a {<<: *a}", "an alias that refers to a value that contains it"),
        ("data: simulate\na: 2013-13-45", r"line 2.*'2013-13-45' is not a date \(month"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("? [a]\n: b", "unhashable"),
        ("a: \x1b[31m", "character"),
        ("#" * 2_000_000, "larger than"),
        ("##" + "é" * 600_000, "larger than"),  # the limit is within a character
        ("- a", "contains no configuration"),
        ("", "contains no configuration"),
    ],
)
def test_a_file_that_means_nothing_certain_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    for read in (load_config, load_comparison):
        began = time.process_time()
        with pytest.raises(ConfigError, match=rf"(?s)c\.yaml.*{message}") as error:
            read(tmp_path / "c.yaml")
        assert len(str(error.value)) < 700
        assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("training: {epochs: true}", "training.epochs"),
        ("training: {epochs: '2'}", "training.epochs"),
        ("training: {epochs: 2.0}", "training.epochs"),
        ("training: {epochs: 010}", "training.epochs"),
        ("training: {epochs: 1:30}", "training.epochs"),
        ("training: {learning_rate: .inf}", "training.learning_rate"),
        ("training: {learning_rate: .nan}", "training.learning_rate"),
        ("training: {learning_rate: 1e999}", "training.learning_rate"),
        ("training: {learning_rate: '0.1'}", "training.learning_rate"),
        ("training: {learning_rate: true}", "training.learning_rate"),
        ("training: {batch_size: 100000000000000000000}", "batch_size"),
        (f"training: {{batch_size: {'9' * 5000}}}", "training.batch_size"),
        (f"training: {{batch_size: 0x{'F' * 5000}}}", "training.batch_size"),
        ("evaluation: {enabled: 'no'}", "evaluation.enabled"),
        ("evaluation: {enabled: 1}", "evaluation.enabled"),
        ("evaluation: {k: ['5']}", "evaluation.k"),
        ("prompt: {window: 5.5}", "prompt.window"),
        ("report: {title: 5}", "report.title"),
        ("report: {segments: title}", "report.segments"),
        ("adapter: {targets: q_proj}", "adapter.targets"),
        ("adapter: {alpha: .inf}", "adapter.alpha"),
        ("strategy: {name: peso, weight: .nan}", "strategy.weight"),
        ("strategy: {name: replay, budget: yes}", "strategy.budget"),
        ("baselines: {name: ease, items: '5'}", "items"),
        ("seed: true", "seed"),
        ("1: 2", "1: Keys should be strings"),
        ("backbone: {name: 5}", "backbone.name"),
        (f"{'x' * 1_000}: 1", "unknown key"),
        (f"training: {{schedule: {'x' * 10_000}}}", "training.schedule"),
        (f"strategy: {'x' * 10_000}", "strategy.name"),
        (f"training: {{epochs: {[1] * 1_000}}}", "training.epochs"),
        (f"evaluation: {{k: {['a'] * 1_000}}}", "and 995 more"),
        (f"data: {{format: csv, path: x, time_format: {'x' * 10_000}}}", "time_format"),
        ("data: {format: csv, path: x, stages: 1000000000}", "10,000 stages"),
    ],
)
def test_a_value_of_another_type_is_refused_in_a_short_sentence(tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "c.yaml").write_text(text if text.startswith("data") else f"data: simulate\n{text}\n")
    with pytest.raises(ConfigError, match=key) as error:
        load_config(tmp_path / "c.yaml")
    assert len(str(error.value)) < 3200


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=true", "training.epochs"),
        ("training.epochs='2'", "training.epochs"),
        ("strategy={name: peso, name: single}", "--set 'strategy' .*'name' occurs twice"),
        ("strategy.weight=.inf", "strategy.weight"),
        ("report.title=" + "[" * 50_000, "--set 'report.title'.*levels deep"),
        (".".join(["a"] * 50_000) + "=1", "--set takes"),
        ("a" * 50_000 + "=1", "unknown key"),
        ("data.path=[", "--set 'data.path' is not readable YAML"),
    ],
)
def test_values_on_the_command_line_are_read_as_strictly(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config({"data": "simulate"}, [override])
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2E-4", 2e-4),
        ("1e3", 1e3),
        ("2.5e-4", 2.5e-4),
        ("1.5e3", 1.5e3),
        ("1", 1.0),
        (".5", 0.5),
    ],
)
def test_a_rate_may_be_written_in_every_usual_way(text: str, value: float) -> None:
    assert (
        load_config({"data": "simulate"}, [f"training.learning_rate={text}"]).training.learning_rate == value
    )
    config = load_config({"data": {"format": "csv", "path": "x", "stages": {"fractions": ["5e-1", 0.5]}}})
    assert config.data.stages.fractions == [0.5, 0.5]


def test_anchors_and_merged_sections_go_on_working() -> None:
    tree = parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n", "text")
    assert tree["b"] == {"x": 1, "y": 3}
    assert tree["c"] == [tree["a"]] * 2


@pytest.mark.parametrize("section", [{"seeds": [1, 1.5]}, {"share_base": "yes"}, {"workers": "2"}])
def test_the_section_compare_is_as_strict(tmp_path: Path, section: dict[str, Any]) -> None:
    (key,) = section
    (tmp_path / "c.yaml").write_text(
        "data: simulate\ncompare: {strategies: [single], **}\n".replace("**", f"{key}: {section[key]!r}")
    )
    with pytest.raises(ConfigError, match=rf"compare\.{key}"):
        load_comparison(tmp_path / "c.yaml")


@pytest.mark.parametrize("value", [None, 3, "text", [1]])
@pytest.mark.parametrize("key", ["training", "training.later", "items", "adapter", "data.columns"])
def test_a_value_in_place_of_a_section_is_told_in_plain_words(key: str, value: Any) -> None:
    tree: dict[str, Any] = {"data": {"format": "csv", "path": "x"}, "training": {}}
    *above, last = key.split(".")
    (tree[above[0]] if above else tree)[last] = value
    told = rf"^{key} is a section: give its keys( \([\w, ]+\))? below it, or remove it"
    with pytest.raises(ConfigError, match=told):
        load_config(tree)


@pytest.mark.parametrize(
    "content", [b"user,item,time\nu1,i1,1600000000\n", b"PAR1\xff", b"a: [\n", b"x" * 1_000_001]
)
def test_a_log_in_place_of_its_configuration_is_sent_to_init(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "my log.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=r"if it is a log, `peso init '.*my log.csv'` writes one"):
        load_config(tmp_path / "my log.csv")
    (tmp_path / "log.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "log.yaml")
    assert "peso init" not in str(error.value)

"""What is wrong with a configuration is said before anything long starts, absurd sizes included."""

from __future__ import annotations

import json
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from event_logs import write_log
from pydantic import BaseModel
from strategy_runs import TREE

from peso.config import Config, load_config
from peso.config.parsing import plain_types
from peso.config.reading import place
from peso.errors import BackboneError, ConfigError, PesoError
from peso.model.backbone import byte_tokenizer, load_backbone, small_llama
from peso.runs import pipeline, preparation
from peso.runs.checks import check_configuration, rehearse
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent
from peso.training.batches import plan_epoch

TINY = {**TREE, "backbone": "tiny"}


@pytest.fixture(autouse=True)
def _a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peso.runtime.machine.machine_memory", lambda: 8 * 2**30)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.width=1000000", "width of 1,000,000.*GiB.*this machine has 8 GiB"),
        ("backbone.layers=1000000", "1,000,000 layers.*GiB"),
        ("adapter.rank=1000000", r"adapter\.rank: .* 8192"),
        ("adapter.rank=8192", None),
        ("data.simulate.users=1000000000", "1,000,000,000 users.*GiB"),
        ("data.simulate.items=2000000000", "items.*GiB"),
        ("baselines=[{name: sasrec, width: 16384}]", "sasrec width=16384.*GiB"),
        ("baselines=[{name: two-tower, width: 1000000}]", "width.* 16384"),
        ("items={quantizer: rq-vae, rq_vae: {hidden: [16384, 16384]}}", r"items\.rq_vae.*GiB"),
        ("items={quantizer: rq-vae, rq_vae: {hidden: [1000000]}}", "16384"),
        ("items={quantizer: rq-vae, rq_vae: {latent: 1000000}}", "16384"),
        ("evaluation={enabled: true, k: [9], }", None),
        (
            "evaluation={enabled: true, k: [41]}",
            "evaluation.k asks for 41 items, but data.simulate.items is 40",
        ),
        ("report.segments=[colour]", "report.segments.*'colour'.*title, text, category"),
        ("report.segments=[category]", None),
        ("items.vectors=[nothing.npy]", "items.vectors: .*nothing.npy does not exist"),
        ("items.index=nothing.json", "items.index: .*nothing.json does not exist"),
        ("items.encoder=./nothing", "items.encoder: .*nothing does not exist"),
        ("report.users=nothing.csv", "nothing.csv"),
        ("backbone=no-such-model", "neither a directory nor a known name"),
        ("backbone={name: tiny, width: 50}", "multiple of the head size"),
        ("backbone={name: owner/model, width: 64}", "has a fixed width"),
        ("adapter.targets=[q_porj]", "no linear layer named q_porj; it has: .*q_proj"),
        ("prompt.window=10000", "prompts reach .* tokens"),
        ("training.device=nonsense", r"training\.device: a device must be auto, cpu"),
        ("training.threads=5000", r"training\.threads: .*1024"),
        ("training={epochs: 1000000}", r"training\.epochs 1,000,000: at most 100,000"),
        ("training={later: {epochs: 1000000}}", r"training\.epochs 1,000,000: at most 100,000"),
        ("baselines=[{name: two-tower, epochs: 1000000}]", "100000"),
        ("baselines=[{name: sasrec, heads: 3}]", "is not a multiple of heads 3"),
        ("baselines=[{name: hybrid, candidates: 1000000}]", "candidates.*500"),
        ("items.rq_vae.steps=1000000", "steps.*100000"),
        ("strategy={name: custom, module: no.such.Class}", "there is no module 'no'"),
        ("strategy={name: custom, module: .Class}", "there is no module ''"),
    ],
)
def test_a_size_or_name_that_cannot_be_is_refused_at_once(override: str, message: str | None) -> None:
    began = time.process_time()
    if message is None:
        check_configuration(load_config(TINY, ["decoding.beams=50", override]))
        return
    with pytest.raises(PesoError, match=message):
        check_configuration(load_config(TINY, ["decoding.beams=50", override]))
    assert time.process_time() - began < 3


NAMED = {  # one member of a union, with what it needs
    "strategy": [{"name": name} for name in ("peso", "replay", "inf_lora")],
    "baselines": [
        {"name": name}
        for name in ("popularity", "item-knn", "ease", "item-graph", "two-tower", "sasrec", "hybrid")
    ],
}


def _counts(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys below a section whose value is a whole number."""
    for name, field in section.model_fields.items():
        kinds = plain_types(field.annotation)
        if int in kinds and float not in kinds and str not in kinds:
            yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _counts(field.annotation, f"{prefix}{name}.")


def _absurd_trees(size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in _counts(Config):
        yield key, {}
    for kind in NAMED["strategy"]:
        config = Config.model_validate({**TINY, "strategy": kind})
        yield from ((f"strategy.{key}", {"strategy": kind}) for key in _counts(type(config.strategy)))
    for kind in NAMED["baselines"]:
        (config,) = Config.model_validate({**TINY, "baselines": [kind]}).baselines
        for key in _counts(type(config)):
            options: dict[str, Any] = dict(kind)
            place(options, key, size)
            yield "", {"baselines": [options]}


@pytest.mark.parametrize("size", [1_000_000, 2**31 - 1, 10**20])
def test_an_absurd_count_is_refused_or_taken_at_once_whatever_its_key(size: int) -> None:
    looked = 0
    for key, tree in _absurd_trees(size):
        began = time.process_time()
        value = f"[{size}]" if key in ("evaluation.k", "items.rq_vae.hidden") else size
        with suppress(PesoError) if size < 10**20 else pytest.raises(PesoError):
            check_configuration(load_config({**TINY, **tree}, [f"{key}={value}"] if key else []))
        assert time.process_time() - began < 1, (key, tree)
        looked += 1
    assert looked > 50


def test_what_the_log_is_too_small_or_too_large_for_is_refused_before_semantic_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [(f"u{n % 9}", f"i{n % 7}", 1_700_000_000 + n) for n in range(200)]
    table = write_log(tmp_path / "items.csv", [(f"i{n}", f"Cup {n}") for n in range(7)], "item,title")
    items = {"path": str(table), "columns": {"item": "item", "title": "title"}}
    log = str(write_log(tmp_path / "log.csv", events))
    data = {"format": "csv", "path": log, "stages": 2, "items": items}
    refused = {
        "evaluation={k: [8]}": "asks for 8 items.*has 7",
        "baselines=[{name: two-tower, width: 16384}]": "two-tower width=16384.*GiB",
    }
    tree = {**TINY, "data": data, "items": {"quantizer": "rq-kmeans"}}
    for number, (override, message) in enumerate(refused.items()):
        config = load_config(tree, [override, "decoding.beams=20"])
        workspace = Workspace.create_or_open(tmp_path / str(number), config)
        monkeypatch.setattr("peso.runtime.machine.machine_memory", lambda: 2 * 2**20)
        with pytest.raises(ConfigError, match=message):
            pipeline.run(workspace)
        assert workspace.has_stream
        assert not workspace.has_semantic_ids


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.targets=[q_porj.q_proj]", "no linear layer named q_porj.q_proj; it has: .*q_proj"),
        ("prompt.window=2047", "prompts reach .* tokens"),
        (
            "head.negatives=900000",
            "head.negatives: 900000 has no effect without the item head; set head.name=items",
        ),
        ("head={name: codes, weight: 0.5}", "head.weight: 0.5 has no effect"),
        ("head.learning_rate_scale=0.1", "head.learning_rate_scale: 0.1 has no effect"),
        ("training.device=cuda:99", r"training\.device 'cuda:99'"),
        ("strategy={name: custom, module: os.system}", "not a subclass"),
        (
            "strategy={name: custom, module: peso.training.strategies.peso.Peso, arguments: {x: 1}}",
            "cannot be created",
        ),
        (
            "strategy={name: custom, module: peso.training.strategies.peso.Peso, arguments: {proximal: l3}}",
            "l3",
        ),
    ],
)
def test_a_run_refuses_before_it_reads_data(tmp_path: Path, override: str, message: str) -> None:
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(TINY, [override]))
    with pytest.raises(PesoError, match=message):
        pipeline.run(workspace)
    assert not workspace.has_stream


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("items.quantizer=rq-kmeans", "no item has a text or a vector"),
        ("items.quantizer=category-path", r"category-path needs data\.items\.columns\.category"),
        ("data.stages={boundaries: [2024-01-02, 2024-01-01]}", "boundaries must be in ascending order"),
        ("data.stages={boundaries: [9, 8.5]}", "boundaries must be in ascending order"),
        ("data.columns.user=customer", "no column 'customer'"),
        ("data.events={column: kind, keep: [buy]}", r"no column 'kind'.*data\.events\.column"),
    ],
)
@pytest.mark.parametrize("call", ["run", "compare"])
def test_data_of_which_no_ids_can_be_made_are_refused_before_they_are_read(
    tmp_path: Path, peso: Any, call: str, override: str, message: str
) -> None:
    log = write_log(tmp_path / "log.csv", [(f"u{n % 9}", f"i{n % 7}", n + 1) for n in range(200)])
    tree: dict[str, Any] = {**TINY, "data": {"format": "csv", "path": str(log)}, "items": {}}
    if call == "compare":
        tree["compare"] = {"strategies": ["single"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    status, _, err = peso(call, tmp_path / "c.yaml", "-w", tmp_path / "w", "--set", override)
    assert status == 1
    assert re.search(message, err), err
    assert not (tmp_path / "w").exists()


def test_a_comparison_refuses_a_wrong_variant_before_the_first_run(tmp_path: Path, peso: Any) -> None:
    comparison = {"strategies": {"single": "single", "wrong": {"strategy": "single", "set": {}}}}
    for wrong, message in (
        ({"adapter.targets": ["nothing"]}, "no linear layer named nothing"),
        ({"backbone.name": "nothing"}, "nor a known name"),
        ({"strategy": {"name": "custom", "module": "no.such"}}, "cannot be imported"),
        ({"backbone.layers": 1_000_000}, "GiB"),
    ):
        comparison["strategies"]["wrong"]["set"] = wrong  # type: ignore[index]
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**TINY, "compare": comparison}))
        status, _, said = peso("compare", tmp_path / "c.yaml", "-w", tmp_path / "w")
        assert status == 1
        assert "/wrong/" in said
        assert message in said
        assert not (tmp_path / "w" / "runs").exists()


def test_a_batch_larger_than_the_data_is_all_of_them() -> None:
    targets = np.array([3, 1, 2, 5])
    (all_at_once,) = plan_epoch(targets, 2**31 - 1, (0, 1, 2))
    (just,) = plan_epoch(targets, 11, (0, 1, 2))
    assert all_at_once.tolist() == just.tolist()
    assert sorted(just.tolist()) == [0, 1, 2, 3]


def test_epochs_beyond_all_memory_are_refused_and_few_steps_of_them_are_not(tmp_path: Path) -> None:
    tree = {**TINY, "training": {"epochs": 2_000_000_000, "batch_size": 64}}
    with pytest.raises(ConfigError, match=r"training\.epochs 2,000,000,000: at most 100,000"):
        check_configuration(load_config(tree))
    workspace = Workspace.create_or_open(tmp_path / "w", load_config(tree, ["training.max_steps=1"]))
    preparation.ingest(workspace, Silent())
    preparation.tokenize(workspace, Silent())
    pipeline.learn(workspace.stage(0), Silent())


# -- backbones -----------------------------------------------------------------------------------------


class Runs:
    """Runs something when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, Any]:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    small_llama(32, 1, 0).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def configured(**keys: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def pickled(how: Callable[[Any, Path], Any]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        how({"model.embed_tokens.weight": Runs(model / "ran")}, model / "pytorch_model.bin")

    return change


def headless(model: Path) -> None:
    small_llama(32, 1, 0, tied=False).model.save_pretrained(model)


def own_code(model: Path) -> None:
    configured(auto_map={"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"}, model_type="own")(model)
    (model / "own.py").write_text(f"import os; os.mkdir({str(model / 'ran')!r})")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled(torch.save), "pickle with more than tensors"),
        (pickled(lambda content, file: file.write_bytes(pickle.dumps(content))), "pickle"),
        (own_code, "its own code"),
        (headless, "incomplete"),
        (configured(hidden_size="wide"), "hidden_size"),
        (configured(num_attention_heads=0), "cannot be loaded"),
        (configured(hidden_act="nonsense"), "nonsense"),
        (configured(num_hidden_layers=10**9), "1,000,000,000 layers"),
        (configured(num_hidden_layers=-1), "-1 layers"),
        (configured(hidden_size=10**9), "of width 1,000,000,000"),
        (lambda model: (model / "model.safetensors").write_bytes(b"\0" * 99), "cannot be loaded"),
        (lambda model: (model / "config.json").write_text("[1]"), "cannot be loaded"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    ],
)
def test_a_backbone_of_any_kind_is_refused_in_a_sentence_and_runs_nothing(
    backbone: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(backbone)
    with pytest.raises(BackboneError, match=message) as error:
        load_backbone(str(backbone))
    assert "\n" not in str(error.value)
    assert not (backbone / "ran").exists()


def test_a_whole_backbone_passes(backbone: Path, tmp_path: Path) -> None:
    config = load_config({**TREE, "backbone": {"name": str(backbone)}})
    rehearse(Workspace(tmp_path, config))

"""``training.rows: all``: the words' rows of embedding and head are trained, too, untied and stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from catalogs import random_semantic_ids
from strategy_runs import TREE, Runs
from torch import Tensor
from transformers import AutoModelForCausalLM

from peso.adapters.lora import adapter_parameters
from peso.config import AdapterConfig, BackboneConfig, PromptConfig, load_config
from peso.config.shape import stage_shape
from peso.model.build import build_model
from peso.model.export import export_merged
from peso.model.generative import GenerativeModel
from peso.model.head import token_log_probabilities
from peso.runs import pipeline
from peso.runs.workspace import Workspace

pytestmark = pytest.mark.slow

CATALOG = random_semantic_ids(30, (5, 6, 7))
WORDS = ("input_words", "output_words")


def build(*, train_words: bool, whole: bool = False, layout: Any = "instruct") -> GenerativeModel:
    adapter = None if whole else AdapterConfig(rank=2, dropout=0.0)
    prompt, backbone = PromptConfig(layout=layout), BackboneConfig(name="tiny")
    return build_model(backbone, prompt, adapter, "full", CATALOG, seed=0, train_words=train_words).eval()


def logits(model: GenerativeModel, ids: Tensor) -> Tensor:
    hidden = model.hidden(ids, None, torch.arange(ids.shape[1])[None])[0]
    return torch.cat([model.word_logits(hidden), model.semantic_logits(hidden)], dim=-1)


def prompt(model: GenerativeModel) -> Tensor:
    return torch.from_numpy(model.layout.prompt(model.item_token_ids(np.array([3, 11])))).long()[None]


def test_it_starts_with_the_answers_of_the_backbone_and_everything_else_alike() -> None:
    own, shared = build(train_words=True), build(train_words=False)
    assert torch.equal(logits(own, prompt(own)), logits(shared, prompt(shared)))
    trained = {name for name, p in own.named_parameters() if p.requires_grad}
    before = {name for name, p in shared.named_parameters() if p.requires_grad}
    assert trained - before == {f"vocabulary.{name}" for name in WORDS}


def test_gradients_are_those_of_a_plain_model_with_untied_rows() -> None:
    """Embedding and head as one table each, words first, in an unmodified Llama without an adapter."""
    model = build(train_words=True)
    vocabulary, ids = model.vocabulary, prompt(model)
    with torch.no_grad():  # no longer tied, so that they cannot be taken for each other
        for p in [*vocabulary.parameters(), *adapter_parameters(model.backbone).values()]:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.05)
    targets = ids[0, 1:]
    hidden = model.hidden(ids, None, torch.arange(ids.shape[1])[None])[0, :-1]
    (-token_log_probabilities(model, hidden, targets, 0.8).mean()).backward()

    tables = [
        torch.cat([words, rows]).detach().requires_grad_()
        for words, rows in (
            (vocabulary.input_words, vocabulary.input_rows),
            (vocabulary.output_words, vocabulary.output_rows),
        )
    ]
    states = model.causal_lm.model(inputs_embeds=tables[0][ids])[0][0, :-1]
    torch.nn.functional.cross_entropy(states @ tables[1].T / 0.8, targets).backward()
    found = [
        torch.cat([torch.as_tensor(words.grad), torch.as_tensor(rows.grad)])
        for words, rows in (
            (vocabulary.input_words, vocabulary.input_rows),
            (vocabulary.output_words, vocabulary.output_rows),
        )
    ]
    for ours, plain in zip(found, tables, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(plain.grad), atol=1e-6, rtol=1e-4)
    assert found[0][: vocabulary.first_id].any(1).sum() > 20  # the words of the instruction


def test_a_backbone_that_is_trained_whole_has_no_second_table() -> None:
    model = build(train_words=True, whole=True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.model.embed_tokens.weight"}  # tied to the head
    merged = build(train_words=True).merged()
    assert {name for name, p in merged.named_parameters() if not p.requires_grad} == frozen


def test_an_export_has_the_trained_rows(tmp_path: Path) -> None:
    model = build(train_words=True)
    with torch.no_grad():
        for p in model.vocabulary.parameters():
            p.mul_(1.5).add_(0.01)
    export_merged(model, tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = prompt(model)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits[0], logits(model, ids), atol=1e-4, rtol=1e-4)


def test_stages_move_and_store_them(runs: Runs, tmp_path: Path) -> None:
    """Through stage 0 and an update, with the frozen backbone as it was."""
    place = runs("none").config.backbone.name
    tree = {
        **TREE,
        "backbone": {"name": place},
        "strategy": {"name": "single"},
        "prompt": {"layout": "instruct"},
    }
    tree["data"] = {"format": "simulate", "simulate": {"users": 40, "items": 30, "stages": 2}}
    workspace = Workspace.create_or_open(
        tmp_path / "w", load_config(tree, ["training.rows=all", "training.learning_rate=0.03"])
    )
    pipeline.run(workspace)
    models = [workspace.stage(stage).model() for stage in (0, 1)]
    first = models[0].vocabulary.first_id
    table = models[0].causal_lm.get_input_embeddings().weight[:first]
    for name in WORDS:
        before, after = (getattr(model.vocabulary, name) for model in models)
        assert before.shape == after.shape == table.shape
        assert not torch.equal(before, table)
        assert not torch.equal(after, before)
    assert all(model.causal_lm.get_input_embeddings().weight[:first].equal(table) for model in models)


def test_only_its_use_is_part_of_what_determines_a_stage() -> None:
    tree = {"data": "simulate", "backbone": "tiny"}
    assert "rows" not in stage_shape(load_config(tree), 1)["training"]
    assert stage_shape(load_config(tree, ["training.rows=all"]), 1)["training"]["rows"] == "all"


def test_the_papers_preset_is_the_released_protocol_where_nothing_else_is_given() -> None:
    paper = load_config({"data": "simulate", "strategy": "paper"})
    assert (paper.prompt.layout, paper.training.rows, paper.decoding.repeats) == ("instruct", "all", "keep")
    assert paper.training.loss_vocabulary == "full"
    given = {"prompt": {"layout": "stream"}, "training": {"rows": "semantic"}}
    chosen = load_config({"data": "simulate", "strategy": "paper", **given})
    assert (chosen.prompt.layout, chosen.training.rows) == ("stream", "semantic")
    assert chosen.training.loss_vocabulary == "full"
    plain = load_config(
        {"data": "simulate", "strategy": {"name": "peso", "weight": 2.0, "reduction": "mean"}}
    )
    assert (plain.prompt.layout, plain.training.rows) == ("stream", "semantic")

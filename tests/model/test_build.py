"""A model from its configuration, and a stage's weights on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from catalogs import random_semantic_ids
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peso.adapters.lora import adapter_parameters
from peso.config import AdapterConfig, BackboneConfig, PromptConfig
from peso.errors import BackboneError, WorkspaceError
from peso.model.backbone import byte_tokenizer, small_llama
from peso.model.build import (
    build_model,
    load_stage_weights,
    longest_sequence,
    round_frozen,
    save_stage_weights,
)
from peso.model.generative import GenerativeModel
from peso.model.layout import INSTRUCTION, make_layout

CATALOGUE = random_semantic_ids(30, (5, 6, 7))


def build(adapter: AdapterConfig | None = None, seed: int = 0, **options) -> GenerativeModel:
    settings = {"backbone": BackboneConfig(name="tiny"), "prompt": PromptConfig(), "loss_vocabulary": "full"}
    settings |= options
    return build_model(
        settings["backbone"],
        settings["prompt"],
        adapter,
        settings["loss_vocabulary"],
        CATALOGUE,
        seed=seed,
    )


def scrambled(model: GenerativeModel) -> GenerativeModel:
    """Every weight as if it had been trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def same(one: GenerativeModel, other: GenerativeModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_an_adapter_everything_learns_and_with_one_only_it_and_the_vocabulary() -> None:
    assert all(parameter.requires_grad for parameter in build().parameters())
    model = build(AdapterConfig())
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    expected = [*adapter_parameters(model).values(), *model.vocabulary.parameters()]
    assert learning == {id(parameter) for parameter in expected}


def test_the_seed_decides_everything_drawn() -> None:
    assert same(build(AdapterConfig(), seed=1), build(AdapterConfig(), seed=1))
    one, other = build(AdapterConfig(), seed=1).state_dict(), build(AdapterConfig(), seed=2).state_dict()
    drawn = [name for name in one if "lora_B" not in name and "norm" not in name]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_semantic_rows_have_half_the_spread_of_the_backbone() -> None:
    def spread(**options) -> float:
        return float(
            build(backbone=BackboneConfig(name="tiny", **options)).vocabulary.input_rows.detach().std()
        )

    assert spread() == pytest.approx(0.01, rel=0.1)
    assert spread(initializer_range=0.2) == pytest.approx(0.1, rel=0.1)


def test_vocabulary_and_backbone_do_not_share_their_draws() -> None:
    """Drawn from one seed, semantic rows would be copies of the words' rows."""
    model = build()
    words = model.causal_lm.get_input_embeddings().weight.detach()[: len(model.vocabulary)].flatten()
    rows = model.vocabulary.input_rows.detach().flatten()
    assert torch.corrcoef(torch.stack([words, rows]))[0, 1].abs() < 0.2


def test_a_frozen_backbone_takes_the_precision_and_what_learns_stays_float32() -> None:
    model, whole = build(AdapterConfig()), build()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for each in (model, whole):
        round_frozen(each, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert whole.dtype == torch.float32


def test_prompts_longer_than_the_backbone_sees_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"max_position_embeddings is 4096; reduce prompt\.window"):
        build(prompt=PromptConfig(window=700))


@pytest.mark.parametrize("name", ["stream", "instruct"])
def test_no_packed_sequence_is_longer_than_the_longest(name: str) -> None:
    layout = make_layout(name, byte_tokenizer(), window=3)
    items = np.zeros((6, 4), dtype=np.int64)
    assert len(layout.prompt(items)) + 4 + len(layout.end) <= longest_sequence(layout, levels=4)


def test_a_tokenizer_that_has_semantic_tokens_already_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a_1>"])
    model = small_llama(32, 1, seed=0)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="already has semantic tokens"):
        build(backbone=BackboneConfig(name=str(tmp_path)))


def test_rows_start_where_the_embedding_module_puts_its_words(tmp_path: Path) -> None:
    """On Gemma the module multiplies its rows by √width; fresh rows must be of that size."""
    from backbone_families import HEAD
    from backbone_families import build as build_family

    model = build(AdapterConfig(), backbone=BackboneConfig(name=build_family("gemma", HEAD, tmp_path)))
    with torch.no_grad():
        words = model.embed(torch.arange(model.vocabulary.first_id))
    ratio = model.vocabulary.input_rows.std() / words.std()
    assert 0.4 < ratio.item() < 0.6


# -- weights on disk ----------------------------------------------------------------------------------------


def test_an_adapted_stage_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = build(AdapterConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.5)
    save_stage_weights(model, tmp_path, whole_backbone=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "vocabulary.safetensors"]
    again = build(AdapterConfig())
    assert not same(model, again)
    load_stage_weights(again, tmp_path)
    assert same(model, again)


def test_a_backbone_trained_whole_comes_back_beneath_a_fresh_adapter(tmp_path: Path) -> None:
    stage0 = scrambled(build())
    save_stage_weights(stage0, tmp_path / "0", whole_backbone=True)
    again = build(seed=7)
    load_stage_weights(again, tmp_path / "0")
    assert same(stage0, again)

    stage1 = build(AdapterConfig(), seed=7)
    load_stage_weights(stage1, tmp_path / "0")
    ids, positions = torch.tensor([[0, 259, 260, 270]]), torch.arange(4)[None]
    with torch.no_grad():
        assert torch.equal(stage1.hidden(ids, None, positions), stage0.hidden(ids, None, positions))

    scrambled(stage1)
    load_stage_weights(stage1, tmp_path / "0")  # so that only the adapter and the vocabulary differ from it
    with torch.no_grad():
        for parameter in adapter_parameters(stage1).values():
            parameter.add_(0.3)
    save_stage_weights(stage1, tmp_path / "1", whole_backbone=False)
    later = build(AdapterConfig(), seed=8)
    load_stage_weights(later, tmp_path / "0")
    load_stage_weights(later, tmp_path / "1")
    assert same(stage1, later)


def test_the_backbone_of_a_stage_is_a_transformers_directory(tmp_path: Path) -> None:
    model = scrambled(build())
    save_stage_weights(model, tmp_path, whole_backbone=True)
    again = build(AdapterConfig(), backbone=BackboneConfig(name=str(tmp_path / "backbone")))
    weight = again.causal_lm.model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(weight, model.causal_lm.model.layers[0].mlp.up_proj.weight)


def test_a_missing_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"vocabulary\.safetensors is missing"):
        load_stage_weights(build(), tmp_path)


def test_a_truncated_vocabulary_is_an_error(tmp_path: Path) -> None:
    save_stage_weights(build(), tmp_path, whole_backbone=False)
    path = tmp_path / "vocabulary.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WorkspaceError, match="damaged"):
        load_stage_weights(build(), tmp_path)


def test_a_vocabulary_of_other_codes_is_an_error(tmp_path: Path) -> None:
    save_stage_weights(build(), tmp_path, whole_backbone=False)
    path = tmp_path / "vocabulary.safetensors"
    save_file({name: rows[:-1].clone() for name, rows in load_file(path).items()}, path)
    with pytest.raises(
        WorkspaceError, match=r"input_rows has the shape \(17, 32\) in the file and \(18, 32\) in"
    ):
        load_stage_weights(build(), tmp_path)


def test_a_backbone_of_another_depth_is_an_error(tmp_path: Path) -> None:
    save_stage_weights(build(), tmp_path, whole_backbone=True)
    with pytest.raises(WorkspaceError, match="does not match the model"):
        load_stage_weights(build(backbone=BackboneConfig(name="tiny", layers=3)), tmp_path)


# -- the instruction around added tokens --------------------------------------------------------------------


@pytest.mark.parametrize("word_mark", ["first", "always", "never", "normalizer"])
def test_the_instruction_is_what_the_extended_tokenizer_reads(word_mark: str) -> None:
    """Tokenizers that mark the first word of a text read the pieces otherwise than the whole."""
    letters = sorted(set("".join(INSTRUCTION)) | {"▁"})
    numbers = {
        t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *letters, *(f"<0x{i:02X}>" for i in range(256))])
    }
    backend = Tokenizer(models.BPE(vocab=numbers, merges=[], unk_token="<unk>", byte_fallback=True))
    if word_mark == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=word_mark, split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    layout, first = make_layout("instruct", tokenizer, 20), len(tokenizer)
    assert len(tokenizer) == first  # the caller's tokenizer is left as it was

    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<a_1>", "<b_1>")])
    item = "<a_1><b_1>"
    text = INSTRUCTION[0] + item + INSTRUCTION[1] + item + INSTRUCTION[2]
    expected = tokenizer.encode(text)
    assert layout.prompt(np.array([[first, first + 1]] * 2)).tolist() == expected

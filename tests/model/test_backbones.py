"""Which families of causal LMs can be a backbone, and that the others are refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from backbone_families import HEAD, SERVES, WINDOW, build

from peso.errors import AssetError, BackboneError
from peso.model import backbone_checks
from peso.model.backbone import byte_tokenizer, embedding_scale, load_backbone, small_llama
from peso.runtime import assets

ROOT = Path(__file__).resolve().parents[2]
REFUSED = {
    "bloom": ({"n_layer": 3, "n_head": 4}, "does not accept"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 3}, "a branch"),
    "rwkv": ({"attention_hidden_size": 32}, "a branch"),
    "qwen3_next": ({"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}, "a branch"),
    "mamba": ({"state_size": 4}, "does not accept"),
    "bert": ({}, "logits"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SERVES)
def test_a_family_passes_the_checks_and_loses_its_last_layer(family: str, tmp_path: Path) -> None:
    causal_lm, _ = load_backbone(build(family, SERVES[family], tmp_path), layers=2)
    assert causal_lm.config.model_type == family
    assert causal_lm.config.num_hidden_layers == 2
    assert not causal_lm.training
    assert not any(parameter.requires_grad for parameter in causal_lm.parameters())


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    extra, reason = REFUSED[family]
    with pytest.raises(BackboneError, match=f"is refused: .*{reason}"):
        load_backbone(build(family, extra, tmp_path))


def test_the_documentation_lists_the_families_that_were_tried() -> None:
    text = (ROOT / "docs" / "reference" / "models.md").read_text(encoding="utf-8")
    for heading, families in (("Pass", SERVES), ("Refused", REFUSED)):
        line = re.search(rf"^- \*\*{heading}\*\*: (.*?)\n(?! )", text, re.MULTILINE | re.DOTALL)
        assert line is not None
        assert re.findall(r"`(.*?)`", line[1]) == list(families)


# -- the checks themselves fail when what they check is broken ----------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return build("llama", {}, tmp_path)


def test_a_scale_on_the_logits_that_the_configuration_hides_is_refused(llama, monkeypatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(BackboneError, match="its logits are not"):
        load_backbone(llama)


def test_a_mask_that_is_ignored_is_refused(llama, monkeypatch) -> None:
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def maskless(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, attention_mask=None, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", maskless)
    with pytest.raises(BackboneError, match="a branch under a four-dimensional mask"):
        load_backbone(llama)


def test_positions_that_are_ignored_are_refused(llama, monkeypatch) -> None:
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def positionless(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", positionless)
    with pytest.raises(BackboneError, match="a branch under a four-dimensional mask"):
        load_backbone(llama)


def test_embeddings_that_are_treated_otherwise_than_ids_are_refused(llama, monkeypatch) -> None:
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def scaling(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * 2
        return forward(self, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", scaling)
    with pytest.raises(BackboneError, match="embeddings as input give"):
        load_backbone(llama)


def test_bfloat16_passes_with_its_own_tolerance(llama) -> None:
    causal_lm, _ = load_backbone(llama, dtype=torch.bfloat16)
    assert causal_lm.dtype == torch.bfloat16


# -- layers, names, lengths ---------------------------------------------------------------------------------


def test_the_first_layers_are_kept(llama) -> None:
    whole, _ = load_backbone(llama)
    short, _ = load_backbone(llama, layers=2)
    kept = dict(short.named_parameters())
    assert kept.keys() == {name for name, _ in whole.named_parameters() if ".layers.2." not in name}
    assert all(torch.equal(kept[name], dict(whole.named_parameters())[name]) for name in kept)


def test_a_shortened_backbone_survives_saving(llama, tmp_path) -> None:
    short, tokenizer = load_backbone(llama, layers=1)
    short.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    again, _ = load_backbone(str(tmp_path / "short"))
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), again.parameters(), strict=True))


def test_more_layers_than_there_are_is_an_error(llama) -> None:
    with pytest.raises(BackboneError, match=r"backbone\.layers is 9, .* only 3 layers"):
        load_backbone(llama, layers=9)


def test_scratch_and_tiny_are_drawn_from_the_seed() -> None:
    state = torch.random.get_rng_state()
    one, _ = load_backbone("tiny", seed=1)
    same, _ = load_backbone("tiny", seed=1)
    other, _ = load_backbone("tiny", seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    scratch, _ = load_backbone("scratch")
    assert (scratch.config.hidden_size, scratch.config.num_hidden_layers) == (128, 4)
    assert load_backbone("scratch", width=64, layers=1)[0].config.hidden_size == 64


def test_the_spread_of_random_weights_can_be_given() -> None:
    def spreads(**options) -> list[float]:
        causal_lm, _ = load_backbone("scratch", width=64, layers=1, **options)
        matrices = [p for p in causal_lm.parameters() if p.ndim > 1]
        assert len(matrices) == 8  # the embedding, which is also the head, and seven linear layers
        return [float(matrix.std()) for matrix in matrices]

    assert spreads() == pytest.approx([0.02] * 8, rel=0.05)
    assert spreads(initializer_range=0.125) == pytest.approx([0.125] * 8, rel=0.05)


def test_dropout_acts_in_training_alone_and_changes_no_file(tmp_path) -> None:
    plain, _ = load_backbone("tiny", seed=1)
    dropping, _ = load_backbone("tiny", seed=1, dropout=0.5)
    embeddings = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))

    def states(causal_lm) -> torch.Tensor:
        return causal_lm.get_decoder()(inputs_embeds=embeddings).last_hidden_state

    assert torch.equal(states(plain), states(dropping))
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    torch.manual_seed(0)
    dropping.train()
    first, second = states(dropping), states(dropping)
    assert not torch.allclose(first, second)
    # a layer adds nothing where all that it adds is dropped
    for layer in dropping.get_decoder().layers:
        layer.self_attn.dropout.p = layer.mlp.dropout.p = 1.0
    dropping.get_decoder().dropout.p = 0.0
    assert torch.allclose(states(dropping), dropping.get_decoder().norm(embeddings))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scratch", {"width": 100}, "backbone.width"),
        ("no-such-model", {}, "known name"),
        ("./nowhere", {}, "neither a directory nor a known name"),
        (__file__, {}, "is a file"),
    ],
)
def test_a_name_that_means_nothing_is_an_error(name, options, message) -> None:
    with pytest.raises(BackboneError, match=message):
        load_backbone(name, **options)


def test_width_is_for_random_backbones_only(llama) -> None:
    with pytest.raises(BackboneError, match="has a fixed width"):
        load_backbone(llama, width=64)


def test_an_asset_that_was_not_pulled_names_the_command(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PESO_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match="peso pull smollm2-135m"):
        load_backbone("smollm2-135m")


def test_a_truncated_file_is_an_error(llama) -> None:
    weights = Path(llama) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(llama)


def test_missing_weights_are_an_error(llama) -> None:
    from safetensors.torch import load_file, save_file

    weights = Path(llama) / "model.safetensors"
    state = load_file(weights)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="incomplete"):
        load_backbone(llama)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path) -> None:
    name = build("llama", {"vocab_size": 200}, tmp_path)
    with pytest.raises(BackboneError, match="258 tokens, but its input embedding has only 200 rows"):
        load_backbone(name)


def test_a_tokenizer_with_gaps_is_refused(llama, monkeypatch) -> None:
    tokenizer = byte_tokenizer()
    gapped = {**tokenizer.get_vocab(), "<|end|>": 300}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: gapped)
    with pytest.raises(BackboneError, match="gaps"):
        load_backbone(llama)


def test_a_prompt_beyond_the_window_is_refused(tmp_path) -> None:
    causal_lm, _ = load_backbone(build("mistral", WINDOW, tmp_path))
    backbone_checks.check_reach(causal_lm, 64)
    with pytest.raises(BackboneError, match="reach 65 tokens, but the backbone's sliding_window is 64"):
        backbone_checks.check_reach(causal_lm, 65)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    causal_lm = small_llama(32, 1, seed=0)
    with pytest.raises(BackboneError, match="max_position_embeddings is 4096"):
        backbone_checks.check_reach(causal_lm, 4097)


def test_the_scale_of_an_embedding_is_found(llama, tmp_path) -> None:
    assert embedding_scale(load_backbone(llama)[0]) == 1
    gemma, _ = load_backbone(build("gemma", HEAD, tmp_path / "gemma"))
    assert embedding_scale(gemma) == pytest.approx(32**0.5, rel=1e-6)


# -- the real one -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_a_plain_float32_llama(tmp_path) -> None:
    try:
        assets.pull("smollm2-135m")
    except AssetError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
    causal_lm, tokenizer = load_backbone("smollm2-135m", layers=2)
    assert (causal_lm.config.hidden_size, causal_lm.config.vocab_size, len(tokenizer)) == (576, 49152, 49152)
    assert {parameter.dtype for parameter in causal_lm.parameters()} == {torch.float32}
    assert getattr(causal_lm.config, "quantization_config", None) is None
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == "<|im_end|>"
    causal_lm.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_backbone(str(tmp_path / "saved"))
    assert all(torch.equal(a, b) for a, b in zip(causal_lm.parameters(), again.parameters(), strict=True))

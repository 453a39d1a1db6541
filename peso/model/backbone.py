"""Loads or builds the frozen language model and checks that it works (:mod:`peso.model.backbone_checks`)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peso.config.model import BUILT_IN, CONTEXT, head_size
from peso.errors import BackboneError
from peso.model.backbone_checks import check_backbone
from peso.model.source import source_of
from peso.runtime.hugging_face import quiet_transformers

BEGIN, END = "<|begin|>", "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Two special tokens and the 256 bytes: any text, no vocabulary to learn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([BEGIN, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def add_dropout(causal_lm: Any, p: float) -> None:
    """Drop a share p of the embeddings, and of what attention and feed-forward add to the residual stream of
    each layer, in training mode; nothing is saved of it."""
    decoder = causal_lm.get_decoder()
    decoder.add_module("dropout", nn.Dropout(p))
    decoder.register_forward_pre_hook(_drop_embeddings, with_kwargs=True)
    for layer in decoder.layers:
        for part in (layer.self_attn, layer.mlp):
            part.add_module("dropout", nn.Dropout(p))
            part.register_forward_hook(_drop_output)


def _drop_embeddings(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    embeddings = kwargs.get("inputs_embeds")  # none where a check calls with ids
    return args, kwargs if embeddings is None else {**kwargs, "inputs_embeds": decoder.dropout(embeddings)}


def _drop_output(part: Any, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # attention: with its weights
        return part.dropout(output[0]), *output[1:]
    return part.dropout(output)


def small_llama(width: int, layers: int, seed: int, *, tied: bool = True) -> LlamaForCausalLM:
    """A randomly initialized Llama for the byte tokenizer: heads of 32 (16 below width 64), MLP 8/3 × width.

    The caller's random state is left as it was. Same seed, same weights.
    """
    head = head_size(width)
    if width % head:
        raise ValueError(f"width {width} is not a multiple of the head size {head}")
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_backbone(
    name: str,
    *,
    layers: int | None = None,
    width: int | None = None,
    dropout: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """A checked causal LM and its tokenizer.

    Attention is scaled-dot-product attention, or eager where Transformers has no other for the family.

    Args:
        name: ``scratch``, ``tiny``, an asset that was pulled, the path of a Transformers directory, or a name
            on the Hugging Face hub.
        layers: keep the first n decoder layers; for ``scratch`` and ``tiny`` the depth.
        width: hidden width, ``scratch`` and ``tiny`` only.
        dropout: see :func:`add_dropout`, ``scratch`` and ``tiny`` only; None: none.
        seed: of the random weights of ``scratch`` and ``tiny``.
        dtype: precision of the weights.

    Returns:
        (causal LM, tokenizer): on the CPU, in evaluation mode, every parameter frozen.

    Raises:
        BackboneError: it cannot be found or read, has fewer layers, is incomplete, or fails a check.
    """
    if name in BUILT_IN:
        default_width, default_layers = BUILT_IN[name]
        try:
            causal_lm: Any = small_llama(width or default_width, layers or default_layers, seed).to(dtype)
        except ValueError as error:
            raise BackboneError(f"backbone {name!r}: {error}; set backbone.width") from None
        if dropout:
            add_dropout(causal_lm, dropout)
        tokenizer: Any = byte_tokenizer()
    else:
        if width is not None:
            raise BackboneError(
                f"backbone.width is for {' and '.join(BUILT_IN)} only; {name!r} brings its own width"
            )
        causal_lm, tokenizer = _pretrained(name, source_of(name), layers, dtype)
    # PEFT writes this into its files: the name that was configured, not a place on this machine
    causal_lm.name_or_path = causal_lm.config._name_or_path = name
    causal_lm.eval().requires_grad_(False)
    try:
        check_backbone(causal_lm, tokenizer)
    except BackboneError as error:
        raise BackboneError(f"backbone {name!r} is refused: {error}") from None
    return causal_lm, tokenizer


def _pretrained(name: str, source: str, layers: int | None, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        with quiet_transformers():  # silent about the weights that `layers` leaves out
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            if layers is not None:
                _keep_layers(config, layers, name)
            _check_depth(config, source)
            causal_lm, report = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except BackboneError:
        raise
    except Exception as error:  # files that others wrote: there is no end to what may be wrong with them
        cause = " ".join(str(error).split()[:40])
        if " " not in cause:  # a key, or nothing
            cause = f"{type(error).__name__} {cause}".strip()
        if "trust_remote_code" in str(error):
            cause = "it needs code that comes with it, which peso does not run"
        if isinstance(error, pickle.UnpicklingError):
            cause = "its weights are a pickle that holds more than tensors; convert it to safetensors"
        raise BackboneError(f"backbone {name!r} cannot be loaded from {source}: {cause}") from error
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise BackboneError(
            f"backbone {name!r} is incomplete: {len(report['missing_keys'])} weights are not in its files "
            f"({some}, …); name a directory that holds a whole causal LM"
        )
    return causal_lm, tokenizer


def _check_depth(config: Any, source: str) -> None:
    """Before layers are made: refuse a directory that says it has more of them than its weights can fill."""
    text = config.get_text_config()
    layers, width = (getattr(text, key, None) or 0 for key in ("num_hidden_layers", "hidden_size"))
    if layers < 1:
        raise BackboneError(f"backbone {source!r} has {layers} layers in its config.json; it needs one")
    files = [path for path in Path(source).glob("*") if path.suffix in (".safetensors", ".bin")]
    held = sum(path.stat().st_size for path in files)
    if files and layers * width > held:
        raise BackboneError(
            f"backbone {source!r} is incomplete: {layers:,} layers {width:,} wide in its config.json, "
            f"{held:,} bytes of weights; name a directory that holds a whole causal LM"
        )


def _keep_layers(config: Any, layers: int, name: str) -> None:
    """Shorten a configuration to its first layers; lists with one entry a layer are shortened with it."""
    text = config.get_text_config()
    total = text.num_hidden_layers
    if layers > total:
        raise BackboneError(f"backbone.layers is {layers}, but backbone {name!r} has only {total} layers")
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == total:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers


def embedding_scale(causal_lm: Any) -> float:
    """The factor between a row of the input embedding and what the module gives for its token.

    Gemma's module multiplies by √width. Our input rows stand beside the module, so they are kept as it gives
    them; an export divides them by this factor.

    Raises:
        BackboneError: the module does something else than look up a row and scale it.
    """
    module = causal_lm.get_input_embeddings()
    with torch.no_grad():
        ids = torch.arange(min(64, len(module.weight)), device=module.weight.device)
        rows, given = module.weight[ids].float(), module(ids).float()
        scale = ((rows * given).sum() / rows.square().sum()).item()
        if not torch.allclose(given, rows * scale, rtol=1e-2, atol=1e-4 * given.abs().max().item()):
            raise BackboneError("its input embedding does more than look up a row and scale it")
    return scale

"""Load or build the frozen language model, and check that it works (:mod:`peso.model.backbone_checks`)."""

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

from peso.config.model import BUILT_IN, CONTEXT, INITIALIZER_RANGE, head_size
from peso.errors import BackboneError
from peso.model.backbone_checks import check_backbone
from peso.model.source import source_of, source_of_pretrained
from peso.runtime.failures import listed
from peso.runtime.hugging_face import loading

BEGIN, END = "<|begin|>", "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for any text, with two special tokens and the 256 bytes."""
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
    """Apply dropout with probability p to the embeddings and to the outputs of attention and feed-forward in
    each layer, in training mode. This does not affect the saved weights."""
    decoder = causal_lm.get_decoder()
    decoder.add_module("dropout", nn.Dropout(p))
    decoder.register_forward_pre_hook(_drop_embeddings, with_kwargs=True)
    for layer in decoder.layers:
        for part in (layer.self_attn, layer.mlp):
            part.add_module("dropout", nn.Dropout(p))
            part.register_forward_hook(_drop_output)


def _drop_embeddings(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    embeddings = kwargs.get("inputs_embeds")  # None if a check passes ids
    return args, kwargs if embeddings is None else {**kwargs, "inputs_embeds": decoder.dropout(embeddings)}


def _drop_output(part: Any, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):  # attention also returns its weights
        return part.dropout(output[0]), *output[1:]
    return part.dropout(output)


@loading()
def small_llama(
    width: int,
    layers: int,
    seed: int,
    *,
    tied: bool = True,
    initializer_range: float = INITIALIZER_RANGE,
) -> LlamaForCausalLM:
    """A randomly initialized Llama for the byte tokenizer.

    Heads have 32 dimensions (16 if the width is less than 64), and the MLP is 8/3 times as wide as the model.
    The same seed gives the same weights, and the caller's random state does not change.

    Args:
        width: the hidden width.
        seed: the seed of the weights.
        tied: whether the input embedding and the output head share their weights.
        initializer_range: the standard deviation of the initial weights.

    Raises:
        ValueError: the width is not a multiple of the head size.
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
        initializer_range=initializer_range,
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
    initializer_range: float | None = None,
    pretrained: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """Load or build a causal LM with its tokenizer, and check it.

    Attention is scaled-dot-product attention, or eager if Transformers has no other for the family.

    Args:
        name: ``scratch``, ``tiny``, an asset that was pulled, the path of a Transformers directory, or a name
            on the Hugging Face hub.
        layers: the number of decoder layers to keep, from the first one on. For ``scratch`` and ``tiny``, the
            number of layers to build.
        width: the hidden width, for ``scratch`` and ``tiny`` only.
        dropout: see :func:`add_dropout`, for ``scratch`` and ``tiny`` only. None for no dropout.
        initializer_range: the standard deviation of the random weights of ``scratch`` and ``tiny``. None for
            ``INITIALIZER_RANGE``.
        pretrained: for ``scratch`` and ``tiny`` only, where their weights are, see
            :func:`peso.model.source.source_of_pretrained`. None for random weights.
        seed: the seed of the random weights of ``scratch`` and ``tiny``.
        dtype: the precision of the weights.

    Returns:
        The causal LM and its tokenizer. The model is on the CPU, in evaluation mode, with all parameters
        frozen.

    Raises:
        BackboneError: the backbone cannot be found or read, has fewer layers, is incomplete, or fails a
            check.
    """
    causal_lm: Any
    tokenizer: Any
    if name in BUILT_IN and pretrained is None:
        default_width, default_layers = BUILT_IN[name]
        try:
            causal_lm = small_llama(
                width or default_width,
                layers or default_layers,
                seed,
                initializer_range=initializer_range or INITIALIZER_RANGE,
            ).to(dtype)
        except ValueError as error:
            raise BackboneError(f"backbone {name!r}: {error}; set backbone.width") from None
        tokenizer = byte_tokenizer()
    elif pretrained is not None:
        causal_lm, tokenizer = _pretrained(name, source_of_pretrained(pretrained), layers, dtype)
        if width not in (None, causal_lm.config.hidden_size):
            raise BackboneError(
                f"backbone.width is {width}, but the backbone in {pretrained} has a width of "
                f"{causal_lm.config.hidden_size}; leave backbone.width out, or use another one"
            )
    else:
        if width is not None:
            raise BackboneError(
                f"backbone.width is for {' and '.join(BUILT_IN)} only; {name!r} has a fixed width"
            )
        causal_lm, tokenizer = _pretrained(name, source_of(name), layers, dtype)
    if name in BUILT_IN and dropout:
        add_dropout(causal_lm, dropout)
    # PEFT writes this to its files; use the configured name instead of a local path
    causal_lm.name_or_path = causal_lm.config._name_or_path = name
    causal_lm.eval().requires_grad_(False)
    try:
        check_backbone(causal_lm, tokenizer)
    except BackboneError as error:
        raise BackboneError(f"backbone {name!r} is refused: {error}") from None
    return causal_lm, tokenizer


def _pretrained(name: str, source: str, layers: int | None, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        with loading():  # no warnings about weights that are left out because of `layers`
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
    except Exception as error:  # files from other sources may be wrong in many ways
        cause = " ".join(str(error).split()[:40])
        if " " not in cause:  # only a key, or an empty message
            cause = f"{type(error).__name__} {cause}".strip()
        if "trust_remote_code" in str(error):
            cause = "it needs its own code, which peso does not run"
        if isinstance(error, pickle.UnpicklingError):
            cause = "its weights are a pickle with more than tensors; convert it to safetensors"
        raise BackboneError(f"backbone {name!r} cannot be loaded from {source}: {cause}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BackboneError(
            f"backbone {name!r} is incomplete: {len(missing)} weights are missing from its files "
            f"({listed(missing, 3)}); use a directory with a complete causal LM"
        )
    return causal_lm, tokenizer


def _check_depth(config: Any, source: str) -> None:
    """Check, before any layer is built, that a directory's weights can fill the configured number of layers.

    Raises:
        BackboneError: there are no layers, or more than the weights can fill.
    """
    text = config.get_text_config()
    layers, width = (getattr(text, key, None) or 0 for key in ("num_hidden_layers", "hidden_size"))
    if layers < 1:
        raise BackboneError(
            f"backbone {source!r} has {layers} layers in its config.json; it needs at least one"
        )
    files = [path for path in Path(source).glob("*") if path.suffix in (".safetensors", ".bin")]
    held = sum(path.stat().st_size for path in files)
    if files and layers * width > held:
        raise BackboneError(
            f"backbone {source!r} is incomplete: its config.json has {layers:,} layers of width {width:,}, "
            f"but there are only {held:,} bytes of weights; use a directory with a complete causal LM"
        )


def _keep_layers(config: Any, layers: int, name: str) -> None:
    """Shorten a configuration to its first layers, including lists with one entry per layer."""
    text = config.get_text_config()
    total = text.num_hidden_layers
    if layers > total:
        raise BackboneError(f"backbone.layers is {layers}, but backbone {name!r} has only {total} layers")
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == total:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers


def embedding_scale(causal_lm: Any) -> float:
    """The factor between a row of the input embedding and the module's output for its token.

    Gemma's module multiplies by √width. Our input rows are outside of the module, so they include this
    factor; an export divides them by it.

    Raises:
        BackboneError: the module does something other than look up a row and scale it.
    """
    module = causal_lm.get_input_embeddings()
    with torch.no_grad():
        ids = torch.arange(min(64, len(module.weight)), device=module.weight.device)
        rows, given = module.weight[ids].float(), module(ids).float()
        scale = ((rows * given).sum() / rows.square().sum()).item()
        if not torch.allclose(given, rows * scale, rtol=1e-2, atol=1e-4 * given.abs().max().item()):
            raise BackboneError("its input embedding does more than look up a row and scale it")
    return scale

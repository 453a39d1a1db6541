"""Backbones built in code: a small Llama and a byte-level tokenizer, no download needed.

Knows widths, depths and seeds; knows nothing of items or training. ``tiny`` is for tests, ``scratch`` is
trained whole at stage 0.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def small_llama(width: int, layers: int, seed: int, *, tied: bool = True) -> LlamaForCausalLM:
    """A randomly initialised Llama for the byte tokenizer: heads of 32 (16 below width 64), MLP 8/3 × width.

    The caller's random state is left as it was. Same seed, same weights.
    """
    head = 32 if width >= 64 else 16
    if width % head:
        raise ValueError(f"width {width} is not a multiple of the head size {head}")
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)

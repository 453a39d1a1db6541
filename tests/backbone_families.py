"""Random models of the families of causal LMs that can be a backbone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from peso.model.backbone import byte_tokenizer

COMMON = {
    "vocab_size": 264,  # a few rows more than the tokenizer has tokens, as many checkpoints have
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}


HEAD = {"head_dim": 8}


WINDOW = {"sliding_window": 64}


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


# model type → what its configuration needs beside COMMON
SERVES = {
    "llama": {},
    "qwen2": {},
    "qwen3": HEAD,
    "mistral": WINDOW,
    "ministral": HEAD | WINDOW,
    "gemma": HEAD,
    "gemma2": HEAD | WINDOW | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": HEAD | WINDOW | {"query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25} | WINDOW,
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.2},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "smollm3": {},
    "glm4": HEAD,
    "helium": HEAD,
    "stablelm": {},
    "starcoder2": {},
    "nemotron": {},
    "exaone4": {},
    "ernie4_5": {},
    "seed_oss": HEAD,
    "hunyuan_v1_dense": HEAD,
    "mixtral": EXPERTS,
    "qwen3_moe": HEAD | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "gpt_oss": HEAD | WINDOW | EXPERTS,
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neox": {},
    "gpt_bigcode": GPT,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {},
}


def build(family: str, extra: dict, directory: Path) -> str:
    """A random model of a family with weights wide enough that a wrong mask or factor shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**COMMON, **extra}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)

"""A GGUF file as a plain Transformers directory.

Dequantising takes many times as long as reading plain weights, so it is done once, when a model is fetched.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peso.runtime.quiet import quiet_transformers


def convert_gguf(file: Path, directory: Path) -> None:
    """Write the model (float32, as dequantised) and the tokenizer of a GGUF file into ``directory``."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # with its quantisation entry the saved model could not be loaded: the weights are plain by now
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)

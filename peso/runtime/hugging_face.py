"""Load models with Transformers, safely and silently, and convert GGUF files to Transformers directories."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

_LOADING = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """A context, or with ``@loading()`` a decorator, in which models are created or loaded: by one thread at
    a time, and without Transformers' output except errors.

    While Transformers loads a model, it replaces methods of its classes and the functions of
    ``torch.nn.init`` for the whole process. A model that another thread creates meanwhile would lack initial
    or tied weights, and after two loads at once the replacements would stay.
    """
    with _LOADING, _quiet():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def convert_gguf(file: Path, directory: Path) -> None:
    """Write the model (dequantized to float32) and the tokenizer of a GGUF file into ``directory``.

    Dequantizing takes many times longer than reading plain weights, so it is done once, when a model is
    downloaded.
    """
    with loading():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # the weights are no longer quantized; with the quantization entry the saved model could not be loaded
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)

"""Item vectors from a pretrained text encoder or a causal LM.

A directory or repository with a ``modules.json`` is a sentence-transformers model, which defines its own
pooling. Anything else is a Transformers model, whose last hidden states are averaged over the tokens of the
text (also for a causal LM, as in the PESO paper).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peso.config.model import is_path
from peso.errors import ConfigError
from peso.items.encoder_assets import find_encoder
from peso.runtime import assets
from peso.runtime.failures import first_line, listed
from peso.runtime.files import checksum
from peso.runtime.hugging_face import loading

BATCH_TOKENS = 8_192  # padded tokens of one forward pass
MODULES = "modules.json"  # a file of sentence-transformers models
_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")
Encode = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder.

    Attributes:
        encode: a function from texts to vectors, float32 (n, width).
        identity: JSON values that determine the vectors.
    """

    encode: Encode
    identity: tuple[object, ...]


def load_text_encoder(name: str, max_tokens: int) -> TextEncoder:
    """Load an encoder by asset name (``all-minilm-l6-v2``), hub name or path.

    Args:
        name: the name or path.
        max_tokens: the number of tokens after which texts are cut. The model's own limit applies if it is
            lower.

    Raises:
        ConfigError: the encoder cannot be loaded; the message says why and what to do.
    """
    try:
        with loading():
            directory, revision = _find(name)
            packaged = (directory / MODULES).is_file()
            load = _sentence_transformer if packaged else _mean_pooling
            encode = load(directory, max_tokens)
            encode(["text"])
    except ConfigError:
        raise
    except _MissingLibrary as error:
        raise ConfigError(
            f"items.encoder {name!r} is a sentence-transformers model; install the library with "
            "`pip install 'peso[text]'`"
        ) from error
    except Exception as error:  # files from other sources may be wrong in many ways
        raise ConfigError(
            f"items.encoder {name!r} cannot be loaded: {first_line(error)}; set it to the hub name or path "
            "of a sentence-transformers or Transformers model, or use `hashing`, which needs no model"
        ) from error
    return TextEncoder(encode, ("text encoder", revision, max_tokens))


class _MissingLibrary(Exception):
    pass


def _find(name: str) -> tuple[Path, str]:
    """The directory of a model, downloaded from the hub if necessary, and a text that identifies its
    version."""
    if name in [*assets.names("encoder"), *assets.names("backbone")]:
        found = find_encoder(name)
        return found, _checksums(found)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory, _checksums(directory)
    if is_path(name):
        raise OSError("there is no such directory")
    from huggingface_hub import snapshot_download

    described = ["*.json", "*.txt", "*.model"]
    snapshot = Path(snapshot_download(name, allow_patterns=[*described, "*.safetensors"]))
    if not list(snapshot.rglob("*.safetensors")):
        snapshot = Path(snapshot_download(name, allow_patterns=[*described, "*.bin"]))
    return snapshot, f"{name}@{snapshot.name}"  # the hub's own cache names a snapshot by its commit


def _checksums(directory: Path) -> str:
    return " ".join(checksum(path) for path in sorted(directory.rglob("*")) if path.suffix in _FILES)


def _require_modules(directory: Path) -> None:
    """Check the list of modules, because the library imports the classes and reads the files that it names.

    Raises:
        ValueError: the list is damaged, or names a class or a folder outside of the library or the model.
    """
    modules = json.loads((directory / MODULES).read_text(encoding="utf-8"))
    if not isinstance(modules, list) or not modules or not all(isinstance(each, dict) for each in modules):
        raise ValueError(f"{MODULES} is not a list of modules")
    for module in modules:
        kind, path = (module.get(key) for key in ("type", "path"))
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise ValueError(f"{MODULES} names the class {kind!r}, which is not part of the library")
        if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{MODULES} names the folder {path!r}, which is not in the model's directory")


def _sentence_transformer(directory: Path, max_tokens: int) -> Encode:
    _require_modules(directory)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise _MissingLibrary from error
    model = SentenceTransformer(str(directory), device=_device(), trust_remote_code=False)
    limit = model.max_seq_length
    model.max_seq_length = max_tokens if limit is None else min(limit, max_tokens)

    def encode(texts: Sequence[str]) -> np.ndarray:
        batch = max(1, BATCH_TOKENS // model.max_seq_length)
        return np.asarray(model.encode(list(texts), batch_size=batch, show_progress_bar=False), np.float32)

    return encode


def _mean_pooling(directory: Path, max_tokens: int) -> Encode:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model, report = AutoModel.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    # the pooler is not used
    if lacking := sorted(name for name in report["missing_keys"] if "pooler" not in name):
        raise ValueError(f"{len(lacking)} weights are missing from its files ({listed(lacking, 3)})")
    model = model.to(_device()).eval()
    positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
    limit = min(max_tokens, positions, tokenizer.model_max_length)
    if tokenizer.pad_token_id is None:  # padded positions are masked, so any token works
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"

    def encode(texts: Sequence[str]) -> np.ndarray:
        ids = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        result = np.zeros((len(texts), model.config.get_text_config().hidden_size), np.float32)
        for rows in _batches([len(row) for row in ids]):
            padded = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            result[rows] = _pooled(model, padded.to(model.device))
        return result

    return encode


@torch.no_grad()
def _pooled(model: Any, inputs: Any) -> np.ndarray:
    hidden = model(**inputs).last_hidden_state  # (texts, tokens, width)
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).float().cpu().numpy()


def _batches(lengths: Sequence[int]) -> list[np.ndarray]:
    """Batches of rows with similar lengths and at most ``BATCH_TOKENS`` padded tokens, without rows of length
    0."""
    order = [row for row in np.argsort(lengths, kind="stable") if lengths[row]]
    batches: list[list[int]] = []
    for row in order:
        if not batches or (len(batches[-1]) + 1) * lengths[row] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(int(row))
    return [np.array(batch) for batch in batches]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

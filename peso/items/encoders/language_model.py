"""Item vectors from a pretrained text encoder or a causal LM.

Knows texts, Transformers and sentence-transformers; knows nothing of items. A directory or repository that
holds a ``modules.json`` is a sentence-transformers model and says itself how it pools; anything else is a
Transformers model, whose last hidden states are averaged over the tokens of the text (for a causal LM too,
as the PESO paper does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from peso import assets
from peso.durable import checksum
from peso.errors import ConfigError

BATCH_TOKENS = 8_192  # padded tokens of one forward pass
_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")
Encode = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class TextEncoder:
    """``encode``: texts to float32 (n, width); ``identity``: JSON values that determine what it gives."""

    encode: Encode
    identity: tuple[object, ...]


def load_text_encoder(name: str, max_tokens: int) -> TextEncoder:
    """Load an encoder by asset name (``all-minilm-l6-v2``), hub name or path.

    Args:
        max_tokens: a text is cut after so many tokens (or at the model's own limit, if lower).

    Raises:
        ConfigError: it cannot be loaded; says why and what to do.
    """
    source = _source(name)
    try:
        if _is_sentence_transformer(source):
            encode, revision = _sentence_transformer(source, max_tokens)
        else:
            encode, revision = _mean_pooling(source, max_tokens)
    except _MissingLibrary as error:
        raise ConfigError(
            f"items.encoder {name!r} is a sentence-transformers model; install the library with "
            "`pip install 'peso[text]'`"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"items.encoder {name!r} cannot be loaded: {cause}; name a sentence-transformers or Transformers "
            "model by hub name or path, or use `hashing`, which needs no model"
        ) from error
    return TextEncoder(encode, ("text encoder", revision, max_tokens))


class _MissingLibrary(Exception):
    pass


def _source(name: str) -> str:
    if name in assets.names("encoder"):
        found = assets.find(name)
        if found is None:
            raise ConfigError(
                f"items.encoder {name!r} is not in the cache; fetch it with `peso pull {name}`, or use "
                "`hashing`, which needs no model"
            )
        return str(found)
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def _is_sentence_transformer(source: str) -> bool:
    if Path(source).is_dir():
        return (Path(source) / "modules.json").is_file()
    from transformers.utils import cached_file

    return cached_file(source, "modules.json", _raise_exceptions_for_missing_entries=False) is not None


def _revision(source: str, commit: str | None) -> str:
    """What tells one state of a model from another: the hub's commit, or the checksums of its files."""
    if not Path(source).is_dir():
        return f"{source}@{commit}"
    files = sorted(path for path in Path(source).rglob("*") if path.suffix in _FILES)
    return " ".join(checksum(path) for path in files)


def _sentence_transformer(source: str, max_tokens: int) -> tuple[Encode, str]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise _MissingLibrary from error
    model = SentenceTransformer(source, device=_device())
    limit = model.max_seq_length
    model.max_seq_length = max_tokens if limit is None else min(limit, max_tokens)

    def encode(texts: Sequence[str]) -> np.ndarray:
        batch = max(1, BATCH_TOKENS // model.max_seq_length)
        return np.asarray(model.encode(list(texts), batch_size=batch, show_progress_bar=False), np.float32)

    commit = getattr(getattr(model[0], "auto_model", None), "config", None)
    return encode, _revision(source, getattr(commit, "_commit_hash", None))


def _mean_pooling(source: str, max_tokens: int) -> tuple[Encode, str]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).to(_device()).eval()
    positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
    limit = min(max_tokens, positions, tokenizer.model_max_length)
    if tokenizer.pad_token_id is None:  # padded positions are masked: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"

    def encode(texts: Sequence[str]) -> np.ndarray:
        ids = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        result = np.zeros((len(texts), model.config.get_text_config().hidden_size), np.float32)
        for rows in _batches([len(row) for row in ids]):
            padded = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            result[rows] = _pooled(model, padded.to(model.device))
        return result

    return encode, _revision(source, getattr(model.config, "_commit_hash", None))


@torch.no_grad()
def _pooled(model: Any, inputs: Any) -> np.ndarray:
    hidden = model(**inputs).last_hidden_state  # (texts, tokens, width)
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).float().cpu().numpy()


def _batches(lengths: Sequence[int]) -> list[np.ndarray]:
    """Rows of like length together, ``BATCH_TOKENS`` padded tokens at most; none of length 0."""
    order = [row for row in np.argsort(lengths, kind="stable") if lengths[row]]
    batches: list[list[int]] = []
    for row in order:
        if not batches or (len(batches[-1]) + 1) * lengths[row] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(int(row))
    return [np.array(batch) for batch in batches]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

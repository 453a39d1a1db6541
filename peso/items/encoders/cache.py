"""Vectors of texts that were encoded before, found by the text's content.

cache/{digest of the encoder}/{digest of the part}.safetensors    sha256 of each text, vector of each text
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from peso.runtime.files import digest, write_aside

PART = 10_000  # texts encoded between two writes: what an interrupted run loses at most


def encode_cached(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], np.ndarray],
    identity: Sequence[object],
    directory: Path | None,
    on_progress: Callable[[int, int], None],
) -> np.ndarray:
    """Encode texts, each distinct one once, and none that the cache has.

    Args:
        encode: texts to float32 (texts, width).
        identity: JSON values that determine what ``encode`` gives.
        directory: the cache; None: nothing is kept.
        on_progress: called with (encoded so far, to be encoded).

    Returns:
        float32 (texts, width).

    Raises:
        WorkspaceError: no space left in the cache.
    """
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    distinct = dict(zip(keys, texts, strict=True))
    folder = directory / digest(*identity)[:32] if directory is not None else None
    known = _read(folder) if folder is not None else {}
    missing = [key for key in distinct if key not in known]
    # texts of like length together, over all parts: batches with little padding
    missing.sort(key=lambda key: len(distinct[key]), reverse=True)
    for start in range(0, len(missing), PART):
        part = missing[start : start + PART]
        vectors = encode([distinct[key] for key in part])
        known.update(zip(part, vectors, strict=True))
        if folder is not None:
            _write(folder, part, vectors)
        on_progress(start + len(part), len(missing))
    return np.stack([known[key] for key in keys]) if keys else np.empty((0, 0), np.float32)


def _read(folder: Path) -> dict[bytes, np.ndarray]:
    known: dict[bytes, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            arrays = load_file(path)
            keys, vectors = arrays["keys"], arrays["vectors"]
        except (SafetensorError, OSError, KeyError):
            path.unlink()  # a damaged part is worth nothing: its texts are encoded again
            continue
        known.update((key.tobytes(), vector) for key, vector in zip(keys, vectors, strict=True))
    return known


def _write(folder: Path, keys: Sequence[bytes], vectors: np.ndarray) -> None:
    rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
    name = hashlib.sha256(rows.tobytes()).hexdigest()[:32]
    with write_aside(folder / f"{name}.safetensors") as aside:
        save_file({"keys": rows.copy(), "vectors": np.ascontiguousarray(vectors)}, aside)

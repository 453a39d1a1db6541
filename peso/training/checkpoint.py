"""The checkpoint and the log of a stage in training, from which an interrupted run continues.

The result is bit-identical to that of an uninterrupted run. Every random number in training is a function of
the seed, the stage and the position, so a checkpoint has only positions and tensors.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peso.errors import TrainingError, WorkspaceError
from peso.runtime.files import read_sealed, write_sealed

FILE = "checkpoint.pt"


class Checkpoint:
    """The newest state of one stage in training, in one file.

    Args:
        directory: the directory of the file. It is created if it is missing.
        digest: a digest of everything that determines the training. A state with another digest is refused.
    """

    def __init__(self, directory: Path, digest: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE
        self.digest = digest

    def save(self, **state: Any) -> None:
        """Replace the file atomically. After a crash, it has either the old state or the new one."""
        buffer = io.BytesIO()
        torch.save({"digest": self.digest, **state}, buffer)
        write_sealed(self.path, buffer.getvalue())

    def load(self) -> dict[str, Any] | None:
        """The saved state, with tensors on the CPU; None if there is no file.

        Raises:
            TrainingError: the file is damaged, or it belongs to a training with other settings, data or
                starting weights.
        """
        if not self.path.exists():
            return None
        again = f"remove {self.path} to train this stage from the beginning"
        try:
            content = io.BytesIO(read_sealed(self.path))
            state = torch.load(content, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, WorkspaceError) as error:
            raise TrainingError(f"{self.path} cannot be read ({error}); {again}") from None
        if state.pop("digest", None) != self.digest:
            raise TrainingError(
                f"{self.path} is from a training with other settings, data or starting weights; {again}, "
                "or restore the old settings"
            )
        return state


class TrainingLog:
    """The file ``log.jsonl``, which has one JSON object per line. It is flushed after each line.

    Args:
        keep: the number of bytes of an existing file to keep, which is its length at the checkpoint.
        sha256: the digest of these bytes; if it is empty, they are not checked.

    Raises:
        TrainingError: the file is shorter than ``keep``, or has changed.
    """

    def __init__(self, path: Path, keep: int, sha256: str = "") -> None:
        size = path.stat().st_size if path.exists() else 0
        if size < keep:
            raise TrainingError(
                f"{path} has {size} bytes, but had {keep} at the last checkpoint: it was truncated or "
                "removed. Remove the stage's checkpoint to train it from the beginning"
            )
        self._hash = hashlib.sha256(path.read_bytes()[:keep] if keep else b"")
        if sha256 and self.sha256 != sha256:
            raise TrainingError(
                f"{path} is damaged: it differs from what training has logged. Remove the stage's checkpoint "
                "to train it from the beginning"
            )
        self._file = path.open("ab")
        if size > keep:
            self._file.truncate(keep)

    @property
    def sha256(self) -> str:
        """The digest of the whole log."""
        return self._hash.hexdigest()

    def write(self, **record: Any) -> None:
        """Append a line."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._hash.update(line)
        self._file.write(line)
        self._file.flush()

    def sync(self) -> int:
        """Wait until everything is on disk. Returns the length of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)  # before the first line, the position is not yet at the end

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the names, dtypes, shapes and values of tensors, in order."""
    result = hashlib.sha256()
    for name, tensor in tensors.items():
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()

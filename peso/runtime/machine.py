"""The resources of this machine, which of them are used, and checks that refuse what cannot fit.

PyTorch's number of threads depends on the size of the network. Threads wait for each other after every
operation. The operations of a small network are so short that waiting costs more than sharing the work saves.
On a busy machine the wait can be much longer: one run took 50 times as long with two threads as with one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peso.errors import AssetError, ConfigError, TrainingError
from peso.runtime import assets
from peso.runtime.failures import installed_version
from peso.runtime.progress import Observer

if TYPE_CHECKING:
    from torch import nn


OPTIONAL = {
    "sentence-transformers": ("text", "sentence encoders as items.encoder"),
    "fastapi": ("serve", "`peso serve`"),
    "s3fs": ("s3", "addresses with s3://"),
    "gcsfs": ("gcs", "addresses with gs://"),
    "pyspark": ("spark", "data.engine: spark"),
}

TRAINED = 16  # bytes per trained parameter: float32, its gradient, two moments of AdamW
LAYER = 50_000  # bytes of Python objects in a decoder layer, at least
AMD_DRIVER = Path("/dev/kfd")
CGROUP = Path("/sys/fs/cgroup/memory.max")  # the memory limit of a container


def machine_memory() -> int:
    """The memory of the machine in bytes, or of the container if it has less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else ""
    return min(whole, int(limit)) if limit.isdecimal() else whole


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_memory(needed: float, what: str) -> None:
    """Check that the machine has enough memory.

    Args:
        needed: a low estimate of the memory needed, in bytes.
        what: the setting, its value and what needs the memory, for the message.

    Raises:
        ConfigError: the machine has less memory.
    """
    if needed > (there := machine_memory()):
        raise ConfigError(
            f"{what} would need at least {needed / 2**30:,.0f} GiB of memory; this machine has "
            f"{there / 2**30:,.0f} GiB. Choose a smaller value, or a machine with more memory"
        )


def require_device(name: str) -> None:
    """Refuse a device that this machine cannot have. PyTorch, which takes a second to load, is not needed.

    Raises:
        TrainingError: the device is a GPU, and this machine has no driver for it.
    """
    if name.startswith("cuda") and not (_has_nvidia_driver() or AMD_DRIVER.exists()):
        raise TrainingError(
            f"training.device {name!r} cannot be used: this machine has no driver for an NVIDIA or AMD GPU; "
            "try auto or cpu"
        )
    if name.startswith("mps") and sys.platform != "darwin":
        raise TrainingError(f"training.device {name!r} cannot be used: only macOS has it; try auto or cpu")


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def examine() -> dict[str, Any]:
    """Find out what this machine has and what peso uses. Imports PyTorch.

    Returns:
        A dictionary with ``machine``, rows of (resource, what this machine has, what peso uses), and
        ``warnings``, a list of sentences.
    """
    import torch

    from peso.runtime.device import Precision

    warnings: list[str] = []
    of_user = os.environ.get(NUMBER)
    own = f"1 thread for models of fewer than {SMALL:,} parameters, {torch.get_num_threads()} for others"
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if not gpus and shutil.which("nvidia-smi"):
        warnings.append(
            "this machine seems to have an NVIDIA GPU (nvidia-smi is installed), but PyTorch "
            f"{torch.__version__} cannot use it; install a build of PyTorch with CUDA"
        )
    chosen = Precision.of("auto", "auto")
    formats = [str(format).removeprefix("torch.") for format in (chosen.frozen, torch.float32)]
    numbers = (
        "float32"
        if not chosen.mixed
        else f"{formats[0]} for frozen weights and matrix products, otherwise float32"
    )
    cache = assets.cache_directory()
    in_cache = [name for name in assets.names() if _is_in_cache(name, warnings)]
    if not os.access(_existing(cache), os.W_OK):
        warnings.append(f"the cache {cache} cannot be written; set PESO_CACHE to another directory")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    offline = os.environ.get("HF_HUB_OFFLINE")
    rows = [
        ("Python", f"{platform.python_version()} on {platform.platform(terse=True)}", sys.executable),
        (
            "packages",
            ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "peft")),
            f"peso {installed_version()}",
        ),
        (
            "cores",
            f"{os.cpu_count()}, {usable_cores()} of them usable",
            f"{NUMBER}={of_user}" if of_user else own,
        ),
        ("memory", _gib(machine_memory()), "as much as a run needs, see `peso run CONFIG --dry-run`"),
        (
            "GPU",
            ", ".join(f"{gpu.name} ({_gib(gpu.total_memory)})" for gpu in gpus) or "none",
            f"training.device: {chosen.device}",
        ),
        (
            "precision",
            "bfloat16" if gpus and torch.cuda.is_bf16_supported() else "float32",
            f"{numbers} (training.precision)",
        ),
        ("torch.compile", compiler or "no C++ compiler", "off, unless training.compile is set"),
        (
            "disk here",
            f"{_gib(shutil.disk_usage('.').free)} free",
            f"{Path.cwd() / 'runs'}, unless -w is given",
        ),
        (
            "cache",
            f"{cache}, {_gib(shutil.disk_usage(_existing(cache)).free)} free",
            f"pulled: {', '.join(in_cache) or 'nothing'}",
        ),
        (
            "network",
            "HF_HUB_OFFLINE is set" if offline else "allowed",
            "no downloads" if offline else "only for `peso pull` and models given by their hub name",
        ),
    ]
    for name, (extra, purpose) in OPTIONAL.items():
        try:
            rows.append((name, version(name), purpose))
        except PackageNotFoundError:
            rows.append((name, "not installed", f"for {purpose}: pip install 'peso[{extra}]'"))
    return {"machine": rows, "warnings": warnings}


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _is_in_cache(name: str, warnings: list[str]) -> bool:
    try:
        return assets.find(name) is not None
    except AssetError as damage:
        warnings.append(str(damage))
        return False


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


# Networks with fewer parameters use one thread. Two threads took 1.3 to 1.8 times the CPU time of one on a
# Llama of up to 0.8 million parameters, and 1.0 to 1.3 times from 1.8 million on (forward and backward pass,
# 1,000 tokens).
SMALL = 1_000_000
NUMBER = "OMP_NUM_THREADS"
# set if `peso compare`, not the user, has set NUMBER, to the share of one process
SHARE = "PESO_THREADS"

VALID = re.compile(r"\s*([1-9][0-9]{0,2}|1[0-9]{3})(,[0-9]+)*\s*")  # valid values of NUMBER

_number: int | None = None  # the number of threads of the enclosing context, if it has one
_told = 0  # the number of threads that was last reported to the user


def check_environment() -> None:
    """Check that OMP_NUM_THREADS, if it is set, is a number of threads.

    Raises:
        ConfigError: it is set to something else.
    """
    text = os.environ.get(NUMBER, "")
    if text and not VALID.fullmatch(text):
        raise ConfigError(
            f"the environment variable {NUMBER} is {text[:40]!r}, not a number of threads; unset it, or "
            "set it to a whole number from 1 to 1999"
        )


@contextmanager
def threads(
    network: nn.Module | None = None, number: int | Literal["auto"] = "auto", observer: Observer | None = None
) -> Iterator[None]:
    """A context in which PyTorch uses a number of threads that suits the network.

    The number is the first of these that is given: ``number``, the number of an enclosing context,
    OMP_NUM_THREADS. Otherwise it is one for networks of fewer than ``SMALL`` parameters, and PyTorch's
    default for others. It affects results only by rounding.

    Args:
        network: the network to compute with. None if nothing is computed in this context itself; the number
            then applies to the contexts inside it.
        number: the number of threads, or ``auto``.
        observer: receives a note if the number differs from the one reported last.
    """
    global _number, _told
    outer = _number
    _number = outer if number == "auto" else number
    if network is None:
        try:
            yield
        finally:
            _number = outer
        return
    import torch

    before, size = torch.get_num_threads(), sum(p.numel() for p in network.parameters())
    count, reason = before, f"the model has {size:,} parameters; training.threads changes it"
    if _number is not None:
        count, reason = _number, "training.threads"
    elif os.environ.get(NUMBER) and not os.environ.get(SHARE):
        reason = NUMBER
    elif size < SMALL:
        count = 1
    if observer is not None and count != _told:
        observer.note(f"{count} {'thread' if count == 1 else 'threads'} ({reason})")
        _told = count
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _number = outer

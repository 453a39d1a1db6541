"""Versions, hardware and time, which manifests record."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peso.runtime.machine import usable_cores


def provenance() -> dict[str, Any]:
    """Versions of Python and the main packages, hardware, command and time, as JSON values."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("peso", "torch", "transformers", "peft", "safetensors")},
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "processor": _processor(),
            "accelerator": _accelerator(),
            "cores": usable_cores(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "command": " ".join(["peso", *sys.argv[1:]]) if Path(sys.argv[0]).name == "peso" else None,
        "created": timestamp(),
    }


def timestamp() -> str:
    """The current time in UTC, to the second, in ISO 8601 format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    """The version of a package; None if it is not installed, such as peso imported from its source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _accelerator() -> str | None:
    torch = sys.modules.get("torch")  # if PyTorch was not imported, no accelerator was used
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

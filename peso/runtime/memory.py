"""How much memory this machine has: what cannot fit is refused before it is tried."""

from __future__ import annotations

import os
from pathlib import Path

from peso.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup/memory.max")  # of a container, where it has a limit


def machine_memory() -> int:
    """Bytes: of the machine, or of the container if that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else ""
    return min(whole, int(limit)) if limit.isdecimal() else whole


def require_memory(needed: float, what: str) -> None:
    """
    Args:
        needed: bytes, a low estimate.
        what: the key, its value and what it makes, for the message.

    Raises:
        ConfigError: the machine has less.
    """
    if needed > (there := machine_memory()):
        raise ConfigError(
            f"{what} would take at least {needed / 2**30:,.0f} GiB of memory; this machine has "
            f"{there / 2**30:,.0f} GiB"
        )

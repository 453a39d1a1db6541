"""Hypothesis by the clock: ``PESO_FUZZ_SECONDS`` (5) for the fuzz tests of a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from hypothesis import HealthCheck, settings

ALL_SECONDS = float(os.environ.get("PESO_FUZZ_SECONDS", "5"))


def fuzz_settings(seconds: float, most_a_second: int = 30) -> settings:
    return settings(
        max_examples=max(int(seconds * most_a_second), 1),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


def at_most(seconds: float, test: Callable[..., None]) -> Callable[..., None]:
    """Hypothesis counts examples; this one looks at the clock, too, until one has failed."""
    state = {"begin": 0.0, "failed": False}

    @wraps(test)
    def timed(**arguments: Any) -> None:
        state["begin"] = state["begin"] or time.monotonic()
        if time.monotonic() - state["begin"] > seconds and not state["failed"]:
            return
        try:
            test(**arguments)
        except BaseException:
            state["failed"] = True
            raise

    return timed

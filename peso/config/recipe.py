"""Settings for a model that is trained from scratch, by the size of the log."""

from __future__ import annotations

import math
from typing import Any

# At 25,000 items, a softmax over all of them takes half of a step or more (docs/reference/benchmarks.md).
EXACT_ITEMS = 10_000
NEGATIVES = 2048
STEPS_PER_EPOCH = 40  # the fewest, as far as batches of 32 allow


def from_scratch(events: int, items: int) -> tuple[dict[str, Any], str]:
    """Sections ``backbone``, ``head`` and ``training`` for a log, and the reason for them in a sentence.

    The values of the smallest size were found by validation (docs/results/recipe.md). Larger logs get wider
    and deeper models, at sizes set by judgment. The item head learns at a tenth of the rate of the codes,
    which need many more steps. ``epochs`` is an upper bound, because ``patience`` ends the training when the
    validation loss no longer falls.

    Args:
        events: the number of training targets of stage 0.
        items: the number of items in the catalog.
    """
    width, layers = (64, 2) if events < 200_000 else (128, 3) if events < 2_000_000 else (256, 4)
    batch = 2 ** round(math.log2(min(max(events / STEPS_PER_EPOCH, 32), 256)))
    head: dict[str, Any] = {"name": "items", "learning_rate_scale": 0.1}
    if items > EXACT_ITEMS:
        head["negatives"] = NEGATIVES
    sections = {
        "backbone": {"name": "scratch", "width": width, "layers": layers},
        "head": head,
        "training": {
            "epochs": 12 if events >= 20_000 else 20,
            "patience": 3,
            "batch_size": batch,
            "learning_rate": 4e-3 * 64 / width,
            "warmup": 0.05,
            "temperature": 1.0,
            "later": {"learning_rate": "auto", "epochs": 6, "patience": 2},
        },
    }
    reason = (
        f"{events:,} training targets in stage 0 and {items:,} items: {layers} layers {width} wide, "
        f"batches of {batch} targets"
    )
    return sections, reason

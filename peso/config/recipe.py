"""Settings for a model that is trained from scratch, by the size of the log: ``backbone: auto``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peso.config.model import AUTO
from peso.config.reading import merged

# Stage 0 has fewer training targets than the first number: width, layers. Only the smallest was measured.
SIZES = ((200_000, 64, 2), (2_000_000, 128, 3), (None, 256, 4))
# At 25,000 items, a softmax over all of them takes half of a step or more (docs/reference/benchmarks.md).
EXACT_ITEMS = 10_000
NEGATIVES = 2048
STEPS_PER_EPOCH = 40  # the fewest, as far as batches of 32 allow
FEWEST = 100  # training targets for `auto`: three steps of the smallest batches
RATE = 4e-3 * 64  # the learning rate times the width


def from_scratch(events: int, items: int, given_head: str | None = None) -> tuple[dict[str, Any], str]:
    """Sections ``backbone``, ``head`` and ``training`` for a log, and the reason for them in a sentence.

    The values of the smallest size were found by validation (docs/results/recipe.md). Larger logs get wider
    and deeper models, at sizes set by judgment. The item head learns at a tenth of the rate of the codes,
    which need many more steps, and the probability of new items is corrected after a stage. ``epochs`` is an
    upper bound, because ``patience`` ends the training when the validation loss no longer falls.

    Args:
        events: the number of training targets of stage 0.
        items: the number of items in the catalog.
        given_head: the name of the head, if the configuration gives one. With ``codes``, the reason says
            nothing about the softmax over the items.

    Returns:
        The sections by name, and the reason.
    """
    most, width, layers = next(size for size in SIZES if size[0] is None or events < size[0])
    batch = 2 ** round(math.log2(min(max(events / STEPS_PER_EPOCH, 32), 256)))
    epochs = 12 if events >= 20_000 else 20
    head: dict[str, Any] = {"name": "items", "arrivals": True, "learning_rate_scale": 0.1}
    if items > EXACT_ITEMS:
        head["negatives"] = NEGATIVES
    sections = {
        "backbone": {"name": "scratch", "width": width, "layers": layers},
        "head": head,
        "training": {
            "epochs": epochs,
            "patience": 3,
            "batch_size": batch,
            "learning_rate": RATE / width,
            "warmup": 0.05,
            "temperature": 1.0,
            "later": {"learning_rate": "auto", "epochs": 6, "patience": 2},
        },
    }
    size = f"fewer than {most:,}" if most else f"at least {SIZES[-2][0]:,}"
    softmax = f"{NEGATIVES:,} sampled negatives" if items > EXACT_ITEMS else "a softmax over all of them"
    reason = (
        f"{events:,} training targets in stage 0 ({size}): {layers} layers {width} wide, batches of {batch} "
        f"targets, at most {epochs} epochs"
    )
    if given_head != "codes":
        reason += f"; {items:,} items: {softmax}"
    return sections, reason


def given_head_of(given: Mapping[str, Any]) -> str | None:
    """The name of the head among the given keys of the sections; None if it is not given."""
    name: str | None = given.get("head", {}).get("name")
    return name


def with_given(sections: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen sections with the keys that a configuration gives, which take precedence.

    A chosen value that depends on a given key is computed from that key: the learning rate from the width,
    and the learning rates of updates from ``training.later_learning_rate_scale``. With ``head: codes``,
    nothing is chosen for the head.

    Args:
        sections: the chosen sections, see :func:`from_scratch`.
        given: the given keys of the same sections. The name ``auto`` of the backbone is ignored.
    """
    chosen = {name: dict(section) for name, section in sections.items()}
    backbone, training = given.get("backbone", {}), given.get("training", {})
    if width := backbone.get("width"):
        chosen["training"]["learning_rate"] *= chosen["backbone"]["width"] / width
    if "later_learning_rate_scale" in training:
        later = chosen["training"]["later"]
        chosen["training"]["later"] = {key: later[key] for key in later if key != "learning_rate"}
    if given_head_of(given) == "codes":
        chosen["head"] = {}
    own = {key: value for key, value in backbone.items() if value not in (AUTO, None)}
    return merged(chosen, {**given, "backbone": own})

"""Catalogs made by hand, for baselines."""

from __future__ import annotations

import numpy as np

from peso.baselines.baseline import Setting
from peso.items.semantic_ids import SemanticIds


def setting(items: int, window: int, seed: int = 0) -> Setting:
    """A catalog of items that each have a semantic ID of their own."""
    codes = np.arange(items, dtype=np.int32)[:, None]
    return Setting(SemanticIds([str(item) for item in range(items)], codes, (items,)).trie, window, seed)

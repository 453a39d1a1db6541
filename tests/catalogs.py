"""Catalogs made by hand."""

from __future__ import annotations

import numpy as np

from peso.baselines.baseline import Setting
from peso.items.semantic_ids import SemanticIds


def setting(items: int, window: int, seed: int = 0) -> Setting:
    """A catalog of items that each have a semantic ID of their own."""
    codes = np.arange(items, dtype=np.int32)[:, None]
    return Setting(SemanticIds([str(item) for item in range(items)], codes, (items,)).trie, window, seed)


def random_semantic_ids(items: int, sizes: tuple[int, ...], seed: int = 0) -> SemanticIds:
    """A random catalogue; with few codes some items share an ID, as in the released index."""
    generator = np.random.default_rng(seed)
    codes = np.stack([generator.integers(0, size, items) for size in sizes], axis=1).astype(np.int32)
    return SemanticIds([f"item{i}" for i in range(items)], codes, sizes)

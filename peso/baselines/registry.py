"""Every baseline by its configuration. A new one is a file of its own in this folder and a case here.

Knows which baselines there are and which options each takes; knows nothing of what they do.
"""

from __future__ import annotations

from typing import assert_never

import torch

from peso.baselines.baseline import Baseline
from peso.baselines.ease import Ease
from peso.baselines.item_knn import ItemKnn
from peso.baselines.popularity import Popularity
from peso.baselines.sasrec import SasRec
from peso.baselines.two_tower import TwoTower
from peso.config.baselines import (
    EaseConfig,
    ItemKnnConfig,
    PlainBaselineConfig,
    PopularityConfig,
    SasRecConfig,
    TwoTowerConfig,
)
from peso.items.trie import ItemTrie


def make_baseline(
    config: PlainBaselineConfig, trie: ItemTrie, window: int, seed: int, device: torch.device
) -> Baseline:
    """One that has learnt nothing yet.

    Args:
        window: items of a history that are read.
        device: of the networks; the others compute in NumPy.
    """
    items = len(trie.leaf_of)
    match config:
        case PopularityConfig():
            return Popularity(trie, config.last)
        case ItemKnnConfig():
            return ItemKnn(items, window, config.neighbours, config.shrinkage)
        case EaseConfig():
            return Ease(items, window, config.items, config.regularisation)
        case TwoTowerConfig():
            return TwoTower(items, window, config, seed, device)
        case SasRecConfig():
            return SasRec(items, window, config, seed, device)
        case _:
            assert_never(config)

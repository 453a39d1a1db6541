"""Builds a baseline from its configuration. A new baseline is a file in this folder and a case here."""

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
    """A baseline that has not learned anything yet.

    Args:
        window: how many items of a history are used.
        device: for the networks; the other baselines use NumPy.
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

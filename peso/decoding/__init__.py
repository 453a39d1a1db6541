"""Trie-constrained beam search for the items that a model recommends (docs/explanation/decoding.md)."""

from peso.decoding.beam import Beams, search
from peso.decoding.ranked_items import beam_search

__all__ = ["Beams", "beam_search", "search"]

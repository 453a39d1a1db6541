"""Where events and items come from: readers of files, and the mappings of well-known data sets."""

from __future__ import annotations

from peso.config import DataConfig
from peso.events.sources.amazon import amazon_source
from peso.events.sources.movielens import movielens_source, movietweetings_source
from peso.events.sources.own import own_source
from peso.events.sources.tables import ItemTable, Log, Source
from peso.events.sources.yelp import yelp_source

__all__ = ["ItemTable", "Log", "Source", "open_source"]

KNOWN = {
    "amazon-2023": amazon_source,
    "movielens": movielens_source,
    "movietweetings": movietweetings_source,
    "yelp": yelp_source,
}


def open_source(data: DataConfig) -> Source:
    """The log and the item table that the configuration names; first lines are read, no more.

    Raises:
        DataError: a file or a column is missing, or a file is empty.
    """
    return KNOWN[data.format](str(data.path)) if data.format in KNOWN else own_source(data)

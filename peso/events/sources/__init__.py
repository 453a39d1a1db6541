"""Sources of events and items: readers of files, and the columns of well-known data sets."""

from __future__ import annotations

from typing import get_args

from peso.config import DataConfig
from peso.config.data import DATA_SETS, LogFormat
from peso.events.sources.tables import ItemTable, Log, Source
from peso.events.sources.user_files import own_source

__all__ = ["ItemTable", "Log", "Source", "open_source"]


def open_source(data: DataConfig) -> Source:
    """The log and the item table that the configuration names. Only the first lines of files are read.

    Raises:
        DataError: a file or a column is missing, or a file is empty.
    """
    if data.format in get_args(LogFormat):
        return own_source(data)
    source: Source = DATA_SETS.find(data.format).open(str(data.path))
    return source

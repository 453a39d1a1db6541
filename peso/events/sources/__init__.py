"""Sources of events and items: readers of files, and the columns of well-known data sets."""

from __future__ import annotations

from typing import get_args

from peso.config import DataConfig
from peso.config.data import DATA_SETS, LogFormat
from peso.errors import ConfigError
from peso.events.sources.tables import ItemTable, Log, Source
from peso.events.sources.user_files import own_source

__all__ = ["ItemTable", "Log", "Source", "open_source"]


def open_source(data: DataConfig) -> Source:
    """The log and the item table that the configuration names. Only the first lines of files are read.

    Raises:
        DataError: a file or a column is missing, or a file is empty.
        ConfigError: a data set of another distribution that opens to something else.
    """
    if data.format in get_args(LogFormat):
        return own_source(data)
    data_set = DATA_SETS.find(data.format)
    source = data_set.open(str(data.path))
    if not isinstance(source, Source):
        raise ConfigError(
            f"data.format {data.format!r}: {data_set.__module__}.{data_set.__qualname__}.open gave "
            f"{type(source).__name__}, not a Source; correct that class"
        )
    return source

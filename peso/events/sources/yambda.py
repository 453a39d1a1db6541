"""Yambda: flat Parquet files of one size, such as flat/50m/multi_event.parquet or …/listens.parquet.

uid, timestamp (seconds from the start), item_id, is_organic, event_type, played_ratio_pct, …

The files in ``sequential/`` have lists: a row has all events of a user.
"""

from __future__ import annotations

from peso.events.sources.files import find_named, require_content
from peso.events.sources.sequences import Roles, sequences
from peso.events.sources.tables import DataSet, Log, Source, parquet_table

FILES = ("multi_event.parquet", "listens.parquet", "likes.parquet")


class Yambda(DataSet):
    """The plays and likes of Yambda, with the column ``event_type`` for ``data.events`` in multi_event."""

    name = "yambda"
    signs = FILES

    @staticmethod
    def open(path: str) -> Source:
        """Open one of the flat files. A folder means the first of multi_event, listens and likes in it.

        The rating of ``data.min_rating`` is the percentage of the track that was played. Files with lists
        have no ratings and no types of events.

        Raises:
            DataError: there is no such file, or it lacks the published columns.
        """
        table = parquet_table([require_content(find_named(path, *FILES))])
        table.require_published("uid", "item_id", "timestamp")
        if table.columns["item_id"].kind.endswith("]"):
            roles = Roles("uid", "item_id", "timestamp", listed=True, timed_each=True)
            return Source(sequences(table, roles, time_format="seconds"))
        rating = "played_ratio_pct" if "played_ratio_pct" in table.columns else None
        return Source(Log(table, "uid", "item_id", "timestamp", rating, time_format="seconds"))

"""KuaiRec: big_matrix.csv or small_matrix.csv, and the captions and categories of the videos.

user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio     big_matrix.csv
video_id,manual_cover_text,caption,topic_tag,first_level_category_id,…            kuairec_caption_category.csv
"""

from __future__ import annotations

from pathlib import Path

from peso.events.sources.files import find_named, first_of, require_content
from peso.events.sources.tables import DataSet, ItemTable, Log, Source, csv_table, published_items


class KuaiRec(DataSet):
    """KuaiRec."""

    name = "kuairec"
    signs = ("big_matrix.csv", "data/big_matrix.csv")

    @staticmethod
    def open(path: str) -> Source:
        """Open the unpacked folder, or one of the two matrices. A folder means ``big_matrix.csv``.

        The rating of ``data.min_rating`` is the share of the video that was watched.

        Raises:
            DataError: there is no matrix, or it lacks the published columns.
        """
        matrix = find_named(path, "big_matrix.csv", "data/big_matrix.csv")
        table = csv_table([require_content(matrix)], ",", header=True)
        table.require_published("user_id", "video_id", "timestamp", "watch_ratio")
        captions = first_of(matrix.parent, "kuairec_caption_category.csv")
        log = Log(table, "user_id", "video_id", "timestamp", "watch_ratio", time_format="seconds")
        return Source(log, _items(captions) if captions else None)


def _items(file: Path) -> ItemTable:
    table = csv_table([require_content(file)], ",", header=True)
    path = [f"{level}_level_category_name" for level in ("first", "second", "third")]
    return published_items(table, "video_id", "caption", ("manual_cover_text", "topic_tag"), path)

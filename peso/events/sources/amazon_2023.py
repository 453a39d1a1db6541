"""Amazon Reviews 2023: reviews as JSON lines or the rating-only CSVs (5-core and so on), and their metadata.

Published at https://amazon-reviews-2023.github.io:

Video_Games.jsonl.gz, meta_Video_Games.jsonl.gz          reviews (times in milliseconds) and products
Video_Games.csv.gz: user_id,parent_asin,rating,timestamp the rating-only logs, 0-core and 5-core
"""

from __future__ import annotations

from pathlib import Path

from peso.errors import DataError
from peso.events.sources.files import bare_suffix, first_of, require_content
from peso.events.sources.tables import PATH, DataSet, ItemTable, Log, Source, csv_table, jsonl_table, plain

USER, ITEM, TIME, RATING = "user_id", "parent_asin", "timestamp", "rating"


class Amazon2023(DataSet):
    """Amazon Reviews 2023."""

    name = "amazon-2023"

    @staticmethod
    def open(path: str) -> Source:
        """Open the reviews at ``path``, a file or a folder with one file of reviews.

        The metadata are in the same folder, in a file whose name begins with ``meta_``.

        Raises:
            DataError: there is no review file, there are several, or the published columns are missing.
        """
        log_file = _log_file(Path(path))
        require_content(log_file)
        if bare_suffix(log_file) == ".csv":
            table = csv_table([log_file], ",", header=True)
        else:
            table = jsonl_table([log_file], [USER, ITEM, TIME, RATING])
        for column in (USER, ITEM, TIME, RATING):
            table.require(column, "data.format (csv or jsonl with data.columns reads other files)")
        category = log_file.name.split(".")[0]
        meta = first_of(log_file.parent, f"meta_{category}.jsonl")
        return Source(Log(table, USER, ITEM, TIME, RATING), _items(meta) if meta else None)


def _log_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(
        file
        for file in path.iterdir()
        if bare_suffix(file) in (".jsonl", ".csv") and not file.name.startswith("meta_")
    )
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{path} should contain one file of reviews (found: {names}); name the file itself")
    return found[0]


def _items(file: Path) -> ItemTable:
    documents = ["title", "features", "description", "categories"]
    table = jsonl_table([require_content(file)], [ITEM, *documents])
    table.require(ITEM, "data.format")
    return ItemTable(
        table,
        ITEM,
        plain(table, "title"),
        plain(table, "features", "description"),
        plain(table, "categories", join=PATH),
    )

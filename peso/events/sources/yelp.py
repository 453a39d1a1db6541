"""The Yelp open data set: reviews and businesses as JSON lines (yelp_academic_dataset_*.json)."""

from __future__ import annotations

from pathlib import Path

from peso.errors import DataError
from peso.events.sources.files import first_of, require_content
from peso.events.sources.tables import DataSet, ItemTable, Log, Source, jsonl_table, plain

REVIEWS = ("yelp_academic_dataset_review.json", "review.json")
BUSINESSES = ("yelp_academic_dataset_business.json", "business.json")


class Yelp(DataSet):
    """The Yelp open data set."""

    name = "yelp"
    signs = ("yelp_academic_dataset_review.json",)

    @staticmethod
    def open(path: str) -> Source:
        """Open a folder with the review file and the business file, or the review file itself.

        Raises:
            DataError: there is no review file, or it lacks the published fields.
        """
        given = Path(path)
        folder = given if given.is_dir() else given.parent
        reviews = first_of(folder, *REVIEWS) if given.is_dir() else given
        if reviews is None:
            raise DataError(f"{folder} has no {REVIEWS[0]}; unpack the Yelp data set there")
        table = jsonl_table([require_content(reviews)], ["user_id", "business_id", "date", "stars"])
        for name in ("user_id", "business_id", "date", "stars"):
            table.require(name, "data.format (jsonl with data.columns reads other files)")
        log = Log(table, "user_id", "business_id", "date", "stars", time_format="iso")
        businesses = first_of(folder, *BUSINESSES)
        return Source(log, _items(businesses) if businesses else None)


def _items(file: Path) -> ItemTable:
    table = jsonl_table([require_content(file)], ["business_id", "name", "city", "categories"])
    for name in ("business_id", "name", "city", "categories"):
        table.require(name, "data.format")
    return ItemTable(
        table,
        "business_id",
        plain(table, "name"),
        plain(table, "city"),
        plain(table, "categories"),
    )

"""The Yelp open data set: reviews and businesses as JSON lines (yelp_academic_dataset_*.json)."""

from __future__ import annotations

from pathlib import Path

from peso.events.sources.files import find_named, first_of, require_content
from peso.events.sources.tables import DataSet, ItemTable, Log, Source, jsonl_table, published_items

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
        reviews = find_named(path, *REVIEWS)
        names = ("user_id", "business_id", "date", "stars")
        table = jsonl_table([require_content(reviews)], names)
        table.require_published(*names)
        log = Log(table, *names, time_format="iso")
        businesses = first_of(reviews.parent, *BUSINESSES)
        return Source(log, _items(businesses) if businesses else None)


def _items(file: Path) -> ItemTable:
    table = jsonl_table([require_content(file)], ["business_id", "name", "city", "categories"])
    return published_items(table, "business_id", "name", ["city"], ["categories"])

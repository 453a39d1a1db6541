"""Amazon reviews of 2014: JSON lines or lines of Python dictionaries, or ratings only.

reviews_Beauty_5.json.gz    {"reviewerID": …, "asin": …, "overall": 5.0, "unixReviewTime": 1252800000, …}
meta_Beauty.json.gz         {'asin': …, 'title': …, 'brand': …, 'categories': [['Beauty', 'Hair Care']], …}
ratings_Beauty.csv          user,item,rating,seconds without a header
"""

from __future__ import annotations

import re
from pathlib import Path

from peso.errors import DataError
from peso.events.database import literal
from peso.events.sources.files import bare_suffix, first_of, require_content
from peso.events.sources.tables import (
    PATH,
    DataSet,
    ItemTable,
    Log,
    Source,
    csv_table,
    dictionary_table,
    plain,
)

REVIEWS = ("reviews_*.json", "ratings_*.csv")


class Amazon2014(DataSet):
    """Amazon reviews of 2014."""

    name = "amazon-2014"
    signs = REVIEWS

    @staticmethod
    def open(path: str) -> Source:
        """Open a file of reviews or ratings, or the folder with one of them. ``meta_NAME.json`` is beside it.

        Raises:
            DataError: there is no such file, there are several, or it lacks the published keys.
        """
        file = require_content(_log_file(Path(path)))
        name = re.sub(r"^(reviews|ratings)_|_\d+$", "", file.name.partition(".")[0])
        meta = first_of(file.parent, f"meta_{name}.json")
        items = _items(meta) if meta else None
        if bare_suffix(file) == ".csv":
            table = csv_table([file], ",", header=False)
            if len(table.columns) != 4:
                raise DataError(
                    f"{file} has {len(table.columns)} columns instead of user, item, rating and seconds; "
                    "check data.format"
                )
            return Source(Log(table, "1", "2", "4", "3", time_format="seconds"), items)
        keys = ("reviewerID", "asin", "unixReviewTime", "overall")
        table = dictionary_table([file], keys)
        table.require_published(*keys)
        return Source(Log(table, *keys, time_format="seconds"), items)


def _log_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(
        {file for sign in REVIEWS for ending in ("", ".gz") for file in path.glob(f"{sign}{ending}")}
    )
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{path} should contain one file reviews_NAME.json or ratings_NAME.csv (found: {names}); name "
            "the file itself"
        )
    return found[0]


def _items(file: Path) -> ItemTable:
    table = dictionary_table([require_content(file)], ["asin", "title", "brand", "description", "categories"])
    table.require("asin", "data.format")
    first = f"try_cast(json_extract({table.columns['categories'].sql}, '$[0]') AS VARCHAR[])"
    return ItemTable(
        table,
        "asin",
        plain(table, "title"),
        plain(table, "brand", "description"),
        f"array_to_string({first}, {literal(PATH)})",
    )

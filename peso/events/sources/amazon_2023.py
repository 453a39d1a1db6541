"""Amazon Reviews 2023: reviews as JSON lines or the rating-only CSVs (5-core and so on), and their metadata.

Published at https://amazon-reviews-2023.github.io:

Video_Games.jsonl.gz, meta_Video_Games.jsonl.gz          reviews (times in milliseconds) and products
Video_Games.csv.gz: user_id,parent_asin,rating,timestamp the rating-only logs, 0-core and 5-core

or on the hub: raw/review_categories/Video_Games.jsonl, benchmark/5core/rating_only/Video_Games.csv, and
raw/meta_categories/meta_Video_Games.jsonl or raw_meta_Video_Games/full-*.parquet.
"""

from __future__ import annotations

from pathlib import Path

from peso.errors import DataError
from peso.events.sources.files import ChoiceError, bare_suffix, first_of, require_content
from peso.events.sources.lines import first_object
from peso.events.sources.tables import (
    DataSet,
    ItemTable,
    Log,
    Source,
    csv_table,
    jsonl_table,
    parquet_table,
    published_items,
)

# the folders of logs on the hub, seen from that of the data set
HUB = (
    "raw/review_categories",
    "review_categories",
    "benchmark/5core/rating_only",
    "benchmark/0core/rating_only",
)
USER, ITEM, TIME, RATING = "user_id", "parent_asin", "timestamp", "rating"


class Amazon2023(DataSet):
    """Amazon Reviews 2023."""

    name = "amazon-2023"
    signs = ("meta_*.jsonl", *(f"{folder}/*.*" for folder in HUB), "*.csv", "*.jsonl")

    @staticmethod
    def open(path: str) -> Source:
        """Open the reviews at ``path``: a file, a folder with one file of reviews, or a copy of the hub's
        folders with one such file.

        The metadata are in the same folder, in a file whose name begins with ``meta_``, or where the hub has
        them: in ``raw/meta_categories/`` or ``raw_meta_NAME/``, beside ``raw/review_categories/`` or
        ``benchmark/``.

        Raises:
            DataError: there is no review file, there are several, or the published columns are missing.
        """
        log_file = _log_file(Path(path))
        require_content(log_file)
        if bare_suffix(log_file) == ".csv":
            table = csv_table([log_file], ",", header=True)
        else:
            if ITEM not in (first_object(log_file) or {ITEM}):  # without reading the whole file
                raise DataError(
                    f"{log_file} has no {ITEM!r} in its first line; set data.format to jsonl, with "
                    "data.columns"
                )
            table = jsonl_table([log_file], [USER, ITEM, TIME, RATING])
        table.require_published(USER, ITEM, TIME, RATING)
        category = log_file.name.split(".")[0]
        meta = _meta_files(log_file.absolute().parent, category)
        return Source(Log(table, USER, ITEM, TIME, RATING), _items(meta) if meta else None)


def _meta_files(folder: Path, category: str) -> list[Path]:
    """The metadata beside the reviews, or in the folders of the hub's layout above them."""
    name = f"meta_{category}.jsonl"
    if found := first_of(folder, name):
        return [found]
    for above in folder.parents[:3]:  # benchmark/5core/rating_only is three levels below
        if found := first_of(above, f"raw/meta_categories/{name}", f"meta_categories/{name}"):
            return [found]
        if parts := sorted(above.glob(f"raw_meta_{category}/*.parquet")):
            return parts
    return []


def _log_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(
        file
        for folder in (path, *map(path.joinpath, HUB))
        if folder.is_dir()
        for file in folder.iterdir()
        if bare_suffix(file) in (".jsonl", ".csv") and not file.name.startswith("meta_")
    )
    if len(found) > 1:
        raise ChoiceError(path, [str(file.relative_to(path)) for file in found], "the file of one")
    if not found:
        raise DataError(f"{path} has no file of reviews; give the file itself")
    return found[0]


def _items(files: list[Path]) -> ItemTable:
    documents = ["title", "features", "description", "categories"]
    found = [require_content(file) for file in files]
    parquet = bare_suffix(files[0]) == ".parquet"
    table = parquet_table(found) if parquet else jsonl_table(found, [ITEM, *documents])
    title, *texts, category = documents
    return published_items(table, ITEM, title, texts, [category], optional=not parquet)

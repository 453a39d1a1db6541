"""MovieLens in all formats in which GroupLens and RecBole publish it.

100k            u.data (tabs), u.item (vertical bars, Latin-1, one flag per genre), u.genre
1M, 10M         ratings.dat, movies.dat (separated by ::; Latin-1 in 1M)
latest, 20M on  ratings.csv, movies.csv (with header)
peso pull       u.data, movies.tsv (tabs, with header: item_id, title, year, genres)
RecBole         NAME.inter, NAME.item (tabs, a header with types)
"""

from __future__ import annotations

from pathlib import Path

from peso.errors import DataError
from peso.events.database import literal
from peso.events.sources.files import first_of, is_utf8, require_content
from peso.events.sources.recbole import RecBole
from peso.events.sources.tables import LIST, DataSet, FileTable, ItemTable, Log, Source, csv_table

FLAGS_FROM = 6  # the column of the first genre in u.item, counted from 1
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


class MovieLens(DataSet):
    """MovieLens, recognized by its files."""

    name = "movielens"
    signs = ("u.data", "ratings.dat", "ratings.csv")

    @staticmethod
    def open(path: str) -> Source:
        """Open a MovieLens folder, whose version is recognized from its files.

        Raises:
            DataError: the folder has none of the published files.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if log := first_of(folder, "u.data"):
            pulled = first_of(folder, "movies.tsv")
            return Source(
                _numbered(log, "\t"), _pulled(pulled) if pulled else _items_100k(first_of(folder, "u.item"))
            )
        if log := first_of(folder, "ratings.dat"):
            return ratings_dat(log, first_of(folder, "movies.dat"))
        if log := first_of(folder, "ratings.csv"):
            table = csv_table([require_content(log)], ",", header=True)
            table.require_published("userId", "movieId", "rating", "timestamp")
            return Source(
                Log(table, "userId", "movieId", "timestamp", "rating"),
                _latest(first_of(folder, "movies.csv")),
            )
        if any(folder.glob("*.inter")):
            return RecBole.open(str(folder))
        raise DataError(
            f"{folder} has none of u.data, ratings.dat, ratings.csv or *.inter; "
            "give the folder of an unpacked MovieLens data set"
        )


def ratings_dat(log: Path, movies: Path | None) -> Source:
    """``ratings.dat`` and ``movies.dat``, separated by ::."""
    return Source(_numbered(log, "::"), _movies(_headless(movies, "::")) if movies else None)


def _numbered(log: Path, separator: str) -> Log:
    """A log with the columns user, item, rating and time, in this order."""
    table = csv_table([require_content(log)], separator, header=False, quote="")
    if len(table.columns) < 4:
        raise DataError(
            f"{log} has {len(table.columns)} columns in its first line instead of user, item, rating and "
            f"time separated by {separator!r}; check data.format"
        )
    return Log(table, "1", "2", "4", "3", time_format="seconds")


def _movies(table: FileTable) -> ItemTable:
    """An item table with the columns number, title and genres, which are separated by vertical bars."""
    return ItemTable(
        table, "1", _at(table, "2"), category=_genres(_at(table, "3")) if "3" in table.columns else "NULL"
    )


def _latest(movies: Path | None) -> ItemTable | None:
    if movies is None:
        return None
    table = csv_table([require_content(movies)], ",", header=True)
    title, genres = (table.require(name, "data.format").sql for name in ("title", "genres"))
    return ItemTable(table, "movieId", title, category=_genres(genres))


def _items_100k(file: Path | None) -> ItemTable | None:
    if file is None:
        return None
    table = _headless(file, "|", "latin-1")
    flags = [
        f"CASE {_at(table, str(FLAGS_FROM + place))} WHEN '1' THEN {literal(genre)} END"
        for place, genre in enumerate(GENRES_100K)
        if str(FLAGS_FROM + place) in table.columns
    ]
    genres = f"nullif(concat_ws({literal(LIST)}, {', '.join(flags)}), '')" if flags else "NULL"
    return ItemTable(table, "1", _at(table, "2"), category=genres)


def _pulled(movies: Path) -> ItemTable:
    table = csv_table([require_content(movies)], "\t", header=True, quote="")
    table.require("item_id", "data.format")
    title, year, genres = (table.require(name, "data.format").sql for name in ("title", "year", "genres"))
    name = f"concat({title}, ' (' || nullif({year}, '') || ')')"
    return ItemTable(table, "item_id", name, category=_genres(genres))


def _headless(file: Path, separator: str, encoding: str | None = None) -> FileTable:
    # MovieLens 1M is Latin-1, 10M and MovieTweetings are UTF-8; the files do not declare it
    encoding = encoding or ("utf-8" if is_utf8(require_content(file)) else "latin-1")
    return csv_table([require_content(file)], separator, header=False, encoding=encoding, quote="")


def _at(table: FileTable, number: str) -> str:
    return table.require(number, "data.format").sql


def _genres(column: str) -> str:
    return f"nullif(replace({column}, '|', {literal(LIST)}), '(no genres listed)')"

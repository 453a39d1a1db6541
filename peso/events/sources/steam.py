"""Steam reviews and games: lines of Python dictionaries, as the authors of SASRec published them.

{u'username': u'Chaos Syren', u'product_id': u'725280', u'date': u'2017-12-17', u'hours': 0.1, …}
{u'id': u'761140', u'app_name': u'Lost Summoner Kitty', u'genres': [u'Action', …], u'tags': […], …}
"""

from __future__ import annotations

from pathlib import Path

from peso.errors import DataError
from peso.events.sources.files import first_of, require_content
from peso.events.sources.tables import LIST, DataSet, ItemTable, Log, Source, dictionary_table, plain

REVIEWS = ("steam_reviews.json", "steam_new.json")


class Steam(DataSet):
    """The reviews and the games of Steam."""

    name = "steam"
    signs = REVIEWS

    @staticmethod
    def open(path: str) -> Source:
        """Open a folder with ``steam_reviews.json`` and ``steam_games.json``, or the file of reviews.

        The rating of ``data.min_rating`` is the number of hours played.

        Raises:
            DataError: there is no file of reviews, or it lacks the published keys.
        """
        given = Path(path)
        folder = given if given.is_dir() else given.parent
        reviews = first_of(folder, *REVIEWS) if given.is_dir() else given
        if reviews is None:
            raise DataError(f"{folder} has no {REVIEWS[0]}; give the folder of the Steam data set")
        keys = ["username", "product_id", "date", "hours"]
        table = dictionary_table([require_content(reviews)], keys)
        for name in keys[:3]:
            table.require(name, "data.format (jsonl with data.columns reads other files)")
        games = first_of(folder, "steam_games.json")
        log = Log(table, "username", "product_id", "date", "hours", time_format="iso")
        return Source(log, _items(games) if games else None)


def _items(file: Path) -> ItemTable:
    table = dictionary_table([require_content(file)], ["id", "app_name", "developer", "tags", "genres"])
    table.require("id", "data.format")
    return ItemTable(
        table,
        "id",
        plain(table, "app_name"),
        plain(table, "developer", "tags", join=LIST),
        plain(table, "genres", join=LIST),
    )

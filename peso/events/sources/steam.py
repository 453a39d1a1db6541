"""Steam reviews and games: lines of Python dictionaries, as the authors of SASRec published them.

{u'username': u'Chaos Syren', u'product_id': u'725280', u'date': u'2017-12-17', u'hours': 0.1, …}
{u'id': u'761140', u'app_name': u'Lost Summoner Kitty', u'genres': [u'Action', …], u'tags': […], …}
"""

from __future__ import annotations

from pathlib import Path

from peso.events.sources.files import find_named, first_of, require_content
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
        reviews = find_named(path, *REVIEWS)
        keys = ("username", "product_id", "date", "hours")
        table = dictionary_table([require_content(reviews)], keys)
        table.require_published(*keys[:3])
        games = first_of(reviews.parent, "steam_games.json")
        log = Log(table, *keys, time_format="iso")
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

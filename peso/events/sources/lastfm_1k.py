"""Last.fm-1K: userid-timestamp-artid-artname-traid-traname.tsv, separated by tabs, without a header.

user_000001  2009-05-04T13:54:10Z  a7f7df4a-…  Björk  …  All Is Full of Love

Quotes are part of the names. An item is a track: its MusicBrainz id or, where the file has none, its artist
and its name.
"""

from __future__ import annotations

from peso.errors import DataError
from peso.events.sources.files import find_named, require_content
from peso.events.sources.tables import DataSet, ItemTable, Log, Source, csv_table, plain, reshaped

PLAYS = "userid-timestamp-artid-artname-traid-traname.tsv"


class LastFm1k(DataSet):
    """The plays of Last.fm-1K."""

    name = "lastfm-1k"
    signs = (PLAYS,)

    @staticmethod
    def open(path: str) -> Source:
        """Open the unpacked folder, or the file of plays.

        Raises:
            DataError: there is no file of plays, or it does not have six columns.
        """
        table = csv_table([require_content(find_named(path, PLAYS))], "\t", header=False, quote="")
        if len(table.columns) != 6:
            raise DataError(
                f"{table.files[0]} has {len(table.columns)} columns instead of user, time, artist id, "
                "artist, track id and track, separated by tabs; check data.format"
            )
        user, time, _, artist, track, name = (column.sql for column in table.columns.values())
        item = f"coalesce(nullif({track}, ''), {artist} || ' - ' || {name})"
        shape = f"""
            SELECT row_of_files, {user} AS "user", {time} AS "time", {item} AS item, {name} AS title,
                {artist} AS artist FROM {{rows}}"""
        names = ("user", "time", "item", "title", "artist")
        plays = reshaped(table, shape, dict.fromkeys(names, "VARCHAR"))
        log = Log(plays, "user", "item", "time", time_format="iso")
        return Source(log, ItemTable(plays, "item", plain(plays, "title"), plain(plays, "artist")))

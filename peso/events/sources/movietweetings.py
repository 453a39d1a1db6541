"""MovieTweetings, in the format of MovieLens 1M: ratings.dat and movies.dat, separated by ::, UTF-8."""

from __future__ import annotations

from pathlib import Path

from peso.events.sources.files import first_of, require_content
from peso.events.sources.movielens import ratings_dat
from peso.events.sources.tables import DataSet, Source


class MovieTweetings(DataSet):
    """A MovieTweetings folder."""

    name = "movietweetings"
    signs = ("ratings.dat",)

    @staticmethod
    def open(path: str) -> Source:
        """Open a MovieTweetings folder.

        Raises:
            DataError: ``ratings.dat`` is missing.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        log = require_content(folder / "ratings.dat" if Path(path).is_dir() else Path(path))
        return ratings_dat(log, first_of(folder, "movies.dat"))

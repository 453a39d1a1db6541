"""MIND, the Microsoft news data set: behaviors.tsv and news.tsv, separated by tabs, without a header.

1  U87243  11/10/2019 11:30:54 AM  N8668 N39081  N78206-0 N26368-1          behaviors.tsv
N88753  lifestyle  lifestyleroyals  The Brands …  Shop the notebooks …      news.tsv

Events are the articles that a user clicked in an impression (``-1``), at its time. The history has no times:
that of the user's first impression comes at the time of the log's first impression.
"""

from __future__ import annotations

from pathlib import Path

from peso.errors import DataError
from peso.events.database import literal
from peso.events.sources.files import ChoiceError, first_of, folders_in, require_content
from peso.events.sources.tables import PATH, DataSet, ItemTable, Log, Source, csv_table, reshaped

# in the names of the folders (MINDsmall_train); a size has all of the smaller ones
SIZES = ("demo", "small", "large")
TIMES = "%m/%d/%Y %I:%M:%S %p"


class Mind(DataSet):
    """The Microsoft news data set."""

    name = "mind"
    signs = ("behaviors.tsv", "*/behaviors.tsv")

    @staticmethod
    def open(path: str) -> Source:
        """Open a folder with ``behaviors.tsv`` and ``news.tsv``, or with several such folders (train, dev).

        Raises:
            DataError: there is no ``behaviors.tsv``, there are several sizes, or it does not have
                five columns.
        """
        logs = _logs(Path(path))
        table = csv_table([require_content(file) for file in logs], "\t", header=False, quote="")
        if len(table.columns) != 5:
            raise DataError(
                f"{logs[0]} has {len(table.columns)} columns instead of impression, user, time, history and "
                "impressions, separated by tabs; check data.format"
            )
        _, user, time, history, shown = (column.sql for column in table.columns.values())
        moment = f"try_strptime({time}, {literal(TIMES)})"
        shape = f"""
            WITH given AS (
                SELECT row_of_files, {user} AS "user", {time} AS "time", {moment} AS moment,
                    {history} AS history, {shown} AS shown FROM {{rows}}),
            events AS (
                SELECT row_of_files, 0 AS part, "user", unnest(had) AS item,
                    (SELECT arg_min("time", moment) FROM given) AS "time",
                    generate_subscripts(had, 1) AS place
                FROM (SELECT *, regexp_extract_all(history, '\\S+') AS had FROM given QUALIFY
                    row_number() OVER (PARTITION BY "user" ORDER BY moment, row_of_files) = 1)
                UNION ALL
                SELECT row_of_files, 1, "user", unnest(regexp_extract_all(shown, '(\\S+)-1(?:\\s|$)', 1)),
                    "time", 0
                FROM given)
            SELECT row_of_files, "user", item, "time" FROM events ORDER BY part, row_of_files, place, item"""
        made = reshaped(table, shape, dict.fromkeys(("user", "item", "time"), "VARCHAR"))
        news = [file for log in logs if (file := log.parent / "news.tsv").is_file()]
        return Source(Log(made, "user", "item", "time", time_format=TIMES), _items(news) if news else None)


def _logs(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [file for folder in (path, *folders_in(path)) if (file := first_of(folder, "behaviors.tsv"))]
    names = [file.parent.name for file in found]
    if len([size for size in SIZES if any(size in name.lower() for name in names)]) > 1:
        raise ChoiceError(path, names, "one of them, or a folder with those of one size")
    if not found:
        raise DataError(f"{path} has no behaviors.tsv; give the folder of the unpacked data set")
    return found


def _items(files: list[Path]) -> ItemTable:
    table = csv_table([require_content(file) for file in files], "\t", header=False, quote="")
    category, narrow, title, abstract = (
        table.require(number, "data.format").sql for number in ("2", "3", "4", "5")
    )
    return ItemTable(
        table,
        "1",
        title,
        abstract,
        f"concat_ws({literal(PATH)}, nullif({category}, ''), nullif({narrow}, ''))",
    )

"""Files of item sequences: a history and a target in a row, or all items of a user in a row.

This is how MiniOneRec (``user_id,history_item_id,item_id,…``), DACT (``user``, ``history``,
``target``), the files with histories of Amazon Reviews 2023 and many others publish their data, in CSV,
Parquet or JSON lines. Lists are lists of Parquet or JSON, or text: ``['a', 'b']``, ``[1, 2]`` or ``1 2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from peso.config import DataConfig
from peso.errors import DataError
from peso.events.database import literal
from peso.events.sources.files import bare_suffix, find_files, kind_of
from peso.events.sources.lines import delimited_rows, first_object
from peso.events.sources.tables import (
    HISTORIES,
    Column,
    DataSet,
    FileTable,
    ItemTable,
    Log,
    Source,
    csv_table,
    jsonl_table,
    parquet_table,
    reshaped,
)
from peso.events.sources.user_files import separator_of

# The names of the columns that are known, the most frequent first.
USERS = ("user_id", "user", "uid", "userid", "reviewerID", "session_id")
TARGETS = ("item_id", "target", "target_item_id", "target_id", "target_item", "parent_asin", "item", "label")
LISTS = ("items", "item_ids", "sequence", "item_sequence", "item_id", *HISTORIES)
TIMES = ("timestamp", "time", "timestamps", "target_timestamp")
TITLE, HISTORY_TITLES = "item_title", "history_item_title"
ENDINGS = (".parquet", ".pq", ".csv", ".tsv", ".jsonl", ".json", ".txt")  # of a folder's files, the first
PARTS = (("test",), ("val", "valid", "validation", "eval", "dev"))  # words in file names, the last part first
SAMPLE = 100  # rows in which lists are looked for
# The ids in a list that is text: in quotes, where they may have blanks, or separated by blanks and commas.
QUOTES = "'\""
IDS = r"""'[^']*'|"[^"]*"|[^\s,\[\]()]+"""


@dataclass(frozen=True)
class Roles:
    """The columns of a table of sequences.

    ``item`` is the target of ``history`` or, without it, the list of all items of the user (``listed``) or a
    single item. Without ``user``, each row is a user. Without ``time``, events are in the order of the files.
    ``time`` is the time of a row or, with ``timed_each``, the list of the items' times.
    """

    user: str | None
    item: str
    time: str | None = None
    history: str | None = None
    listed: bool = False
    timed_each: bool = False


class Sequences(DataSet):
    """Files of item sequences."""

    name = "sequences"
    signs = ()  # these columns can mean other things
    takes = frozenset({"columns", "separator", "encoding", "quote", "time_format"})

    @staticmethod
    def open(path: str) -> Source:
        """Open a file, a folder or a pattern whose columns have the known names.

        Raises:
            DataError: there is no file, or no column of items.
        """
        return Sequences.read(DataConfig(format="sequences", path=path))

    @classmethod
    def read(cls, data: DataConfig) -> Source:
        """Open a file, a folder or a pattern. ``data.columns`` names columns that have other names.

        Raises:
            DataError: as for ``open``, or a named column does not exist.
        """
        return sequences_of(_table(data), data)


def sequences_of(table: FileTable, data: DataConfig) -> Source:
    """The events in a table of sequences, with the columns that the configuration names, and their titles.

    Raises:
        DataError: a named column does not exist, or there is no column of items.
    """
    roles = _roles(table, data)
    return Source(sequences(table, roles, data.time_format), _items(table, roles))


def sequences(table: FileTable, roles: Roles, time_format: str = "auto") -> Log:
    """The events of a table of sequences.

    Of a history and a target in each row, the events are the history in the user's first row and then the
    target of each row. A history has the time of its target. Of one list a user without times, event ``k``
    of ``n`` is at ``k / n`` of the log, so that every stage has the same part of each list.
    """
    order = "row_number() OVER (ORDER BY row_of_files, part, place)"
    rows = 'SELECT row_of_files, "user", item::VARCHAR AS item, "time", 1 AS part, 0 AS place FROM given'
    if roles.history is not None:
        rows += """
            UNION ALL SELECT row_of_files, "user", unnest(history)::VARCHAR, "time", 0,
                generate_subscripts(history, 1)
            FROM (FROM given QUALIFY row_number() OVER (PARTITION BY "user" ORDER BY row_of_files) = 1)"""
    elif roles.listed:
        rows = f"""
            SELECT row_of_files, "user", unnest(item)::VARCHAR AS item,
                {'unnest("time")' if roles.timed_each else '"time"'} AS "time", 0 AS part,
                generate_subscripts(item, 1) AS place
            FROM given"""
        order = """(1e12 * row_number() OVER (PARTITION BY "user" ORDER BY row_of_files, place)
            / count(*) OVER (PARTITION BY "user"))::BIGINT"""
    shape = f"""
        WITH given AS (SELECT row_of_files, {_fields(table, roles)} FROM {{rows}}), events AS ({rows})
        SELECT row_of_files, "user", item, {order if roles.time is None else '"time"'} AS "time"
        FROM events ORDER BY row_of_files, part, place"""
    time = None if roles.time is None else table.columns[roles.time]
    kind = "BIGINT" if time is None else "VARCHAR" if time.kind == "JSON" else time.kind.removesuffix("[]")
    made = reshaped(table, shape, {"user": "VARCHAR", "item": "VARCHAR", "time": kind})
    if time is None:
        return Log(made, "user", "item", "time", time_format="microseconds", timed=False)
    return Log(made, "user", "item", "time", time_format=time_format)


def _fields(table: FileTable, roles: Roles) -> str:
    """SQL: ``user``, ``time``, ``item`` and ``history`` of a row of the files."""
    item = table.columns[roles.item]
    time = None if roles.time is None else table.columns[roles.time]
    user = "row_of_files::VARCHAR" if roles.user is None else table.columns[roles.user].text
    listed = f"coalesce({listing(item)}, [NULL])" if roles.listed else item.text
    moment = "NULL" if time is None else listing(time) if roles.timed_each else time.value
    history = "NULL" if roles.history is None else listing(table.columns[roles.history])
    return f'{user} AS "user", {moment} AS "time", {listed} AS item, {history} AS history'


def listing(column: Column) -> str:
    """SQL: the list in a column, or null if the value is not a list."""
    if column.kind.endswith("]"):
        return column.sql
    if column.kind == "JSON":
        return f"try_cast({column.sql} AS VARCHAR[])"
    found = f"regexp_extract_all(coalesce({column.sql}, ''), {literal(IDS)})"
    return f"list_transform({found}, lambda text: trim(text, {literal(QUOTES)}))"


def _roles(table: FileTable, data: DataConfig) -> Roles:
    """The columns that the configuration names, and for the others those of a known name."""
    given = {key: str(value) for key, value in data.columns if value is not None}
    usual = type(data.columns)()
    for key, name in given.items():
        if name != getattr(usual, key):
            table.require(name, f"data.columns.{key}")

    def find(key: str, known: Sequence[str]) -> str | None:
        names = [given[key], *known] if key in given else known
        return next((name for name in names if name in table.columns), None)

    user, time = find("user", USERS), find("time", TIMES)
    history = find("history", HISTORIES)
    target = find("item", TARGETS)
    if history is not None and target is not None and target != history:
        return Roles(user, target, time, history)
    item = find("item", LISTS)
    if item is None:
        raise DataError(
            f"{table.files[0]} has no column that is known to hold lists of items; it has "
            f"{', '.join(table.columns)}. Set data.columns.item, and data.columns.history if that is a target"
        )
    listed = _has_lists(table, item)
    return Roles(
        user, item, time, listed=listed, timed_each=listed and time is not None and _has_lists(table, time)
    )


def _has_lists(table: FileTable, name: str) -> bool:
    """Whether a column has lists, by its type or by the first rows of the first file."""
    if table.kind in ("parquet", "arrow"):
        return table.columns[name].kind.endswith("]")
    if table.dialect is None:
        return isinstance((first_object(table.files[0]) or {}).get(name), list)
    rows = islice(delimited_rows(table.files[0], table.dialect, table.width), SAMPLE)
    place = [*table.columns].index(name)
    return any(isinstance(row, list) and set(row[place].strip()) & set("[, ") for _, row in rows)


def _items(table: FileTable, roles: Roles) -> ItemTable | None:
    """The titles beside the items, as MiniOneRec has them."""
    if TITLE not in table.columns or roles.listed:
        return None
    item, title = table.columns[roles.item].text, table.columns[TITLE].text
    rows = f"SELECT row_of_files, {item} AS item, {title} AS title FROM {{rows}}"
    if roles.history is not None and HISTORY_TITLES in table.columns:
        history = listing(table.columns[roles.history])
        titles = listing(table.columns[HISTORY_TITLES])
        rows = f"""
            {rows} UNION ALL SELECT row_of_files, unnest(had)::VARCHAR, unnest(titles)::VARCHAR
            FROM (SELECT row_of_files, {history} AS had, {titles} AS titles FROM {{rows}})
            WHERE len(had) = len(titles)"""
    shape = f"""
        SELECT min(row_of_files) AS row_of_files, item, title FROM ({rows})
        GROUP BY item, title ORDER BY row_of_files, item, title"""
    return ItemTable(reshaped(table, shape, {"item": "VARCHAR", "title": "VARCHAR"}), "item", "title")


def _table(data: DataConfig) -> FileTable:
    path = str(data.path)
    kind, files = kind_of(path), []
    if Path(path).is_dir():
        there = {bare_suffix(file) for file in Path(path).iterdir() if file.is_file()}
        ending = next((ending for ending in ENDINGS if ending in there), None)
        kind = kind_of(f"a{ending}") if ending else "csv"
        files = [
            file for file in find_files(path, str(kind)) if ending is None or bare_suffix(file) == ending
        ]
        files = _of_sequences(files) if kind == "parquet" else files
    elif kind is None:
        raise DataError(
            f"the format of {path} cannot be recognized from its extension; rename it to end in .csv, .tsv, "
            ".parquet or .jsonl"
        )
    files = in_reading_order(files or find_files(path, str(kind)))
    if kind == "parquet":
        return parquet_table(files)
    if kind == "jsonl":
        return jsonl_table(files)
    return csv_table(files, data.separator or separator_of(files[0]), True, data.encoding, data.quote)


def in_reading_order(files: Sequence[Path]) -> list[Path]:
    """Files in the order of their names, with those for validation and then those for testing at the end.

    If the same parts repeat for several periods (``train_0.6``, ``test_0.6``, ``train_0.7``, ``test_0.7``),
    this holds within each period, and the periods are in the order of the rest of the name.
    """
    periods: dict[tuple[tuple[int, str], ...], list[Path]] = {}
    for file in files:
        periods.setdefault(_period(file), []).append(file)
    parts = [sorted(map(_part, of_period)) for of_period in periods.values()]
    if parts and len(parts[0]) > 1 and all(part == parts[0] and len({*part}) == len(part) for part in parts):
        return [file for period in sorted(periods) for file in sorted(periods[period], key=_part)]
    return sorted(files, key=lambda file: (_part(file), file))


def _words(file: Path) -> list[str]:
    return file.name.lower().replace("_", ".").replace("-", ".").split(".")


def _part(file: Path) -> int:
    """A number that is larger for a part that is read later."""
    return -next((place for place, names in enumerate(PARTS) if {*names} & {*_words(file)}), len(PARTS))


def _period(file: Path) -> tuple[tuple[int, str], ...]:
    """The words of a file's name that do not name a part; numbers are ordered by value."""
    said = {"train", "training", *chain(*PARTS)}
    return tuple(
        (int(word), "") if word.isdecimal() else (-1, word) for word in _words(file) if word not in said
    )


def _of_sequences(files: Sequence[Path]) -> list[Path]:
    """The Parquet files of a folder that have sequences. If the names of some files contain train or test,
    files without such a word in their name and with other columns are left out, such as DACT's vectors of
    items."""
    named = [file for file in files if {"train", "training", *chain(*PARTS)} & {*_words(file)}]
    if not named:
        return [*files]
    columns = _columns(named[0])
    return [file for file in files if file in named or _columns(file) == columns]


def _columns(file: Path) -> list[str]:
    return [*parquet_table([file]).columns]

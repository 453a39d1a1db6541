"""The table of users: one row a user, whose columns are segments of the test cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from peso.errors import DataError
from peso.events.database import identifier, temporary_database
from peso.events.sources.files import kind_of, require_content
from peso.events.sources.own import separator_of
from peso.events.sources.reading import Reading
from peso.events.sources.tables import FileTable, csv_table, jsonl_table, parquet_table, plain
from peso.events.stream import Stream
from peso.progress import Observer

USER = "user_id"


def read_user_table(path: str | Path) -> Mapping[str, Mapping[str, str]]:
    """By column, the value of each user that has one.

    Args:
        path: CSV or TSV with a header, Parquet or JSON lines, with a column ``user_id``.

    Raises:
        DataError: no such file, unreadable, no column ``user_id``, or a user with two rows.
    """
    path = Path(path)
    try:
        table = _table(path)
        with TemporaryDirectory() as aside, temporary_database(Path(aside)) as connection:
            reading = Reading(connection, table, skip=False, key=USER)
            user = reading.id(USER, "the name of the column with the users to user_id")
            others = [name for name in table.columns if name not in (USER, "")]
            fields = [f"{plain(table, name, join=', ')} AS f{place}" for place, name in enumerate(others)]
            reading.create("users", ", ".join([f"{user} AS {identifier(USER)}", *fields]))
            rows = connection.execute("SELECT * FROM users").fetchall()
    except DataError as error:
        raise DataError(f"report.users: {error}") from None
    values: dict[str, dict[str, str]] = {name: {} for name in others}
    seen: set[str] = set()
    for number, (user, *row) in enumerate(rows, 1):
        if user is None:
            raise DataError(f"report.users: {path}: row {number} (without a header) names no user; remove it")
        if user in seen:
            raise DataError(f"report.users: {path} has two rows of user {user!r}; keep one")
        seen.add(user)
        for name, value in zip(others, row, strict=True):
            if value is not None:
                values[name][user] = value
    return values


def tell_found(told: Mapping[str, Mapping[str, str]], stream: Stream, observer: Observer) -> None:
    """Say how many users of the stream the user table knows (:func:`read_user_table`)."""
    known = {user for column in told.values() for user in column}
    if not known:
        return
    users = {user for number in range(stream.stages) for user in stream.stage(number).users}
    found = len(users & known)
    observer.note(
        f"{found:,} of {len(users):,} users of the log have a row in report.users, which has {len(known):,}"
        + ("" if found else f" (the log has {min(users)!r}, the table {min(known)!r}, for example)")
    )


def _table(path: Path) -> FileTable:
    kind = kind_of(path.name)
    if kind is None:
        raise DataError(f"{path} has none of the endings .csv, .tsv, .parquet, .jsonl")
    require_content(path)
    if kind == "parquet":
        return parquet_table([path])
    if kind == "jsonl":
        return jsonl_table([path])
    return csv_table([path], separator_of(path), header=True)

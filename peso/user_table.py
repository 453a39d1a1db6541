"""What is known of users beside their events: a table with a row a user, whose columns part the test cases.

Knows files; knows nothing of what the columns mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import duckdb

from peso.errors import DataError
from peso.events.database import literal

READERS = {".csv": "read_csv", ".tsv": "read_csv", ".parquet": "read_parquet", ".jsonl": "read_json"}
USER = "user_id"


def read_user_table(path: str | Path) -> Mapping[str, Mapping[str, str]]:
    """By column, the value of each user that has one.

    Args:
        path: CSV or TSV with a header, Parquet or JSON lines, with a column ``user_id``.

    Raises:
        DataError: no such file, unreadable, no column ``user_id``, or a user with two rows.
    """
    path = Path(path)
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"report.users: {path} is none of {', '.join(READERS)}")
    try:
        text = "header = true, all_varchar = true" if reader == "read_csv" else ""
        scan = f"{reader}({', '.join(filter(None, (literal(str(path)), text)))})"
        with duckdb.connect() as database:
            table = database.sql(f"SELECT * FROM {scan}").to_arrow_table()
    except duckdb.Error as error:
        raise DataError(f"report.users: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if USER not in table.column_names:
        raise DataError(
            f"report.users: {path} has no column {USER!r}; it has {', '.join(table.column_names)}"
        )
    users = [str(user) for user in table[USER].to_pylist()]
    if len(set(users)) < len(users):
        twice = next(user for row, user in enumerate(users) if user in set(users[:row]))
        raise DataError(f"report.users: {path} has two rows of user {twice!r}")
    return {
        name: {
            user: str(value)
            for user, value in zip(users, table[name].to_pylist(), strict=True)
            if value is not None
        }
        for name in table.column_names
        if name != USER
    }

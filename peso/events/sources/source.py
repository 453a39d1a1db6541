"""What a source says: where an event's and an item's fields stand in which files.

Knows tables and columns; knows nothing of what is done with the events.
"""

from __future__ import annotations

from dataclasses import dataclass

from peso.events.database import literal
from peso.events.sources.tables import Column, FileTable

PATH = " > "  # between the parts of a category path, broad to narrow
LIST = ", "  # between texts without an order, such as genres


@dataclass(frozen=True)
class Log:
    """Events: a table and the names of its columns. ``time_format`` as in the configuration.

    ``kind``: the column of the event types, read where ``keep`` names those that count.
    """

    table: FileTable
    user: str
    item: str
    time: str
    rating: str | None = None
    time_format: str = "auto"
    kind: str | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class ItemTable:
    """Items: a table, its column of ids, and for each field the SQL that gives the text or null.

    ``item``: the name of the column.
    """

    table: FileTable
    item: str
    title: str = "NULL"
    text: str = "NULL"
    category: str = "NULL"


@dataclass(frozen=True)
class Source:
    """A log and, where the source has one, the table of its items."""

    log: Log
    items: ItemTable | None = None


def plain(table: FileTable, *names: str, join: str = "\n") -> str:
    """SQL: one text from these columns, null if all are. A list in a column is joined likewise."""
    parts = [f"nullif({_as_text(table.columns[name], join)}, '')" for name in names]
    return f"nullif(concat_ws({literal(join)}, {', '.join(parts)}), '')" if parts else "NULL"


def _as_text(column: Column, join: str) -> str:
    if column.kind == "JSON":
        items = f"""from_json({column.sql}, '["VARCHAR"]')"""
        return (
            f"CASE json_type({column.sql}) WHEN 'ARRAY' THEN array_to_string({items}, {literal(join)}) "
            f"WHEN 'OBJECT' THEN {column.value} ELSE {column.text} END"
        )
    if column.kind.endswith("[]"):
        return f"array_to_string({column.sql}::VARCHAR[], {literal(join)})"
    return f"{column.sql}::VARCHAR" if column.is_container else column.text

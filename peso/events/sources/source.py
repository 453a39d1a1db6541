"""What a source says: where an event's and an item's fields stand in which files.

Knows tables and columns; knows nothing of what is done with the events.
"""

from __future__ import annotations

from dataclasses import dataclass

from peso.events.database import identifier, literal
from peso.events.sources.tables import FileTable

PATH = " > "  # between the parts of a category path, broad to narrow
LIST = ", "  # between texts without an order, such as genres


@dataclass(frozen=True)
class Log:
    """Events: a table and the names of its columns. ``time_format`` as in the configuration."""

    table: FileTable
    user: str
    item: str
    time: str
    rating: str | None = None
    time_format: str = "auto"


@dataclass(frozen=True)
class ItemTable:
    """Items: a table and, for each field, the SQL expression over its columns that gives the text or null."""

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
    parts = [f"nullif({_as_text(table, name, join)}, '')" for name in names]
    return f"nullif(concat_ws({literal(join)}, {', '.join(parts)}), '')" if parts else "NULL"


def _as_text(table: FileTable, name: str, join: str) -> str:
    column, kind = identifier(name), table.columns[name]
    if kind == "JSON":
        items = f"""from_json({column}, '["VARCHAR"]')"""
        return (
            f"CASE json_type({column}) WHEN 'ARRAY' THEN array_to_string({items}, {literal(join)}) "
            f"ELSE {column} ->> '$' END"
        )
    if kind.endswith("[]"):
        return f"array_to_string({column}::VARCHAR[], {literal(join)})"
    return f"{column}::VARCHAR"

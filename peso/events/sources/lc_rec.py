"""LC-Rec's JSON files: NAME.inter.json with the items of each user, oldest first, and NAME.item.json.

{"0": [12, 7, 3], "1": [7, 9]}                                        NAME.inter.json
{"7": {"title": "…", "description": "…", "brand": "…", "categories": "…"}}     NAME.item.json

LETTER, MiniOneRec and others use them, too. ``NAME.index.json`` has semantic IDs (``items.index``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from peso.errors import DataError
from peso.events.database import identifier
from peso.events.sources.files import require_content
from peso.events.sources.sequences import Roles, sequences
from peso.events.sources.tables import Column, DataSet, FileTable, ItemTable, Source, plain
from peso.runtime.files import read_json_object

INTERACTIONS, ITEMS = ".inter.json", ".item.json"
TEXTS = ("title", "brand", "description", "categories")


class LCRec(DataSet):
    """A data set in LC-Rec's JSON files."""

    name = "lc-rec"
    signs = (f"*{INTERACTIONS}",)

    @staticmethod
    def open(path: str) -> Source:
        """Open a folder with ``NAME.inter.json``, or this file itself. ``NAME.item.json`` beside it is
        optional.

        Raises:
            DataError: there is no such file or there are several, or it is not an object of lists of items.
        """
        given = Path(path)
        found = sorted(given.glob(f"*{INTERACTIONS}")) if given.is_dir() else [given]
        if len(found) != 1:
            raise DataError(
                f"{given} has {len(found)} files *{INTERACTIONS}, not one; give the file, or the folder of "
                "one data set in LC-Rec's format"
            )
        file = require_content(found[0])
        content = read_json_object(file)
        for user, items in content.items():
            if not isinstance(items, list) or any(isinstance(item, list | dict) for item in items):
                raise DataError(
                    f'{file}: user {user!r} has no list of items, as in {{"0": [12, 7]}}; '
                    "other files are read with --format sequences"
                )
        rows = pa.table(
            {
                "user": pa.array(content, pa.string()),
                "items": pa.array([[*map(_text, row)] for row in content.values()], pa.list_(pa.string())),
            }
        )
        log = sequences(_table(file, "lists_of_users", rows), Roles("user", "items", listed=True))
        contents = file.with_name(file.name.removesuffix(INTERACTIONS) + ITEMS)
        return Source(log, _items(contents) if contents.is_file() else None)


def _items(file: Path) -> ItemTable:
    content = read_json_object(file)
    known = {item: fields if isinstance(fields, Mapping) else {} for item, fields in content.items()}
    columns = {"item": pa.array(known, pa.string())}
    for name in TEXTS:
        columns[name] = pa.array([_words(fields.get(name)) for fields in known.values()], pa.string())
    table = _table(file, "contents_of_items", pa.table(columns))
    return ItemTable(table, "item", "title", plain(table, "brand", "description"), "categories")


def _table(file: Path, name: str, rows: pa.Table) -> FileTable:
    kinds = {field.name: "VARCHAR[]" if pa.types.is_list(field.type) else "VARCHAR" for field in rows.schema}
    columns = {column: Column(identifier(column), kind) for column, kind in kinds.items()}
    return FileTable("arrow", (file,), columns, len(columns), name, arrow=rows)


def _text(item: Any) -> str | None:
    return None if item is None else str(item)


def _words(value: Any) -> str | None:
    """A text, or the texts of a list: a path of categories."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " > ".join(str(part) for part in value) or None
    return None if value is None else str(value)

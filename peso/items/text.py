"""The text of an item: a template over its title, text and category.

Knows the fields of an item table; knows nothing of how text becomes vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter

import pyarrow as pa

FIELDS = ("title", "text", "category")


def item_texts(items: pa.Table, template: str) -> list[str | None]:
    """Fill the template for every item.

    The template is read line by line. A line that names fields is dropped where all of them are empty, so
    that no label stands without its value. An item whose every field of the template is empty has no text:
    None (what becomes of it: :mod:`peso.items.vectors`).

    Args:
        items: with the columns ``title``, ``text`` and ``category`` (string or null); a missing column
            counts as empty.
        template: such as ``"{title}\\n{category}\\n{text}"``.

    >>> table = pa.table({"title": ["Tea", " ", None], "category": ["Home", "Garden", None]})
    >>> item_texts(table, "{title}\\nIn {category}")
    ['Tea\\nIn Home', 'In Garden', None]
    """
    lines = [(line, _fields(line)) for line in template.split("\n")]
    empty = [None] * len(items)
    columns = [items[name].to_pylist() if name in items.column_names else empty for name in FIELDS]
    texts = []
    for values in zip(*columns, strict=True):
        filled = {name: (value or "").strip() for name, value in zip(FIELDS, values, strict=True)}
        texts.append(_fill(lines, filled))
    return texts


def _fill(lines: list[tuple[str, list[str]]], filled: Mapping[str, str]) -> str | None:
    if not any(filled[name] for _, names in lines for name in names):
        return None
    kept = [line for line, names in lines if not names or any(filled[name] for name in names)]
    return "\n".join(kept).format(**filled)


def _fields(line: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(line) if name is not None]

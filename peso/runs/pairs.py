"""Files with two columns of ids: the old and the new one, or the user to merge and who gets the history."""

from __future__ import annotations

import csv
import reprlib
from pathlib import Path

from peso.errors import UsageError
from peso.runtime.files import read_given

Pair = tuple[str, str]


def read_pairs(path: Path, what: str, header: Pair) -> list[Pair]:
    """The pairs of ids in a file with two columns, separated by commas or tabs, with or without a header.

    Args:
        what: what the ids identify, for messages: ``item`` or ``user``.
        header: the names of the columns; a first line with these names is skipped.

    Raises:
        UsageError: the file cannot be read or has no pair, or a line does not have exactly two ids.
    """
    text = read_given(path, "--file")
    rows = csv.reader(text.splitlines(), delimiter="\t" if "\t" in text.split("\n", 1)[0] else ",")
    pairs: list[Pair] = []
    try:
        for row in filter(any, rows):
            if len(row) != 2 or not all(row):
                raise UsageError(
                    f"{path}, line {rows.line_num}: expected two ids ({' and '.join(header)}) of {what}s, "
                    f"separated by a comma or a tab, not {reprlib.repr(row)}"
                )
            if pairs or tuple(name.strip().lower() for name in row) != header:
                pairs.append((row[0], row[1]))
    except csv.Error as error:
        raise UsageError(f"{path}, line {rows.line_num}: {error}; give two ids per line") from None
    if not pairs:
        raise UsageError(f"{path} has no pair of ids; write one `{','.join(header)}` per line")
    return pairs

"""Files with two columns of names: what becomes what."""

from __future__ import annotations

import csv
from pathlib import Path

from peso.errors import UsageError

Pair = tuple[str, str]


def read_pairs(path: Path, what: str, header: Pair) -> list[Pair]:
    """The pairs of a file with two columns, separated by commas or tabs, with or without a header.

    Args:
        path: the file.
        what: what the names are of, for messages.
        header: the two words of the header, if there is one.

    Raises:
        UsageError: the file cannot be read, has no pair, or a line has not exactly two names.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--file {path} cannot be read: {reason}") from None
    rows = csv.reader(text.splitlines(), delimiter="\t" if "\t" in text.split("\n", 1)[0] else ",")
    pairs: list[Pair] = []
    for row in rows:
        if not any(row):
            continue
        if len(row) != 2 or not all(row):
            raise UsageError(
                f"{path}, line {rows.line_num}: expected two ids ({' and '.join(header)}) of {what}s, "
                f"separated by a comma or a tab, not {row!r}"
            )
        if pairs or tuple(name.strip().lower() for name in row) != header:
            pairs.append((row[0], row[1]))
    if not pairs:
        raise UsageError(f"{path} has no pair of ids; write one `{','.join(header)}` a line")
    return pairs

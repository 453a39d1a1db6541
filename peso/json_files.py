"""Reading JSON: what can be wrong with the text of a file, said with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peso.errors import DataError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        DataError: missing, unreadable, not UTF-8, truncated or otherwise malformed (says where), not an
            object, or a key twice in one object (of which JSON readers keep the last in silence).
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; check the path, or fetch the data again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its rights") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text at byte {error.start}; fetch the file again, or convert it"
        ) from None
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        ended = not text[error.pos :].strip()
        what = "ends too early (truncated?)" if ended or "Unterminated" in error.msg else "is not valid JSON"
        byte = len(text[: error.pos].encode())
        raise DataError(
            f"{path} {what}: {error.msg} at line {error.lineno}, column {error.colno} (byte {byte} of "
            f"{len(content)}); fetch or write the file again"
        ) from None
    except RecursionError:
        raise DataError(f"{path} nests too deep to be the data expected; fetch the file again") from None
    except _Twice as error:
        raise DataError(
            f"{path} has the key {error.args[0]!r} twice in one object; keep one of them"
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path} holds a JSON {type(value).__name__} where an object {{…}} belongs; "
            "check that it is the right file"
        )
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file that holds one JSON object a line.

    Raises:
        DataError: unreadable, not UTF-8, or a line that is not a JSON object (says which).
    """
    records: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                records.append(dict(json.loads(line)))
        return records
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its rights") from None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}, line {len(records) + 1}: not a JSON object ({error}); restore it from a copy"
        ) from None


class _Twice(Exception):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(key)
            seen.add(key)
    return result

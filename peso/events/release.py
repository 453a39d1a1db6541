"""Reader of the preprocessed streams that the PESO authors released.

*.all.block_{t}.json   {user: {"previous_block": [item, …], "current_block": [item, …]}}, oldest first
*.index*.json          {item: ["<a_i>", "<b_j>", …]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from peso.config.parsing import shown
from peso.errors import DataError
from peso.events import columns
from peso.events.histories import Ragged, Stage, require_trainable
from peso.items.semantic_ids import SemanticIds, read_release_index
from peso.runtime.failures import listed
from peso.runtime.files import read_json_object
from peso.runtime.remote import local

PREVIOUS = "previous_block"
CURRENT = "current_block"

_BLOCK = re.compile(r"(?P<name>.+)\.all\.block_(?P<number>0|[1-9]\d*)\.json", re.ASCII)
_INDEX = re.compile(r".+\.index.*\.json")


def read_release(directory: str | Path) -> tuple[pa.Table, list[Stage], SemanticIds]:
    """Read a directory with a released stream.

    The files have no titles, texts or categories, so these columns are null. Users with fewer than three
    items in a block are part of the stage (their events are history), but are not tested.

    Returns:
        The item table (``peso.events.columns.ITEMS``) in the order of the index file, the stages, and the
        semantic IDs in the order of the item table.

    Raises:
        DataError: a file is missing, unreadable or inconsistent; the message names the file, key or id and
            says what to do.
    """
    blocks, index = release_files(directory)
    ids = read_release_index(index)
    stages = [_read_block(path, number, ids, index) for number, path in enumerate(blocks)]
    unknown = pa.nulls(len(ids.item_ids), pa.string())
    items = pa.Table.from_arrays(
        [pa.array(ids.item_ids, pa.string()), unknown, unknown, unknown], schema=columns.ITEMS
    )
    return items, stages, ids


def release_files(directory: str | Path) -> tuple[list[Path], Path]:
    """The block files in the order of their numbers, and the index file.

    Raises:
        DataError: the directory does not exist, has no blocks, a gap in their numbers, no index, or more than
            one stream or index.
    """
    directory = Path(local(str(directory)))
    if not directory.is_dir():
        raise DataError(
            f"{directory} is not a directory; give the directory that contains the released JSON files"
        )
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    found: dict[int, str] = {}
    streams = set()
    for name in names:
        if match := _BLOCK.fullmatch(name):
            found[int(match["number"])] = name
            streams.add(match["name"])
    if not found:
        raise DataError(
            f"{directory} has no block files NAME.all.block_0.json, NAME.all.block_1.json, …; "
            "give the directory that contains the released JSON files"
        )
    if len(streams) > 1:
        raise DataError(
            f"{directory} has blocks of several streams ({', '.join(sorted(streams))}); keep only one of them"
        )
    missing = [number for number in range(max(found)) if number not in found]
    if missing:
        wanted = ", ".join(f"{next(iter(streams))}.all.block_{number}.json" for number in missing)
        raise DataError(
            f"{directory} lacks {wanted} (it has block {', '.join(map(str, sorted(found)))}); "
            "add the missing file: blocks are numbered from 0 without gaps"
        )
    indices = [name for name in names if _INDEX.fullmatch(name) and not _BLOCK.fullmatch(name)]
    if not indices:
        raise DataError(
            f"{directory} has no semantic-ID index NAME.index*.json; put it in the directory of the blocks"
        )
    if len(indices) > 1:
        raise DataError(
            f"{directory} has several indices ({', '.join(indices)}); keep only the one to be used"
        )
    return [directory / found[number] for number in sorted(found)], directory / indices[0]


def _read_block(path: Path, number: int, ids: SemanticIds, index: Path) -> Stage:
    block = read_json_object(path)
    if not block:
        raise DataError(
            f"{path} has no users, so stage {number} is empty; download the file again or remove the block"
        )
    rows = {item: row for row, item in enumerate(ids.item_ids)}
    sides: dict[str, list[list[int]]] = {PREVIOUS: [], CURRENT: []}
    unknown: list[tuple[str, str]] = []
    for user, entry in block.items():
        for key, side in sides.items():
            items = _items(path, user, entry, key)
            unknown.extend((user, item) for item in items if item not in rows)
            side.append([rows.get(item, -1) for item in items])
    if unknown:
        some = listed(f"user {user!r} item {item!r}" for user, item in unknown)
        raise DataError(
            f"{path} has items that are not in {index.name}: {some}; "
            "use the index made for these blocks, or remove these events"
        )
    stage = Stage(number, list(block), Ragged.of(sides[PREVIOUS]), Ragged.of(sides[CURRENT]))
    require_trainable(stage, str(path))
    return stage


def _items(path: Path, user: str, entry: Any, key: str) -> list[str]:
    if not isinstance(entry, Mapping):
        raise DataError(
            f"{path}: user {user!r} has {shown(entry, 40)} instead of an object with {PREVIOUS!r} and "
            f"{CURRENT!r}; create the block again"
        )
    if key not in entry:
        raise DataError(f"{path}: user {user!r} lacks {key!r} (has {sorted(entry)}); create the block again")
    items = entry[key]
    if not isinstance(items, list):
        raise DataError(
            f"{path}: {key!r} of user {user!r} is {shown(items, 40)} instead of a list of item ids; "
            "create the block again"
        )
    for item in items:
        if not isinstance(item, str):
            raise DataError(
                f"{path}: {key!r} of user {user!r} contains {shown(item, 40)} instead of an item id; "
                "write ids as strings"
            )
    return items

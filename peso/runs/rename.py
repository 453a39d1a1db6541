"""`peso items rename`: gives items of the stream other names (:mod:`peso.runs.names`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peso.errors import DataError
from peso.items.names import ItemNames
from peso.runs.names import Renaming, as_names, names_held, renamings, write_renamings
from peso.runs.pairs import Pair
from peso.runs.workspace import Workspace
from peso.runtime.failures import listed
from peso.runtime.provenance import timestamp

LONGEST = 256  # characters of an item id that the server accepts


@dataclass(frozen=True)
class Renamed:
    """The result of :func:`rename`.

    Attributes:
        items: the previous and the new name of each renamed item.
        same: names of items that already had the new name.
    """

    items: dict[str, str]
    same: list[str]


def rename(workspace: Workspace, pairs: Sequence[Pair], *, dry_run: bool = False) -> Renamed:
    """Give items new names, with effect from the next answer on; all pairs or none.

    Args:
        pairs: the old and the new name of each item. An item may be given by any name that it has or had. The
            pairs of one call may form chains (a to b, b to c) in any order: the item gets the last name.
        dry_run: only check the pairs.

    Raises:
        DataError: an old name is unknown, a new name belongs to another item, or the pairs contradict each
            other. Nothing is changed.
        WorkspaceError: there is no stream, or ``names.json`` is damaged.
    """
    ends = _ends(pairs)
    with names_held(workspace.root):
        before = renamings(workspace.root)
        names, known = as_names(before), frozenset(workspace.stream.item_ids)
        _require_known(workspace, list(ends), names, known)
        after, changed, same = dict(before), dict[str, str](), list[str]()
        owners = dict(names.stored)  # of every name
        time = timestamp()
        for old, chain in ends.items():
            stored, now = names.in_files(old), names.now(old)
            for name in chain:
                _require_free(name, stored, owners, known, after)
            owners |= {name: stored for name in chain if name != stored}
            if chain[-1] == now:
                same.append(now)
                continue
            if now in changed:
                raise DataError(f"two of the pairs rename the item {now!r}; give each item once")
            held = [*(after[stored].earlier if stored in after else ()), now, *chain[:-1]]
            earlier = [name for name in dict.fromkeys(held) if name not in (stored, chain[-1])]
            after[stored] = Renaming(name=chain[-1], earlier=earlier, time=time)
            changed[now] = chain[-1]
        if changed and not dry_run:
            write_renamings(workspace.root, after)
    return Renamed(changed, same)


def _ends(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """The chain of new names of each item that the pairs rename, by its old name; the item gets the last.

    Raises:
        DataError: a name is renamed twice, two items would get one name, the pairs form a cycle, or a name
            cannot be an id.
    """
    to: dict[str, str] = {}
    origin: dict[str, str] = {}
    for old, new in dict.fromkeys(pairs):
        if not new or len(new) > LONGEST or not new.isprintable() or new != new.strip():
            raise DataError(
                f"{new!r} cannot be the name of an item: a name has 1 to {LONGEST} visible characters, "
                "without spaces around them"
            )
        if old in to:
            raise DataError(f"{old!r} would be renamed to both {to[old]!r} and {new!r}; give each item once")
        if new in origin:
            raise DataError(f"both {origin[new]!r} and {old!r} would be renamed to {new!r}; {MERGE}")
        to[old], origin[new] = new, old
    ends: dict[str, list[str]] = {}
    for old in (name for name in to if name not in origin or to[name] == name):
        chain = [to[old]]
        while chain[-1] in to and chain[-1] != old:
            chain.append(to[chain[-1]])
        ends[old] = chain
    if circle := set(to) - {name for old, chain in ends.items() for name in (old, *chain)}:
        raise DataError(
            f"the pairs rename {listed(map(repr, sorted(circle)))} in a circle, so it is not clear "
            "which name belongs to which item; items cannot exchange their names, so give each a new one"
        )
    return ends


MERGE = (
    "two items cannot become one, because the model has its own rows for each of them. Keep both, and leave "
    "one out of all answers: `peso items retire`"
)


def _require_known(
    workspace: Workspace, items: Sequence[str], names: ItemNames, known: frozenset[str]
) -> None:
    if others := [item for item in items if names.in_files(item) not in known]:
        raise DataError(
            f"{len(others):,} of {len(items):,} items to rename are not in the stream of {workspace.root}: "
            f"{listed(map(repr, others))}; check the ids (the old one comes first)"
        )


def _require_free(
    name: str, stored: str, owners: Mapping[str, str], known: frozenset[str], items: Mapping[str, Renaming]
) -> None:
    """Raise DataError if a name belongs to another item than the one with this stored id."""
    owner = owners.get(name, name if name in known else None)
    if owner in (None, stored):
        return
    item, other = (items[each].name if each in items else each for each in (stored, owner))
    if name == other:
        raise DataError(f"{item!r} cannot be renamed to {name!r}, which is another item; {MERGE}")
    raise DataError(
        f"{item!r} cannot be renamed to {name!r}, which is an earlier name of the item {other!r} and is "
        "still understood as that; choose another name"
    )

"""The names of renamed items.

An item keeps the id under which it entered the stream: its *stored id*. Files use only stored ids. A renamed
item has a current name, and is also understood by its stored id and by every name that it had in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ItemNames:
    """The names of the items that were renamed; all other items have only their stored id.

    Attributes:
        current: the current name of each renamed item, by its stored id. A name may be the stored id again.
        stored: the stored id of each renamed item, by every other name that it has or had.

    >>> names = ItemNames({"a": "c"}, {"b": "a", "c": "a"})  # a was renamed to b, then to c
    >>> [names.now(item) for item in ("a", "b", "c", "d")]
    ['c', 'c', 'c', 'd']
    >>> [names.in_files(item) for item in ("a", "b", "c", "d")]
    ['a', 'a', 'a', 'd']
    """

    current: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_earlier(cls, earlier: Mapping[str, str]) -> ItemNames:
        """The names of items of an export, which has only current names: the current name by each earlier
        one (:attr:`peso.items.semantic_ids.SemanticIds.earlier_ids`)."""
        return cls({name: name for name in earlier.values()}, earlier)

    def __bool__(self) -> bool:
        return bool(self.current or self.stored)

    def in_files(self, item: str) -> str:
        """The stored id of an item that is given by any of its names."""
        return self.stored.get(item, item)

    def now(self, item: str) -> str:
        """The current name of an item that is given by any of its names."""
        stored = self.stored.get(item, item)
        return self.current.get(stored, stored)

    def after(self, other: ItemNames) -> ItemNames:
        """These names for items that are given by any name that they have or had in another workspace.

        >>> other = ItemNames({"a": "c", "d": "e"}, {"c": "a", "e": "d"})
        >>> names = ItemNames({"a": "b"}, {"b": "a"}).after(other)
        >>> [names.now(item) for item in ("b", "c", "e")]
        ['b', 'b', 'd']
        """
        return ItemNames(self.current, {**self.stored, **other.stored})

    def every(self, items: Iterable[str]) -> list[list[str]]:
        """All names of each item, given by its stored id: the current one first, then from new to old.

        >>> ItemNames({"a": "c"}, {"b": "a", "c": "a"}).every(["a", "d"])
        [['c', 'b', 'a'], ['d']]
        """
        others: dict[str, list[str]] = {}
        for name, stored in self.stored.items():
            others.setdefault(stored, []).insert(0, name)
        return [[*dict.fromkeys([self.now(item), *others.get(item, ()), item])] for item in items]

    def former(self, items: Iterable[str]) -> dict[str, str]:
        """Those of the items that are given by a former name, with their current names."""
        return {item: name for item in items if (name := self.now(item)) != item}


NONE_RENAMED = ItemNames()

"""Filters for all recommendations of a server: only items in stock that are not retired. The files of the
filters are read again when they change."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from peso.errors import UsageError, WorkspaceError
from peso.items.semantic_ids import SemanticIds
from peso.runs.retired import retired_items
from peso.runtime.files import file_state, read_given

log = logging.getLogger("peso.serving")


@dataclass(frozen=True)
class Stock:
    """The filters.

    Attributes:
        allow: the only items that may be recommended; None: all.
        deny: items that may not be recommended.
    """

    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()

    def among(self, ids: SemanticIds) -> frozenset[str] | None:
        """The items of a catalog that may be recommended, by their current names; None: all of them."""
        if self.allow is None and not self.deny:
            return None
        allowed = ids.item_ids if self.allow is None else _named(ids, self.allow)
        return frozenset(allowed) - _named(ids, self.deny)


def _named(ids: SemanticIds, items: frozenset[str]) -> frozenset[str]:
    """Those of the items that a catalog has, by their current names."""
    return frozenset(ids.name(item) for item in items if item in ids)


class StockFiles:
    """Reads the filters from files.

    Args:
        root: the workspace, whose retired items are denied.
        allow, deny: files of item ids, one per line; None: no filter.

    Raises:
        UsageError: a file cannot be read, or the allow file is empty.
        WorkspaceError: the record of retired items is damaged.
    """

    def __init__(self, root: Path, allow: Path | None = None, deny: Path | None = None) -> None:
        self._retired = retired_items(root)
        self._never = self._retired.current()
        self._problem = ""
        self._files = {"--allow-file": allow, "--deny-file": deny}
        self._seen = self._fingerprint()
        self._stock = self._combined = self._read()
        self._parts: tuple[Stock, frozenset[str]] = self._stock, frozenset()  # what _combined is made from

    def current(self) -> Stock:
        """The current filters. If a changed file cannot be read, the old filters stay and the error is
        logged.
        """
        if (fingerprint := self._fingerprint()) != self._seen:
            self._seen = fingerprint
            try:
                self._stock = self._read()
            except UsageError as error:
                log.error("filters stay as they were", extra={"fields": {"problem": str(error)}})
            else:
                log.info("filters read", extra={"fields": self._counts()})
        if (parts := (self._stock, self._retired_now())) != self._parts:
            self._parts, self._combined = parts, replace(self._stock, deny=self._stock.deny | parts[1])
        return self._combined

    def _retired_now(self) -> frozenset[str]:
        """The retired items; if the record cannot be read, the last known ones, and the error is logged
        once."""
        try:
            self._never, self._problem = self._retired.current(), ""
        except WorkspaceError as error:
            if self._problem != str(error):
                log.error("retired items stay as they were", extra={"fields": {"problem": str(error)}})
            self._problem = str(error)
        return self._never

    def _counts(self) -> dict[str, int | None]:
        allow, deny = self._stock.allow, self._stock.deny
        return {"allow": None if allow is None else len(allow), "deny": len(deny)}

    def _fingerprint(self) -> list[tuple[int, int, int] | None]:
        """Inodes, times and sizes of the files, to detect changes."""
        return [file_state(path) for path in filter(None, self._files.values())]

    def _read(self) -> Stock:
        read = {option: self._items(option, path) for option, path in self._files.items()}
        return Stock(read["--allow-file"], read["--deny-file"] or frozenset())

    @staticmethod
    def _items(option: str, path: Path | None) -> frozenset[str] | None:
        if path is None:
            return None
        items = frozenset(line.strip() for line in read_given(path, option).splitlines()) - {""}
        if option == "--allow-file" and not items:
            raise UsageError(
                f"{option} {path} has no item, so nothing could be recommended; write one id per line"
            )
        return items

"""RecBole's atomic files: NAME.inter and NAME.item, separated by tabs, with types in the header.

user_id:token  item_id:token  rating:float  timestamp:float     NAME.inter
session_id:token  item_id_list:token_seq  item_id:token         NAME.train.inter, NAME.valid.inter, …
item_id:token  title:token_seq  categories:token_seq            NAME.item
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peso.errors import DataError
from peso.events.database import literal
from peso.events.sources.files import ChoiceError, first_of, require_content
from peso.events.sources.sequences import Roles, in_reading_order, sequences
from peso.events.sources.tables import LIST, DataSet, FileTable, ItemTable, Log, Source, csv_table

USERS = ("user_id", "session_id")
TITLES = ("title", "movie_title", "item_name", "name", "app_name", "product_title")
CATEGORIES = ("categories", "category", "class", "genre", "genres")
TEXTS = ("brand", "description", "tags", "developer", "author", "city")


class RecBole(DataSet):
    """A data set in RecBole's atomic files."""

    name = "recbole"
    signs = ("*.inter",)

    @staticmethod
    def open(path: str) -> Source:
        """Open a folder with ``NAME.inter``, or this file itself.

        Files that are already split (``NAME.train.inter``, ``NAME.valid.inter``, ``NAME.test.inter``) are
        read in this order. If there is no ``timestamp``, the events are in the order of the files.

        Raises:
            DataError: there is no such file, there are several data sets, or a file lacks the columns of
                users and items.
        """
        given = Path(path)
        folder = given if given.is_dir() else given.parent
        found = sorted(folder.glob("*.inter")) if given.is_dir() else [given]
        if not found:
            raise DataError(f"{folder} has no NAME.inter; give the folder of a data set in RecBole's format")
        files = _of_one(found)
        log = csv_table([require_content(file) for file in files], "\t", header=True, quote="")
        stem = files[0].stem
        item = first_of(folder, f"{stem}.item", f"{stem.rpartition('.')[0]}.item")
        items = _items(item) if item else None
        at = _fields(log)
        user = next((name for name in USERS if name in at), USERS[0])
        log.require_published(at.get(user, user), at.get("item_id", "item_id"))
        roles = Roles(at[user], at["item_id"], at.get("timestamp"), at.get("item_id_list"))
        if roles.history is not None or roles.time is None:
            return Source(sequences(log, roles), items)
        return Source(Log(log, at[user], at["item_id"], at["timestamp"], at.get("rating")), items)


def _of_one(found: Sequence[Path]) -> list[Path]:
    """``NAME.inter`` if there is one, or else its parts, ``NAME.train.inter`` and so on, in their order."""
    stems = [file.stem for file in found]
    for file in found:
        if all(stem == file.stem or stem.startswith(f"{file.stem}.") for stem in stems):
            return [file]
    names = {stem.rpartition(".")[0] for stem in stems}
    if len(names) > 1 or "" in names:
        raise ChoiceError(found[0].parent, [file.name for file in found], "the file of one")
    return in_reading_order(found)


def _items(file: Path) -> ItemTable:
    table = csv_table([require_content(file)], "\t", header=True, quote="")
    at = _fields(table)
    table.require(at.get("item_id", "item_id"), "data.format")
    of = {name: table.columns[whole].sql for name, whole in at.items()}
    category = next((of[name] for name in CATEGORIES if name in of), "NULL")
    texts = [of[name] for name in TEXTS if name in of]
    return ItemTable(
        table,
        at["item_id"],
        next((of[name] for name in TITLES if name in of), "NULL"),
        f"nullif(concat_ws('\n', {', '.join(texts)}), '')" if texts else "NULL",
        # a sequence of tokens is separated by blanks, unless the names of the categories have blanks
        f"CASE WHEN contains({category}, ',') THEN {category} "
        f"ELSE replace({category}, ' ', {literal(LIST)}) END",
    )


def _fields(table: FileTable) -> dict[str, str]:
    """The columns by their names without the types."""
    return {name.partition(":")[0]: name for name in table.columns}

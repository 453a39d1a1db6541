"""Data sets that the library `datasets` saved to disk (``save_to_disk``), read without that library.

A folder has Arrow files and ``dataset_info.json``, or ``dataset_dict.json`` and such a folder for each split.
Columns are named as for the user's own files, or as for ``sequences`` if ``data.columns.history`` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from peso.config import DataConfig
from peso.errors import DataError
from peso.events.database import identifier
from peso.events.sources.files import require_content, require_same
from peso.events.sources.sequences import in_reading_order, sequences_of
from peso.events.sources.tables import Column, DataSet, FileTable, Source
from peso.events.sources.user_files import log_of


class Datasets(DataSet):
    """A data set, or a dictionary of its splits, that `datasets` saved to disk."""

    name = "datasets"
    signs = ("dataset_dict.json", "state.json")
    takes = frozenset({"columns", "time_format"})

    @staticmethod
    def open(path: str) -> Source:
        """Open a saved data set with the columns ``user``, ``item`` and ``time``.

        Raises:
            DataError: the folder is not a saved data set, or it has no such columns.
        """
        return Datasets.read(DataConfig(format="datasets", path=path))

    @classmethod
    def read(cls, data: DataConfig) -> Source:
        """Open a saved data set with the columns of ``data.columns``. Splits are read one after another.

        Raises:
            DataError: as for ``open``.
        """
        table = arrow_table(_files(Path(str(data.path))))
        if data.columns.history is not None:
            return sequences_of(table, data)
        return Source(log_of(table, data))


def _files(folder: Path) -> list[Path]:
    folders = [folder, *in_reading_order([*filter(Path.is_dir, folder.glob("*"))])]
    found = [file for each in folders for file in sorted(each.glob("*.arrow"))]
    if not found:
        raise DataError(f"{folder} has no *.arrow; give a folder that save_to_disk of `datasets` wrote")
    return [require_content(file) for file in found]


def arrow_table(files: Sequence[Path]) -> FileTable:
    """A table of files in Arrow's stream format, which are mapped into memory and not copied.

    Raises:
        DataError: a file is not in this format, or the columns of the files differ.
    """
    parts = []
    for file in files:
        try:
            parts.append(pa.ipc.open_stream(pa.memory_map(str(file))).read_all())
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file} is not readable as Arrow ({str(error).splitlines()[0]}); save the data set again"
            ) from None
    names = require_same([(file, part.column_names) for file, part in zip(files, parts, strict=True)])
    whole = pa.concat_tables(parts, promote_options="permissive")
    with duckdb.connect() as connection:
        kinds = connection.from_arrow(whole.slice(0, 0)).types
    columns = {name: Column(identifier(name), str(kind)) for name, kind in zip(names, kinds, strict=True)}
    return FileTable("arrow", tuple(files), columns, len(names), "saved_data_set", arrow=whole)

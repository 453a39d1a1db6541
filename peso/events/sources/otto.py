"""OTTO sessions as JSON lines.

{"session": 12, "events": [{"aid": 59625, "ts": 1661724000278, "type": "clicks"}, …]}

A session is a user. Types are ``clicks``, ``carts`` and ``orders``; ``data.events`` keeps some of them.
"""

from __future__ import annotations

from pathlib import Path

from peso.errors import DataError
from peso.events.sources.files import require_content
from peso.events.sources.lines import first_object
from peso.events.sources.tables import DataSet, Log, Source, jsonl_table, reshaped


class Otto(DataSet):
    """The sessions of OTTO, with the column ``type`` for ``data.events``."""

    name = "otto"
    signs = ("otto-recsys-*.jsonl", "train.jsonl")

    @staticmethod
    def open(path: str) -> Source:
        """Open a file of sessions, or the training file of a folder.

        Raises:
            DataError: there is no such file, or its lines have no ``session`` or no ``events``.
        """
        given = Path(path)
        found = [given]
        if given.is_dir():
            there = sorted(file for ending in ("jsonl", "jsonl.gz") for file in given.glob(f"*.{ending}"))
            found = [file for file in there if "train" in file.name] or there
        if not found:
            raise DataError(f"{given} has no otto-recsys-train.jsonl; give the folder of the OTTO data set")
        if not {"session", "events"} <= {*(first_object(found[0]) or ())}:
            raise DataError(
                f"{found[0]} has no session or no events in its first line; set data.format to jsonl, with "
                "data.columns"
            )
        table = jsonl_table([require_content(file) for file in found], ["session", "events"])
        table.require_published("session", "events")
        session, events = table.columns["session"], table.columns["events"]
        # what is not a list is one event without an item, which is refused or skipped like any such row
        shape = f"""
            SELECT row_of_files, "user", event ->> 'aid' AS item, event ->> 'ts' AS "time",
                event ->> 'type' AS type
            FROM (
                SELECT row_of_files, {session.text} AS "user",
                    unnest(coalesce(try_cast({events.sql} AS JSON[]), [NULL])) AS event
                FROM {{rows}})"""
        made = reshaped(table, shape, dict.fromkeys(("user", "item", "time", "type"), "VARCHAR"))
        return Source(Log(made, "user", "item", "time", time_format="milliseconds"))

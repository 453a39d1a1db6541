"""New events as further stages of a stream whose earlier stages stay as they are.

Knows a stream and a log that begins where the stream ends; knows nothing of codes or models. The earlier
files are linked into the new directory, byte for byte the same, and only the item table is written anew,
with rows added at its end.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from peso.config import DataConfig, StagesConfig
from peso.errors import DataError
from peso.events.cleaning import Funnel, clean
from peso.events.cutting import Cut, calendar, cut_at, order_by_time
from peso.events.database import literal, scalar, temporary_database
from peso.events.ingest import describe
from peso.events.loading import load
from peso.events.sources import open_source
from peso.events.stage_writer import new_items, number_by_arrival, write_items, write_stages
from peso.events.stream import FORMAT, ITEMS_FILE, Stream, stage_file
from peso.events.times import Clock, iso
from peso.manifest import intact, write_manifest
from peso.progress import Observer, Silent

# Who had what before, as numbers of the new log.
_HAD = """
    SELECT users.u, items.i
    FROM (SELECT name, unnest(history) AS n FROM known_users) AS had
    JOIN users ON users.name = had.name
    JOIN known_items ON known_items.n = had.n JOIN items ON items.name = known_items.name"""
BEFORE = 2**40  # subtracted from the place of what a user did before: negative, and still in order


def append(
    data: DataConfig, earlier: str | Path, directory: Path, observer: Observer | None = None
) -> dict[str, Any]:
    """Fill an existing, empty directory with the stream at ``earlier`` and further stages of new events.

    The events of ``data`` become one stage, or with ``stages.every`` or ``stages.boundaries`` as many as
    begin among them. Users and items of the stream are never too rare; new ones have to reach ``min_user``
    and ``min_item`` within the new events. Texts of items that the stream has stay as they are. An event at
    the very moment of the stream's last is new unless its user had its item already.

    Args:
        data: where the new events are; cleaning and stages as for the stream.
        earlier: the stream to continue. It is only read.

    Returns:
        The manifest; ``appended`` lists what each append brought.

    Raises:
        DataError: events older than the last of the stream (with ``on_error: skip`` they are left out and
            counted), a stream without times, and whatever :func:`peso.events.ingest.ingest` refuses.
        WorkspaceError: the earlier stream is damaged, or the disk is full.
    """
    observer = observer or Silent()
    stream = Stream.open(earlier)
    if "time" not in stream.manifest:
        raise DataError(
            f"{stream.directory} was not made from a log with times ({stream.manifest.get('source')}), so "
            "nothing says where new events belong; append to a stream that was ingested from a log"
        )
    if split := stream.manifest.get("split"):
        raise DataError(
            f"{stream.directory} was split {split}: its stages do not follow one another in time, so nothing "
            "comes after them; ingest everything into a new workspace"
        )
    last = int(stream.manifest["time"]["last"])
    skip = data.on_error == "skip"
    with temporary_database(directory) as connection:
        source = open_source(data)
        observer.note(f"reading {data.path}")
        loaded = load(connection, source.log, skip, data.min_rating is not None)
        funnel = Funnel(connection, loaded.rows)
        older = _leave_out_older(connection, last, skip, str(data.path))
        if older:
            funnel.count("not older than the stream")
        _know(connection, stream)
        if scalar(connection, f"SELECT count(*) FROM events WHERE time = {last}"):
            # the one moment of which the log may hold events that the stream has: duplicates are kept once
            connection.execute(f"DELETE FROM events WHERE time = {last} AND (u, i) IN ({_HAD})")
            funnel.count("not in the stream yet")
        if data.repeats == "drop":
            connection.execute(f"DELETE FROM events WHERE (u, i) IN ({_HAD})")
            funnel.count("repeats of earlier stages dropped")
        clean(funnel, data.min_rating, data.repeats, data.min_user, data.min_item)
        order_by_time(connection)
        stages = _cut(connection, data.stages, loaded.clock)
        number_by_arrival(connection, first_item=len(stream.item_ids))
        connection.execute(f"""
            CREATE TABLE sorted AS SELECT * FROM (
                SELECT user_numbers.n AS u, coalesce(known_items.n, item_numbers.n) AS i,
                       ordered.rowid AS place
                FROM ordered JOIN user_numbers USING (u) JOIN items USING (i)
                LEFT JOIN item_numbers USING (i) LEFT JOIN known_items ON known_items.name = items.name
                UNION ALL
                SELECT n, unnest(history), generate_subscripts(history, 1) - {BEFORE}
                FROM known_users JOIN user_numbers USING (name))
            ORDER BY u, place""")
        observer.begin("writing the stages", scalar(connection, "SELECT count(*) FROM sorted"), "events")
        counts = write_stages(
            connection, directory, stages.ends, stream.stages, str(data.path), observer.advance
        )
        observer.end()
        added, of_items = new_items(connection, source.items, skip)
        items = pa.concat_tables([stream.items, added])
        write_items(items, directory)
        first_new, last_new = connection.execute("SELECT min(time), max(time) FROM ordered").fetchall()[0]
    for name in stream.manifest["files"]:
        if name != ITEMS_FILE:
            _link(intact(stream.directory, name, stream.manifest), directory / name)
    brought = {
        "source": describe(data),
        "first_stage": stream.stages,
        "stages": len(counts),
        "time": {**loaded.stated, "unit": loaded.clock.unit, "first": first_new, "last": last_new},
        "skipped": loaded.skipped,
        "older": older,
        "funnel": funnel.rows,
        "boundaries": [iso(moment) for moment in stages.moments or []],
        "new_items": len(added),
        **of_items,
    }
    content = dict(stream.manifest)
    content.update(
        time={**content["time"], "last": last_new, "until": iso(last_new)},
        items=len(items),
        stages=[*stream.counts, *counts],
        appended=[*content.get("appended", []), brought],
    )
    write_manifest(directory, FORMAT, content)
    return dict(Stream.open(directory).manifest)


def _leave_out_older(connection: duckdb.DuckDBPyConnection, last: int, skip: bool, path: str) -> int:
    older = scalar(connection, f"SELECT count(*) FROM events WHERE time < {last}")
    if not older:
        return 0
    earliest = scalar(connection, "SELECT min(time) FROM events")
    if not skip:
        raise DataError(
            f"{path}: {older:,} events are older than the last one of the stream ({iso(last)}; the earliest "
            f"is of {iso(earliest)}). Earlier stages are not rewritten: append newer events only, leave the "
            "older ones out with data.on_error: skip, or ingest everything into a new workspace"
        )
    connection.execute(f"DELETE FROM events WHERE time < {last}")
    if not scalar(connection, "SELECT count(*) FROM events"):
        raise DataError(
            f"{path}: all {older:,} events are older than the last one of the stream; nothing is new"
        )
    return older


def _know(connection: duckdb.DuckDBPyConnection, stream: Stream) -> None:
    """Tables ``known_users`` (name, history) and ``known_items`` (name, n); mark who and what is known."""
    items = literal(str(intact(stream.directory, ITEMS_FILE, stream.manifest)))
    connection.execute(f"""
        CREATE TABLE known_items AS SELECT item_id AS name, file_row_number::INTEGER AS n
        FROM read_parquet({items}, file_row_number = true)""")
    stages = " UNION ALL ".join(
        f'SELECT "user" AS name, {number} AS stage, previous, "current" '
        f"FROM read_parquet({literal(str(stream.directory / stage_file(number)))}, hive_partitioning = false)"
        for number in range(stream.stages)
    )
    connection.execute(f"""
        CREATE TABLE known_users AS
        WITH stages AS ({stages}),
        newest AS (
            SELECT name, max(stage) AS stage FROM stages WHERE name IN (SELECT name FROM users) GROUP BY name)
        SELECT name, list_concat(previous, "current") AS history
        FROM stages JOIN newest USING (name, stage)""")
    connection.execute("UPDATE users SET known = true WHERE name IN (SELECT name FROM known_users)")
    connection.execute("UPDATE items SET known = true WHERE name IN (SELECT name FROM known_items)")


def _cut(connection: duckdb.DuckDBPyConnection, stages: StagesConfig, clock: Clock) -> Cut:
    first, last = connection.execute("SELECT min(time), max(time) FROM ordered").fetchall()[0]
    if stages.every is not None:
        assert stages.start is not None
        moments = calendar(stages.every, clock.moment(stages.start, "data.stages.from"), last)
    else:
        moments = [clock.moment(value, "data.stages.boundaries") for value in stages.boundaries or []]
    return cut_at(connection, [moment for moment in moments if first < moment <= last])


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)

"""Change an existing stream: append stages, remove the last append, or correct the texts of items.

The files of stages that do not change are linked into the new directory, byte for byte the same. Only the
item table is written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peso.config import DataConfig, StagesConfig
from peso.errors import DataError, NothingNew
from peso.events import columns
from peso.events.cleaning import Cut, Funnel, clean, cut_at, moments_of, order_by_time
from peso.events.database import literal, scalar, temporary_database
from peso.events.engines.engine import Engine, open_engine
from peso.events.ingest import describe
from peso.events.known import StreamOverlap, overlap_of, with_histories, without
from peso.events.loading import NO_ALIASES, Aliases, EventTables, event_tables, load
from peso.events.merge import shorten_merged
from peso.events.sources import Source, open_source
from peso.events.sources.tables import ALIKE, folded
from peso.events.sources.user_files import own_items
from peso.events.stage_writer import (
    new_items,
    number_by_arrival,
    texts_in_catalogue,
    write_items,
    write_rare,
    write_stages,
)
from peso.events.stream import FORMAT, ITEMS_FILE, MERGED, Stream, merged_file, rare_file, stage_file
from peso.events.times import Clock, iso
from peso.runtime.manifest import write_manifest
from peso.runtime.progress import Observer, Silent

if TYPE_CHECKING:
    import ibis.expr.types as ir

CORRECTED = "corrected_items"  # in an entry of ``appended``: what the append has corrected in the item table


def extend_stream(
    data: DataConfig,
    earlier: str | Path,
    directory: Path,
    observer: Observer | None = None,
    *,
    source: Source | None = None,
    told: Mapping[str, Any] | None = None,
    aliases: Aliases = NO_ALIASES,
    corrects: bool | None = None,
) -> dict[str, Any]:
    """Write the stream at ``earlier``, extended by stages of new events, to an existing empty directory.

    The events of ``data`` become one stage. With ``stages.every`` or ``stages.boundaries`` they become as
    many stages as begin among them. Users and items of the stream are never removed as too rare; new ones
    must reach ``min_user`` and ``min_item`` within the new events. An event with the same time as the
    stream's last event is new unless its user already had its item.

    Args:
        data: the configuration of the new events. Cleaning and stages should be as for the stream.
        earlier: the directory of the stream to extend. It does not change.
        source: a log and an item table to read instead of those that ``data`` names.
        told: further contents of the entry in ``appended``.
        aliases: names in the log and the item table that differ from the ids in the stream.
        corrects: whether known items get the titles, texts and categories that differ in the item table, as
            by :func:`correct_items`. None: only if the item table is the user's own (``data.items``).

    Returns:
        The manifest. Its key ``appended`` describes each append and its corrections.

    Raises:
        DataError: events are older than the last event of the stream (with ``on_error: skip`` they are left
            out and counted instead), the stream or the data have no times, or
            :func:`peso.events.ingest.ingest` would refuse the data.
        NothingNew: all events are in the stream already.
        WorkspaceError: the earlier stream is damaged, or the disk is full.
    """
    observer = observer or Silent()
    stream = _open_extensible(earlier)
    last = int(stream.manifest["time"]["last"])
    skip = data.on_error == "skip"
    with (
        temporary_database(directory) as connection,
        open_engine(data.engine, connection, directory) as engine,
    ):
        keeps_rare = source is None
        source = source or open_source(data)
        if not source.log.timed:
            raise DataError(
                f"{data.path} has no times, so its events cannot be placed after those of the stream; append "
                "a log with times"
            )
        observer.begin(f"reading {data.path}", 0, "")
        loaded = load(connection, source.log, skip, data.min_rating is not None, aliases)
        loaded.tell(observer)
        remarks = [*loaded.remarks, *_remarks_on_new_ids(connection, stream, observer)]
        log = event_tables(engine, source.log, data.min_rating is not None)
        funnel = Funnel(log, loaded.rows)
        log, older = _leave_out_older(log, last, skip, str(data.path))
        if older:
            funnel.count("not older than the stream", log.events)
        overlap = overlap_of(log, stream)
        log = _leave_out_had(log, overlap, funnel, last, data)
        cleaned = clean(log, funnel, data, source.log.keep, overlap.known)
        ordered = order_by_time(engine, cleaned)
        stages = _cut(engine, ordered, data.stages, loaded.clock)
        numbers = number_by_arrival(log, ordered, len(stream.item_ids), overlap.items)
        events, first_new, last_new = engine.row(
            ordered.aggregate(n=ordered.count(), first=ordered.time.min(), last=ordered.time.max())
        )
        known_users = overlap.users.semi_join(numbers.users, "u")
        returning, earlier_events = engine.row(
            known_users.aggregate(
                n=known_users.count(), events=known_users.history.length().sum().fill_null(0)
            )
        )
        observer.begin("writing the stages", events + earlier_events, "events")
        counts = write_stages(
            engine,
            with_histories(ordered, overlap, numbers),
            numbers.users,
            directory,
            stages.ends,
            stream.stages,
            str(data.path),
            observer.advance,
            [ordered],
        )
        observer.end()
        item_numbers = numbers.items.select("i", "n").union(overlap.items)
        rare = write_rare(log, cleaned.rare, item_numbers, directory, stream.stages) if keeps_rare else 0
        engine.give(numbers.items, "item_numbers")
        added, of_items = new_items(connection, source.items, skip, observer, aliases.items)
        known = stream.items
        if source.items is not None and (data.items is not None if corrects is None else corrects):
            known, corrections = _corrected(connection, stream, observer)
            of_items |= corrections
        write_items(pa.concat_tables([known, added]), directory)
        users = engine.count(numbers.users)
    linked = _link_stages(stream, stream.stages, directory)
    brought = {
        "source": describe(data),
        "first_stage": stream.stages,
        "stages": len(counts),
        "events": events,
        "users": users,
        "new_users": users - returning,
        **({"rare_users": rare} if rare else {}),
        "time": {**loaded.stated, "unit": loaded.clock.unit, "first": first_new, "last": last_new},
        "skipped": loaded.skipped,
        "remarks": remarks,
        "older": older,
        "funnel": funnel.rows,
        "boundaries": [iso(moment) for moment in stages.moments or []],
        "new_items": len(added),
        "new_items_without_text": _without_text(added),
        **of_items,
        "before": {"time": stream.manifest["time"]},
        **(told or {}),
    }
    content = dict(stream.manifest)
    content.update(
        time={**content["time"], "last": last_new, "until": iso(last_new)},
        items=len(known) + len(added),
        stages=[*stream.counts, *counts],
        appended=[*content.get("appended", []), brought],
    )
    write_manifest(directory, FORMAT, content, linked)
    return dict(Stream.open(directory).manifest)


def shorten_stream(earlier: str | Path, directory: Path) -> None:
    """Write the stream at ``earlier`` as it was before its last append to an existing empty directory.

    Corrections of the item table (:func:`correct_items`) are kept.

    Args:
        earlier: the directory of the stream. It does not change.

    Raises:
        WorkspaceError: the stream is damaged.
    """
    stream = Stream.open(earlier)
    *others, brought = stream.manifest["appended"]
    stages = int(brought["first_stage"])
    items = stream.items.slice(0, stream.items_known(stages - 1))
    write_items(items, directory)
    linked = _link_stages(stream, stages, directory)
    content = dict(stream.manifest)
    if MERGED in content:
        content[MERGED] = shorten_merged(stream, stages, directory)
        linked.pop(merged_file(stages - 1), None)
    if "before" in brought:
        time = brought["before"]["time"]
    else:  # written by an earlier version: use the start of the append as the end of the stream
        time = {**content["time"], "last": brought["time"]["first"], "until": iso(brought["time"]["first"])}
    content.update(time=time, items=len(items), stages=stream.counts[:stages], appended=others)
    if not others:
        del content["appended"]
    write_manifest(directory, FORMAT, content, linked)


def correct_items(
    data: DataConfig,
    earlier: str | Path,
    directory: Path,
    observer: Observer | None = None,
    *,
    aliases: Aliases = NO_ALIASES,
) -> dict[str, Any]:
    """Write the stream at ``earlier`` with a corrected item table to an existing empty directory.

    The title, text and category of each item are taken from its first row in ``data.items``. Empty cells, and
    fields for which ``data.items.columns`` names no column, do not change anything.

    Args:
        data: the configuration of the item table.
        earlier: the directory of the stream. It does not change.
        aliases: names in the table that differ from the ids in the stream.

    Returns:
        The changes: ``rows`` (items in the table), the counts of
        :func:`peso.events.stage_writer.new_items`, ``changed`` (items), and the numbers of ``titles``,
        ``texts`` and ``categories`` that changed. The manifest stores this under ``item_updates``.

    Raises:
        DataError: the table is unreadable, or has no item of the stream.
        WorkspaceError: the stream is damaged, or the disk is full.
    """
    stream, path = Stream.open(earlier), data.items.path if data.items else None
    table = own_items(data)
    with temporary_database(directory) as connection:
        connection.from_arrow(_numbered(stream)).create("item_numbers")
        skip = data.on_error == "skip"
        given, counted = new_items(connection, table, skip, observer or Silent(), aliases.items)
        rows = scalar(connection, "SELECT count(DISTINCT item_id) FROM catalogue")
    if not counted["items_found"]:
        raise DataError(
            f"{path} has {rows:,} items, but none of the {len(stream.items):,} items of the stream (the "
            f"first is {stream.item_ids[0]!r}); set data.items.columns.item to the column with the log's ids"
        )
    items, changes = _with_texts(stream.items, given)
    done: dict[str, Any] = {"path": path, "rows": rows, **counted, **changes}
    write_items(items, directory)
    linked = _link_stages(stream, stream.stages, directory)
    updates = [*stream.manifest.get("item_updates", []), done]
    write_manifest(directory, FORMAT, {**stream.manifest, "item_updates": updates}, linked)
    return done


def _numbered(stream: Stream) -> pa.Table:
    return pa.table({"name": stream.items[columns.ITEM_ID], "n": range(len(stream.items))})


def _with_texts(items: pa.Table, given: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """An item table with the titles, texts and categories of the table ``given`` where that is not empty, and
    the numbers of changes. Both tables have the same rows."""
    changed, counts = np.zeros(len(items), bool), dict[str, int]()
    for name, told in ((columns.TITLE, "titles"), (columns.TEXT, "texts"), (columns.CATEGORY, "categories")):
        new = pc.coalesce(given[name], items[name])
        differs = pc.fill_null(pc.not_equal(new, items[name]), True).to_numpy()
        differs &= pc.is_valid(new).to_numpy()
        counts[told] = int(differs.sum())
        changed |= differs
        items = items.set_column(items.column_names.index(name), name, new)
    return items, {**counts, "changed": int(changed.sum())}


def _corrected(
    connection: duckdb.DuckDBPyConnection, stream: Stream, observer: Observer
) -> tuple[pa.Table, dict[str, Any]]:
    """The items of the stream with the texts of an append's product table, and the numbers of changes for the
    manifest."""
    connection.from_arrow(_numbered(stream)).create("known_numbers")
    items, done = _with_texts(stream.items, texts_in_catalogue(connection, "known_numbers"))
    if not done["changed"]:
        return stream.items, {}
    observer.note(
        f"note: the product table has other texts for {done['changed']:,} known items ({done['titles']:,} "
        f"titles, {done['texts']:,} texts, {done['categories']:,} categories), which are used from now on; "
        "existing semantic IDs and content vectors do not change"
    )
    return items, {CORRECTED: done}


def _link_stages(stream: Stream, stages: int, directory: Path) -> dict[str, str]:
    """Link all files except the item table and the stages from number ``stages`` on; returns their
    checksums."""
    left = {ITEMS_FILE}
    for number in range(stages, stream.stages):
        left |= {stage_file(number), rare_file(number), merged_file(number)}
    return stream.link_files(directory, left)


def _without_text(items: pa.Table) -> int:
    """How many items have neither a title nor a text."""
    return int(pc.sum(pc.is_null(pc.coalesce(items[columns.TITLE], items[columns.TEXT]))).as_py() or 0)


def _leave_out_had(
    log: EventTables, overlap: StreamOverlap, funnel: Funnel, last: int, data: DataConfig
) -> EventTables:
    """Leave out events that the stream already has; with ``repeats: drop``, those of an item that their user
    had before."""

    def leave_out(log: EventTables, time: int | None, why: str, step: str) -> EventTables:
        left = without(log.events, overlap.had, time)
        if not log.engine.count(left):
            raise NothingNew(f"{data.path} has no new events: every event {why}. Was it appended before?")
        funnel.count(step, left)
        return replace(log, events=left)

    if log.engine.count(log.events.filter(log.events.time == last)):
        # only at this time can the log have events that the stream already has
        why = f"is already in the stream, which ends at {iso(last)}"
        log = leave_out(log, last, why, "not in the stream yet")
    if data.repeats == "drop":
        why = "is of an item that its user had before (data.repeats: drop)"
        log = leave_out(log, None, why, "repeats of earlier stages dropped")
    return log


def _open_extensible(directory: str | Path) -> Stream:
    """The stream in a directory. Raises DataError if new events cannot be placed after its own."""
    stream = Stream.open(directory)
    if "time" not in stream.manifest:
        raise DataError(
            f"{stream.directory} was not made from a log with times ({stream.manifest.get('source')}), so "
            "new events cannot be placed in it; append to a stream that was ingested from a log"
        )
    if split := stream.manifest.get("split"):
        raise DataError(
            f"{stream.directory} was split {split}: its stages do not follow one another in time, so no "
            "stage can come after them; ingest everything into a new workspace"
        )
    return stream


def _leave_out_older(log: EventTables, last: int, skip: bool, path: str) -> tuple[EventTables, int]:
    events = log.events
    before = events.time < last
    older, newer, earliest = log.engine.row(
        events.aggregate(older=before.sum().fill_null(0), newer=(~before).sum(), earliest=events.time.min())
    )
    if not older:
        return log, 0
    if not skip:
        raise DataError(
            f"{path}: {older:,} events are older than the last event of the stream ({iso(last)}; the "
            f"earliest is of {iso(earliest)}). Earlier stages are not rewritten: append only newer events, "
            "skip the older ones with data.on_error: skip, or ingest everything into a new workspace"
        )
    if not newer:
        raise DataError(
            f"{path}: all {older:,} events are older than the last event of the stream ({iso(last)}), so "
            "there is nothing to append. Was it appended before?"
        )
    return replace(log, events=events.filter(~before)), older


def _remarks_on_new_ids(
    connection: duckdb.DuckDBPyConnection, stream: Stream, observer: Observer
) -> list[str]:
    """Warnings about new users and items whose ids are almost the same as known ids."""
    files = ", ".join(literal(str(stream.file(stage_file(n)))) for n in range(stream.stages))
    known_users = f'SELECT "user" AS name FROM read_parquet([{files}], hive_partitioning = false)'
    known_items = f"SELECT item_id AS name FROM read_parquet({literal(str(stream.directory / ITEMS_FILE))})"
    remarks = []
    for table, known in (("users", known_users), ("items", known_items)):
        count, new, old = connection.execute(f"""
            WITH new AS (SELECT name, {folded("name")} AS id FROM {table} WHERE name NOT IN ({known})),
            near AS (
                SELECT new.name AS new, known.name AS old
                FROM new JOIN ({known}) AS known ON {folded("known.name")} = new.id)
            SELECT count(DISTINCT new), min(new), arg_min(old, new) FROM near""").fetchall()[0]
        if count:
            remarks.append(
                f"{count:,} new {table} differ from {table} of the stream only in {ALIKE}, for example "
                f"{new!r} and {old!r}. They are treated as different; use one spelling for each id"
            )
            observer.note(f"note: {remarks[-1]}")
    return remarks


def _cut(engine: Engine, ordered: ir.Table, stages: StagesConfig, clock: Clock) -> Cut:
    first, last = engine.row(ordered.aggregate(first=ordered.time.min(), last=ordered.time.max()))
    moments = [moment for moment in moments_of(stages, clock, last) if first < moment <= last]
    return cut_at(engine, ordered, moments)

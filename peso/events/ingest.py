"""Turn the data that a configuration describes into a stream directory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq

from peso.config import DataConfig, ItemColumnsConfig, ItemTableConfig
from peso.errors import DataError
from peso.events import columns
from peso.events.cleaning import Funnel, clean, cut, order_by_time
from peso.events.database import temporary_database
from peso.events.engines.engine import open_engine
from peso.events.histories import user_disjoint
from peso.events.loading import NO_ALIASES, Aliases, event_tables, load
from peso.events.release import read_release
from peso.events.simulate import EVENTS_FILE, simulate, write_simulation
from peso.events.sources import open_source
from peso.events.stage_writer import (
    in_numbers,
    new_items,
    number_by_arrival,
    write_items,
    write_rare,
    write_stages,
)
from peso.events.stream import FORMAT, ITEMS_FILE, Stream, replace_stages, write_stream
from peso.events.times import iso
from peso.runtime.manifest import write_manifest
from peso.runtime.progress import Observer, Silent


def ingest(
    data: DataConfig,
    directory: Path,
    seed: int = 0,
    observer: Observer | None = None,
    *,
    aliases: Aliases = NO_ALIASES,
) -> dict[str, Any]:
    """Write the stream of ``data`` to an existing empty directory (see ``peso.events.stream``).

    Args:
        seed: the seed of the simulator and of the shuffle of ``split: user-disjoint``. Nothing else is
            random.
        aliases: names in the log and its item table, and the ids that replace them.

    Returns:
        The manifest. For a log it contains, in addition to the keys of every stream: ``source``; ``time``
        (the recognized format, the first and the last event; missing if the log has no times); ``funnel``
        (events, users and items left after each cleaning step); ``skipped`` (unreadable rows); ``boundaries``
        (where the stages were cut, if by time); and ``split``, unless it is the natural one.

    Raises:
        DataError: the data cannot be used; the message names the file, row, column or stage and says what to
            do.
        ConfigError: what ``data.engine`` needs is not installed.
        WorkspaceError: the disk is full.
    """
    observer = observer or Silent()
    if data.format == "peso-release":
        items, stages, _ = read_release(str(data.path))
        write_stream(directory, items, stages, {"source": describe(data)})
    elif data.format == "simulate":
        _ingest_simulation(data, directory, seed, observer)
    else:
        _ingest_log(data, directory, describe(data), observer, aliases)
    if data.split == "user-disjoint":
        natural = Stream.open(directory)
        dealt = user_disjoint([natural.stage(number) for number in range(natural.stages)], seed)
        replace_stages(directory, dealt, {"split": data.split, "boundaries": None})
        observer.note("split: each user belongs to one stage")
    return dict(Stream.open(directory).manifest)


def describe(data: DataConfig) -> dict[str, Any]:
    """The data configuration for a manifest: the format, and all settings that differ from the defaults,
    except for the engine, which does not affect the stream."""
    changed = data.model_dump(mode="json", exclude_defaults=True, exclude={"engine"})
    return {"format": data.format, **changed}


def _ingest_log(
    data: DataConfig,
    directory: Path,
    source: dict[str, Any],
    observer: Observer,
    aliases: Aliases = NO_ALIASES,
) -> None:
    with (
        temporary_database(directory) as connection,
        open_engine(data.engine, connection, directory) as engine,
    ):
        opened = open_source(data)
        files = opened.log.table.files
        what = str(files[0]) if len(files) == 1 else f"{len(files)} files of {data.path}"
        if source["format"] == "simulate":  # its file is a temporary one
            what = "the simulated log"
        observer.begin(f"reading {what}", 0, "")
        skip, rated = data.on_error == "skip", data.min_rating is not None
        loaded = load(connection, opened.log, skip, rated, aliases)
        loaded.tell(observer)
        if not opened.log.timed and data.stages.fractions is None:
            raise DataError(
                f"{what} has no times, so it cannot be cut by time; set data.stages to a number of stages, "
                "or to fractions"
            )
        log = event_tables(engine, opened.log, rated)
        funnel = Funnel(log, loaded.rows)
        cleaned = clean(log, funnel, data, opened.log.keep)
        ordered = order_by_time(engine, cleaned)
        stages = cut(engine, ordered, data.stages, loaded.clock)
        numbers = number_by_arrival(log, ordered)
        first, last = engine.row(ordered.aggregate(first=ordered.time.min(), last=ordered.time.max()))
        observer.begin("writing the stages", int(stages.ends[-1]), "events")
        counts = write_stages(
            engine,
            in_numbers(ordered, numbers.users, numbers.items),
            numbers.users,
            directory,
            stages.ends,
            0,
            str(data.path),
            observer.advance,
            [ordered],
        )
        observer.end()
        rare = write_rare(log, cleaned.rare, numbers.items, directory, 0)
        engine.give(numbers.items, "item_numbers")
        items, of_items = new_items(connection, opened.items, skip, observer, aliases.items)
        if opened.items is not None and not of_items["items_found"]:
            raise DataError(
                f"none of the {len(items):,} items of the log has a row in {opened.items.table.files[0]}; "
                f"the first item of the log is {items[columns.ITEM_ID][0].as_py()!r}. Check "
                "data.columns.item and data.items.columns.item, or remove data.items"
            )
        write_items(items, directory)
    write_manifest(
        directory,
        FORMAT,
        {
            "source": source,
            **loaded.in_manifest(first, last),
            "skipped": loaded.skipped,
            "remarks": loaded.remarks,
            "funnel": funnel.rows,
            "boundaries": [iso(moment) for moment in stages.moments] if stages.moments is not None else None,
            **({"rare_users": rare} if rare else {}),
            "items": len(items),
            "items_without_title": items[columns.TITLE].null_count,
            **of_items,
            "stages": counts,
        },
    )


def _ingest_simulation(data: DataConfig, directory: Path, seed: int, observer: Observer) -> None:
    """Write the simulated log and item table as files, and ingest them like any other log."""
    sizes = data.simulate
    source = {"format": "simulate", **sizes.model_dump(), "seed": seed}
    simulation = simulate(sizes.users, sizes.items, sizes.stages, seed)
    write_simulation(simulation, directory)
    with TemporaryDirectory() as aside:  # not in the stream's directory, where the manifest lists all
        products = Path(aside) / ITEMS_FILE
        pq.write_table(simulation.items, products)
        log = DataConfig.model_validate(
            {
                "format": "parquet",
                "path": str(directory / EVENTS_FILE),
                "stages": sizes.stages,
                "engine": data.engine,
                "items": ItemTableConfig(
                    path=str(products),
                    columns=ItemColumnsConfig(
                        item=columns.ITEM_ID,
                        title=columns.TITLE,
                        text=[columns.TEXT],
                        category=columns.CATEGORY,
                    ),
                ),
            }
        )
        _ingest_log(log, directory, source, observer)

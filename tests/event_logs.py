"""Small logs for the tests of ingestion: written in any format, ingested, and computed the slow way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peso.config import load_config
from peso.events.append import extend_stream
from peso.events.ingest import ingest
from peso.events.stream import Stream

Event = tuple[str, str, float]  # user, item, time


def data_config(**data: Any):
    """The data section of a configuration."""
    return load_config({"data": data}).data


def write_log(path: Path, events: Sequence[Sequence[object]], header: str = "user,item,time") -> Path:
    lines = [header, *(",".join(map(str, event)) for event in events)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ingested(directory: Path, **data: Any) -> Stream:
    """Ingest into a new directory and open what came out."""
    directory.mkdir(parents=True)
    ingest(data_config(**data), directory)
    return Stream.open(directory)


def appended(directory: Path, earlier: Stream, **data: Any) -> Stream:
    directory.mkdir(parents=True)
    extend_stream(data_config(**data), earlier.directory, directory)
    return Stream.open(directory)


def histories(stream: Stream) -> list[dict[str, tuple[list[str], list[str]]]]:
    """Per stage: user → (previous, current) in item ids. Independent of every order but that of the items."""
    ids = stream.item_ids
    result = []
    for number in range(stream.stages):
        stage = stream.stage(number)
        result.append(
            {
                user: ([ids[i] for i in previous], [ids[i] for i in current])
                for user, previous, current in zip(stage.users, stage.previous, stage.current, strict=True)
            }
        )
    return result


def core(events: list[Event], min_user: int, min_item: int) -> list[Event]:
    """The k-core, by definition: take out whoever is rare until nobody is."""
    while True:
        users, items = Counter(e[0] for e in events), Counter(e[1] for e in events)
        kept = [e for e in events if users[e[0]] >= min_user and items[e[1]] >= min_item]
        if len(kept) == len(events):
            return events
        events = kept


def expected_histories(
    events: list[Event], ends: Sequence[int]
) -> list[dict[str, tuple[list[str], list[str]]]]:
    """What :func:`histories` should be for cleaned events whose stages end after so many of them."""
    by_time = sorted(events, key=lambda event: event[2])  # stable: ties stay as in the log
    result = []
    begin = 0
    for end in ends:
        stage: dict[str, tuple[list[str], list[str]]] = {}
        for user in dict.fromkeys(event[0] for event in by_time[begin:end]):
            stage[user] = (
                [item for u, item, _ in by_time[:begin] if u == user],
                [item for u, item, _ in by_time[begin:end] if u == user],
            )
        result.append(stage)
        begin = end
    return result


def write_json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

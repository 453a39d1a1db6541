"""What the times of events are worth: the model's answers, corrected by what everybody had shortly before.

    python benchmarks/event_times.py W [--quick] [--json]

W is a workspace of a log with times, in which nobody has an item twice, with a trained model that has an item
head and counts of transitions. `peso` uses times to order and to cut a log, and does not keep them. This
script reads them from the log again. For each validation case of the later stages, it counts the training
events of all users up to the time of the case, or up to a day before it, where an event has half of its
weight after some hours:

    R(ID) = Σ_events with this ID 2^(-age / half-life)

Answers are R alone, and p(ID)^0.7 · q(ID)^0.3 with q = (R + 30 p) / (Σ R + 30), where p is the model's
probability. The weights 0.3 and 30 are those of this script: nothing is tuned, and no later event is counted.
The figures are NDCG@10 and the mean log-probability of the targets, both without the items that users have
had. `--quick` uses 64 cases of each stage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pool_forms import figures, model_probabilities, seen_ids

from peso.errors import PesoError
from peso.events.database import temporary_database
from peso.events.loading import load
from peso.events.sources import open_source
from peso.runs.validation import validation_cases
from peso.runs.workspace import Workspace

HOUR = 3_600_000_000  # in microseconds
HALF_LIVES = (6, 12, 24, 48)  # in hours
DELAYS = (0, 24)  # in hours
WEIGHT, SMOOTHING = 0.3, 30.0
KEPT = 20  # half-lives; older events have a weight below a millionth


def times(workspace: Workspace) -> dict[tuple[str, str], int]:
    """The time of each event, in microseconds, by user and item."""
    data = workspace.config.data
    with TemporaryDirectory() as directory, temporary_database(Path(directory)) as connection:
        source = open_source(data)
        if not source.log.timed:
            raise SystemExit(f"{data.path} has no times")
        load(connection, source.log, data.on_error == "skip")
        rows = connection.execute(
            "SELECT DISTINCT users.name, items.name, time "  # rows may repeat
            "FROM events JOIN users USING (u) JOIN items USING (i)"
        ).fetchall()
    found = {(user, item): time for user, item, time in rows}
    if len(found) < len(rows):
        raise SystemExit("users have items twice, so an event cannot be recognized by user and item")
    return found


def training_events(workspace: Workspace, when: dict[tuple[str, str], int]) -> tuple[np.ndarray, np.ndarray]:
    """The times of all training targets, ascending, and their items."""
    stream, found = workspace.stream, []
    for number in range(stream.stages):
        stage = stream.stage(number)
        for row, targets in stage.trained():
            events = [(stage.users[row], stream.item_ids[item]) for item in targets]
            if missing := [event for event in events if event not in when]:
                raise SystemExit(f"the log has no event of {missing[0]}; was it appended, or renamed?")
            found += [(when[event], int(item)) for event, item in zip(events, targets, strict=True)]
    moments, items = np.array(sorted(found), dtype=np.int64).T
    return moments, items


def recent(
    moments: np.ndarray, leaves: np.ndarray, before: np.ndarray, half_life: float, size: int
) -> np.ndarray:
    """R at some moments: float64 (n, size).

    Args:
        moments: int64 (events,), ascending.
        leaves: int (events,), the ID of each event.
        before: int64 (n,); events at or after this moment are not counted.
        half_life: in microseconds.
        size: the number of IDs.
    """
    result = np.zeros((len(before), size))
    ends = np.searchsorted(moments, before, "left")
    starts = np.searchsorted(moments, before - KEPT * half_life)
    for row, moment, start, end in zip(result, before, starts, ends, strict=True):
        ages = (moment - moments[start:end]) / half_life
        row += np.bincount(leaves[start:end], 0.5**ages, minlength=size)
    return result


def answers(
    p: np.ndarray, moments: np.ndarray, leaves: np.ndarray, now: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each answer and its scores, (cases, IDs).

    Args:
        p: float64 (cases, IDs), the model's probabilities.
        moments, leaves: (events,), the times of the training events, ascending, and their IDs.
        now: int64 (cases,), the time of each case.
    """
    yield "model", p
    for delay in DELAYS:
        for hours in HALF_LIVES:
            counts = recent(moments, leaves, now - delay * HOUR, hours * HOUR, p.shape[1])
            name = f"up to {delay} h before, half-life {hours} h"
            yield f"events {name}", counts + 1e-3 * p  # the model decides between IDs without events
            smooth = (counts + SMOOTHING * p) / (counts.sum(1, keepdims=True) + SMOOTHING)
            yield f"model and events {name}", p ** (1 - WEIGHT) * smooth**WEIGHT


def measure(workspace: Workspace, most: int) -> dict[str, dict[str, float]]:
    """The figures of all answers over the later stages."""
    when, stream = times(workspace), workspace.stream
    moments, items = training_events(workspace, when)
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for number in range(1, stream.stages):
        stage = workspace.stage(number)
        cases, trie = validation_cases(stage, most), workspace.semantic_ids.trie
        p, targets = model_probabilities(stage, cases), trie.leaf_of[cases.targets]
        seen = seen_ids(cases, trie.leaf_of, trie.leaves)
        now = np.array(
            [when[user, stream.item_ids[item]] for user, item in zip(cases.users, cases.targets, strict=True)]
        )

        for name, scores in answers(p, moments, trie.leaf_of[items], now):
            unseen = np.where(seen, 0, scores)
            probabilities = unseen / unseen.sum(1, keepdims=True)
            found.setdefault(name, []).append(figures(probabilities, targets, seen))
    return {
        name: {
            "ndcg@10": float(np.concatenate([one["ndcg"] for one in stages]).mean()),
            "log_probability": float(np.concatenate([one["log"] for one in stages]).mean()),
            "cases": sum(len(one["ndcg"]) for one in stages),
        }
        for name, stages in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace", type=Path, help="a workspace with a trained model")
    parser.add_argument("--quick", action="store_true", help="64 cases of each stage: to see that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    try:
        result = measure(Workspace.open(options.workspace), 64 if options.quick else 1_000_000)
    except PesoError as error:
        raise SystemExit(str(error)) from None
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, row in result.items():
        print(f"{name}: NDCG@10 {row['ndcg@10']:.4f}, log-probability {row['log_probability']:.3f}")


if __name__ == "__main__":
    main()

"""How a stream drifts: new and returning users and items in each stage, and how far tastes moved.

Terms are as in ``peso.evaluation.predictions``: *continuing* users were seen in the previous stage, *new*
ones never before. Known users without events in a stage are *dormant* in it, and *returning* when they have
events again. The same terms apply to items.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from peso.events.database import temporary_database
from peso.events.engines.engine import Engine, open_engine
from peso.events.histories import MIN_STAGE_ITEMS
from peso.events.stream import Stream, stage_file

if TYPE_CHECKING:
    import ibis.expr.types as ir

QUANTILES = (0.1, 0.5, 0.9)
STATES = ("", "new_", "continuing_", "returning_", "dormant_")  # beginnings of the names of figures


def drift(
    stream: Stream, first_codes: np.ndarray | None = None, engine: str = "duckdb"
) -> list[dict[str, Any]]:
    """Compare each stage with those before it.

    Args:
        first_codes: int (items,), the first-level code of each item; None if it is not known.
        engine: the name of the engine that computes the figures (`data.engine`); they do not depend on it.

    Returns:
        One dictionary per stage:

        - ``stage``, ``events``, ``users``, ``new_users``, ``continuing_users``, ``returning_users``,
          ``dormant_users``, and the same for ``items``;
        - ``item_divergence`` and ``code_divergence``: :func:`jensen_shannon` between the events of this
          stage and of the previous one, over items and over first-level codes; None in stage 0, without
          codes, or if one of the stages has no events;
        - ``new_item_targets``: the share of targets, including those of validation and test, whose item
          nobody had before the stage;
        - ``history_lengths``: the mean and the ``QUANTILES`` of the number of items that the users of the
          stage had before it; None if it has no users.

    Raises:
        WorkspaceError: a file of the stream is damaged.
        ConfigError: what the engine needs is not installed.
    """
    files = [stream.file(stage_file(number)) for number in range(stream.stages)]
    with (
        TemporaryDirectory(prefix="peso-") as directory,
        temporary_database(Path(directory)) as connection,
        open_engine(engine, connection, Path(directory)) as opened,
    ):
        return _drift(opened, files, first_codes)


def _drift(engine: Engine, files: Sequence[Path], first_codes: np.ndarray | None) -> list[dict[str, Any]]:
    rows = engine.stages(files)
    with_events = rows.filter(rows.current.length() > 0)
    users = engine.keep("users", with_events.select("stage", key="user", had=with_events.previous.length()))
    known_users = _known(engine, users, users.filter(users.had > 0))
    lengths = _by_stage(engine, users.group_by("stage", "had").aggregate(times=users.count()))

    eligible = rows.current.length() >= MIN_STAGE_ITEMS
    events = rows.select("stage", key=rows.current.unnest(), target=eligible.cast("int64"))
    counted = events.group_by("stage", "key").aggregate(n=events.count(), targets=events.target.sum())
    items = engine.keep("items", counted)
    # items that are only in histories count as earlier
    known_items = _known(engine, items, rows.select("stage", key=rows.previous.unnest()))
    found = items.join(known_items, "key")
    new = found.filter(found.since > found.stage).group_by("stage").aggregate(n=lambda of: of.targets.sum())
    targets = items.group_by("stage").aggregate(n=items.targets.sum())

    item_pairs, code_pairs = _pairs(engine, items), None
    if first_codes is not None:
        numbers = pa.array(range(len(first_codes)), pa.int32())
        codes = engine.given("codes", pa.table({"key": numbers, "code": pa.array(first_codes, pa.int32())}))
        code_pairs = _pairs(engine, items.join(codes, "key").select("stage", "n", key="code"))
    user_states = _states(engine, users, known_users, len(files))
    item_states = _states(engine, items, known_items, len(files))
    all_targets, new_targets = dict(engine.rows(targets)), dict(engine.rows(new))
    return [
        {
            "stage": stage,
            "events": sum(now * times for _, now, times in item_pairs[stage]),
            **{f"{state}users": count for state, count in zip(STATES, user_states[stage], strict=True)},
            **{f"{state}items": count for state, count in zip(STATES, item_states[stage], strict=True)},
            "item_divergence": _divergence(stage, item_pairs),
            "code_divergence": None if code_pairs is None else _divergence(stage, code_pairs),
            "new_item_targets": int(new_targets.get(stage, 0)) / int(all_targets[stage])
            if all_targets.get(stage)
            else None,
            "history_lengths": _lengths(lengths[stage]),
        }
        for stage in range(len(files))
    ]


def _known(engine: Engine, here: ir.Table, before: ir.Table) -> ir.Table:
    """The first stage at whose beginning each user or item is known (key, since).

    Args:
        here: the stages of each user or item with events (stage, key).
        before: the stages in whose histories each one is, including events before the stream (stage, key).
    """
    each = here.select("key", since=here.stage + 1).union(before.select("key", since=before.stage))
    return engine.keep("known", each.group_by("key").aggregate(since=each.since.min()))


def _states(engine: Engine, here: ir.Table, known: ir.Table, stages: int) -> list[tuple[int, ...]]:
    """For each stage, how many users or items it has, how many of them are new, continuing and returning, and
    how many others are dormant, as in ``STATES``.

    Args:
        here: the stages of each user or item with events (stage, key), each pair once.
        known: see :func:`_known`.
        stages: the number of stages, of which some may be empty.
    """
    import ibis

    last = here.stage.lag().over(ibis.window(group_by="key", order_by="stage"))
    each = here.mutate(continuing=(last == here.stage - 1).fill_null(False)).join(known, "key")
    counted = each.group_by("stage").aggregate(
        n=each.count(), new=(each.since > each.stage).sum(), continuing=each.continuing.sum()
    )
    began = engine.rows(known.group_by("since").aggregate(n=known.count()))
    found = {stage: tuple(counts) for stage, *counts in engine.rows(counted)}
    states: list[tuple[int, ...]] = []
    for stage in range(stages):
        count, new, continuing = found.get(stage, (0, 0, 0))
        returning = count - new - continuing
        dormant = sum(n for since, n in began if since <= stage) - continuing - returning
        states.append((count, new, continuing, returning, dormant))
    return states


def _pairs(engine: Engine, counts: ir.Table) -> dict[int, list[tuple[int, ...]]]:
    """For each stage, how often a pair of counts occurs: events of an item in the stage before and in this
    one (last, now, times), in ascending order. A stream has far fewer pairs than items.

    Args:
        counts: the events of items (stage, key, n); those of one item are added.
    """
    now = counts.select("key", "stage", last=0 * counts.n, now=counts.n)
    then = counts.select("key", stage=counts.stage + 1, last=counts.n, now=0 * counts.n)
    both = now.union(then)
    each = both.group_by("key", "stage").aggregate(last=both.last.sum(), now=both.now.sum())
    return _by_stage(engine, each.group_by("stage", "last", "now").aggregate(times=each.count()))


def _by_stage(engine: Engine, rows: ir.Table) -> dict[int, list[tuple[int, ...]]]:
    """Rows by their stage, the first column, in ascending order."""
    found: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for stage, *values in sorted(engine.rows(rows)):
        found[stage].append(tuple(map(int, values)))
    return found


def _divergence(stage: int, pairs: dict[int, list[tuple[int, ...]]]) -> float | None:
    """The divergence of a stage from the previous one; None if there is none, or one of them is empty."""
    last, now, times = np.array(pairs[stage], dtype=np.int64).reshape(-1, 3).T
    return jensen_shannon(last, now, times) if last.any() and now.any() else None


def jensen_shannon(first: np.ndarray, second: np.ndarray, times: np.ndarray | None = None) -> float:
    """Jensen-Shannon divergence of two count vectors in bits: 0 for equal shares, 1 for nothing in common.

    JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q) (Lin, 1991).

    Args:
        first, second: counts (n,), not all zero.
        times: int (n,), how often each pair of counts occurs; None: once.

    >>> jensen_shannon(np.array([1, 1, 0]), np.array([2, 2, 0]))
    0.0
    >>> jensen_shannon(np.array([1, 0]), np.array([0, 5]))
    1.0
    """
    from scipy.special import rel_entr  # slow to load

    often = np.ones(len(first)) if times is None else times
    p, q = first / (first * often).sum(), second / (second * often).sum()
    middle = (p + q) / 2
    nats = float(((rel_entr(p, middle) + rel_entr(q, middle)) * often).sum()) / 2
    return max(0.0, nats / math.log(2))  # rounding may give less than 0, where SciPy's distance would be nan


def _lengths(counted: list[tuple[int, ...]]) -> dict[str, float | None]:
    """Mean and quantiles of lengths, from how often each occurs (length, times)."""
    names = ["mean", *(f"p{q * 100:.0f}" for q in QUANTILES)]
    if not counted:
        return dict.fromkeys(names)
    each = np.repeat(*np.array(counted).T)
    return dict(zip(names, [float(each.mean()), *np.quantile(each, QUANTILES).tolist()], strict=True))

"""Ingestion of a raw log: time, memory and growth of `peso ingest`, compared with the same steps in pandas.

    python benchmarks/ingest.py [--quick] [--events N] [--json] [--unquoted] [--directory D] [--spark]
                                [--before CHECKOUT]

The input is a synthetic CSV file of 20 million events (1 million users, 200 thousand items); for the growth,
a file of 2 million events is read before. Duplicates are removed, users and items with fewer than 5 events
are removed until none is left, the events are sorted by time and split into 60 % and four times 10 %, and
each stage's users are written to Parquet with all their items before and in the stage. Each measurement runs
in a separate process, whose peak resident size is its memory. CPU seconds are given too, because they are
more reliable than elapsed time on a busy machine. `--quick` uses a twentieth of the events. Needs pandas.

`--spark` also measures `data.engine: spark` (needs the extra `spark` and Java; its memory includes Java's).
`--before` also measures `peso` in another checkout, such as one of an earlier version (`git worktree add`),
with the same packages; the files of the stages must be equal. Versions up to the first with Ibis read quoted
logs line by line: compare with them by `--unquoted`. Everything that is compared in this way runs
`--repeats` times in turn, and the run with the fewest CPU seconds counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVENTS = 20_000_000
USERS_PER_EVENT, ITEMS_PER_EVENT = 1 / 20, 1 / 100
CORE = 5
SHARES = (0.6, 0.1, 0.1, 0.1, 0.1)


def write_log(path: Path, events: int, quoted: bool = True) -> None:
    """A log whose items follow a power law; half of its events are of ever fewer, busier users."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv

    rng = np.random.default_rng(0)
    users, items = int(events * USERS_PER_EVENT), int(events * ITEMS_PER_EVENT)
    busy = (users * rng.random(events) ** 3).astype(np.int64)
    user = np.where(rng.random(events) < 0.5, rng.integers(0, users, events), busy)
    item = (items * rng.random(events) ** 2.5).astype(np.int64)
    seconds = rng.integers(1_500_000_000, 1_600_000_000, events)

    def names(prefix: str, numbers: np.ndarray) -> pa.Array:
        return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")

    table = pa.table({"user": names("U", user), "item": names("B0", item), "time": seconds})
    style = {} if quoted else {"quoting_style": "none", "quoting_header": "none"}
    pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(**style))


def with_peso(path: Path, directory: Path, **further: str) -> list[int]:
    from peso.config import load_config
    from peso.events.ingest import ingest

    data = {"format": "csv", "path": str(path), "min_user": CORE, "min_item": CORE, **further}
    data["stages"] = {"fractions": list(SHARES)}
    manifest = ingest(load_config({"data": data}).data, directory)
    return [stage["events"] for stage in manifest["stages"]]


def with_spark(path: Path, directory: Path) -> list[int]:
    return with_peso(path, directory, engine="spark")


def with_pandas(path: Path, directory: Path) -> list[int]:
    """As one would write it: ids made numbers first, everything else on whole columns."""
    import numpy as np
    import pandas as pd

    log = pd.read_csv(path)
    log["user"], users = pd.factorize(log["user"])
    log["item"], items = pd.factorize(log["item"])
    log = log.drop_duplicates()
    while True:
        often = log["user"].map(log["user"].value_counts()) >= CORE
        often &= log["item"].map(log["item"].value_counts()) >= CORE
        if often.all():
            break
        log = log[often]
    log = log.sort_values("time", kind="stable")
    log["item"], kept = pd.factorize(log["item"])
    pd.DataFrame({"item_id": items[kept]}).to_parquet(directory / "items.parquet")
    ends = np.rint(np.cumsum(SHARES) * len(log)).astype(int)
    counts = []
    for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        current = log.iloc[begin:end].groupby("user")["item"].agg(list)
        before = log.iloc[:begin]
        previous = before[before["user"].isin(current.index)].groupby("user")["item"].agg(list)
        stage = pd.DataFrame({"previous": previous.reindex(current.index), "current": current})
        stage.index = users[stage.index]
        stage.to_parquet(directory / f"{number}.parquet")
        counts.append(end - begin)
    return [int(count) for count in counts]


WAYS = {"peso": with_peso, "before": with_peso, "spark": with_spark, "pandas": with_pandas}


def measure(way: str, path: Path, checkout: Path | None = None) -> dict[str, object]:
    """Run one way in a process of its own, with the package in ``checkout``."""
    command = [sys.executable, __file__, "--way", way, "--log", str(path)]
    environment = {**os.environ, **({"PYTHONPATH": str(checkout)} if checkout else {})}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(ways: list[str], path: Path, before: Path | None, repeats: int) -> dict[str, object]:
    """Measure ways in turn. The results are named after the way, with ratios of the others to ``peso``."""
    runs: dict[str, list[dict[str, object]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(measure(way, path, before if way == "before" else None))
    if len({json.dumps(run["files"]) for several in runs.values() for run in several}) > 1:
        raise SystemExit(f"the files of the stages differ: {runs}")
    best = {way: min(several, key=lambda run: run["cpu_seconds"]) for way, several in runs.items()}
    result = {}
    for way in ways[1:]:
        for name in ("seconds", "cpu_seconds", "peak_gib"):
            result[f"{way}_{name}"] = best[way][name]
            result[f"peso_beside_{way}_{name}"] = best["peso"][name]
            result[f"peso_to_{way}_{name}"] = round(best["peso"][name] / best[way][name], 2)
    return result


def _run_way(way: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        begin = time.perf_counter()
        counts = WAYS[way](path, Path(directory))
        seconds = time.perf_counter() - begin
        files = {
            str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(Path(directory).glob("stage=*/*.parquet"))
        }
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(sum(process.ru_utime + process.ru_stime for process in used), 2),
        "peak_gib": round(_peak(), 2),
        "stage_events": counts,
        "files": files,
    }
    print(json.dumps(result))


def _peak() -> float:
    """The peak resident size of this process, in GiB, with that of its largest child (Java)."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if sys.platform != "linux":
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + children) / 2**30
    # ru_maxrss of a process on Linux is at least that of its parent when it was started, which wrote the log
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return (own + children) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--spark", action="store_true")
    parser.add_argument("--before", type=Path, help="another checkout of peso")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--events", type=int, help="the number of events, instead of 20 million")
    parser.add_argument("--unquoted", action="store_true", help="write the log without quotes")
    parser.add_argument("--directory", type=Path, help="where the logs are written (about 1 GB)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        _run_way(arguments.way, arguments.log)
        return
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
    large = arguments.events or (EVENTS // 20 if arguments.quick else EVENTS)
    small = large // 10
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        logs = {events: Path(directory) / f"{events}.csv" for events in (small, large)}
        for events, path in logs.items():
            write_log(path, events, not arguments.unquoted)
        peso = {events: measure("peso", path) for events, path in logs.items()}
        pandas = measure("pandas", logs[large])
        others = ["before"] * (arguments.before is not None) + ["spark"] * arguments.spark
        others = (
            compare(["peso", *others], logs[large], arguments.before, arguments.repeats) if others else {}
        )
    if peso[large]["stage_events"] != pandas["stage_events"]:
        raise SystemExit(f"the two ways differ: {peso[large]} and {pandas}")
    result = {
        "events": large,
        "users": int(large * USERS_PER_EVENT),
        "items": int(large * ITEMS_PER_EVENT),
        "events_left": sum(pandas["stage_events"]),
        "peso_seconds": peso[large]["seconds"],
        "pandas_seconds": pandas["seconds"],
        "peso_cpu_seconds": peso[large]["cpu_seconds"],
        "pandas_cpu_seconds": pandas["cpu_seconds"],
        "pandas_ratio": round(pandas["seconds"] / peso[large]["seconds"], 2),
        "peso_peak_gib": peso[large]["peak_gib"],
        "pandas_peak_gib": pandas["peak_gib"],
        "peso_seconds_at_a_tenth": peso[small]["seconds"],
        "growth": round(peso[large]["seconds"] / peso[small]["seconds"], 2),
        "n_log_n_growth": round(large * math.log(large) / (small * math.log(small)), 2),
        **others,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:34}{value:>14,}")


if __name__ == "__main__":
    main()

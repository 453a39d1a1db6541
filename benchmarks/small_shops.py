"""Is the model that `backbone: auto` chooses for a small log worse than item-kNN?

    python benchmarks/small_shops.py DIR [--quick] [--json]

Two made-up shops of about 20,000 events, other than the demo's, in which the order of a history hardly
matters, so that counting who bought what is hard to beat: `taste` is the simulator with customers who mostly
choose from their favorite categories, `clusters` has 25 groups of 20 products, of which a customer likes two.
Each is run with `backbone: auto`, the strategy `single`, item-kNN, EASE, and the hybrid of model and
item-kNN. Prints NDCG@10, the mean of stages 1 to 4. A run that was stopped goes on where it was. `--quick`
trains a few steps on a tenth of the customers.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import peso
from peso.events.simulate import Behaviour, simulate
from peso.runs.baselines import BaselineRun

BASELINES = [
    {"name": "popularity", "last": 1},
    "item-knn",
    "ease",
    {"name": "hybrid", "partners": ["item-knn"]},
]
QUICK = {"training": {"epochs": 1, "max_steps": 5, "later": {"learning_rate": 1e-3}}}
Rows = Iterable[tuple[object, ...]]


def taste(users: int) -> tuple[Rows, Rows]:
    """Events (user, item, time) and products (item, title, category)."""
    behaviour = Behaviour(series=0.0, companion=0.05, favourite=0.75, trend=0.1, events_per_user=20)
    shop = simulate(users, 900, 4, 11, behaviour)
    events, items = shop.events.to_pydict().values(), shop.items.to_pydict()
    return zip(*events, strict=True), zip(items["item_id"], items["title"], items["category"], strict=True)


def clusters(users: int) -> tuple[Rows, Rows]:
    """As :func:`taste`. Titles are words at random, after one that names the group."""
    rng, groups, size = np.random.default_rng(13), 25, 20
    products = []
    for item in range(groups * size):
        words = [f"word{number}" for number in (item // size, *(100 + rng.integers(300, size=2)))]
        products.append((f"p{item}", " ".join(words), words[0]))
    share = 1 / np.arange(1, size + 1) ** 0.8
    share /= share.sum()
    events = []
    for user in range(users):
        liked, time = rng.choice(groups, 2, replace=False), 1_600_000_000 + rng.integers(300 * 86_400)
        had = set[int]()
        for _ in range(3 + rng.poisson(7)):
            group = liked[int(rng.random() < 0.35)] if rng.random() < 0.85 else rng.integers(groups)
            item = int(group * size + rng.choice(size, p=share))
            time += int(rng.exponential(6 * 86_400))
            if item not in had:
                had.add(item)
                events.append((f"u{user}", f"p{item}", int(time)))
    return sorted(events, key=lambda event: event[2]), products


def write(path: Path, header: tuple[str, ...], rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)
    return str(path.absolute())


def measure(root: Path, events: Rows, products: Rows, changes: dict[str, Any]) -> dict[str, float]:
    """NDCG@10 of the model and each baseline."""
    log = write(root / "log.csv", ("user", "item", "time"), events)
    table = write(root / "products.csv", ("item", "title", "category"), products)
    columns = {"item": "item", "title": "title", "category": "category"}
    config = {
        "data": {
            "format": "csv",
            "path": log,
            "columns": {"user": "user", "item": "item", "time": "time"},
            "items": {"path": table, "columns": columns},
            "stages": 5,
        },
        "items": {"encoder": "hashing", "quantizer": "rq-kmeans"},
        "backbone": "auto",
        "strategy": "single",
        "baselines": BASELINES,
        **changes,
    }
    workspace = peso.run(config, root / "w")
    later = range(1, workspace.stream.stages)
    tests = [workspace.stage(stage).metrics["test"]["metrics"] for stage in later]
    found = {"single": fmean(test["ndcg@10"]["value"] for test in tests)}
    for options in workspace.config.baselines:
        run = BaselineRun(workspace, options)
        found[run.label] = fmean(run.metrics(stage)["ndcg@10"]["value"] for stage in later)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="where the logs and workspaces are kept")
    parser.add_argument("--quick", action="store_true", help="a few steps: to see that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    results = {}
    for name, make, users in (("taste", taste, 1000), ("clusters", clusters, 2000)):
        shop = make(users // 10 if options.quick else users)
        results[name] = measure(options.directory / name, *shop, QUICK if options.quick else {})
        if not options.json:
            print(f"{name}: " + ", ".join(f"{who} {value:.4f}" for who, value in results[name].items()))
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

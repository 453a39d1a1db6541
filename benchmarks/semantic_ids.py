"""Semantic IDs of a real catalog: time, collisions and kept neighbors, compared with a released index.

    python benchmarks/semantic_ids.py [--quick] [--json]

The catalog is "Industrial and Scientific" as released with MiniOneRec (3,686 items; PESO_DATA names the
folder that contains `industrial`). Every index, including the released one, is measured with the same
vectors: hashed TF-IDF of title, brand and description. `seconds` is the time of `tokenize`, from text to
written index.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from peso.config import ItemsConfig
from peso.items import quality
from peso.items.semantic_ids import SemanticIds, read_release_index, read_semantic_ids
from peso.items.tokenize import tokenize
from peso.items.vectors import ItemEncoder
from peso.runtime.progress import Silent

DATA = Path(os.environ.get("PESO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
QUANTIZERS = ("rq-kmeans", "balanced-rq-kmeans", "rq-vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train RQ-VAE for only 50 steps")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    folder = DATA / "industrial"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there; set PESO_DATA to the folder that holds `industrial`")
    items = read_items(folder / "Industrial_and_Scientific.item.json")
    released = read_release_index(folder / "Industrial_and_Scientific.index.json")
    rows = np.arange(len(items))
    vectors = ItemEncoder.fit(items, rows, ItemsConfig(), 0, None, Silent())[1].vectors

    results = [{"index": "released", "seconds": None, **measure(vectors, released)}]
    # three levels as the released index has, four as is our default
    for levels in (3, 4):
        for name in QUANTIZERS:
            rq_vae = {"steps": 50} if arguments.quick else {}
            config = ItemsConfig.model_validate({"quantizer": name, "levels": levels, "rq_vae": rq_vae})
            with tempfile.TemporaryDirectory() as directory:
                started = time.perf_counter()
                tokenize(items, config, Path(directory), seed=0)
                seconds = time.perf_counter() - started
                ids = read_semantic_ids(directory)
            results.append({"index": f"{name}, {levels} levels", "seconds": seconds, **measure(vectors, ids)})
    print(json.dumps({"items": len(items), "results": results}) if arguments.json else table(results))


def read_items(path: Path) -> pa.Table:
    """The item table of the release; brands stand where categories would, for they are all empty."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    columns = {
        "item_id": list(entries),
        "title": [entry["title"] for entry in entries.values()],
        "text": [entry["description"] for entry in entries.values()],
        "category": [entry["brand"] for entry in entries.values()],
    }
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def measure(vectors: np.ndarray, ids: SemanticIds) -> dict[str, Any]:
    kept = quality.neighbors_kept(vectors, ids.codes)
    shared = quality.collisions(ids.codes)
    return {
        "shared_ids": shared["items"] - shared["distinct_ids"],
        "first": kept["first"],
        "first_two": kept["first_two"],
        "used": [level["used"] for level in quality.codebook_use(ids.codes, ids.sizes)],
        "perplexity": [round(level["perplexity"], 1) for level in quality.codebook_use(ids.codes, ids.sizes)],
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'index':30} {'seconds':>8} {'shared IDs':>10} {'first':>6} {'first two':>9}  codes used"]
    for row in results:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        lines.append(
            f"{row['index']:30} {seconds:>8} {row['shared_ids']:>10} {row['first']:>6.3f} "
            f"{row['first_two']:>9.3f}  {row['used']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

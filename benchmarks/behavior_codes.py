"""What `items.behavior` does to codes: neighbors under the same first code by weight, and where new items go.

    python benchmarks/behavior_codes.py [--quick] [--json]

The catalog and the sequences are "Industrial and Scientific" as released with MiniOneRec (PESO_DATA names the
folder that contains `industrial`), without the last two items of each user. The first table has the share of
each item's 10 nearest neighbors, in text or in behavior, that have the same first code. The second table
places items that were held out of the codebooks without their behavior, as new items are placed: with 0 for
behavior, or with a prediction from their text by ridge regression. It compares them with the codes that the
items would get if their behavior were known.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from semantic_ids import read_items
from sklearn.linear_model import RidgeCV

from peso.config import ItemsConfig
from peso.items.codebooks import ResidualCodebooks, fit_rq_kmeans
from peso.items.quality import neighbors_kept
from peso.items.vectors import ItemEncoder, ItemVectors
from peso.runtime.progress import Silent

DATA = Path(os.environ.get("PESO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
WEIGHTS = (0.01, 0.3, 0.5, 0.7, 0.9)
SIZES = [256] * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one weight and one seed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = DATA / "industrial"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there; set PESO_DATA to the folder that holds `industrial`")
    items = read_items(folder / "Industrial_and_Scientific.item.json")
    users = read_sequences(folder / "sequences.jsonl", items)
    kept = [neighbours(items, users, weight) for weight in (WEIGHTS[2:3] if arguments.quick else WEIGHTS)]
    placed = [row for seed in range(1 if arguments.quick else 3) for row in place(items, users, seed)]
    if arguments.json:
        print(json.dumps({"neighbors": kept, "placement": placed}))
        return
    for rows in (kept, placed):
        print("".join(f"{name:>18}" for name in rows[0]))
        for row in rows:
            print("".join(f"{v:18.3f}" if isinstance(v, float) else f"{v!s:>18}" for v in row.values()))


def read_sequences(path: Path, items: pa.Table) -> list[np.ndarray]:
    """The training events of each user, as item rows."""
    row_of = {item: row for row, item in enumerate(items["item_id"].to_pylist())}
    users = [json.loads(line)["items"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [np.array([row_of[str(item)] for item in user[:-2]], int) for user in users if len(user) > 2]


def encode(
    items: pa.Table, users: list[np.ndarray], weight: float, rows: np.ndarray
) -> tuple[ItemVectors, np.ndarray]:
    """The vectors of all items, and the part of their contents."""
    config = ItemsConfig.model_validate({"quantizer": "rq-kmeans", "behavior": {"weight": weight}})
    vectors = ItemEncoder.fit(items, rows, config, 0, None, Silent(), users)[1]
    return vectors, vectors.vectors[:, : -vectors.behavior_width]


def neighbours(items: pa.Table, users: list[np.ndarray], weight: float) -> dict[str, Any]:
    vectors, text = encode(items, users, weight, np.arange(len(items)))
    codes = fit_rq_kmeans(vectors.vectors, SIZES, 0, Silent()).codes
    has = np.asarray(vectors.has_behavior)
    return {
        "weight": weight,
        "text": neighbors_kept(text, codes)["first"],
        "behavior": neighbors_kept(vectors.behavior[has], codes[has])["first"],
    }


def place(items: pa.Table, users: list[np.ndarray], seed: int) -> list[dict[str, Any]]:
    """Hold 10 % of the items out of the codebooks, and place those of them that have behavior."""
    held = np.zeros(len(items), bool)
    held[np.random.default_rng(seed).choice(len(items), len(items) // 10, replace=False)] = True
    vectors, text = encode(items, users, 0.5, np.flatnonzero(~held))
    books = fit_rq_kmeans(vectors.vectors[~held], SIZES, seed, Silent()).codebooks
    has = np.asarray(vectors.has_behavior)
    behavior, new, known = vectors.behavior, held & has, ~held & has
    ridge = RidgeCV(np.logspace(-2, 4, 13), fit_intercept=False).fit(text[known], behavior[known])
    predicted = ridge.predict(text[new])
    left = 1 - np.square(behavior[new] - predicted).sum() / np.square(behavior[new]).sum()
    true = vectors.vectors[new]
    parts = {"known": behavior[new], "zero": np.zeros_like(predicted), "ridge": predicted}
    return [
        {"seed": seed, "behavior": name, "R2 of ridge": float(left)}
        | _compare(books, true, np.concatenate([text[new], part], axis=1).astype(np.float32))
        for name, part in parts.items()
    ]


def _compare(books: ResidualCodebooks, true: np.ndarray, placed: np.ndarray) -> dict[str, Any]:
    codes = books.nearest(placed)
    return {
        "items": len(true),
        "same first code": float((codes[:, 0] == books.nearest(true)[:, 0]).mean()),
        "error": float(np.square(true - books.reconstruct(codes)).sum(1).mean()),
    }


if __name__ == "__main__":
    main()

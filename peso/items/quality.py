"""How good an index is: are its IDs distinct, its codes used, and do its prefixes keep neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peso.items.codebooks import ResidualCodebooks
from peso.items.semantic_ids import SemanticIds, token_name

NEIGHBOURS = 10
MOST_QUERIES = 5_000  # items whose neighbours are looked up; more add digits, not knowledge
SAMPLE = 8  # titles shown under one prefix


def collisions(codes: np.ndarray) -> dict[str, Any]:
    """Items that share an ID: ``rate`` = 1 − distinct IDs / items (0 for an empty catalogue).

    >>> collisions(np.array([[0, 1], [0, 1], [2, 0], [2, 1]]))
    {'items': 4, 'distinct_ids': 3, 'items_sharing': 2, 'rate': 0.25}
    """
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    rate = 1 - len(counts) / len(codes) if len(codes) else 0.0
    return {
        "items": len(codes),
        "distinct_ids": len(counts),
        "items_sharing": int(counts[counts > 1].sum()),
        "rate": float(rate),
    }


def of_codes(ids: SemanticIds, titles: Sequence[str | None]) -> dict[str, Any]:
    """What the codes alone tell, no vector needed."""
    return {
        "collisions": collisions(ids.codes),
        "levels": codebook_use(ids.codes, ids.sizes),
        "sample": prefix_sample(ids, titles),
    }


def codebook_use(codes: np.ndarray, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Per level: codes, how many are used, and their perplexity exp(−Σ p log p), p the shares of the items.

    Perplexity is the number of equally used codes that would be as diverse.

    >>> codebook_use(np.array([[0], [1]]), [4])
    [{'codes': 4, 'used': 2, 'perplexity': 2.0}]
    """
    levels = []
    for column, size in zip(codes.T, sizes, strict=True):
        counts = np.bincount(column, minlength=size)
        shares = counts[counts > 0] / max(len(column), 1)
        levels.append(
            {
                "codes": int(size),
                "used": int((counts > 0).sum()),
                "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
            }
        )
    return levels


def neighbours_kept(vectors: np.ndarray, codes: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Share of each item's 10 nearest others in vector space that share its first code, its first two.

    Exact Euclidean neighbours; for large catalogues of a seeded sample of items. Fine codes share less than
    coarse ones: read it beside the codebook use, or against an index of the same sizes.

    Args:
        vectors: float32 (items, width).
        codes: int (items, levels), of the same items.

    Returns:
        ``items`` measured, ``neighbours`` of each, ``first`` and ``first_two`` (absent with one level;
        both absent with fewer than two items).
    """
    import faiss

    neighbours = min(NEIGHBOURS, len(vectors) - 1)
    if neighbours < 1:
        return {"items": 0, "neighbours": 0}
    queries = np.arange(len(vectors))
    if len(queries) > MOST_QUERIES:
        queries = np.sort(np.random.default_rng(seed).choice(len(queries), MOST_QUERIES, replace=False))
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, np.float32))
    found = index.search(np.ascontiguousarray(vectors[queries], np.float32), neighbours + 1)[1]
    # the item itself goes, wherever it came among equally near ones; else the farthest
    own = found == queries[:, None]
    own[~own.any(1), -1] = True
    found = found[~own].reshape(len(queries), neighbours)
    result: dict[str, Any] = {"items": len(queries), "neighbours": neighbours}
    same = np.ones(found.shape, bool)
    for name, column in zip(("first", "first_two"), codes.T, strict=False):
        same &= column[found] == column[queries][:, None]
        result[name] = float(same.mean())
    return result


def prefix_sample(ids: SemanticIds, titles: Sequence[str | None]) -> dict[str, Any]:
    """Items under the first two codes that most items share, with their titles.

    Items without a title tell nothing: they count only where no item has one.
    """
    if not ids.item_ids:
        return {"prefix": [], "items": []}
    depth = min(2, ids.levels - 1)  # a whole ID is no prefix
    prefixes, group, counts = np.unique(ids.codes[:, :depth], axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    telling = np.array([title is not None for title in titles])
    telling |= not telling.any()
    largest = int(np.bincount(group[telling]).argmax())
    rows = np.flatnonzero((group == largest) & telling)[:SAMPLE]
    return {
        "prefix": [token_name(level, int(code)) for level, code in enumerate(prefixes[largest])],
        "under_it": int(counts[largest]),
        "items": [{"item": ids.item_ids[row], "title": titles[row]} for row in rows],
    }


def figures(manifest: Mapping[str, Any]) -> list[tuple[str, int | float]]:
    """The index as a whole in figures with their names, from the manifest of the semantic IDs.

    What was not measured is left out: an index that came with the data came without vectors.
    """
    measured = manifest.get("quality", {})
    near = measured.get("neighbours", {})
    shared = f"share of the {near.get('neighbours', 0)} nearest items under the same"
    named = (
        ("items", manifest["items"]),
        ("distinct semantic IDs", manifest["distinct_ids"]),
        ("tokens in use", manifest["tokens_in_use"]),
        ("items without a vector", measured.get("without_vector")),
        ("collision rate before items were separated", measured.get("collisions_before", {}).get("rate")),
        ("collision rate", measured.get("collisions", {}).get("rate")),
        ("reconstruction error", measured.get("reconstruction_error")),
        (f"{shared} first code", near.get("first")),
        (f"{shared} first two codes", near.get("first_two")),
    )
    return [(name, value) for name, value in named if value is not None]


def sample_title(sample: Mapping[str, Any]) -> str:
    """What a sample of :func:`prefix_sample` shows: ``12 items under <a_3><b_7>, the first 8 of them``."""
    shown = len(sample["items"])
    more = f", the first {shown} of them" if sample["under_it"] > shown else ""
    return f"{sample['under_it']:,} items under {''.join(sample['prefix']) or 'no prefix'}{more}"


HELD_OUT = 0.05  # share of the items of stage 0 that nothing is fitted to
FEWEST = 20  # fewer items tell nothing: no part is held out, no warning is given
WORSE = 1.25  # times the error of the held-out items
CHANCE = 0.01  # how often a warning of collisions may come from a handful of items by luck
MORE_COLLISIONS = 0.1  # more of the items than of the held-out ones want an ID that is taken

REFIT = "refit the codebooks: ingest and tokenize everything into a new workspace"


def held_out(items: int, seed: int) -> np.ndarray:
    """bool (items,): which are left out of the fit. None of a catalogue too small to spare them."""
    count = int(HELD_OUT * items)
    chosen = np.zeros(items, bool)
    if count >= FEWEST:
        chosen[np.random.default_rng(seed).choice(items, count, replace=False)] = True
    return chosen


def quantisation_error(
    codebooks: ResidualCodebooks, vectors: np.ndarray, codes: np.ndarray, known: np.ndarray
) -> float | None:
    """Mean ‖x − x̂‖² over the items with a known vector; about 1 for codes that say nothing.

    Vectors have mean square length 1 over the fitted items (:mod:`peso.items.vectors`).
    """
    if not known.any():
        return None
    difference = vectors[known] - codebooks.reconstruct(codes[known])
    return float(np.square(difference).sum(1, dtype=np.float64).mean())


def already_wanted(wanted: np.ndarray, taken: np.ndarray) -> int:
    """How many of the items want an ID that an item before them has or wants."""
    if not len(wanted):
        return 0
    before = len(np.unique(taken, axis=0))
    return len(wanted) - (len(np.unique(np.concatenate([taken, wanted]), axis=0)) - before)


def refit_warnings(fitness: Mapping[str, Any]) -> list[str]:
    """A sentence for every stage whose items the codebooks fit too badly; none: no refit is due.

    Args:
        fitness: the entry of that name in the manifest of the semantic IDs.
    """
    found = []
    expected = fitness.get("held_out")
    for stage in fitness.get("stages", []):
        if expected is None or stage["items"] < FEWEST:
            continue
        error, usual = stage["error"], expected["error"]
        if error is not None and usual is not None and error > WORSE * usual:
            found.append(
                f"stage {stage['stage']}: the codes write its {stage['items']:,} new items with an error of "
                f"{error:.3f}, items of stage 0 that were held out with {usual:.3f}; {REFIT}"
            )
        share, usual = stage["wanted_taken"] / stage["items"], expected["wanted_taken"] / expected["items"]
        if share > usual + MORE_COLLISIONS and _more_often(stage, expected):
            found.append(
                f"stage {stage['stage']}: {share:.0%} of its {stage['items']:,} new items want an ID that is "
                f"taken ({usual:.0%} of the items held out of stage 0 do); {REFIT}"
            )
    return found


def _more_often(stage: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a stage's items want taken IDs more often than chance explains (Fisher's exact test)."""
    from scipy.stats import fisher_exact  # slow to load

    table = [[group["wanted_taken"], group["items"] - group["wanted_taken"]] for group in (stage, expected)]
    return bool(fisher_exact(table, alternative="greater").pvalue < CHANCE)


def fitness_rows(fitness: Mapping[str, Any]) -> list[tuple[str, int, float | None, int, int | None]]:
    """The entry of that name in the manifest, a row for each group of items: its name, how many, their error,
    how many want an ID that is taken, how many share one. None at all where nothing was fitted."""
    groups = [("fitted", fitness.get("fit")), ("held out of stage 0", fitness.get("held_out"))]
    groups += [(f"new in stage {stage['stage']}", stage) for stage in fitness.get("stages", [])]
    return [
        (name, group["items"], group["error"], group["wanted_taken"], group.get("sharing"))
        for name, group in groups
        if group is not None
    ]

"""The quality of an index: whether its IDs are distinct, its codes are used, and its prefixes preserve
neighbors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peso.items.codebooks import ResidualCodebooks
from peso.items.semantic_ids import SemanticIds, token_name

if TYPE_CHECKING:  # its encoders are slow to load
    from peso.items.vectors import ItemVectors

NEIGHBORS = 10
MOST_QUERIES = 5_000  # items whose neighbors are searched; more would hardly change the result
SAMPLE = 8  # titles to show for one prefix


def collisions(codes: np.ndarray) -> dict[str, Any]:
    """Items that share an ID: ``rate`` = 1 − distinct IDs / items (0 for an empty catalog).

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
    """The measures that need only the codes, not the vectors."""
    return {
        "collisions": collisions(ids.codes),
        "levels": codebook_use(ids.codes, ids.sizes),
        "sample": prefix_sample(ids, titles),
    }


def codebook_use(codes: np.ndarray, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """For each level, the number of codes, how many are used, and the perplexity exp(−Σ p log p), where p is
    the share of items with each code.

    Perplexity is the number of equally frequent codes that would be as diverse.

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


def neighbors_kept(vectors: np.ndarray, codes: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The share of each item's 10 nearest neighbors that have the same first code, and the same first two
    codes.

    Neighbors are exact Euclidean neighbors in vector space; large catalogs are sampled. Indices with fewer
    codes have higher shares, so compare the result with the codebook use or with an index of the same size.

    Args:
        vectors: float32 (items, width), the vectors of the items.
        codes: int (items, levels), the codes of the same items.
        seed: the seed of the sample.

    Returns:
        ``items`` (the number measured), ``neighbours`` (the number for each item), ``first`` and
        ``first_two`` (missing if there is one level; both are missing if there are fewer than two items).
    """
    import faiss

    neighbours = min(NEIGHBORS, len(vectors) - 1)
    if neighbours < 1:
        return {"items": 0, "neighbours": 0}
    queries = np.arange(len(vectors))
    if len(queries) > MOST_QUERIES:
        queries = np.sort(np.random.default_rng(seed).choice(len(queries), MOST_QUERIES, replace=False))
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, np.float32))
    found = index.search(np.ascontiguousarray(vectors[queries], np.float32), neighbours + 1)[1]
    # remove the item itself, at whatever position it is; if it is not found, remove the farthest neighbor
    own = found == queries[:, None]
    own[~own.any(1), -1] = True
    found = found[~own].reshape(len(queries), neighbours)
    result: dict[str, Any] = {"items": len(queries), "neighbours": neighbours}
    same = np.ones(found.shape, bool)
    for name, column in zip(("first", "first_two"), codes.T, strict=False):
        same &= column[found] == column[queries][:, None]
        result[name] = float(same.mean())
    return result


def of_behavior(vectors: ItemVectors, codes: np.ndarray, seed: int) -> dict[str, Any]:
    """The measures of ``items.behavior``: how many items have no vector of behavior, and
    :func:`neighbors_kept` with the other items' vectors of behavior alone. Empty if behavior is not used."""
    has = vectors.has_behavior
    if has is None:
        return {}
    kept = neighbors_kept(vectors.behavior[has], codes[has], seed)
    return {"without_behavior": int((~has).sum()), "behavior_neighbours": kept}


def prefix_sample(ids: SemanticIds, titles: Sequence[str | None]) -> dict[str, Any]:
    """Items with the most common first two codes, and their titles.

    Items without a title are ignored, unless no item has one.
    """
    if not ids.item_ids:
        return {"prefix": [], "items": []}
    depth = min(2, ids.levels - 1)  # a complete ID is not a prefix
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
    """The names and values of the measures of a whole index, from the manifest of the semantic IDs.

    Measures that are not available are left out, such as those that need vectors for an imported index.
    """
    measured = manifest.get("quality", {})
    near = measured.get("neighbours", {})
    behaved = measured.get("behavior_neighbours", {})
    shared = f"share of the {near.get('neighbours', 0)} nearest items under the same"
    together = f"share of the {behaved.get('neighbours', 0)} items nearest in behavior under the same"
    named = (
        ("items", manifest["items"]),
        ("distinct semantic IDs", manifest["distinct_ids"]),
        ("tokens in use", manifest["tokens_in_use"]),
        ("items without a vector", measured.get("without_vector")),
        ("items without a vector of behavior", measured.get("without_behavior")),
        ("collision rate before items were separated", measured.get("collisions_before", {}).get("rate")),
        ("collision rate", measured.get("collisions", {}).get("rate")),
        ("reconstruction error", measured.get("reconstruction_error")),
        (f"{shared} first code", near.get("first")),
        (f"{shared} first two codes", near.get("first_two")),
        (f"{together} first code", behaved.get("first")),
        (f"{together} first two codes", behaved.get("first_two")),
    )
    return [(name, value) for name, value in named if value is not None]


def sample_title(sample: Mapping[str, Any]) -> str:
    """The title of a sample of :func:`prefix_sample`: ``12 items under <a_3><b_7>, the first 8 of them``."""
    shown = len(sample["items"])
    more = f", the first {shown} of them" if sample["under_it"] > shown else ""
    return f"{sample['under_it']:,} items under {''.join(sample['prefix']) or 'no prefix'}{more}"


HELD_OUT = 0.05  # the share of the items of stage 0 that is held out of the fit
FEWEST = 20  # with fewer items nothing is held out and no warning is given
WORSE = 1.25  # warn if the error exceeds that of the held-out items by this factor
CHANCE = 0.01  # the largest probability that a warning about collisions is due to chance
MORE_COLLISIONS = 0.1  # warn if the share of items whose nearest ID is taken is higher by more than this

REFIT = "refit the codebooks: ingest and tokenize everything into a new workspace"


def held_out(items: int, seed: int) -> np.ndarray:
    """bool (items,): which items are held out of the fit. If the catalog is too small, no item is."""
    count = int(HELD_OUT * items)
    chosen = np.zeros(items, bool)
    if count >= FEWEST:
        chosen[np.random.default_rng(seed).choice(items, count, replace=False)] = True
    return chosen


def quantization_error(
    codebooks: ResidualCodebooks, vectors: np.ndarray, codes: np.ndarray, known: np.ndarray
) -> float | None:
    """The mean of ‖x − x̂‖² over the items with a known vector; None if there are none.

    Vectors have a mean squared length of 1 over the fitted items (:mod:`peso.items.vectors`), so the error is
    about 1 if the codes do not help.
    """
    if not known.any():
        return None
    difference = vectors[known] - codebooks.reconstruct(codes[known])
    return float(np.square(difference).sum(1, dtype=np.float64).mean())


def already_wanted(wanted: np.ndarray, taken: np.ndarray) -> int:
    """How many items want an ID that an earlier item, or one before them in ``wanted``, has or wants.

    Args:
        wanted: int (n, levels), the IDs that the items want.
        taken: int (m, levels), the IDs of earlier items.
    """
    if not len(wanted):
        return 0
    before = len(np.unique(taken, axis=0))
    return len(wanted) - (len(np.unique(np.concatenate([taken, wanted]), axis=0)) - before)


def refit_warnings(fitness: Mapping[str, Any]) -> list[str]:
    """A sentence for every stage whose items the codebooks do not fit well. If there is none, the codebooks
    need not be fitted again.

    Args:
        fitness: the entry ``fitness`` in the manifest of the semantic IDs.
    """
    found = []
    expected = fitness.get("held_out")
    for stage in fitness.get("stages", []):
        if expected is None or stage["items"] < FEWEST:
            continue
        error, usual = stage["error"], expected["error"]
        if error is not None and usual is not None and error > WORSE * usual:
            found.append(
                f"stage {stage['stage']}: the error of the codes is {error:.3f} for its "
                f"{stage['items']:,} new items, but {usual:.3f} for items held out of stage 0; {REFIT}"
            )
        share, usual = stage["wanted_taken"] / stage["items"], expected["wanted_taken"] / expected["items"]
        if share > usual + MORE_COLLISIONS and _more_often(stage, expected):
            found.append(
                f"stage {stage['stage']}: the nearest ID is already taken for {share:.0%} of its "
                f"{stage['items']:,} new items, but only for {usual:.0%} of the items held out of stage 0; "
                f"{REFIT}"
            )
    return found


def _more_often(stage: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether the nearest IDs of a stage's items are taken more often than chance explains (Fisher's exact
    test)."""
    from scipy.stats import fisher_exact  # slow to load

    table = [[group["wanted_taken"], group["items"] - group["wanted_taken"]] for group in (stage, expected)]
    return bool(fisher_exact(table, alternative="greater").pvalue < CHANCE)


def fitness_rows(fitness: Mapping[str, Any]) -> list[tuple[str, int, float | None, int, int | None]]:
    """The rows of a table of the entry ``fitness`` in the manifest, one for each group of items.

    A row has the name of the group, the number of items, their error, how many want an ID that is taken, and
    how many share an ID. There are no rows if nothing was fitted.
    """
    groups = [("fitted", fitness.get("fit")), ("held out of stage 0", fitness.get("held_out"))]
    groups += [(f"new in stage {stage['stage']}", stage) for stage in fitness.get("stages", [])]
    return [
        (name, group["items"], group["error"], group["wanted_taken"], group.get("sharing"))
        for name, group in groups
        if group is not None
    ]

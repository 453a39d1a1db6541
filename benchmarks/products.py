"""What a second network is worth: products of models and SASRecs of several seeds.

    python benchmarks/products.py W W [W …] [--test] [--quick] [--json]

Each W is a workspace of the same stream with a trained model that has an item head and counts of
transitions, and with a trained SASRec (`peso baseline sasrec -w W`); the workspaces differ in the seed. On
the cases of all later stages, semantic IDs are ranked by the probabilities of each model and each SASRec, and
by the product of every two of them, p · q: two models, two SASRecs, or one of each. Nothing is tuned. The
printed figures are NDCG@10, without the items that users have had: the mean over all members or pairs of a
kind, the lowest and the highest. `--test` uses test cases instead of validation cases; `--quick` 64 cases of
each stage.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations, product
from pathlib import Path

import numpy as np
from pool_forms import figures, model_probabilities, sasrec_of, sasrec_probabilities, seen_ids

from peso.runs.workspace import Workspace


def measure(workspaces: list[Workspace], most: int, test: bool) -> dict[str, dict[str, float]]:
    """NDCG@10 over the later stages of each kind of answer: the mean, the lowest and the highest."""
    first = workspaces[0]
    trie, runs = first.semantic_ids.trie, [sasrec_of(each) for each in workspaces]
    found: dict[str, dict[tuple[int, ...], list[np.ndarray]]] = {}
    for number in range(1, first.stream.stages):
        stage, window = first.stream.stage(number), first.config.prompt.window
        cases = (stage.test_cases if test else stage.validation_cases)(window).spread(most)
        targets, seen = trie.leaf_of[cases.targets], seen_ids(cases, trie.leaf_of, trie.leaves)
        models = [model_probabilities(each.stage(number), cases) for each in workspaces]
        networks = [sasrec_probabilities(run, number, cases) for run in runs]
        for kind, members in (("model", models), ("SASRec", networks)):
            of_one, of_two = found.setdefault(kind, {}), found.setdefault(f"{kind} · {kind}", {})
            for place, one in enumerate(members):
                of_one.setdefault((place,), []).append(figures(one, targets, seen)["ndcg"])
            for (a, one), (b, other) in combinations(enumerate(members), 2):
                of_two.setdefault((a, b), []).append(figures(one * other, targets, seen)["ndcg"])
        of_both = found.setdefault("model · SASRec", {})
        for (a, one), (b, other) in product(enumerate(models), enumerate(networks)):
            of_both.setdefault((a, b), []).append(figures(one * other, targets, seen)["ndcg"])
    result = {}
    for kind, members_or_pairs in found.items():
        means = [float(np.concatenate(stages).mean()) for stages in members_or_pairs.values()]
        result[kind] = {"mean": float(np.mean(means)), "lowest": min(means), "highest": max(means)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspaces", type=Path, nargs="+", help="workspaces with a model and a SASRec")
    parser.add_argument("--test", action="store_true", help="on test cases")
    parser.add_argument("--quick", action="store_true", help="64 cases of each stage: to see that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if len(options.workspaces) < 2:
        parser.error("give two workspaces at least")
    workspaces = [Workspace.open(path) for path in options.workspaces]
    if len({each.stream.fingerprint(each.stream.stages - 1) for each in workspaces}) > 1:
        parser.error("the workspaces have different streams")
    result = measure(workspaces, 64 if options.quick else 1_000_000, options.test)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for kind, row in result.items():
        print(f"{kind}: NDCG@10 {row['mean']:.4f} ({row['lowest']:.4f} to {row['highest']:.4f})")


if __name__ == "__main__":
    main()

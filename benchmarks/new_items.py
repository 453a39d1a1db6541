"""Which parts of an answer need the correction for new items (`head.arrivals`), on validation cases.

    python benchmarks/new_items.py W [W …] [--quick] [--json]

Each W is a workspace with a trained model that has an item head with `arrivals` and counts of transitions,
usually one for each seed. The correction of every later stage is taken out of its model, and chosen again in
four ways: none; of the item head alone, by its likelihood; of head and counts, by their common likelihood
(what `head.arrivals` does); of both, by the likelihood of the head. One half of the validation cases chooses,
and the other half judges, both ways. The printed figures are means over all cases and workspaces: NDCG@10 of
all cases, of those with an item that the stage brings, and of the others; the log-probability of the targets;
and the difference of NDCG@10 from no correction with half of its 95 % interval over cases. `--quick` uses 64
cases of each stage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pool_forms import figures, of_codes, of_items
from scipy.optimize import minimize_scalar

from peso.decoding.pool import Evidence
from peso.model.transitions import PRIOR
from peso.runs.stage import RunStage
from peso.runs.validation import validation_cases
from peso.runs.workspace import Workspace

FORMS = ("nothing", "item head", "item head and counts", "item head and counts, the addition of the head")
LARGEST = 5.0


def addition(
    items: np.ndarray, counts: np.ndarray, new: np.ndarray, targets: np.ndarray, counted: bool
) -> float:
    """The addition that maximizes the likelihood of these targets, with a standard normal prior.

    Args:
        items, counts: (cases, leaves), the head's probabilities and the evidence, both uncorrected.
        new: bool (leaves,), whether the stage brings an ID.
        targets: (cases,), the leaf of each target.
        counted: the likelihood is that of head and counts together; otherwise, that of the head alone.
    """
    rows, prior = np.arange(len(targets)), PRIOR if counted else 1.0
    evidence = counts if counted else np.zeros_like(counts)

    def loss(value: float) -> float:
        likelihood = np.log(mixed(*corrected(items, evidence, new, value, value), prior)[rows, targets])
        return float(value**2 / 2 - likelihood.sum())

    return float(minimize_scalar(loss, bounds=(-LARGEST, LARGEST), method="bounded").x)


def corrected(
    items: np.ndarray, counts: np.ndarray, new: np.ndarray, of_head: float, of_counts: float
) -> tuple[np.ndarray, np.ndarray]:
    """The head's probabilities and the evidence with these additions for new IDs: (cases, leaves) each."""
    raised = items * np.exp(of_head * new)
    return raised / raised.sum(1, keepdims=True), counts * np.exp(of_counts * new)


def mixed(mean: np.ndarray, counts: np.ndarray, prior: float) -> np.ndarray:
    """Probabilities with the counts as evidence: (cases, leaves)."""
    mixture: np.ndarray = (counts + prior * mean) / (counts.sum(1, keepdims=True) + prior)
    return mixture


def of_stage(
    stage: RunStage, most: int, keep: Callable[[str, dict[str, np.ndarray]], None]
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Judge all forms on the cases of a stage; ``keep`` gets the figures of each form, a half at a time.

    Returns:
        bool (cases,), whether the stage brings the target, in the same order; and the additions of each half.
    """
    model, cases = stage.answering_model(), validation_cases(stage, most)
    head, trie = model.vocabulary.item_head, model.semantic_ids.trie
    if head is None or not head.arrivals or model.transitions is None:
        raise SystemExit(f"{stage.workspace.root}: the model has no item head with arrivals and transitions")
    arrived = head.arrival_bias.cpu().numpy() != 0
    applied = stage.metrics["training"]["item_head"]["arrivals"].get("addition", 0.0)
    new = np.zeros(trie.leaves, dtype=bool)
    new[trie.leaf_of[np.flatnonzero(arrived)]] = True
    evidence = Evidence.of(model.transitions, trie, cases.histories, torch.device("cpu"))
    items, counts = corrected(
        of_items(model, cases), evidence.counts.double().numpy(), new, -applied, -applied
    )
    codes = of_codes(stage, model, cases)
    lengths = torch.tensor([len(history) for history in cases.histories])
    share = head.share_of(lengths).double().unsqueeze(1).numpy()
    targets = trie.leaf_of[cases.targets]
    seen = np.zeros(items.shape, dtype=bool)
    for row, having in zip(seen, cases.seen, strict=True):
        row[trie.leaf_of[having]] = True
    seen[np.arange(len(cases)), targets] = False
    halves, order, found = [np.arange(start, len(cases), 2) for start in (0, 1)], [], []
    for chooses, judges in (halves, halves[::-1]):
        parts = items[chooses], counts[chooses], new, targets[chooses]
        both, alone = addition(*parts, counted=True), addition(*parts, counted=False)
        found.append({"head": alone, "both": both})
        order.append(judges)
        pairs = (0.0, 0.0), (alone, 0.0), (both, both), (alone, alone)
        for form, (of_head, of_counts) in zip(FORMS, pairs, strict=True):
            head_now, counts_now = corrected(items[judges], counts[judges], new, of_head, of_counts)
            mean = share[judges] * head_now + (1 - share[judges]) * codes[judges]
            answer = mixed(mean, counts_now, model.transitions.prior)
            keep(form, figures(answer, targets[judges], seen[judges]))
    return new[targets[np.concatenate(order)]], found


def measure(workspaces: list[Workspace], most: int) -> dict[str, Any]:
    """The figures of each form, and the range of the additions."""
    gathered: dict[str, list[dict[str, np.ndarray]]] = {form: [] for form in FORMS}
    new, additions = [], []
    for workspace in workspaces:
        for number in range(1, workspace.stream.stages):
            brought, found = of_stage(
                workspace.stage(number), most, lambda form, row: gathered[form].append(row)
            )
            new.append(brought)
            additions += found
    brought = np.concatenate(new)
    whole = {
        form: {key: np.concatenate([row[key] for row in rows]) for key in ("ndcg", "log")}
        for form, rows in gathered.items()
    }
    result: dict[str, Any] = {"cases": len(brought), "new": int(brought.sum()), "forms": {}}
    for name in ("head", "both"):
        values = [found[name] for found in additions]
        result[f"addition_{name}"] = [min(values), max(values)]
    for form, row in whole.items():
        difference = row["ndcg"] - whole[FORMS[0]]["ndcg"]
        result["forms"][form] = {
            "ndcg@10": row["ndcg"].mean(),
            "new": row["ndcg"][brought].mean(),
            "known": row["ndcg"][~brought].mean(),
            "log_probability": row["log"].mean(),
            "difference": difference.mean(),
            "half_interval": 1.96 * difference.std(ddof=1) / len(difference) ** 0.5,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspaces", type=Path, nargs="+", help="workspaces with a trained model")
    parser.add_argument("--quick", action="store_true", help="64 cases of each stage: to see that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    opened = [Workspace.open(root) for root in options.workspaces]
    result = measure(opened, 64 if options.quick else 1_000_000)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['cases']} cases, {result['new']} with an item that the stage brings")
    for name in ("head", "both"):
        low, high = result[f"addition_{name}"]
        print(f"additions by the likelihood of {name}: {low:.2f} to {high:.2f}")
    for form, row in result["forms"].items():
        print(
            f"{form}: NDCG@10 {row['ndcg@10']:.4f} ({row['difference']:+.4f} ± {row['half_interval']:.4f}), "
            f"new items {row['new']:.4f}, known {row['known']:.4f}, "
            f"log-probability {row['log_probability']:.3f}"
        )


if __name__ == "__main__":
    main()

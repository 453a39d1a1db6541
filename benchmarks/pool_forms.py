"""What bounds a model with an item head: its parts, and other ways to combine them.

    python benchmarks/pool_forms.py W [--with B] [--quick] [--json]

W is a workspace with a trained model that has an item head and counts of transitions. B is a workspace with
a SASRec that was trained on the same stream (`peso baseline sasrec`), W itself by default. On the
validation cases of all later stages, each part and each form of combination ranks all semantic IDs. The
printed figures are NDCG@10 of all cases, of those with an item that the stage brings, and of the others; the
mean log-probability of the targets; and the probability that goes to items that the user has had, which are
left out of the lists. p_codes is that of the model's candidates, and zero elsewhere. Nothing is tuned here:
the parameter of each form is in its name. For several seeds, call it once for each. `--quick` uses 64 cases
of each stage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peso.baselines.baseline import BaselineAnswers
from peso.config.baselines import read_baseline
from peso.decoding.pool import Candidates, Evidence, leaf_log_probabilities
from peso.decoding.prompt import Prompt, run_prompts
from peso.evaluation.metrics import ndcg
from peso.events.histories import Cases
from peso.model.generative import GenerativeModel
from peso.runs.baselines import BaselineRun
from peso.runs.stage import RunStage
from peso.runs.validation import search_validation, validation_cases
from peso.runs.workspace import Workspace
from peso.runtime.progress import Silent

DEPTH = 10
PRIORS = (30.0, 100.0, 300.0)
BATCH = 64


@torch.no_grad()
def of_items(model: GenerativeModel, cases: Cases) -> np.ndarray:
    """p_items of all semantic IDs: float64 (cases, leaves)."""
    result = np.zeros((len(cases), model.semantic_ids.trie.leaves))
    longest_first = np.argsort([-len(history) for history in cases.histories], kind="stable")
    for start in range(0, len(cases), BATCH):
        rows = longest_first[start : start + BATCH]
        last = run_prompts(model, [Prompt.cold(model, cases.histories[row]) for row in rows], 0).last
        result[rows] = leaf_log_probabilities(model, last).double().exp().cpu().numpy()
    return result


def of_codes(stage: RunStage, model: GenerativeModel, cases: Cases) -> np.ndarray:
    """p_codes of the candidates and the targets, zero elsewhere: float64 (cases, leaves)."""
    result = np.zeros((len(cases), model.semantic_ids.trie.leaves))

    def keep(users: np.ndarray, found: Candidates, target: Candidates | None) -> None:
        for some in (found, target):
            assert some is not None
            leaves, codes = some.leaves.cpu().numpy(), some.codes.double().exp().cpu().numpy()
            for user, places, values in zip(users, leaves, codes, strict=True):
                result[user, places[places >= 0]] = values[places >= 0]

    search_validation(stage, model, cases, "candidates", Silent(), keep)
    return result


def counted(mean: np.ndarray, evidence: Evidence, prior: float) -> np.ndarray:
    """The posterior of the counts, with the probabilities ``mean`` as prior: float64 (cases, leaves)."""
    return (evidence.counts.double().numpy() + prior * mean) / (evidence.totals.double().numpy() + prior)


def share_of(model: GenerativeModel, cases: Cases) -> np.ndarray:
    """The tuned share of the item head: float64 (cases, 1)."""
    assert model.vocabulary.item_head is not None
    lengths = torch.tensor([len(history) for history in cases.histories])
    return model.vocabulary.item_head.share_of(lengths).double().unsqueeze(1).numpy()


def seen_ids(cases: Cases, leaf_of: np.ndarray, leaves: int) -> np.ndarray:
    """The IDs that are left out of each list, those of items that the user has had but for the target's:
    bool (cases, leaves).

    Args:
        leaf_of: (items,), the leaf of each item.
    """
    seen = np.zeros((len(cases), leaves), dtype=bool)
    for row, items in zip(seen, cases.seen, strict=True):
        row[leaf_of[items]] = True
    seen[np.arange(len(cases)), leaf_of[cases.targets]] = False
    return seen


def forms(
    items: np.ndarray, codes: np.ndarray, share: np.ndarray, evidence: Evidence, sasrec: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Each part and each form of combination: its name and the probabilities, float64 (cases, leaves).

    Args:
        items, codes, sasrec: (cases, leaves), the probabilities of the parts.
        share: (cases, 1), the tuned share of the item head.
        evidence: the counts of all leaves, with the tuned prior.
    """
    both = share * items + (1 - share) * codes
    yield "codes", codes
    yield "item head", items
    yield "codes and item head", both
    yield "counts", counted(np.full_like(items, 1 / items.shape[1]), evidence, 1.0)
    yield "model: codes, item head, counts", counted(both, evidence, evidence.prior)
    yield "SASRec", sasrec
    for prior in PRIORS:
        yield f"SASRec and counts, prior {prior:.0f}", counted(sasrec, evidence, prior)
    mean = (both + sasrec) / 2
    yield "mean of SASRec, codes and head", mean
    for prior in PRIORS:
        yield f"mean of SASRec, codes and head, and counts, prior {prior:.0f}", counted(mean, evidence, prior)
    model = counted(both, evidence, evidence.prior)
    for weight in (0.25, 0.5):
        product = model ** (1 - weight) * sasrec**weight
        name = f"model to the power {1 - weight:g}, SASRec to the power {weight:g}"
        yield name, product / product.sum(1, keepdims=True)
    smooth = counted(both, evidence, PRIORS[0])
    for weight in (0.5, 0.7):
        product = smooth**weight * both ** (1 - weight)
        name = f"counts (prior 30) to the power {weight:g}, codes and head to the power {1 - weight:g}"
        yield name, product / product.sum(1, keepdims=True)


def figures(probabilities: np.ndarray, targets: np.ndarray, seen: np.ndarray) -> dict[str, np.ndarray]:
    """NDCG@10 of each case if seen IDs are left out, the target's log-probability, and the probability of
    seen IDs: float64 (cases,) each.

    Args:
        targets: (cases,), the leaf of each target.
        seen: bool (cases, leaves).
    """
    rows = np.arange(len(targets))
    own = probabilities[rows, targets]
    left = np.where(seen, -1.0, probabilities)
    gains = ndcg((left > own[:, None]).sum(1) + 1, DEPTH)
    with np.errstate(divide="ignore"):
        return {"ndcg": gains, "log": np.log(own), "seen": (probabilities * seen).sum(1)}


def model_probabilities(stage: RunStage, cases: Cases) -> np.ndarray:
    """The probabilities of all semantic IDs by the model of a stage: float64 (cases, leaves)."""
    model = stage.answering_model()
    if model.vocabulary.item_head is None or model.transitions is None:
        raise SystemExit(f"{stage.workspace.root}: the model has no item head with counts of transitions")
    share = share_of(model, cases)
    both = share * of_items(model, cases) + (1 - share) * of_codes(stage, model, cases)
    evidence = Evidence.of(model.transitions, model.semantic_ids.trie, cases.histories, torch.device("cpu"))
    return counted(both, evidence, evidence.prior)


def sasrec_of(workspace: Workspace) -> BaselineRun:
    """The SASRec that was trained in a workspace; of several the first one by name."""
    path = next(iter(sorted((workspace.root / "baselines").glob("sasrec*/*/manifest.json"))), None)
    if path is None:
        root = workspace.root
        raise SystemExit(f"{root} has no trained SASRec; run `peso baseline sasrec -w {root}`")
    return BaselineRun(workspace, read_baseline(json.loads(path.read_text())["baseline"]))


def sasrec_probabilities(run: BaselineRun, number: int, cases: Cases) -> np.ndarray:
    """The probabilities of all semantic IDs at a stage: float64 (cases, leaves)."""
    baseline = run.restored(number)
    assert isinstance(baseline, BaselineAnswers)
    return np.exp(baseline.log_probabilities(cases))


def measure(workspace: Workspace, other: Workspace, most: int) -> dict[str, Any]:
    """The figures of all forms over the later stages of a workspace."""
    run = sasrec_of(other)
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    new = []
    first = np.asarray(workspace.stream.first_stages())
    for number in range(1, workspace.stream.stages):
        stage = workspace.stage(number)
        model, cases = stage.answering_model(), validation_cases(stage, most)
        head, trie = model.vocabulary.item_head, model.semantic_ids.trie
        if head is None or model.transitions is None:
            raise SystemExit(f"{workspace.root}: the model has no item head with counts of transitions")
        share, targets = share_of(model, cases), trie.leaf_of[cases.targets]
        evidence = Evidence.of(model.transitions, trie, cases.histories, torch.device("cpu"))
        sasrec = sasrec_probabilities(run, number, cases)
        seen = seen_ids(cases, trie.leaf_of, trie.leaves)
        new.append(first[cases.targets] == number)
        parts = of_items(model, cases), of_codes(stage, model, cases), share, evidence, sasrec
        for name, probabilities in forms(*parts):
            found.setdefault(name, []).append(figures(probabilities, targets, seen))
    brought = np.concatenate(new)
    result: dict[str, Any] = {"cases": len(brought), "new": int(brought.sum()), "forms": {}}
    for name, stages in found.items():
        gains, log, mass = (np.concatenate([one[key] for one in stages]) for key in ("ndcg", "log", "seen"))
        result["forms"][name] = {
            "ndcg@10": gains.mean(),
            "new": gains[brought].mean(),
            "known": gains[~brought].mean(),
            "log_probability": log.mean(),
            "seen": mass.mean(),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace", type=Path, help="a workspace with a trained model")
    parser.add_argument("--with", dest="other", type=Path, help="a workspace with a trained SASRec")
    parser.add_argument("--quick", action="store_true", help="64 cases of each stage: to see that it works")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    workspace = Workspace.open(options.workspace)
    other = Workspace.open(options.other) if options.other else workspace
    result = measure(workspace, other, 64 if options.quick else 1_000_000)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['cases']} validation cases, {result['new']} with an item that the stage brings")
    for name, row in result["forms"].items():
        print(
            f"{name}: NDCG@10 {row['ndcg@10']:.4f}, new items {row['new']:.4f}, known {row['known']:.4f}, "
            f"log-probability {row['log_probability']:.3f}, of items the user has had {row['seen']:.3f}"
        )


if __name__ == "__main__":
    main()

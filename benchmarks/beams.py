"""What wider beams cost and gain: the lists of ten that a trained model gives, by the width of the search.

    python benchmarks/beams.py W [--beams 10,20,50] [--turns 3] [--quick] [--json]

W is a workspace with a trained model. For each width, the search (`decoding.beams`) answers the validation
cases of all later stages, and of stage 0 if there are no others; its list is cut to ten. Printed are NDCG@10
and Hit@10, and the processor time of a user: the widths take turns, and the figure is the median of all
turns, with its range. `--quick` uses 64 cases of each stage and one turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from peso.decoding import search
from peso.evaluation.metrics import ndcg
from peso.runs.validation import validation_cases
from peso.runs.workspace import Workspace
from peso.runtime.machine import threads

LENGTH = 10


def measure(workspace: Workspace, widths: list[int], turns: int, most: int) -> dict[int, dict[str, Any]]:
    """NDCG@10, Hit@10 and the milliseconds of processor time per user, for each width."""
    times: dict[int, list[float]] = {width: [] for width in widths}
    gains: dict[int, list[np.ndarray]] = {width: [] for width in widths}
    stages = [workspace.stage(number) for number in range(workspace.stream.stages)]
    stages = [stage for stage in stages if stage.is_trained]
    asked = [(stage.answering_model(), validation_cases(stage, most)) for stage in stages[1:] or stages]
    users = sum(len(cases) for _, cases in asked)
    for turn in range(turns):
        for width in widths:
            spent = 0.0
            for model, cases in asked:
                with threads(model, workspace.config.training.threads):
                    start = time.process_time()
                    lists = search(model, cases.histories, beams=width, exclude=cases.seen)
                    spent += time.process_time() - start
                if not turn:
                    wanted = model.semantic_ids.trie.leaf_of[cases.targets]
                    found = lists.leaves[:, :LENGTH] == wanted[:, None]
                    ranks = np.where(found.any(1), found.argmax(1) + 1, LENGTH + 1)
                    gains[width].append(ndcg(ranks, LENGTH))
            times[width].append(spent / users * 1e3)
    return {
        width: {
            "cases": users,
            "ndcg@10": float(np.concatenate(gains[width]).mean()),
            "hit@10": float((np.concatenate(gains[width]) > 0).mean()),
            "milliseconds": statistics.median(times[width]),
            "range": (min(times[width]), max(times[width])),
        }
        for width in widths
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workspace", type=Path, help="a workspace with a trained model")
    parser.add_argument("--beams", default="10,20,50", help="widths of the search, separated by commas")
    parser.add_argument("--turns", type=int, default=3, help="how often each width answers")
    parser.add_argument("--quick", action="store_true", help="64 cases of each stage, one turn")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    widths = [int(width) for width in options.beams.split(",")]
    if min(widths) < LENGTH:
        parser.error(f"--beams: a list of {LENGTH} needs at least {LENGTH} beams")
    turns, most = (1, 64) if options.quick else (options.turns, 1_000_000)
    result = measure(Workspace.open(options.workspace), widths, turns, most)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for width, row in result.items():
        low, high = row["range"]
        print(
            f"{width} beams: NDCG@10 {row['ndcg@10']:.4f}, Hit@10 {row['hit@10']:.4f}, "
            f"{row['milliseconds']:.2f} ms a user ({low:.2f} to {high:.2f}), {row['cases']} cases"
        )


if __name__ == "__main__":
    main()

"""What the figures say, in plain sentences, and how far they can be trusted.

Knows comparisons; knows nothing of pages. A difference is called one only where its interval excludes zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from peso.evaluation.comparison import Comparison
from peso.evaluation.intervals import Estimate
from peso.evaluation.metrics import Metric
from peso.evaluation.run_summary import RunSummary
from peso.evaluation.tables import Quantity

MOST_NAMED = 5  # runs that a sentence names one by one


def findings(comparison: Comparison) -> list[str]:
    """Sentences for the head of a report: what was measured, what came out, what to make of it."""
    if len(comparison.runs) == 1:
        results = [_values(comparison)]
    else:
        results = [_result(comparison, metric) for metric in comparison.headline]
    return [_scope(comparison), *results, *_gaps(comparison), _caution(comparison)]


def stage_range(stages: Sequence[int]) -> str:
    """
    >>> stage_range([2]), stage_range([1, 2, 3]), stage_range([0, 2])
    ('stage 2', 'stages 1 to 3', 'stages 0 and 2')
    """
    if len(stages) == 1:
        return f"stage {stages[0]}"
    if list(stages) == list(range(stages[0], stages[-1] + 1)):
        return f"stages {stages[0]} to {stages[-1]}"
    return "stages " + listed([str(stage) for stage in stages])


def listed(parts: Sequence[str]) -> str:
    """
    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _scope(comparison: Comparison) -> str:
    runs = comparison.runs
    who = f"{len(runs)} runs were" if len(runs) > 1 else f"{_name(comparison, runs[0])} was"
    counts = [comparison.cases(run) for run in runs]
    cases = f"{counts[0]:,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
    same = "the same " * (len(runs) > 1 and comparison.same_cases)
    depth = min(run.stages[stage].predictions.depth for run in runs for stage in comparison.averaged)
    return (
        f"{who} tested on {same}{cases} cases of {stage_range(comparison.averaged)}. A case is one user's "
        f"last item in a stage; the answer is a list of {depth} semantic IDs, made from the items before it."
    )


def _values(comparison: Comparison) -> str:
    (run,) = comparison.runs
    values = listed([f"{metric.label} is {_mean(comparison, run, metric)}" for metric in comparison.headline])
    stages = comparison.averaged
    return f"{values}{f', averaged over {stage_range(stages)}' if len(stages) > 1 else ''}."


def _mean(comparison: Comparison, run: RunSummary, metric: Metric) -> str:
    mean = Quantity.of(comparison.average(run, metric), metric.decimals)
    assert mean is not None
    return mean.text + " nats" * (metric.name == "log_probability")


def _result(comparison: Comparison, metric: Metric) -> str:
    standing = comparison.standing(metric)
    value = _mean(comparison, standing.best, metric)
    text = f"{metric.label}: {_name(comparison, standing.best)} has the highest mean, {value}"
    if standing.behind:
        names = [_name(comparison, run) for run in standing.behind]
        text += f", and leads {_some(names)} by more than the choice of users explains"
    text += "."
    if standing.tied:
        tied = [
            f"{_name(comparison, run)} ({_lead(comparison.difference(standing.best, run, metric), metric)})"
            for run in standing.tied
        ]
        text += f" These data do not tell it from {_some(tied)}."
    return text


def _name(comparison: Comparison, run: RunSummary) -> str:
    return f"“{comparison.labels[run.name]}”"


def _some(names: Sequence[str]) -> str:
    return listed(names) if len(names) <= MOST_NAMED else f"{len(names)} others (see the tables)"


def _lead(estimate: Estimate, metric: Metric) -> str:
    if not estimate.has_interval:
        return "no difference in any case" if estimate.value == 0 else "too few cases to say"
    value, low, high = (
        f"{number:+.{metric.decimals}f}".replace("-", "\N{MINUS SIGN}")
        for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"lead {value}, interval {low} to {high}"


def _gaps(comparison: Comparison) -> list[str]:
    notes = []
    if not comparison.same_cases:
        notes.append(
            "The runs were tested on different cases, so nothing is said about the differences between them."
        )
    if comparison.left_out:
        lacking = [
            f"{_name(comparison, run)} lacks {stage_range(missing)}"
            for run in comparison.runs
            if (missing := [stage for stage in comparison.left_out if stage not in run.stages])
        ]
        notes.append(
            f"Averages leave out {stage_range(comparison.left_out)}, which not every run has: "
            f"{listed(lacking)}."
        )
    if comparison.averaged == [0]:
        notes.append("No later stage has been evaluated yet, so all figures are those of stage 0.")
    return notes


def _caution(comparison: Comparison) -> str:
    text = (
        "Intervals are 95 % intervals over users. They do not cover another seed of training, which can move "
        "results as much"
    )
    if len(comparison.runs) > 2:
        text += (
            "; nor are they corrected for the number of runs compared, so the best of many looks a little "
        )
        text += "better than it is"
    return text + "."

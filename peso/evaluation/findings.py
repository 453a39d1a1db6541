"""What the figures say, in plain sentences, and how far they can be trusted.

Knows comparisons; knows nothing of pages. A difference is called one only where it is
significant after Holm's correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from peso.evaluation.comparison import Comparison
from peso.evaluation.metrics import LOG_PROBABILITY, Metric
from peso.evaluation.systems import System
from peso.evaluation.tables import Quantity

MOST_NAMED = 5  # runs that a sentence names one by one


def findings(comparison: Comparison) -> list[str]:
    """Sentences for the head of a report: what was measured, what came out, what to make of it."""
    if len(comparison.systems) == 1:
        results = [_values(comparison)]
    else:
        compared = [metric for metric in comparison.headline if len(comparison.rivals(metric)) > 1]
        results = [_result(comparison, metric) for metric in compared]
    return [_scope(comparison), *results, *_gaps(comparison), _caution(comparison), *_bases(comparison)]


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
    systems = comparison.systems
    runs = sum(len(system.runs) for system in systems)
    if len(systems) == 1:
        who = f"{_name(systems[0])} was"
    elif runs == len(systems):
        who = f"{runs} runs were"
    else:
        who = f"{len(systems)} systems in {runs} runs were"
    counts = [comparison.cases(system) for system in systems]
    cases = f"{counts[0]:,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
    same = "the same " * (len(systems) > 1 and comparison.same_cases)
    depth = min(
        run.stages[stage].predictions.depth for run in comparison.runs for stage in comparison.averaged
    )
    return (
        f"{who} tested on {same}{cases} cases of {stage_range(comparison.averaged)}. A case is one user's "
        f"last item in a stage; the answer is a list of {depth} semantic IDs, made from the items before it."
    )


def _values(comparison: Comparison) -> str:
    (system,) = comparison.systems
    values = listed(
        [f"{metric.label} is {_mean(comparison, system, metric)}" for metric in comparison.headline]
    )
    stages = comparison.averaged
    return f"{values}{f', averaged over {stage_range(stages)}' if len(stages) > 1 else ''}."


def _mean(comparison: Comparison, system: System, metric: Metric) -> str:
    mean = Quantity.of(comparison.average(system, metric), metric.decimals)
    assert mean is not None
    return mean.text + " nats" * (metric.name == LOG_PROBABILITY)


def _result(comparison: Comparison, metric: Metric) -> str:
    standing = comparison.standing(metric)
    value = _mean(comparison, standing.best, metric)
    text = f"{metric.label}: {_name(standing.best)} has the highest mean, {value}"
    if standing.behind:
        text += (
            f", and leads {_some([_name(system) for system in standing.behind])} by more than chance explains"
        )
    text += "."
    if standing.tied:
        tied = [
            f"{_name(system)} ({_lead(comparison, standing.best, system, metric)})"
            for system in standing.tied
        ]
        text += f" These data do not tell it from {_some(tied)}."
    return text


def _name(system: System) -> str:
    return f"“{system.label}”"


def _some(names: Sequence[str]) -> str:
    return listed(names) if len(names) <= MOST_NAMED else f"{len(names)} others (see the tables)"


def _lead(comparison: Comparison, best: System, other: System, metric: Metric) -> str:
    found = comparison.contrasts(metric).contrast(metric.name, best.name, other.name)
    if math.isnan(found.low):
        return "no difference in any case" if found.value == 0 else "too few cases to say"
    value, low, high = (
        f"{number:+.{metric.decimals}f}".replace("-", "\N{MINUS SIGN}")
        for number in (found.value, found.low, found.high)
    )
    return f"lead {value}, interval {low} to {high}"


def _gaps(comparison: Comparison) -> list[str]:
    notes = []
    if not comparison.same_cases:
        notes.append(
            "The runs were tested on different cases, so nothing is said about the differences between them."
        )
    if comparison.unfinished:
        lacking = [
            f"“{run.name}” has {len(run.stages)} of {run.expected_stages} stages"
            for run in comparison.unfinished
        ]
        notes.append(f"Not done yet and left out: {_some(lacking)}.")
    if comparison.left_out:
        lacking = [
            f"{_name(system)} lacks {stage_range(missing)}"
            for system in comparison.systems
            if (missing := [stage for stage in comparison.left_out if stage not in system.stages])
        ]
        notes.append(
            f"Averages leave out {stage_range(comparison.left_out)}, which not every run has: "
            f"{listed(lacking)}."
        )
    if comparison.averaged == [0]:
        notes.append("No later stage has been evaluated yet, so all figures are those of stage 0.")
    return notes


def _bases(comparison: Comparison) -> list[str]:
    """Whether the seeds of a system share their stage 0, as far as manifests tell."""
    shared, apart = list[str](), list[str]()
    for system in comparison.systems:
        bases = [
            manifest["determined_by"]
            for run in system.runs
            for manifest in run.manifests
            if manifest.get("stage") == 0 and "determined_by" in manifest
        ]
        if len(bases) == len(system.runs) > 1:
            (shared if len(set(bases)) == 1 else apart).append(_name(system))
    sentences = []
    if shared:
        whose = _some(shared) if apart else "all systems"
        sentences.append(
            f"The seeds of {whose} share one stage 0: intervals do not cover what another one would have "
            "given."
        )
    if apart:
        whose = _some(apart) if shared else "every system"
        sentences.append(f"Each seed of {whose} has a stage 0 of its own, which intervals cover.")
    return sentences


def _caution(comparison: Comparison) -> str:
    alone = any(system.one_seed for system in comparison.systems)
    text = "Intervals are 95 % intervals over users"
    if alone:
        text += (
            ". Where there is one seed only they do not cover another seed of training, which can move "
            "results as much"
        )
    else:
        text += " and seeds" * any(len(system.runs) > 1 for system in comparison.systems)
    return text + "."

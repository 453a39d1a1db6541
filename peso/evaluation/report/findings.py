"""The results in plain sentences, and how reliable they are.

One system is called better than another only if the difference is significant after Holm's correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from peso.evaluation.catalogue import USERS
from peso.evaluation.comparison import Comparison
from peso.evaluation.contrasts import LEVEL, Contrast
from peso.evaluation.intervals import Estimate
from peso.evaluation.metrics import FEWEST, LOG_PROBABILITY, Metric
from peso.evaluation.predictions import USER_SEGMENTS
from peso.evaluation.report.tables import Quantity
from peso.evaluation.run_summary import System

MOST_NAMED = 5  # systems that a sentence names one by one


def findings(comparison: Comparison) -> list[str]:
    """The results: models that have learned too little, whether the newest model is better, baselines that
    win, and the best system."""
    if len(comparison.systems) == 1:
        results = [_values(comparison)]
    else:
        compared = [metric for metric in comparison.headline if len(comparison.rivals(metric)) > 1]
        results = [_result(comparison, metric) for metric in compared]
    return [
        *_unhealthy(comparison),
        *last_update(comparison),
        *winning_baselines(comparison),
        *results,
        *_gaps(comparison),
    ]


def _unhealthy(comparison: Comparison) -> list[str]:
    """Warnings about the newest stage of each model that has enough cases to be checked."""
    result = []
    for system in comparison.systems:
        first = system.first.stages
        checked = [t for t in comparison.averaged if len(first[t].predictions) >= FEWEST]
        newest = (checked or comparison.averaged)[-1]
        told = dict.fromkeys(w for run in system.runs for w in run.stages[newest].warnings)
        result += [f"Warning: {_name(system)}, stage {newest}: {warning}." for warning in told]
    return result


def cautions(comparison: Comparison) -> list[str]:
    """What was measured, and which sources of uncertainty the intervals cover."""
    return [
        _scope(comparison),
        _interval(comparison),
        *_bases(comparison),
        _seen_items(comparison),
        *_target_users(comparison),
    ]


def _seen_items(comparison: Comparison) -> str:
    """Which systems leave out items that the user has already had. The rule affects every metric."""
    without, partly, keeping = list[str](), list[str](), list[str]()
    for system in comparison.systems:
        found = {run.stages[t].leaves_out_seen for run in system.runs for t in comparison.averaged}
        (partly if len(found) > 1 else without if True in found else keeping).append(_name(system))
    if not (partly or keeping):
        return "Items that a user has already had are left out of every list."
    if not (partly or without):
        return "Items that a user has already had are recommended like others."
    told = [
        f"{listed(names)} {words}"
        for names, words in (
            (without, "leave them out"),
            (partly, "leave them out at some stages"),
            (keeping, "recommend them like others"),
        )
        if names
    ]
    return f"Systems differ in how they treat items that a user has already had: {'; '.join(told)}."


def _target_users(comparison: Comparison) -> list[str]:
    """Which systems were also trained on users who are not tested; nothing if none was."""
    more, less = list[str](), list[str]()
    for system in comparison.systems:
        found = {stage.target_users for run in system.runs for stage in run.stages.values()}
        (more if "all" in found else less).append(_name(system))
    if not more:
        return []
    few = "users with fewer than three events in a stage, who are not tested"
    if not less:
        return [f"The training data include the events of {few} (training.users: all)."]
    return [
        f"Systems differ in their training data: those of {listed(more)} include the events of {few}; those "
        f"of {listed(less)} do not."
    ]


def stage_range(stages: Sequence[int]) -> str:
    """Stages in words.

    >>> stage_range([2]), stage_range([1, 2, 3]), stage_range([0, 2])
    ('stage 2', 'stages 1 to 3', 'stages 0 and 2')
    """
    if len(stages) == 1:
        return f"stage {stages[0]}"
    if list(stages) == list(range(stages[0], stages[-1] + 1)):
        return f"stages {stages[0]} to {stages[-1]}"
    return "stages " + listed([str(stage) for stage in stages])


def listed(parts: Sequence[str]) -> str:
    """Words joined by commas and "and".

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def winning_baselines(comparison: Comparison) -> list[str]:
    """Sentences if baselines, or hybrids that contain the model, are significantly better than the best model
    in the first metric."""
    metric = comparison.headline[0]
    models = [system for system in comparison.systems if not system.first.baseline]
    if not models or len(models) == len(comparison.systems) or not comparison.same_cases:
        return []
    model = max(models, key=lambda system: comparison.average(system, metric).value)
    better: dict[bool, list[str]] = {False: [], True: []}  # by whether the model is a part of it
    for system in comparison.systems:
        if not system.first.baseline:
            continue
        found = comparison.contrasts(metric).contrast(metric.name, system.name, model.name)
        if found.value > 0 and found.p_adjusted <= LEVEL:
            told = f"{_name(system)} ({_mean(comparison, system, metric)}, {_difference(found, metric)})"
            better[system.first.contains_model].append(told)
    what = f"{'the best' if len(models) > 1 else 'the'} model, {_name(model)},"
    verbs = {
        False: ("A baseline without a language model beats", "Baselines without a language model beat"),
        True: ("The model together with a baseline beats", "The model together with baselines beats"),
    }
    return [
        f"{verbs[contains][len(names) > 1]} {what}{' alone' * contains} in "
        f"{metric.label} ({_mean(comparison, model, metric)}): {_some(names)}. "
        "The difference is significant on the same cases."
        for contains, names in better.items()
        if names
    ]


def last_update(comparison: Comparison) -> list[str]:
    """Whether the newest model is better than the previous one, for whom, and by how much.

    If the previous model was not tested, the newest model is compared with that of stage 0, if it is one of
    the systems.
    """
    system, metric, stage = comparison.subject, comparison.headline[0], comparison.averaged[-1]
    groups: dict[str, Estimate | None]
    if (change := comparison.last_change(system, metric)) is not None:
        several = sum(not other.first.baseline for other in comparison.systems) > 1
        new, old = (
            f"The model{f' of {_name(system)}' * several} after stage {stage}",
            f"after stage {stage - 1}",
        )
        cases = f"the {change.cases:,} case{'s' * (change.cases > 1)} of stage {stage}"
        before, after = comparison.before_and_after(system, metric, change)
        groups = {name: comparison.last_change(system, metric, n) for n, name in enumerate(USER_SEGMENTS)}
    else:
        stale = next((s for s in comparison.systems if s.first.reference == "no updates"), None)
        if stale is None or stale is system or not comparison.same_cases:
            return []
        new, old, cases = _name(system), "of stage 0 without updates", stage_range(comparison.averaged)
        change = comparison.difference(system, stale, metric)
        before, after = (comparison.average(one, metric).value for one in (stale, system))
        groups = {
            name: comparison.difference(system, stale, metric, group=n)
            for n, name in enumerate(USER_SEGMENTS)
            if comparison.in_group(system, metric, USERS, n) is not None
        }
    text = (
        f"{new} is {_verdict(change)} the model {old} on {cases}: {metric.label} {_number(after, metric)} "
        f"against {_number(before, metric)}, {_difference(change, metric)}."
    )
    likelihood = comparison.headline[-1]
    if (told := comparison.last_change(system, likelihood)) is not None:
        text += f" Log-probability: {_difference(told, likelihood)}."
    return [text + _for_whom({name: found for name, found in groups.items() if found is not None}, metric)]


def _for_whom(groups: dict[str, Estimate], metric: Metric) -> str:
    if len(groups) < 2:
        return ""
    parts: dict[str, list[str]] = {}
    for name, change in groups.items():
        told = f"{name} ({_signed(change.value, metric)})" if change.excludes_zero else name
        parts.setdefault(_verdict(change).rpartition(" ")[0], []).append(told)
    return f" By users: {'; '.join(f'{verdict} for {listed(names)}' for verdict, names in parts.items())}."


def _verdict(change: Estimate) -> str:
    if _is_none(change):
        return "as good as"
    if not change.excludes_zero:
        return "not significantly different from"
    return "better than" if change.value > 0 else "worse than"


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
    cases += f" case{'s' * (max(counts) > 1)} of {stage_range(comparison.averaged)}"
    same = "the same " * (len(systems) > 1 and comparison.same_cases)
    depth = min(
        run.stages[stage].predictions.depth for run in comparison.runs for stage in comparison.averaged
    )
    return (
        f"{who} tested on {same}{cases}. A case is one user's last item in a stage; each system predicts a "
        f"list of {depth} semantic IDs from the items before it."
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
    text = f"{metric.label}: {_name(standing.best)} is best with {_mean(comparison, standing.best, metric)}"
    if standing.behind:
        text += f", significantly better than {_some([_name(system) for system in standing.behind])}"
    text += "."
    if standing.tied:
        tied = [
            f"{_name(system)} ({_lead(comparison, standing.best, system, metric)})"
            for system in standing.tied
        ]
        contrasts = comparison.contrasts(metric)
        apart = [contrasts.contrast(metric.name, other.name, standing.best.name) for other in standing.tied]
        # without it, an interval that excludes zero would seem to contradict the sentence
        corrected = any(found.low > 0 or found.high < 0 for found in apart)
        after = " after the correction for several comparisons, which intervals do not have" * corrected
        text += f" Not significantly different{after}: {_some(tied)}."
    return text


def _name(system: System) -> str:
    return f"“{system.label}”"


def _some(names: Sequence[str]) -> str:
    return listed(names) if len(names) <= MOST_NAMED else f"{len(names)} others (see the tables)"


def _lead(comparison: Comparison, best: System, other: System, metric: Metric) -> str:
    found = comparison.contrasts(metric).contrast(metric.name, other.name, best.name)
    return _difference(found, metric)


def _difference(found: Estimate | Contrast, metric: Metric) -> str:
    if _is_none(found):
        return "no difference in any case"
    text = f"difference {_signed(found.value, metric)}"
    if math.isnan(found.low):
        return f"{text}, too few cases for an interval"
    return f"{text}, 95 % interval {_signed(found.low, metric)} to {_signed(found.high, metric)}"


def _is_none(found: Estimate | Contrast) -> bool:
    return math.isnan(found.low) and found.value == 0


def _signed(value: float, metric: Metric) -> str:
    return f"{value:+.{metric.decimals}f}".replace("-", "\N{MINUS SIGN}")


def _number(value: float, metric: Metric) -> str:
    return Quantity(value, decimals=metric.decimals).number


def _gaps(comparison: Comparison) -> list[str]:
    notes = []
    if not comparison.same_cases:
        notes.append("The runs were tested on different cases, so they are not compared.")
    if comparison.unfinished:
        lacking = [
            f"“{run.name}” has {len(run.stages)} of {run.expected_stages} stages"
            for run in comparison.unfinished
        ]
        notes.append(f"Unfinished and left out: {_some(lacking)}.")
    notes += [
        f"“{run.name}” is not tested on {stage_range(run.untested)} with its present settings, so the "
        "figures are without. To test there, run `peso run` again, or `peso evaluate` with --stage."
        for run in comparison.runs
        if run.untested
    ]
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
        notes.append("All figures are those of stage 0.")
    return notes


def _bases(comparison: Comparison) -> list[str]:
    """Whether the seeds of a system share their stage 0, if the manifests record it."""
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
            f"The seeds of {whose} share one stage 0: intervals do not cover a different stage 0."
        )
    if apart:
        whose = _some(apart) if shared else "every system"
        sentences.append(f"Each seed of {whose} has its own stage 0, which intervals cover.")
    return sentences


def _interval(comparison: Comparison) -> str:
    seeds = " and seeds" * any(len(system.runs) > 1 for system in comparison.systems)
    alone = [_name(system) for system in comparison.systems if system.one_seed]
    text = f"Intervals are 95 % intervals over users{seeds}."
    if alone:
        text += (
            f" With a single seed ({_some(alone)}) they do not cover another training seed, which can change "
            "results as much."
        )
    return text

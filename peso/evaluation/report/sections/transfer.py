"""Section: how training on one stage changes the results on other stages."""

from __future__ import annotations

import numpy as np

from peso.evaluation.comparison import Comparison
from peso.evaluation.metrics import Metric, backward_terms, forgetting_terms, forward_terms
from peso.evaluation.report.plots import HeatMap
from peso.evaluation.report.sections.section import Section, file_name, quantity, section
from peso.evaluation.report.tables import Cell, Table
from peso.evaluation.run_summary import System

FEW = 6  # with more systems than this, each has a heat map for one metric instead of two


@section(place=60)
def transfer(comparison: Comparison) -> Section | None:
    """Transfer, forgetting, and the regret against retraining."""
    tested = [system for system in comparison.systems if any(run.across for run in system.runs)]
    retrained = next((s for s in comparison.systems if s.first.reference == "retraining"), None)
    tables = [_table(comparison, metric, retrained) for metric in comparison.headline]
    if not any(table.rows for table in tables):
        return None
    text = (
        "Backward transfer is the mean change of the result on earlier stages caused by later training. "
        "Forgetting is how far the last model falls below the best earlier model on a stage, on average. "
        "Forward transfer is how much the stages before stage j help on j, compared with the model of stage "
        "0. Regret is how much better retraining from scratch is. In the maps, rows are models, columns are "
        "test cases, and each column has its own color scale."
    )
    ndcg, _, log_probability = comparison.headline
    shown = [ndcg, log_probability] if len(tested) <= FEW else [ndcg]
    return Section(
        "transfer",
        "Forgetting and transfer",
        [text],
        plots=[_heat_map(comparison, system, metric) for metric in shown for system in tested],
        tables=tables,
    )


def matrix(system: System, metric: Metric) -> np.ndarray:
    """The matrix R of :mod:`peso.evaluation.metrics`.

    It is averaged over the seeds that were tested on other stages, with nan where one of them lacks a test.
    If no seed was tested on other stages, only the diagonal is known, averaged over all seeds.
    """
    last = max(system.stages)
    runs = [run for run in system.runs if run.across] or list(system.runs)
    found = np.full((len(runs), last + 1, last + 1), np.nan)
    for number, run in enumerate(runs):
        for stage, summary in run.stages.items():
            if stage <= last and len(summary.predictions):
                found[number, stage, stage] = metric.values(summary.predictions).mean()
        for (i, j), predictions in run.across.items():
            if max(i, j) <= last and len(predictions):
                found[number, i, j] = metric.values(predictions).mean()
    return found.mean(axis=0)


def _table(comparison: Comparison, metric: Metric, retrained: System | None) -> Table:
    rows: list[list[Cell]] = []
    for system in comparison.systems:
        results = matrix(system, metric)
        terms = [function(results) for function in (backward_terms, forward_terms, forgetting_terms)]
        regret: Cell = None
        if retrained is not None and system is not retrained and comparison.same_cases:
            regret = quantity(comparison.difference(retrained, system, metric), metric)
        cells = [quantity(comparison.change(system, metric, some), metric) for some in terms]
        if any(cell is not None for cell in [*cells, regret]):
            rows.append([system.label, *cells, regret])
    return Table(
        f"{file_name(metric)}-transfer",
        f"{metric.label}: transfer and forgetting",
        ["Strategy", "Backward transfer", "Forward transfer", "Forgetting", "Regret against retraining"],
        rows,
        "± half width of the 95 % interval over users, for the seeds that were tested on other stages; for "
        "forgetting, the best earlier model of each stage is taken as given.",
    )


def _heat_map(comparison: Comparison, system: System, metric: Metric) -> HeatMap:
    results = matrix(system, metric)
    stages = [str(stage) for stage in range(len(results))]
    return HeatMap(
        f"{file_name(metric)}-across-{comparison.systems.index(system)}",
        f"{metric.label} · {system.label}",
        f"{metric.label} of {system.label} after each stage on the cases of each stage.",
        results,
        stages,
        stages,
        "model after stage",
        "cases of stage",
        metric.decimals,
    )

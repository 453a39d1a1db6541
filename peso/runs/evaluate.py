"""Testing a stage's model on the cases of a stage: predictions.parquet and metrics.json."""

from __future__ import annotations

from typing import Any

from peso.config import Config
from peso.errors import DataError, WorkspaceError
from peso.evaluation.metrics import default_metrics, level_metrics, stage_metrics, warnings
from peso.evaluation.predictions import (
    Predictions,
    label_cases,
    make_predictions,
    write_predictions,
)
from peso.items.semantic_ids import SemanticIds
from peso.runs.health import Rivals
from peso.runs.stage import FORMAT, METRICS, PREDICTIONS, StageTest
from peso.runtime.files import write_json
from peso.runtime.machine import threads
from peso.runtime.manifest import replace_file, take_out
from peso.runtime.processes import current
from peso.runtime.progress import Observer


def test(wanted: StageTest, observer: Observer) -> dict[str, Any]:
    """Test the model of a stage on the test or validation cases of a stage; returns the metrics.

    Writes predictions.parquet, then metrics.json, each atomically. Results that are up to date are not
    computed again; if only ``evaluation.k`` changed, the predictions stay. Several processes
    (:mod:`peso.runtime.processes`) share the cases; the main one writes.

    Raises:
        WorkspaceError: the stage is not trained, or items of the cases' stage have no semantic ID yet.
        DataError: the stream has no such stage, or the catalog has fewer items than ``evaluation.k``.
    """
    workspace, processes = wanted.stage.workspace, current()
    workspace.trained(wanted.stage.number)  # raises if it is not trained
    if processes.on_main(lambda: wanted.is_done):
        return wanted.metrics["test"]
    stream = workspace.stream
    stream.stage(wanted.cases)  # raises if there is no such stage
    if stream.items_known(wanted.cases) > workspace.semantic_ids_manifest["items"]:
        raise WorkspaceError(
            f"items of stage {wanted.cases} of {workspace.root} have no semantic ID yet; "
            f"run `peso tokenize --append -w {workspace.root}` first"
        )
    if not wanted.has_cases:
        raise DataError(
            f"no {wanted.part} case of stage {wanted.cases} of {workspace.root} is left, because the users "
            "were erased; test on the cases of another stage: `peso evaluate --on STAGE`"
        )
    if not processes.on_main(lambda: wanted.is_predicted):
        _predict(wanted, observer)
    metrics: dict[str, Any] = processes.on_main(lambda: measure(wanted))
    for warning in metrics["warnings"] if wanted.part == "test" else ():
        on = "" if wanted.is_own else f" on the cases of stage {wanted.cases}"
        observer.note(f"warning: stage {wanted.stage.number}{on}: {warning}")
    return metrics


def require_enough_ids(config: Config, ids: SemanticIds) -> None:
    """Raise DataError if the evaluation asks for more items than there are distinct semantic IDs."""
    if (asked := max(config.evaluation.k)) > ids.trie.leaves:
        raise DataError(
            f"evaluation.k asks for {asked} items, but the catalog has {ids.trie.leaves} distinct semantic "
            "IDs; ask for fewer"
        )


def _predict(wanted: StageTest, observer: Observer) -> None:
    """Compute and write predictions.parquet; several processes share the cases."""
    from peso.decoding import search

    stage, on, processes = wanted.stage, wanted.cases, current()
    config, stream = stage.workspace.config, stage.workspace.stream
    model = stage.answering_model(processes=processes)
    require_enough_ids(config, model.semantic_ids)
    cases_of, cases = stream.stage(on), wanted.read_cases(config.prompt.window)
    seen = cases.seen if stage.leaves_out_seen else None
    title = f"{'test' if wanted.part == 'test' else 'validate'} stage {stage.number}"
    title += f" on the cases of stage {on}" if stage.number != on else ""
    observer.begin(f"{title}: search and score", len(cases), "users")
    with threads(model, config.training.threads, observer):
        found = search(
            model,
            cases.histories,
            beams=config.decoding.beams,
            batch_size=config.decoding.batch_size,
            exclude=seen,
            targets=cases.targets,
            on_progress=observer.advance,
            processes=processes,
        )
    observer.end()
    by_level, of_targets = found.targets, found.target_scores
    assert by_level is not None
    assert of_targets is not None

    def write() -> None:
        labels = label_cases((stream.stage(earlier) for earlier in range(on)), cases_of, wanted.part)
        predictions = make_predictions(
            cases,
            labels,
            found.leaves,
            found.scores,
            of_targets,
            model.semantic_ids,
            by_level,
            leave_out=seen,
        )
        with replace_file(stage.directory, wanted.name(PREDICTIONS), FORMAT) as aside:
            write_predictions(aside, predictions)

    processes.on_main(write)


def measure(wanted: StageTest) -> dict[str, Any]:
    """Compute and write metrics.json from the stored predictions; returns the test's part."""
    stage, config, known = wanted.stage, wanted.stage.workspace.config, wanted.known_metrics
    predictions = wanted.predictions
    estimates = stage_metrics(
        predictions, [*default_metrics(config.evaluation.k), *level_metrics(predictions)]
    )
    metrics = {
        "stage": stage.number,
        "on": wanted.cases,
        "k": config.evaluation.k,
        "beams": config.decoding.beams,
        "repeats": "leave-out" if stage.leaves_out_seen else "keep",
        "determined_by": wanted.determination,
        "predictions": stage.manifest["files"][wanted.name(PREDICTIONS)],
        "warnings": list(_warnings(wanted, predictions).values()),
        "metrics": {name: estimate.as_json() for name, estimate in estimates.items()},
    }
    with replace_file(stage.directory, wanted.name(METRICS), FORMAT) as aside:
        write_json(aside, {**known, "test": metrics})
    return metrics


def remove_test(gone: StageTest) -> None:
    """Remove a test that no case is left of: its metrics and its predictions."""
    directory, names = gone.stage.directory, [gone.name(PREDICTIONS)]
    if gone.is_own:  # the figures of training stay
        left = {key: value for key, value in gone.known_metrics.items() if key != "test"}
        with replace_file(directory, gone.name(METRICS), FORMAT) as aside:
            write_json(aside, left)
    else:
        names.append(gone.name(METRICS))
    take_out(directory, names, FORMAT, {})
    for name in names:
        (directory / name).unlink(missing_ok=True)


def _warnings(wanted: StageTest, predictions: Predictions) -> dict[str, str]:
    """See :func:`peso.evaluation.metrics.warnings`."""
    stage = wanted.stage
    rivals = Rivals(stage, wanted.read_cases(window=1), predictions.depth)
    item_head = stage.config.head.name == "items"
    return warnings(
        predictions,
        rivals.popular_ranks,
        rivals.log_frequencies(item_head),
        catalogue=stage.semantic_ids.trie.leaves,
        item_head=item_head,
    )

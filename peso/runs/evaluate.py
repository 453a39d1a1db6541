"""Testing a stage's model on the cases of a stage: predictions and metrics beside its weights."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from peso.errors import DataError, WorkspaceError
from peso.evaluation.metrics import default_metrics, level_metrics, stage_metrics
from peso.evaluation.predictions import Predictions, make_predictions, read_predictions, write_predictions
from peso.evaluation.segments import label_cases
from peso.events.stream import Stream, stage_file
from peso.items.index_files import FORMAT as IDS_FORMAT
from peso.runs.workspace import FORMAT, METRICS, PREDICTIONS, Workspace, answers_on
from peso.runtime.files import digest, json_text
from peso.runtime.manifest import REPLACING, read_manifest, replace_file
from peso.runtime.processes import current
from peso.runtime.progress import Observer
from peso.runtime.threads import threads


def test_directory(workspace: Workspace, stage: int, on: int) -> Path:
    """Where the test of a stage's model on the cases of stage ``on`` lies."""
    directory = workspace.stage_directory(stage)
    return directory if stage == on else directory / f"on={on}"


def is_tested(workspace: Workspace, stage: int, on: int) -> bool:
    """Whether predictions and metrics are there and belong to this model, these cases and this search.

    Raises:
        WorkspaceError: metrics.json is damaged.
    """
    if stage not in workspace.finished_stages:
        return False
    tested = _known(workspace, stage, on).get("test", {})
    return _is_predicted(workspace, stage, on) and set(workspace.config.evaluation.k) == set(tested["k"])


def read_metrics(workspace: Workspace, stage: int, on: int) -> dict[str, Any]:
    """metrics.json of a test, {} where there is none. Raises WorkspaceError if it is damaged or missing."""
    return workspace.metrics(stage, on)


def tested_predictions(workspace: Workspace, stage: int, on: int) -> Predictions:
    """The answers of a test that was made. Raises WorkspaceError if they are damaged or missing."""
    path = workspace.stage_file(stage, answers_on(stage, on, PREDICTIONS))
    assert path is not None
    return read_predictions(path)


def _known(workspace: Workspace, stage: int, on: int) -> dict[str, Any]:
    """As :func:`read_metrics`; what a test alone has written can be missing: it is then made again."""
    if on != stage and not (test_directory(workspace, stage, on) / METRICS).is_file():
        return {}
    return workspace.metrics(stage, on)


def test(workspace: Workspace, stage: int, on: int, observer: Observer) -> dict[str, Any]:
    """Test the model of a stage on the test cases of stage ``on``; returns the metrics.

    Writes predictions.parquet, then metrics.json, each whole or not at all. What is there already and fits
    is not computed again; if only ``evaluation.k`` changed, the predictions stay. Several processes
    (:mod:`peso.runtime.processes`) share the cases; the main one writes.

    Raises:
        WorkspaceError: the stage is not learnt, or items of stage ``on`` have no semantic ID yet.
        DataError: the stream has no stage ``on``, or the catalogue holds fewer items than a list is long.
    """
    stage, processes = workspace.require_stage(stage), current()
    if processes.on_main(partial(is_tested, workspace, stage, on)):
        return read_metrics(workspace, stage, on)["test"]
    stream = Stream.open(workspace.stream_directory)
    stream.stage(on)  # raises for a stage that does not exist
    if stream.items_known(on) > read_manifest(workspace.semantic_ids_directory, IDS_FORMAT)["items"]:
        raise WorkspaceError(
            f"items of stage {on} of {workspace.root} have no semantic ID yet; "
            f"`peso tokenize --append -w {workspace.root}` comes first"
        )
    if not processes.on_main(partial(_is_predicted, workspace, stage, on)):
        _predict(workspace, stage, on, observer)
    return processes.on_main(partial(_measure, workspace, stage, on))


def leaves_out_seen(workspace: Workspace, stage: int) -> bool:
    """Whether a stage's model recommends no item that the user has had (``decoding.repeats``)."""
    rule = workspace.config.decoding.repeats
    if rule != "auto":
        return rule == "leave-out"
    files = Stream.open(workspace.stream_directory).manifest["files"]
    known = tuple(files[name] for number in range(stage + 1) if (name := stage_file(number)) in files)
    return not _repeats_occur(workspace.stream_directory, known)


@lru_cache(maxsize=64)
def _repeats_occur(directory: Path, checksums: tuple[str, ...]) -> bool:
    """Of the first stages of a stream, as many as there are checksums, which name their content."""
    from peso.baselines.baseline import repeats_occur

    stream = Stream.open(directory)
    return repeats_occur([stream.stage(number) for number in range(len(checksums))])


def _is_predicted(workspace: Workspace, stage: int, on: int) -> bool:
    """Whether predictions are there that belong to this model, these cases and this search."""
    tested = _known(workspace, stage, on).get("test", {})
    manifest, name = workspace.stage_manifest(stage), answers_on(stage, on, PREDICTIONS)
    return bool(
        tested
        and tested["determined_by"] == _determination(workspace, stage, on)
        and (test_directory(workspace, stage, on) / PREDICTIONS).is_file()
        # a step that was killed may have left answers of its own; older metrics do not tell theirs
        and name in manifest["files"]
        and name not in manifest.get(REPLACING, {})
        and tested.get("predictions", manifest["files"][name]) == manifest["files"][name]
    )


def _predict(workspace: Workspace, stage: int, on: int, observer: Observer) -> None:
    """predictions.parquet; several processes share the cases."""
    from peso.decoding import search
    from peso.runs.models import answering_model

    config, processes = workspace.config, current()
    stream = Stream.open(workspace.stream_directory)
    model = answering_model(workspace, stage)
    if model.semantic_ids.trie.leaves < max(config.evaluation.k):
        raise DataError(
            f"evaluation.k asks for {max(config.evaluation.k)} items, but the catalogue has "
            f"{model.semantic_ids.trie.leaves} distinct semantic IDs; ask for fewer"
        )
    cases_of = stream.stage(on)
    cases = cases_of.test_cases(config.prompt.window)
    seen = cases.seen if leaves_out_seen(workspace, stage) else None
    title = f"test stage {stage}" + (f" on the cases of stage {on}" if stage != on else "")
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
    by_level = found.targets
    assert by_level is not None

    def write() -> None:
        labels = label_cases((stream.stage(earlier) for earlier in range(on)), cases_of)
        predictions = make_predictions(
            cases,
            labels,
            found.leaves,
            found.scores,
            by_level.sum(axis=-1),
            model.semantic_ids,
            by_level,
            leave_out=seen,
        )
        name = answers_on(stage, on, PREDICTIONS)
        with replace_file(workspace.stage_directory(stage), name, FORMAT) as aside:
            write_predictions(aside, predictions)

    processes.on_main(write)


def _measure(workspace: Workspace, stage: int, on: int) -> dict[str, Any]:
    """metrics.json, from the predictions."""
    config, known = workspace.config, _known(workspace, stage, on)
    predictions = tested_predictions(workspace, stage, on)
    estimates = stage_metrics(
        predictions, [*default_metrics(config.evaluation.k), *level_metrics(predictions)]
    )
    metrics = {
        "stage": stage,
        "on": on,
        "k": config.evaluation.k,
        "beams": config.decoding.beams,
        "repeats": "leave-out" if leaves_out_seen(workspace, stage) else "keep",
        "determined_by": _determination(workspace, stage, on),
        "predictions": workspace.stage_manifest(stage)["files"][answers_on(stage, on, PREDICTIONS)],
        "metrics": {name: estimate.as_json() for name, estimate in estimates.items()},
    }
    with replace_file(workspace.stage_directory(stage), answers_on(stage, on, METRICS), FORMAT) as aside:
        aside.write_text(json_text({**known, "test": metrics}), encoding="utf-8")
    return metrics


def _determination(workspace: Workspace, stage: int, on: int) -> str:
    files = Stream.open(workspace.stream_directory).manifest["files"]
    parts = [
        workspace.stage_manifest(stage)["determined_by"],
        files[stage_file(on)],
        workspace.config.decoding.beams,
    ]
    # earlier versions, whose answers stay, kept what users had had
    return digest(*parts, *(["leave-out"] if leaves_out_seen(workspace, stage) else []))

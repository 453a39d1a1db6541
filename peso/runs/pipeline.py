"""What `peso run` does, step by step, resuming what is done.

What loads PyTorch is imported where it is used, so that a refused command answers at once. A step is done
when its files are there: ingest → stream/, tokenize → semantic_ids/, learn → stages/{t}/, test → predictions
and metrics in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peso.config import DataConfig, changed_keys
from peso.config.data import STREAMS
from peso.config.shape import changed_shape, is_later
from peso.errors import ConfigError, DataError, ExportError, WorkspaceError
from peso.events.append import correct_items, extend_stream
from peso.events.ingest import ingest as fill_stream
from peso.events.release import read_release
from peso.events.stream import FORMAT as STREAM_FORMAT
from peso.events.stream import Stream
from peso.items.semantic_ids import FORMAT as IDS_FORMAT
from peso.items.semantic_ids import SemanticIds, read_release_index, write_release_index
from peso.runs.baselines import check_data
from peso.runs.challenger import is_judged, judge, keep_serving
from peso.runs.checks import check_configuration, check_surroundings, rehearse
from peso.runs.evaluate import test
from peso.runs.report import catalogue, read_user_table, tell_found
from peso.runs.retired import retired
from peso.runs.stage import FORMAT, METRICS, RunStage
from peso.runs.workspace import Workspace, require_place
from peso.runtime import assets
from peso.runtime.files import commit_directory, link, remove_directory
from peso.runtime.machine import require_device, threads
from peso.runtime.manifest import intact, read_manifest, write_manifest
from peso.runtime.processes import current
from peso.runtime.progress import Observer, Silent

# -- what is left to do ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One piece of the work: `ingest`, `tokenize`, `learn` or `test`, the last two of a stage."""

    name: str
    stage: int | None = None

    def __str__(self) -> str:
        return self.name if self.stage is None else f"{self.name} stage {self.stage}"


def missing_steps(workspace: Workspace, stages: int) -> Iterator[Step]:
    """What is not done yet, in order. ``stages``: how many the stream has."""
    if not workspace.has_stream:
        yield Step("ingest")
    if not workspace.has_semantic_ids or workspace.items_without_id:
        yield Step("tokenize")
    for number in range(stages):
        stage = workspace.stage(number)
        if not stage.is_trained:
            yield Step("learn", number)
        pruned = stage.is_trained and stage.pruned is not None
        if workspace.config.evaluation.enabled and not pruned and not stage.is_tested:
            if workspace.has_stream and not stage.on(number).has_cases:
                continue
            yield Step("test", number)


def run(workspace: Workspace, base: Path | None = None, observer: Observer | None = None) -> None:
    """Do everything that is not done, then write the report. The caller holds the workspace's lock.

    Several processes (:mod:`peso.runtime.processes`) learn and test together; the main one does the rest.

    Args:
        base: a workspace to take stage 0 from.

    Raises:
        PesoError: see the single steps. What was finished before stays.
    """
    observer = observer or Silent()
    for step in current().on_main(partial(_begin, workspace, base, observer)):
        assert step.stage is not None
        if step.name == "learn":
            learn(workspace.stage(step.stage), observer)
        else:
            test(workspace.stage(step.stage).on(step.stage), observer)
    if workspace.config.evaluation.enabled:
        current().on_main(partial(_conclude, workspace, observer))


def _begin(workspace: Workspace, base: Path | None, observer: Observer) -> list[Step]:
    """Everything before the stages; returns what is left to do of these."""
    source = None if base is None else Workspace.open(base)
    if 0 in workspace.finished_stages:
        source = None
    else:
        if source is not None:
            _refuse_base(workspace, source)
        rehearse_stages(workspace, observer)
    if not workspace.has_stream:
        ingest(workspace, observer)
        if source is not None:
            _refuse_base(workspace, source)
    check_data(workspace.config, workspace.stream)
    if not workspace.has_semantic_ids:
        tokenize(workspace, observer)
    elif workspace.items_without_id:
        tokenize_new(workspace, observer)
    require_catalogue(workspace)
    if source is not None:
        take_base(workspace, source, observer)
    return list(missing_steps(workspace, workspace.stream.stages))


def _conclude(workspace: Workspace, observer: Observer) -> None:
    """Everything after the stages."""
    if workspace.config.baselines:
        from peso.runs.baselines import run_baselines

        run_baselines(workspace, workspace.config.baselines, observer)
    from peso.runs.report import report

    observer.begin("writing the report", 0, "")
    report([workspace], workspace.report_directory)
    observer.end()


# -- data --------------------------------------------------------------------------------------------


def ingest(workspace: Workspace, observer: Observer) -> dict[str, Any]:
    """Read the data into stream/; returns its manifest. Semantic IDs of another stream are removed.

    Raises:
        DataError: names what is wrong with the data. Nothing is written then.
        WorkspaceError: stages were trained on the stream that is there, or events were appended to it.
    """
    data = workspace.config.data
    check_configuration(workspace.config)
    _refuse_if_learnt(workspace, "stream")
    before = workspace.stream.manifest if workspace.has_stream else {}
    if appended := len(before.get("appended", [])):
        raise WorkspaceError(
            f"the stream of {workspace.root} was appended to {appended} times, which ingesting again would "
            f"undo; `peso undo -w {workspace.root}` removes one append, or take a new workspace (-w)"
        )
    observer.note(f"ingest: {data.format} {data.path or ''}".rstrip())
    told = read_user_table(users) if (users := workspace.config.report.users) else {}
    with commit_directory(workspace.stream_directory) as directory:
        manifest = fill_stream(data, directory, workspace.config.seed_of_data, observer)
        if workspace.has_semantic_ids and manifest["files"] != before.get("files"):
            remove_directory(workspace.semantic_ids_directory)  # before the stream they do not belong to
            observer.note("the data changed: their semantic IDs have to be made again")
    tell_found(told, workspace.stream, observer)
    return manifest


def append(workspace: Workspace, observer: Observer, data: DataConfig | None = None) -> dict[str, Any]:
    """Add new events to stream/ as further stages; returns its manifest. Trained stages stay valid.

    Where there are semantic IDs already, those of the new items are made once to see that they can be;
    nothing is committed otherwise.

    Args:
        data: where the new events are, how they are cleaned and cut; none given: as configured (a folder to
            which files were added, say). The workspace's configuration stays as it is.

    Raises:
        WorkspaceError: there is no stream, or it is damaged.
        DataError: see :func:`peso.events.append.extend_stream`; new items that cannot get an ID. The stream
            is then as before.
        ConfigError: as :func:`tokenize_new`. The stream is then as before.
    """
    given = data or workspace.config.data
    if given.format in STREAMS:
        raise DataError(
            f"{given.format} data have no new events; name a log of them: "
            f"`peso ingest NEW --format csv --append -w {workspace.root}`"
        )
    observer.note(f"append: {given.format} {given.path}")
    earlier = workspace.stream.directory
    return extend(workspace, observer, lambda place: extend_stream(given, earlier, place, observer))


def extend(
    workspace: Workspace, observer: Observer, fill: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Put a longer stream in the place of the workspace's; returns its manifest.

    Args:
        fill: writes it into an empty directory and returns its manifest; nothing is committed where it fails.

    Raises: as :func:`append`.
    """
    told = read_user_table(users) if (users := workspace.config.report.users) else {}
    with commit_directory(workspace.stream_directory) as directory:
        manifest = fill(directory)
        if workspace.has_semantic_ids and manifest["appended"][-1]["new_items"]:
            with TemporaryDirectory() as trial:
                observer.note("see whether the new items can get semantic IDs")
                try:
                    _continue_ids(workspace, Stream.open(directory), Path(trial), observer)
                except (DataError, ConfigError) as error:
                    raise type(error)(
                        f"nothing was appended, since the new items could not get semantic IDs: {error}"
                    ) from None
    tell_found(told, workspace.stream, observer)
    return manifest


def update_items(workspace: Workspace, data: DataConfig, observer: Observer) -> dict[str, Any]:
    """Correct titles, texts and categories in the item table; returns what changed. Semantic IDs stay.

    Args:
        data: ``data.items`` is the product table.

    Raises:
        WorkspaceError: there is no stream, or it is damaged.
        DataError: see :func:`peso.events.append.correct_items`. The stream is then as before.
    """
    stream, ids = workspace.stream, workspace.semantic_ids_directory
    with commit_directory(workspace.stream_directory) as directory:
        done = correct_items(data, stream.directory, directory, observer)
        from peso.items.tokenize import extend_semantic_ids, lacks_tree

        if workspace.has_semantic_ids and lacks_tree(ids):  # the categories of now are the only record of it
            known = stream.items.slice(0, len(workspace.semantic_ids.item_ids))
            with commit_directory(ids) as kept:
                extend_semantic_ids(known, workspace.config.items, ids, kept, _vector_cache())
    return done


def tokenize(workspace: Workspace, observer: Observer) -> dict[str, Any]:
    """Give every item of the stream its semantic ID, into semantic_ids/; returns its manifest.

    Raises:
        WorkspaceError: there is no stream, or stages were trained on the IDs that are there.
        DataError, ConfigError: see :mod:`peso.items.tokenize` and :mod:`peso.items.imported`.
    """
    stream, config = workspace.stream, workspace.config
    check_configuration(workspace.config)
    _refuse_if_learnt(workspace, "semantic IDs")
    from peso.items.imported import adopt
    from peso.items.tokenize import tokenize as make_semantic_ids

    number = config.training.threads
    with threads(number=number), commit_directory(workspace.semantic_ids_directory) as directory:
        further = (config.items, directory, config.seed_of_data, _vector_cache(), observer)
        if config.items.index is not None:
            adopt(stream.items, read_release_index(config.items.index), config.items.index, *further)
        elif config.data.format == "peso-release":
            adopt(stream.items, read_release(str(config.data.path))[2], "index of the release", *further)
        else:
            make_semantic_ids(stream.items, *further, stream.first_stages())
    manifest = workspace.semantic_ids_manifest
    observer.note(
        f"tokenize: {manifest['items']:,} items, {manifest['distinct_ids']:,} distinct semantic IDs"
    )
    return manifest


def tokenize_new(workspace: Workspace, observer: Observer) -> dict[str, Any]:
    """Give the items that the stream has gained IDs from what is frozen; returns the manifest.

    Raises:
        WorkspaceError: there is no stream, or there are no semantic IDs to continue.
        DataError, ConfigError: as :func:`tokenize`. The IDs are then as before.
    """
    stream, ids = workspace.stream, workspace.semantic_ids_directory
    workspace.require_semantic_ids()
    new = workspace.items_without_id
    if new:
        from peso.items.tokenize import remember

        with commit_directory(ids) as directory:
            try:
                _continue_ids(workspace, stream, directory, observer)
            except (DataError, ConfigError) as error:
                raise type(error)(
                    f"{error}. Then repeat this; the item table is corrected by `peso ingest --items FILE -w "
                    f"{workspace.root}`. Or remove the appended stage: `peso undo -w {workspace.root}`"
                ) from None
            remember(ids, directory)
    observer.note(f"tokenize: {new:,} new items; no earlier ID changed")
    return workspace.semantic_ids_manifest


def _continue_ids(workspace: Workspace, stream: Stream, directory: Path, observer: Observer) -> None:
    """Fill a directory with the workspace's semantic IDs and those of the further items of ``stream``."""
    from peso.items.imported import adopt_more
    from peso.items.tokenize import extend_semantic_ids

    config, source = workspace.config.items, workspace.semantic_ids_directory
    further = (config, source, directory, _vector_cache(), observer)
    if config.index is not None:
        index = read_release_index(config.index, workspace.semantic_ids.sizes)
        adopt_more(stream.items, index, config.index, *further, seed=workspace.config.seed_of_data)
    else:
        extend_semantic_ids(stream.items, *further, stream.first_stages())


def export_index(
    workspace: Workspace, path: Path, stage: int | None = None, with_retired: bool = False
) -> int:
    """Write the semantic IDs as the ``index.json`` of released research code.

    Args:
        stage: of the items that were there when this stage came; None: of all.
        with_retired: of retired items too.

    Returns:
        How many retired items are left out.

    Raises:
        WorkspaceError: there are no semantic IDs, or the disk is full.
        DataError: the stream has no such stage.
        ExportError: the place is taken.
    """
    workspace.require_semantic_ids()
    require_place(path)
    if os.path.lexists(path):
        raise ExportError(f"{path} is there already; name a file that does not exist yet")
    ids = workspace.semantic_ids
    if stage is not None:
        stream = workspace.stream
        stream.stage(stage)  # raises for a stage that does not exist
        count = stream.items_known(stage)
        ids = SemanticIds(ids.item_ids[:count], ids.codes[:count], ids.sizes)
    never = {} if with_retired else retired(workspace.root)
    kept = [row for row, item in enumerate(ids.item_ids) if item not in never]
    write_release_index(SemanticIds([ids.item_ids[row] for row in kept], ids.codes[kept], ids.sizes), path)
    return len(ids.item_ids) - len(kept)


# -- training ----------------------------------------------------------------------------------------


def rehearse_stages(workspace: Workspace, observer: Observer) -> None:
    """Fetch the backbone if need be, and find what a stage would come upon, see :mod:`peso.runs.checks`."""
    check_configuration(workspace.config)
    check_surroundings(workspace)
    from peso.runs.learn import pull_backbone

    pull_backbone(workspace, observer)
    rehearse(workspace)


def learn(stage: RunStage, observer: Observer) -> None:
    """Learn one stage from where the last one left the model, and commit stages/{t}/.

    Interrupted, it continues from its newest checkpoint and ends with the same bits.

    Raises:
        WorkspaceError: the stage before is not learnt, or this one already is.
        TrainingError: see :func:`peso.training.loop.train_stage`.
    """
    current().on_main(partial(require_next, stage))
    require_device(stage.workspace.config.training.device)
    from peso.runs.learn import learn_stage

    learn_stage(stage, observer)


def update(workspace: Workspace, observer: Observer) -> int | None:
    """Train the next stage. Where evaluation is enabled, test it and the model before it on its test cases,
    let the gate decide, if that is on, and renew the report; an interrupted update is finished so.

    Returns:
        The stage that was trained or finished; None where nothing is left to do.

    Raises:
        WorkspaceError: stage 0 is not trained.
    """
    number, trained = current().on_main(partial(unfinished, workspace))
    if number is None:
        return None
    gated = workspace.config.gate.enabled
    if gated:
        current().on_main(partial(keep_serving, workspace))
    stage = workspace.stage(number)
    if not trained:
        learn(stage, observer)
    if workspace.config.evaluation.enabled:
        for later in range(1, number + 1):
            own = workspace.stage(later)
            if own.pruned is None and own.on(later).has_cases:  # else its test stays as it is
                test(own.on(later), observer)
        if stage.before.pruned is None and stage.on(number).has_cases:
            test(stage.before.on(number), observer)
        if gated:
            judge(stage, observer)
        current().on_main(partial(_conclude, workspace, observer))
    return number


def refuse_unused(workspace: Workspace) -> None:
    """Raise WorkspaceError where settings of later stages are new and :func:`update` has no stage to train
    with them, only one to finish."""
    number, trained = unfinished(workspace)
    if number is None or not trained:
        return
    changed = changed_shape(workspace.stage(number).config, workspace.config, number)
    if unused := [key for key in changed if is_later(key)]:
        raise WorkspaceError(
            f"{', '.join(unused)}: no stage is left to train with this. Stage {number} of {workspace.root} "
            "was trained with other settings; finish its tests and the report (`peso update -w "
            f"{workspace.root}`), or undo its training (`peso undo -w {workspace.root}`)"
        )


def unfinished(workspace: Workspace) -> tuple[int | None, bool]:
    """The stage that an update is about, None where nothing is left to do, and whether it is trained already.

    Raises WorkspaceError where stage 0 is not trained.
    """
    finished = workspace.finished_stages
    if not finished:
        raise WorkspaceError(
            f"{workspace.root} has no base stage yet; `peso train -w {workspace.root}` first"
        )
    newest = finished[-1]
    judged = not newest or not workspace.config.gate.enabled or is_judged(workspace.stage(newest))
    if not judged:
        return newest, True
    if newest + 1 < workspace.stream.stages:
        return newest + 1, False
    enabled = workspace.config.evaluation.enabled
    concluded = newest == 0 or not enabled or _is_reported(workspace.stage(newest))
    return (None if concluded else newest), True


def _is_reported(stage: RunStage) -> bool:
    """Whether a stage is tested, the model before it as well unless its weights were pruned, and the report
    newer than the tests."""
    page = stage.workspace.report_directory / "index.html"
    due = [stage.on(stage.number)]
    due += [stage.before.on(stage.number)] if stage.before.pruned is None else []
    return page.is_file() and all(
        tested.is_done and page.stat().st_mtime >= tested.path(METRICS).stat().st_mtime
        for tested in due
        if tested.has_cases
    )


def take_data(workspace: Workspace, source: Workspace, observer: Observer) -> None:
    """Take stream and semantic IDs over from another workspace (files are linked, not copied).

    Raises:
        WorkspaceError: the other has none yet, or something that determines them differs.
    """
    theirs, ours = source.config, workspace.config
    changed = [k for k in changed_keys(theirs, ours) if k.split(".")[0] in ("data", "items")]
    changed += ["data_seed"] if theirs.seed_of_data != ours.seed_of_data else []
    if changed:
        raise WorkspaceError(f"the data of {source.root} were made otherwise: {', '.join(changed)} differ")
    source.require_semantic_ids()
    _take_over(source.stream_directory, workspace.stream_directory, STREAM_FORMAT)
    _take_over(source.semantic_ids_directory, workspace.semantic_ids_directory, IDS_FORMAT)
    observer.note(f"stream and semantic IDs: taken over from {source.root}")


def take_base(workspace: Workspace, base: Workspace, observer: Observer) -> None:
    """Take stage 0 over from another workspace instead of learning it again, and the stages after it as long
    as they would be the same (files are linked, not copied).

    Raises:
        WorkspaceError: the other has no stage 0, or something that determines it differs.
    """
    _refuse_base(workspace, base)
    if base.stage(0).determined_by != workspace.stage(0).determination(like=base.stage(0).config):
        raise _other_base(base, "its semantic IDs differ")
    for number in range(workspace.stream.stages):
        theirs, ours = base.stage(number), workspace.stage(number)
        if ours.is_trained:
            continue
        if (
            not theirs.is_trained
            or theirs.pruned
            or theirs.determined_by != ours.determination(like=theirs.config)
        ):
            break
        _take_over(theirs.directory, ours.directory, FORMAT)
        observer.note(f"stage {number}: taken over from {base.root}")


def _refuse_base(workspace: Workspace, base: Workspace) -> None:
    """Raise WorkspaceError where configurations and data show that stage 0 of ``base`` is another one, or
    where its weights were pruned."""
    base.trained(0).require_weights()
    if changed := changed_shape(base.trained(0).config, workspace.config, 0):
        told = (f"{key} is {there} there and {here} here" for key, (there, here) in changed.items())
        raise _other_base(base, ", ".join(told))
    if workspace.has_stream and base.stream.fingerprint(0) != workspace.stream.fingerprint(0):
        raise _other_base(base, "its data differ")


def _other_base(base: Workspace, why: str) -> WorkspaceError:
    return WorkspaceError(
        f"stage 0 of {base.root} is not the one that this run would train: {why}; leave --base out, or make "
        "them equal"
    )


def require_catalogue(workspace: Workspace) -> None:
    """Refuse lists longer than the catalogue, and segments it does not know, before anything long starts."""
    asked, ids = max(workspace.config.evaluation.k), workspace.semantic_ids
    if workspace.config.evaluation.enabled and asked > ids.trie.leaves:
        raise DataError(
            f"evaluation.k asks for {asked} items, but the catalogue has {ids.trie.leaves} distinct semantic "
            "IDs; ask for fewer"
        )
    if workspace.config.report.segments:
        known = catalogue(workspace)
        for column in workspace.config.report.segments:
            known.require_column(column)


def _vector_cache() -> Path:
    return assets.cache_directory() / "vectors"


def require_next(stage: RunStage) -> None:
    """Raise WorkspaceError unless this stage is the next one to train."""
    workspace, number = stage.workspace, stage.number
    workspace.require_semantic_ids()
    if new := workspace.items_without_id:
        raise WorkspaceError(
            f"{new:,} items of the stream in {workspace.root} have no semantic ID yet; "
            f"`peso tokenize --append -w {workspace.root}` comes first"
        )
    if stage.is_trained:
        raise WorkspaceError(
            f"stage {number} of {workspace.root} is trained already; `peso undo -w {workspace.root}` removes "
            "the last stage"
        )
    if number and not stage.before.is_trained:
        raise WorkspaceError(
            f"stage {number} of {workspace.root} starts from stage {number - 1}, which is not trained yet"
        )


def _refuse_if_learnt(workspace: Workspace, what: str) -> None:
    if workspace.finished_stages:
        raise WorkspaceError(
            f"stages {workspace.finished_stages} of {workspace.root} were trained on the {what} there; "
            "take a new workspace (-w) for other data"
        )


def _take_over(source: Path, target: Path, number: int) -> None:
    """Link the files of a finished directory into another place, each checked first, and its manifest."""
    with commit_directory(target) as directory:
        while True:
            manifest = read_manifest(source, number)
            for name in manifest["files"]:
                (directory / name).unlink(missing_ok=True)
                link(intact(source, name, manifest), directory / name)
            if read_manifest(source, number) == manifest:  # else a test has replaced files meanwhile
                break
        write_manifest(directory, number, manifest, manifest["files"])

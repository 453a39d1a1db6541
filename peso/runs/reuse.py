"""Taking over stream, semantic IDs and stages from another workspace; files are linked, not copied."""

from __future__ import annotations

from pathlib import Path

from peso.config import changed_keys
from peso.config.shape import changed_shape
from peso.errors import WorkspaceError
from peso.events.stream import FORMAT as STREAM_FORMAT
from peso.items.semantic_ids import FORMAT as IDS_FORMAT
from peso.runs.stage import FORMAT
from peso.runs.workspace import Workspace
from peso.runtime.files import commit_directory, link
from peso.runtime.manifest import intact, read_manifest, write_manifest
from peso.runtime.progress import Observer


def take_data(workspace: Workspace, source: Workspace, observer: Observer) -> None:
    """Take over stream and semantic IDs from another workspace.

    Raises:
        WorkspaceError: the other workspace does not have them, or made them with other settings.
    """
    theirs, ours = source.config, workspace.config
    changed = [k for k in changed_keys(theirs, ours) if k.split(".")[0] in ("data", "items")]
    changed += ["data_seed"] if theirs.seed_of_data != ours.seed_of_data else []
    if changed:
        raise WorkspaceError(
            f"the data of {source.root} were made with other settings: {', '.join(changed)} differ; make the "
            "settings equal"
        )
    source.require_semantic_ids()
    _link_directory(source.stream_directory, workspace.stream_directory, STREAM_FORMAT)
    _link_directory(source.semantic_ids_directory, workspace.semantic_ids_directory, IDS_FORMAT)
    observer.note(f"stream and semantic IDs: taken over from {source.root}")
    workspace.choose_sizes(observer)


def take_base(workspace: Workspace, base: Workspace, observer: Observer) -> None:
    """Take over stage 0 from another workspace, and the stages after it that would be identical.

    Raises:
        WorkspaceError: the other workspace has no stage 0, or it would not be identical.
    """
    refuse_base(workspace, base)
    if base.stage(0).determined_by != workspace.stage(0).determination(like=base.stage(0).config):
        raise _different_base(base, "its semantic IDs differ")
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
        _link_directory(theirs.directory, ours.directory, FORMAT)
        observer.note(f"stage {number}: taken over from {base.root}")


def refuse_base(workspace: Workspace, base: Workspace) -> None:
    """Raise WorkspaceError if configurations and data show that stage 0 of ``base`` is different, or if its
    weights were pruned."""
    base.trained(0).require_weights()
    auto = workspace.config.backbone.is_auto  # compared again once the sizes are known
    if not auto and (changed := changed_shape(base.trained(0).config, workspace.config, 0)):
        differences = (f"{key} is {there} there and {here} here" for key, (there, here) in changed.items())
        raise _different_base(base, ", ".join(differences))
    if workspace.has_stream and base.stream.fingerprint(0) != workspace.stream.fingerprint(0):
        raise _different_base(base, "its data differ")


def _different_base(base: Workspace, why: str) -> WorkspaceError:
    return WorkspaceError(
        f"stage 0 of {base.root} is not the one that this run would train: {why}; leave --base out, or make "
        "the settings equal"
    )


def _link_directory(source: Path, target: Path, number: int) -> None:
    """Link the files of a finished directory and copy its manifest; each file is checked first.

    Args:
        number: the format number of the manifest.
    """
    with commit_directory(target) as directory:
        while True:
            manifest = read_manifest(source, number)
            for name in manifest["files"]:
                (directory / name).unlink(missing_ok=True)
                link(intact(source, name, manifest), directory / name)
            if read_manifest(source, number) == manifest:  # otherwise an evaluation replaced files meanwhile
                break
        write_manifest(directory, number, manifest, manifest["files"])

"""Which changes of a workspace's configuration are refused, because finished steps depend on the old values.

There are two checks: :func:`refuse_changes` compares a new configuration with the steps that are done, and
:func:`refuse_edits` compares config.yaml with the steps, in case somebody edited it. Keys of evaluation,
decoding and report may always change. What a trained stage depends on is in :mod:`peso.config.shape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peso.config import Config, changed_keys
from peso.config.parsing import shown
from peso.config.reading import MOST_PROBLEMS
from peso.config.shape import Changes, changed_data, changed_items, changed_shape, is_later
from peso.errors import WorkspaceError
from peso.runs.place import CONFIG

if TYPE_CHECKING:
    from peso.runs.workspace import Workspace

# sections and keys that cannot change once the step is done
DEPENDS = {"stream": ("data", "seed", "data_seed"), "semantic IDs": ("data", "seed", "data_seed", "items")}
PATHS = {"data.path", "data.items.path"}


def refuse_changes(workspace: Workspace, config: Config, *, later: bool = False, anew: str = "") -> None:
    """Raise WorkspaceError if ``config`` changes a key on which a finished step depends.

    Args:
        later: settings of later stages may change.
        anew: ``stream`` or ``semantic IDs``: this step is about to be repeated.
    """
    for stage in reversed(workspace.stages):
        changed = changed_shape(stage.config, config, stage.number)
        fixed = [key for key in changed if not (later and is_later(key))]
        _refuse_change(workspace.root, fixed, f"stage {stage.number} was trained")
    keys = changed_keys(workspace.config, config)
    for done, step in ((workspace.has_semantic_ids, "semantic IDs"), (workspace.has_stream, "stream")):
        fixed = [key for key in keys if key.split(".")[0] in DEPENDS[step]]
        if done and anew not in (step, "stream"):
            _refuse_change(workspace.root, fixed, f"its {step} were made")


def refuse_edits(workspace: Workspace, anew: str) -> None:
    """Raise WorkspaceError if config.yaml does not match the finished steps, or one of their results is
    missing.

    Args:
        anew: see :func:`refuse_changes`.
    """
    root, trained = workspace.root, workspace.finished_stages
    for place in (workspace.stream_directory, workspace.semantic_ids_directory):
        replaced = place.with_name(f".{place.name}.old")  # after a crash, restored by the next writer
        if trained and not place.is_dir() and not replaced.is_dir():
            raise WorkspaceError(
                f"{place} is missing, on which stages {trained} were trained; restore it from a copy, or "
                "use a new workspace (-w)"
            )
    for stage in workspace.stages:
        changed = changed_shape(stage.config, workspace.config, stage.number)
        edits = {key: both for key, both in changed.items() if not is_later(key)}
        cure = ", or use a new workspace (-w) to train with the new ones"
        _refuse_edit(root, edits, f"stage {stage.number} was trained", cure)
    new_workspace = ", or use a new workspace (-w) for the new ones"
    if workspace.has_stream and (trained or anew != "stream"):
        stream = workspace.stream.manifest
        again = f", or read the data again: `peso ingest -w {root}`"
        cure = new_workspace if trained or "appended" in stream else again
        edits = changed_data(stream, workspace.config)
        if any(key.startswith("data.") for key in edits):
            cure += (
                ". To add new events, with other settings of `data` if needed: `peso ingest NEW --append "
                f"--set … -w {root}`"
            )
        _refuse_edit(root, edits, "its stream was made", cure)
    if workspace.has_semantic_ids and (trained or not anew):
        cure = new_workspace if trained else f", or make the IDs again: `peso tokenize -w {root}`"
        edits = changed_items(workspace.semantic_ids_manifest, workspace.config)
        _refuse_edit(root, edits, "its semantic IDs were made", cure)


def _refuse_edit(root: Path, edits: Changes, since: str, cure: str) -> None:
    if edits:
        listed = [f"{key} was {shown(then)}, is {shown(now)}" for key, (then, now) in edits.items()]
        listed[MOST_PROBLEMS:] = [f"and {len(listed) - MOST_PROBLEMS} more"] * (len(listed) > MOST_PROBLEMS)
        raise WorkspaceError(
            f"{root / CONFIG} was edited after {since}: {'; '.join(listed)}. Restore the old values{cure}"
        )


def _refuse_change(root: Path, fixed: Sequence[str], since: str) -> None:
    if not fixed:
        return
    message = (
        f"the configuration of {root} has changed since {since}: {', '.join(fixed)}. Restore the old values "
        f"(see {root / CONFIG}), or use a new workspace with -w (--base takes over the stages that stay the "
        f"same), or remove {root}. Keys of evaluation, decoding and report may change."
    )
    if all(map(is_later, fixed)):
        message += f" To train the next stage with other settings: `peso update -w {root} --set …`."
    if "data.path" in fixed and set(fixed) <= PATHS:
        message += (
            " If the path points to new events, add them as further stages: "
            f"`peso ingest NEW --append -w {root}`. If the same data were moved: "
            f"`peso run {root / CONFIG} -w {root}`."
        )
    raise WorkspaceError(message)

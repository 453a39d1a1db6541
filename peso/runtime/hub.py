"""Download models and data sets from the Hugging Face hub into the cache of its client, and upload models.

If ``HF_HUB_OFFLINE`` is set, only the cache is used. The client's own variables apply: ``HF_ENDPOINT``,
``HF_TOKEN``, ``HF_HOME``.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from peso.errors import AssetError, ExportError
from peso.runtime.downloads import TIMEOUT, Progress
from peso.runtime.failures import first_line, listed

if TYPE_CHECKING:
    from huggingface_hub import HfUri

HUB = "hf://"
# the files of a model that Transformers and sentence-transformers read; code is never downloaded
READ = {".json", ".txt", ".model", ".jinja", ".md", ".tiktoken"}
WEIGHTS = (".safetensors", ".bin")  # the first of these that a model has is downloaded
OTHER_FORMATS = {"onnx", "openvino", "coreml", "original", "metal"}  # folders with the same weights again
REPLACED = ["*.safetensors", "*.json", "*.jinja"]  # files of an earlier export that an upload removes


def place_of(name: str) -> HfUri:
    """The repository that a name refers to.

    Args:
        name: ``owner/model`` or ``datasets/owner/name``, optionally with ``hf://`` before it and
            ``@revision`` after it. A data set may be followed by a path or a pattern within it.

    Raises:
        AssetError: the name has another form.
    """
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        place = parse_hf_uri(name if name.startswith(HUB) else HUB + name)
    except HfUriError as error:
        raise AssetError(f"{error}; give owner/model, or datasets/owner/name") from None
    if place.type not in ("model", "dataset"):
        raise AssetError(f"{name} is a {place.type}; give owner/model, or datasets/owner/name")
    if place.type == "model" and place.path_in_repo:
        raise AssetError(
            f"{name} has a path; give a model as owner/model, and a data set as datasets/owner/name"
        )
    return place


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Fetch a model, a data set or a part of one into the cache of the hub's client, unless it is there.

    A branch (``main``, if no revision is given) is looked up anew each time; a commit, and everything if
    ``HF_HUB_OFFLINE`` is set, is taken from the cache where it is complete.

    Args:
        name: see :func:`place_of`.
        progress: called with a description of the current step and the share of it that is done (0 to 1).

    Returns:
        The folder of the files; if the name has a path or a pattern, this path or pattern in the folder.

    Raises:
        AssetError: there is no such repository or path, or it cannot be fetched; the message says what to do.
    """
    from huggingface_hub import snapshot_download

    place, tell = place_of(name), progress or (lambda text, share: None)
    sizes = _listed(place)
    wanted = _of_model(name, sizes) if place.type == "model" else _of_path(name, place.path_in_repo, sizes)
    total = sum(sizes[file] for file in wanted)
    label = f"hub, {place.id}: {len(wanted):,} files" + (f", {total / 1e6:,.1f} MB" if total else "")
    tell(label, 0.0)
    try:
        folder = snapshot_download(
            place.id,
            repo_type=place.type,
            revision=place.revision,
            allow_patterns=[glob.escape(file) for file in wanted],
            tqdm_class=_bars(lambda done: tell(label, min(1.0, done / max(1, total)))),
        )
    except Exception as error:  # without a connection, errors of the client's own HTTP library
        raise AssetError(_explained(place, error)) from error
    tell(label, 1.0)
    return Path(folder) / place.path_in_repo


def require_name(name: str) -> None:
    """Check the name of a model to upload: before an export, which takes a while.

    Raises:
        ExportError: it is neither ``owner/model`` nor ``model``, or the hub does not allow it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ExportError(
            f"{name!r} cannot be the name of a model ({first_line(error)}); give OWNER/MODEL, or MODEL for "
            "your own"
        ) from None


def account() -> str:
    """The name of the user who is logged in. It is checked before an export, which takes a while.

    Raises:
        ExportError: ``HF_HUB_OFFLINE`` is set, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        raise ExportError("HF_HUB_OFFLINE does not allow uploads; unset it, or export to a directory with -o")
    try:
        return str(HfApi().whoami()["name"])
    except Exception as error:
        raise ExportError(
            f"the hub does not accept an upload ({first_line(error)}); log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write"
        ) from error


def upload(folder: Path, name: str, message: str, *, private: bool) -> str:
    """Upload an exported model in one commit, which also removes files of an earlier export.

    Args:
        folder: the exported model.
        name: ``owner/model``, or ``model`` for the user's own.
        private: whether a new repository is private; an existing one does not change.

    Returns:
        The address of the model.

    Raises:
        ExportError: the hub refuses the upload, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        there = api.list_repo_files(repository.repo_id)
        left = [file for file in there if any(fnmatchcase(file, each) for each in REPLACED)]
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, file) for name, file in files.items()),
            *(CommitOperationDelete(file) for file in left if file not in files),
        ]
        # not upload_folder, which may make several commits
        api.create_commit(repository.repo_id, changes, commit_message=message)
    except Exception as error:
        raise ExportError(
            f"{name} was not uploaded ({first_line(error)}); check the name and that the token may write, "
            "and run the command again"
        ) from error
    return str(repository)


def _listed(place: HfUri) -> dict[str, int]:
    """The files of a repository and their sizes, from the cache if the hub cannot be reached."""
    from huggingface_hub import HfApi, get_cached_repo_tree, is_offline_mode

    revision: dict[str, Any] = {"repo_type": place.type, "revision": place.revision}
    reason: Exception | None = None
    if not is_offline_mode():
        try:
            found: Any = HfApi().repo_info(place.id, timeout=TIMEOUT, files_metadata=True, **revision)
            return {file.rfilename: file.size or 0 for file in found.siblings or ()}
        except Exception as error:
            if getattr(error, "response", None) is not None:  # the hub has answered
                raise AssetError(_explained(place, error)) from error
            reason = error
    try:
        return {file.path: file.size for file in get_cached_repo_tree(place.id, **revision)}
    except Exception:
        why = "HF_HUB_OFFLINE does not allow downloads; unset it"
        if reason is not None:
            why = f"the hub cannot be reached ({first_line(reason)}); check the connection"
        raise AssetError(f"{place.id} is not in the cache, and {why} and try again") from reason


def _of_model(name: str, sizes: dict[str, int]) -> list[str]:
    """The files of a model that are read: weights in one format, configuration and tokenizer."""
    paths = [PurePosixPath(file) for file in sizes]
    kept = [path for path in paths if not {*path.parts[:-1]} & OTHER_FORMATS]
    for kind in WEIGHTS:
        weights = [p for p in kept if p.suffix == kind and not p.name.startswith("consolidated")]
        if weights:
            return sorted(str(p) for p in [*weights, *(p for p in kept if p.suffix in READ)])
    known = ", ".join(sorted({p.suffix for p in paths if p.suffix})) or "none"
    raise AssetError(
        f"{name} has no weights in {' or '.join(WEIGHTS)} (its files: {known}); use another model"
    )


def _of_path(name: str, path: str, sizes: dict[str, int]) -> list[str]:
    """The files of a data set at a path, below it, or that match it as a pattern."""
    files = [file for file in sizes if not file.startswith(".")]
    # what exists is not a pattern, whatever characters its name has
    wanted = [file for file in files if not path or file == path or file.startswith(f"{path}/")]
    wanted = wanted or [file for file in files if fnmatchcase(file, path)]
    if not wanted:
        raise AssetError(f"{name}: the data set has no {path or 'files'}; it has {listed(files) or 'none'}")
    return wanted


def _bars(tell: Callable[[int], None]) -> type[Any]:
    """A progress bar for the hub's client that draws nothing and reports the bytes that were read."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self.counts = options.get("unit") == "B"
            self.done = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            if self.counts:
                tell(self.done)

    return Bar


def _explained(place: HfUri, error: Exception) -> str:
    from huggingface_hub import errors

    what = f"{'data set' if place.type == 'dataset' else place.type} {place.id}"
    if isinstance(error, errors.GatedRepoError):
        return f"the {what} is gated: accept its terms at {place.to_url()}, and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the {what} has no revision {place.revision!r}; correct it, or leave it out"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no {what}, or it is private; check the name, and log in with `hf auth login` if it "
            "is private"
        )
    return f"the {what} cannot be fetched ({first_line(error)}); check the connection, and try again"

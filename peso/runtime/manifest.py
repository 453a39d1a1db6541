"""Manifests: the description of the files in a directory, with their format version and sha256.

A file that a manifest lists is checked against its sha256 whenever it is loaded (:func:`intact`). A manifest
also has a sha256 of its own content, unless an older version wrote it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peso.errors import DataError, WorkspaceError
from peso.runtime.failures import sentence
from peso.runtime.files import checksum, json_text, read_json_and_text, write_aside, write_atomically
from peso.runtime.records import require_known_format

MANIFEST = "manifest.json"
FILES, OWN = "files", "sha256"
# Files that are about to be replaced, with their new sha256. Until the manifest is written again, both the
# old and the new file count as intact, so that a crash at any point does no harm.
REPLACING = "replacing"

# The types of the values that are read from manifests.
KINDS: dict[type, tuple[str, ...]] = {
    dict: (
        *(FILES, REPLACING, "parent", "inputs", "configuration", "baseline", "settings", "config"),
        *("quality", "fitness"),
    ),
    list: ("stages", "sizes", "appended"),
    int: ("stage", "items", "distinct_ids", "tokens_in_use", "trained_parameters", "bytes_on_disk"),
    str: ("determined_by", "backbone_sha256", OWN),
}
NULL = ("parent", "config")  # these may be null


class Manifest(dict[str, Any]):
    """The content of a directory's manifest. A missing key raises a WorkspaceError that names both."""

    def __init__(self, directory: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.directory = directory

    def __missing__(self, key: str) -> Any:
        raise WorkspaceError(f"{self.directory / MANIFEST} is damaged (no {key!r}); {_cure(self.directory)}")


def write_manifest(
    directory: Path, number: int, content: Mapping[str, Any], known: Mapping[str, str] | None = None
) -> None:
    """Write ``manifest.json`` with ``content``, the format version and the files' checksums.

    Write it after all other files of the directory.

    Args:
        directory: the directory that the manifest describes.
        number: the version of the format.
        content: what to write besides the format version and the checksums.
        known: checksums of files that another step has written; they are not computed again.
    """
    found = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    names = [str(path.relative_to(directory)) for path in found]
    known = known or {}
    files = {name: known[name] if name in known else checksum(directory / name) for name in names}
    _write(directory, {**content, "format": number, FILES: files})


@contextmanager
def replace_file(directory: Path, name: str, number: int) -> Iterator[Path]:
    """Yield a temporary path that replaces a file of a finished directory on success.

    The manifest then lists the new file. If the process is killed at any point, all files still match the
    manifest.
    """
    with write_aside(directory / name) as aside:
        yield aside
        new = checksum(aside)
        manifest = read_manifest(directory, number)
        files, replacing = dict(manifest[FILES]), dict(manifest.get(REPLACING, {}))
        begun = replacing.get(name)  # from a step that was killed
        if begun is not None and (directory / name).is_file() and checksum(directory / name) == begun:
            files[name] = begun
        _write(directory, {**manifest, FILES: files, REPLACING: {**replacing, name: new}})
    replacing.pop(name, None)
    _write(directory, {**manifest, FILES: {**files, name: new}, REPLACING: replacing})


def remove_folder(directory: Path, name: str, number: int) -> None:
    """Remove a folder of a finished directory, after removing its files from the manifest."""
    manifest = read_manifest(directory, number)
    kept = {
        key: {file: sha256 for file, sha256 in manifest[key].items() if not file.startswith(f"{name}/")}
        for key in (FILES, REPLACING)
        if key in manifest
    }
    _write(directory, {**manifest, **kept})
    shutil.rmtree(directory / name, ignore_errors=True)


def take_out(
    directory: Path, names: Sequence[str], number: int, entry: Mapping[str, Mapping[str, Any]]
) -> None:
    """Remove files from the manifest of a finished directory, before the files are removed.

    Args:
        names: the names of the files.
        number: the version of the format.
        entry: an entry to add to the manifest, as one key and its value. The value gets the checksums of the
            files as ``files``, in addition to those from an interrupted call.
    """
    manifest = read_manifest(directory, number)
    gone = {name: sha256 for name, sha256 in manifest[FILES].items() if name in names}
    kept = {name: sha256 for name, sha256 in manifest[FILES].items() if name not in names}
    extra = {
        key: {**value, FILES: {**manifest.get(key, {}).get(FILES, {}), **gone}}
        for key, value in entry.items()
    }
    _write(directory, {**manifest, **extra, FILES: kept})


def _write(directory: Path, content: Mapping[str, Any]) -> None:
    content = {key: value for key, value in content.items() if key != OWN and (key, value) != (REPLACING, {})}
    write_atomically(directory / MANIFEST, json_text({**content, OWN: _own(content)}).encode())


def _own(content: Mapping[str, Any]) -> str:
    return _sha256(json_text(content))


def _states_its_own(content: Mapping[str, Any], text: str) -> bool:
    """Whether the sha256 in a manifest is that of the other content.

    Manifests are read often, so the text itself is checked first: it is usually as :func:`_write` wrote it,
    and to write the content again takes several times as long as to read it.
    """
    stated = content[OWN]
    if _sha256(text.removesuffix(f',\n  "{OWN}": "{stated}"\n}}\n') + "\n}\n") == stated:
        return True
    return bool(_own({key: value for key, value in content.items() if key != OWN}) == stated)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(directory: Path, number: int) -> Manifest:
    """Read the manifest of a directory.

    Args:
        directory: the directory that the manifest describes.
        number: the newest version of the format that this version of peso can read.

    Raises:
        WorkspaceError: the manifest is missing or damaged, or a newer version of peso wrote it.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise WorkspaceError(f"{path} is missing; {_cure(directory)}")
    try:
        content, text = read_json_and_text(path)
        require_known_format(path, content["format"], number)
        if content.get(OWN) is not None and not _states_its_own(content, text):
            raise ValueError("its content does not match its own sha256")
        if type(content["format"]) is not int or content["format"] < 1:
            raise ValueError("the format version is not a number")
        for kind, keys in KINDS.items():
            for key in keys:
                value = content.get(key, kind())
                is_empty = key in content and value == []
                if is_empty or (type(value) is not kind and (key not in NULL or value is not None)):
                    raise ValueError(f"{key} has an invalid value")
        if not isinstance(content.get("source", ""), dict | str):  # of data, or of an imported index
            raise ValueError("source has an invalid value")
        if not all(isinstance(value, str) for value in content[FILES].values()):
            raise ValueError("a checksum is not a string")
    except KeyError as error:
        raise WorkspaceError(f"{path} is damaged (no {error}); {_cure(directory)}") from None
    except (DataError, ValueError) as error:
        if isinstance(error.__cause__, OSError) and path.is_file():  # the file itself may be intact
            raise WorkspaceError(sentence(error.__cause__)) from None
        raise WorkspaceError(f"{path} is damaged ({error}); {_cure(directory)}") from None
    return Manifest(directory, content)


def intact(directory: Path, name: str, manifest: Mapping[str, Any], cure: str = "") -> Path:
    """The path of a file, after checking that its checksum is the one in the manifest.

    Args:
        directory: the directory of the file.
        name: the name of the file in the manifest.
        manifest: the manifest of the directory.
        cure: what the user should do if the file is damaged; by default, create the directory again.

    Raises:
        WorkspaceError: the file is not listed, is missing, or has changed since the manifest was written.
    """
    path, cure = directory / name, cure or _cure(directory)
    try:
        found = checksum(path)
    except FileNotFoundError:
        raise WorkspaceError(f"{path} is missing; {cure}") from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise WorkspaceError(f"{path} cannot be read: {error.strerror}; {cure}") from None
    except OSError as error:  # the file itself may be intact
        raise WorkspaceError(sentence(error)) from None
    if found not in _checksums_of(name, manifest):
        # another process may have replaced it since the manifest was read
        now = read_manifest(directory, manifest["format"])
        if found not in _checksums_of(name, now):
            raise WorkspaceError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}; {cure}")
    return path


def all_intact(directory: Path, parts: Sequence[str], manifest: Mapping[str, Any]) -> None:
    """Check every listed file of some parts of a directory, and that the parts have no other files.

    Args:
        directory: the directory that the manifest describes.
        parts: names of files, or of folders with all their files.
        manifest: the manifest of the directory.

    Raises:
        WorkspaceError: as for :func:`intact`; or the manifest does not list a file of these parts.
    """
    listed = {name for name in manifest[FILES] if name.split("/")[0] in parts}
    for name in sorted(listed):
        intact(directory, name, manifest)
    for part in parts:
        path = directory / part
        for found in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = str(found.relative_to(directory))
            if found.is_file() and name not in listed and not found.name.startswith("."):
                raise WorkspaceError(f"{found} does not belong there: {MANIFEST} does not list it; remove it")


def is_listed(directory: Path, name: str, manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest lists a file, or a step that was killed has already written it."""
    return name in manifest[FILES] or (name in manifest.get(REPLACING, {}) and (directory / name).is_file())


def _checksums_of(name: str, manifest: Mapping[str, Any]) -> list[str]:
    return [files[name] for files in (manifest[FILES], manifest.get(REPLACING, {})) if name in files]


def _cure(directory: Path) -> str:
    return (
        f"restore it from a copy (if nothing was made from {directory} yet, you can also remove that "
        "directory and repeat the step)"
    )

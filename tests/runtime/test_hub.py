"""Models and data sets of the hub by name, against a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, running_hub

from peso.errors import AssetError, ExportError
from peso.runtime import hub as client

MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights",
    "consolidated.safetensors": b"the same weights",
    "onnx/model.onnx": b"the same weights",
    "onnx/config.json": b"{}",
    "modeling.py": b"raise SystemExit('code is never fetched')",
    "1_Pooling/config.json": b"{}",
    "tokenizer.json": b"{}",
    "README.md": b"# a model",
}
DATA = {
    "README.md": b"# a data set",
    ".gitattributes": b"",
    "data/train-0.csv": b"user,item,time\n",
    "data/train-1.csv": b"user,item,time\n",
    "data/test.csv": b"user,item,time\n",
    "other/x.csv": b"",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as running:
        running.repositories |= {"models/owner/model": dict(MODEL), "datasets/owner/shop": dict(DATA)}
        running.use(monkeypatch, tmp_path / "cache")
        yield running


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_of_a_model_only_what_is_read_is_fetched(hub: Hub) -> None:
    told: list[tuple[str, float]] = []
    folder = client.fetch("owner/model", lambda text, share: told.append((text, share)))
    assert files(folder) == {
        "config.json",
        "model.safetensors",
        "1_Pooling/config.json",
        "tokenizer.json",
        "README.md",
    }
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert told[-1][1] == 1.0
    assert "owner/model: 5 files" in told[0][0]


def test_a_model_with_weights_of_the_earlier_format_only(hub: Hub) -> None:
    del hub.repositories["models/owner/model"]["model.safetensors"]
    del hub.repositories["models/owner/model"]["consolidated.safetensors"]
    assert "pytorch_model.bin" in files(client.fetch("owner/model"))


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("", {"README.md", "data/train-0.csv", "data/train-1.csv", "data/test.csv", "other/x.csv"}),
        ("/data", {"data/train-0.csv", "data/train-1.csv", "data/test.csv"}),
        ("/data/train-*.csv", {"data/train-0.csv", "data/train-1.csv"}),
        ("/data/test.csv", {"data/test.csv"}),
    ],
)
def test_of_a_data_set_the_files_at_its_path_are_fetched(hub: Hub, path: str, wanted: set[str]) -> None:
    found = client.fetch(f"hf://datasets/owner/shop{path}")
    assert str(found).endswith(path)
    (snapshot,) = (Path(hub_cache(found)) / "snapshots").iterdir()
    assert files(snapshot) == wanted


def hub_cache(found: Path) -> Path:
    return next(path for path in [found, *found.parents] if path.name == "datasets--owner--shop")


def test_offline_nothing_is_asked_and_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = client.fetch("owner/model")
    offline(monkeypatch)
    hub.asked.clear()
    assert client.fetch("owner/model") == folder
    with pytest.raises(AssetError, match=r"owner/shop is not in the cache, and HF_HUB_OFFLINE .* unset it"):
        client.fetch("datasets/owner/shop")
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE does not allow uploads"):
        client.account()
    assert hub.asked == []


def test_a_hub_out_of_reach_leaves_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = client.fetch("owner/model")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert client.fetch("owner/model") == folder
    with pytest.raises(AssetError, match=r"cannot be reached \(.*check the connection"):
        client.fetch("datasets/owner/shop")


def test_a_new_revision_is_noticed_and_an_old_one_can_be_asked_for(hub: Hub) -> None:
    client.fetch("owner/model")
    hub.repositories["models/owner/model"]["model.safetensors"] = b"other weights"
    assert (client.fetch("owner/model") / "model.safetensors").read_bytes() == b"other weights"
    revision = hub.revision("models/owner/model")
    assert client.fetch(f"owner/model@{revision}").name == revision


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("owner/nothing", "the hub has no model owner/nothing, or it is private; check the name"),
        ("datasets/owner/nothing", "the hub has no data set owner/nothing"),
        ("owner/model@v9", "the model owner/model has no revision 'v9'"),
        ("datasets/owner/shop/dta", "has no dta; it has README.md, data/train-0.csv"),
        ("owner/model/config.json", "has a path; give a model as owner/model"),
        ("spaces/owner/app", "is a space; give owner/model"),
        ("owner/", "give owner/model, or datasets/owner/name"),
    ],
)
def test_what_there_is_not_is_told_with_a_cure(hub: Hub, name: str, told: str) -> None:
    with pytest.raises(AssetError) as raised:
        client.fetch(name)
    assert told in str(raised.value)


def test_a_model_without_weights_is_refused(hub: Hub) -> None:
    hub.repositories["models/owner/gguf"] = {"model.gguf": b"", "config.json": b""}
    with pytest.raises(AssetError, match=r"owner/gguf has no weights in \.safetensors or \.bin"):
        client.fetch("owner/gguf")


# -- uploads ------------------------------------------------------------------------------------------------


def export(folder: Path, **content: bytes) -> Path:
    for name, held in {"README.md": b"---\ntags: [peso]\n---\n", **content}.items():
        (folder / name.replace("__", "/")).parent.mkdir(parents=True, exist_ok=True)
        (folder / name.replace("__", "/")).write_bytes(held)
    return folder


def test_an_upload_is_one_commit_and_comes_back(hub: Hub, tmp_path: Path) -> None:
    first = export(tmp_path / "1", **{"model.safetensors": b"1", "transitions.safetensors": b"1"})
    address = client.upload(first, "me/games", "stage 1", private=True)
    assert address == f"{hub.endpoint}/me/games"
    assert hub.private["models/me/games"]
    hub.repositories["models/me/games"]["LICENSE"] = b"mine"
    second = export(tmp_path / "2", **{"model.safetensors": b"2"})
    client.upload(second, "me/games", "stage 2", private=True)
    assert hub.messages == ["stage 1", "stage 2"]
    assert set(hub.repositories["models/me/games"]) == {"README.md", "model.safetensors", "LICENSE"}
    assert (client.fetch("me/games") / "model.safetensors").read_bytes() == b"2"


def test_an_upload_that_is_refused_says_why(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(tmp_path / "1", **{"model.safetensors": b"1"})
    assert client.account() == "me"
    with pytest.raises(ExportError, match=r"other/games was not uploaded \(.*403.*the token may write"):
        client.upload(folder, "other/games", "stage 1", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ExportError, match="log in with `hf auth login`") as raised:
        client.account()
    assert "hf_wrong" not in str(raised.value)
    assert hub.messages == []

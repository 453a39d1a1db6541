"""Vectors from pretrained models, from the cache and from files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from peso.errors import ConfigError, DataError
from peso.items.language_model import load_text_encoder
from peso.items.vector_files import read_vectors
from peso.items.vectors import encode_cached
from peso.model.backbone import byte_tokenizer, small_llama

IDS = ["a", "b", "c"]
MATRIX = np.arange(6, dtype=np.float32).reshape(3, 2) + 1


class Counting:
    """An encoder that counts the texts it is given; a vector tells the length of its text."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return np.array([[len(text), 1] for text in texts], np.float32)


def cached(texts: list[str], encode: Counting, folder: Path | None, name: str = "x") -> np.ndarray:
    return encode_cached(texts, encode, (name,), folder, lambda done, total: None)


def test_a_second_run_encodes_only_new_texts(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    cached(["tea", "hammer", "tea"], first, tmp_path)
    vectors = cached(["nail", "tea", "hammer"], second, tmp_path)
    assert sorted(first.texts) == ["hammer", "tea"]
    assert second.texts == ["nail"]
    assert vectors[:, 0].tolist() == [4, 3, 6]


def test_another_encoder_finds_nothing_in_the_cache(tmp_path: Path) -> None:
    cached(["tea"], Counting(), tmp_path, "one")
    other = Counting()
    cached(["tea"], other, tmp_path, "other")
    assert other.texts == ["tea"]


def test_a_damaged_part_of_the_cache_is_encoded_again(tmp_path: Path) -> None:
    cached(["tea"], Counting(), tmp_path)
    (part,) = tmp_path.rglob("*.safetensors")
    part.write_bytes(part.read_bytes()[:20])
    again = Counting()
    assert cached(["tea"], again, tmp_path).tolist() == [[3, 1]]
    assert again.texts == ["tea"]


@pytest.fixture(scope="module")
def causal_lm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal_lm")
    small_llama(32, 2, 0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_causal_lm_gives_the_mean_of_its_last_hidden_states(causal_lm_dir: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["a short one", "a text that is a good deal longer than the other", "mid length text"]
    vectors = load_text_encoder(str(causal_lm_dir), 64).encode(texts)
    model, tokenizer = AutoModel.from_pretrained(causal_lm_dir), AutoTokenizer.from_pretrained(causal_lm_dir)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(vector, hidden.mean(0).numpy(), atol=1e-5)


def test_a_text_is_cut_after_max_tokens(causal_lm_dir: Path) -> None:
    encoder = load_text_encoder(str(causal_lm_dir), 8)
    vectors = encoder.encode(["12345678 and more", "12345678 and something else"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_another_limit_or_other_weights_are_another_encoder(causal_lm_dir: Path, tmp_path: Path) -> None:
    one = load_text_encoder(str(causal_lm_dir), 8).identity
    small_llama(32, 2, 1).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_text_encoder(str(causal_lm_dir), 9).identity != one
    assert load_text_encoder(str(tmp_path), 8).identity != one
    assert load_text_encoder(str(causal_lm_dir), 8).identity == one


def test_a_sentence_transformer_pools_as_it_says_itself(causal_lm_dir: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs the extra `text`")
    modules = pytest.importorskip("sentence_transformers.models")
    word = modules.Transformer(str(causal_lm_dir))
    pooling = modules.Pooling(32, pooling_mode="max")
    model = library.SentenceTransformer(modules=[word, pooling], device="cpu")
    model.save(str(tmp_path / "model"))
    vectors = load_text_encoder(str(tmp_path / "model"), 64).encode(["tea", "a hammer"])
    np.testing.assert_allclose(vectors, model.encode(["tea", "a hammer"]), atol=1e-5)


def test_a_hub_name_that_leads_nowhere_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(name: str, **options: object) -> str:
        raise OSError(f"no {name} on the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigError, match="model' cannot be loaded: no some/model on the hub; set it to"):
        load_text_encoder("some/model", 8)


def test_an_asset_that_was_not_pulled_says_how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PESO_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="download it with `peso pull all-minilm-l6-v2`"):
        load_text_encoder("all-minilm-l6-v2", 8)


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_an_encoder_that_cannot_be_loaded_is_named_with_a_cure(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"items.encoder '.*model' cannot be loaded: .*hashing"):
        load_text_encoder(str(folder), 8)


MODULE = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("", "Expecting value"),
        ("{}", "not a list of modules"),
        ("[]", "not a list of modules"),
        ("[1]", "not a list of modules"),
        ("[" * 100_000, "recursion"),
        (json.dumps([{"path": ""}]), "names the class None"),
        (json.dumps([{**MODULE, "type": "os.system"}]), "names the class 'os.system'"),
        (json.dumps([MODULE, {**MODULE, "path": "../../etc"}]), "names the folder '../../etc'"),
        (json.dumps([{**MODULE, "path": 7}]), "names the folder 7"),
    ],
)
def test_broken_modules_are_refused_before_the_library_reads_them(
    tmp_path: Path, modules: str, message: str
) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(ConfigError, match=message):
        load_text_encoder(str(tmp_path), 8)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_a_damaged_file_of_an_encoder_is_a_sentence(causal_lm_dir: Path, tmp_path: Path, name: str) -> None:
    for content in (b"", b"null", b"[" * 100_000, b"\xff{}"):
        folder = shutil.copytree(causal_lm_dir, tmp_path / "model", dirs_exist_ok=True)
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match=r"cannot be loaded: .*hashing"):
            load_text_encoder(str(folder), 8)


def test_an_encoder_without_all_its_weights_is_refused(causal_lm_dir: Path, tmp_path: Path) -> None:
    """Transformers would draw the others at random."""
    folder = shutil.copytree(causal_lm_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing from its files .*up_proj"):
        load_text_encoder(str(folder), 8)


def write(path: Path, matrix: np.ndarray, ids: list[str] | None = None) -> Path:
    if path.suffix == ".npy":
        np.save(path, matrix)
    elif path.suffix == ".safetensors":
        save_file({"vectors": matrix}, path)
    else:
        rows = pa.array(list(matrix.astype(float)), pa.list_(pa.float64()))
        pq.write_table(pa.table({"item_id": ids or IDS, "vector": rows}), path)
        return path
    if ids is not None:
        path.with_name(f"{path.stem}.ids.txt").write_text("\n".join(ids) + "\n")
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])


@SUFFIXES
def test_vectors_are_found_by_item_id(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"v{suffix}", MATRIX, ["c", "a", "z"])
    assert read_vectors(path, IDS).tolist() == [[3, 4], [0, 0], [1, 2]]


def test_a_parquet_file_may_have_a_column_a_dimension(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1.0, 2.0], "item_id": ["b", "a"], "y": [3, 4]}), tmp_path / "v.parquet")
    assert read_vectors(tmp_path / "v.parquet", ["a", "b"]).tolist() == [[2, 4], [1, 3]]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_without_ids_the_rows_are_those_of_the_item_table(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"v{suffix}", MATRIX)
    np.testing.assert_array_equal(read_vectors(path, IDS), MATRIX)
    with pytest.raises(DataError, match=r"3 rows for 4 items; add v.ids.txt"):
        read_vectors(path, [*IDS, "d"])


@SUFFIXES
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_a_vector_names_the_item(tmp_path: Path, suffix: str, bad: float) -> None:
    matrix = MATRIX.copy()
    matrix[1, 1] = bad
    with pytest.raises(DataError, match="NaN or infinity in the vector of item 'b'"):
        read_vectors(write(tmp_path / f"v{suffix}", matrix), IDS)


def test_a_vector_of_another_width_names_the_item(tmp_path: Path) -> None:
    rows = pa.array([[1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0]])
    pq.write_table(pa.table({"item_id": IDS, "vector": rows}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=r"item 'b' has 3 values, but that of item 'a' has 2"):
        read_vectors(tmp_path / "v.parquet", IDS)


def test_an_item_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="item 'a' twice"):
        read_vectors(write(tmp_path / "v.npy", MATRIX, ["a", "b", "a"]), IDS)


def test_vectors_of_other_items_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="for any of the 3 items"):
        read_vectors(write(tmp_path / "v.npy", MATRIX, ["x", "y", "z"]), IDS)


def test_unreadable_files_of_vectors_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"v.npy is missing"):
        read_vectors(tmp_path / "v.npy", IDS)
    for suffix in (".npy", ".safetensors", ".parquet"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(b"not what it says")
        with pytest.raises(DataError, match="is not readable"):
            read_vectors(path, IDS)
    (tmp_path / "v.csv").touch()
    with pytest.raises(DataError, match=r"is not a .npy, .parquet or .safetensors"):
        read_vectors(tmp_path / "v.csv", IDS)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        read_vectors(tmp_path / "flat.npy", IDS)

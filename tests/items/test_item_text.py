"""Item text, and the encoders that make vectors of it."""

from __future__ import annotations

import doctest

import numpy as np
import pyarrow as pa
import pytest

import peso.items.quality
import peso.items.vectors
from peso.items.fusion import Fusion
from peso.items.hashing import HashingEncoder
from peso.items.vectors import item_texts, warning_on_texts

TEXTS = [
    "green tea from japan",
    "black tea from india",
    "green tea in bags",
    "steel hammer with wooden handle",
    "steel nails",
    "wooden handle for a hammer",
]


def table(**columns: list[str | None]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


@pytest.mark.parametrize("module", [peso.items.vectors, peso.items.quality])
def test_worked_examples(module) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted
    assert not outcome.failed


def test_a_line_whose_fields_are_all_empty_is_dropped() -> None:
    items = table(title=["Tea", None], text=[None, "boils"], category=[None, "Home"])
    assert item_texts(items, "Title: {title}\n{category}, {text}") == ["Title: Tea", "Home, boils"]


def test_an_item_without_any_field_has_no_text_whatever_words_the_template_has() -> None:
    assert item_texts(table(title=[None, "  ", ""]), "An item:\n{title}") == [None, None, None]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (
            ["a", "b", "a", None],
            "items without a text (1 of 4) and items with the same text as another one (1 of 4; for example "
            "'a')",
        ),
        ([None, "a"], "items without a text (1 of 2) are"),
        (["a"] * 3, "items with the same text as another one (2 of 3; for example 'a') are"),
        ([*map(str, range(9)), "0"], None),  # a tenth is not yet many
        ([*map(str, range(8)), "0"], "items with the same text as another one (1 of 9; for example '0')"),
        ([], None),
        (["ware " * 100] * 2, "items with the same text as another one (1 of 2; for example 'ware ware "),
    ],
)
def test_many_items_without_a_text_of_their_own_give_a_warning(texts, said) -> None:
    warning = warning_on_texts(texts)
    if said is None:
        assert warning is None
    else:
        assert warning is not None
        assert warning.startswith(f"warning: the semantic IDs of {said}")
        assert len(warning) < 400


def test_braces_in_an_item_are_no_fields() -> None:
    assert item_texts(table(title=["a {text} b"]), "{title}") == ["a {text} b"]


def test_hashing_puts_like_texts_near_each_other() -> None:
    vectors = HashingEncoder.fit(TEXTS, 4, seed=0).encode(TEXTS)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ vectors.T
    assert likeness[0, 2] > likeness[0, 3]
    assert likeness[3, 5] > likeness[3, 0]


def test_hashing_gives_the_vectors_of_scikit_learns_own_pipeline() -> None:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    from peso.items.hashing import FEATURES

    texts = TEXTS * 2 + ["and another green tea", "and a steel tea"]
    vectorizer = HashingVectorizer(
        n_features=FEATURES, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", alternate_sign=False, norm=None
    )
    counts = vectorizer.transform(sorted(set(texts)))
    features, documents = np.unique(counts.indices, return_counts=True)
    tfidf = TfidfTransformer(sublinear_tf=True).fit(counts[:, features[documents > 1]])
    reduced = TruncatedSVD(3, random_state=5).fit(tfidf.transform(counts[:, features[documents > 1]]))
    expected = reduced.transform(tfidf.transform(vectorizer.transform(texts)[:, features[documents > 1]]))
    np.testing.assert_allclose(HashingEncoder.fit(texts, 3, seed=5).encode(texts), expected, atol=1e-5)


def test_a_frozen_hashing_encoder_gives_a_text_the_same_vector_ever_after() -> None:
    fitted = HashingEncoder.fit(TEXTS, 4, seed=0)
    again = HashingEncoder.from_arrays(fitted.arrays())
    later = [*TEXTS, "a text of later about tea", "qwertz"]
    np.testing.assert_array_equal(again.encode(later)[: len(TEXTS)], fitted.encode(TEXTS))
    assert again.encode(later)[len(TEXTS)].any()
    assert not again.encode(later)[-1].any()  # not one known word


def test_a_text_that_many_items_share_weighs_as_one() -> None:
    once = HashingEncoder.fit(TEXTS, 4, seed=0)
    often = HashingEncoder.fit(TEXTS + [TEXTS[0]] * 100, 4, seed=0)
    np.testing.assert_array_equal(once.components, often.components)


@pytest.mark.parametrize("texts", [["one text alone"], ["!!!", "..."], ["same", "same"], []])
def test_few_texts_and_texts_without_words_are_encoded_all_the_same(texts: list[str]) -> None:
    vectors = HashingEncoder.fit(texts, 128, seed=0).encode(texts)
    assert vectors.shape[0] == len(texts)
    assert np.isfinite(vectors).all()


def test_fused_sources_count_the_same_whatever_their_scale_and_common_part() -> None:
    generator = np.random.default_rng(0)
    text = generator.normal(size=(200, 8)).astype(np.float32)
    image = 1000 * (generator.normal(size=(200, 30)) + 20).astype(np.float32)
    rows = np.arange(200)
    vectors, has = Fusion.fit([text, image], rows).apply([text, image])
    assert has.all()
    shares = np.square(vectors[:, :8]).sum(1).mean(), np.square(vectors[:, 8:]).sum(1).mean()
    np.testing.assert_allclose(shares, (0.5, 0.5), rtol=1e-3)
    np.testing.assert_allclose(vectors.mean(0), 0, atol=1e-5)


def test_a_missing_source_is_the_centre_and_leaves_the_others_as_they_are() -> None:
    generator = np.random.default_rng(0)
    text, image = (generator.normal(size=(50, 4)).astype(np.float32) for _ in range(2))
    fusion = Fusion.fit([text, image], np.arange(50))
    whole = fusion.apply([text, image])[0]
    image[3] = 0
    vectors, has = fusion.apply([text, image])
    np.testing.assert_array_equal(vectors[3, :4], whole[3, :4])
    assert not vectors[3, 4:].any()
    assert has[:, 3].tolist() == [True, False]
    text[3] = 0
    vectors, has = fusion.apply([text, image])
    assert not vectors[3].any()
    assert not has[:, 3].any()

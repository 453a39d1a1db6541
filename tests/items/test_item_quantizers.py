"""Quantisers, and telling apart items whose codes are the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peso.config import RqVaeConfig
from peso.items import placement
from peso.items.codebooks import (
    Fitted,
    ResidualCodebooks,
    balanced_assignment,
    fillable,
    fit_balanced_rq_kmeans,
    fit_rq_kmeans,
)
from peso.items.placement import resolve
from peso.items.rq_vae import fit_rq_vae
from peso.runtime.progress import Silent

pytestmark = pytest.mark.slow

SMALL_VAE = RqVaeConfig(hidden=[32], latent=8, steps=200, batch_size=64, learning_rate=5e-3)
Fit = Callable[[np.ndarray, list[int], int], Fitted]
FITS: dict[str, Fit] = {
    "rq-kmeans": lambda vectors, sizes, seed: fit_rq_kmeans(vectors, sizes, seed, Silent()),
    "balanced-rq-kmeans": lambda vectors, sizes, seed: fit_balanced_rq_kmeans(vectors, sizes, seed, Silent()),
    "rq-vae": lambda vectors, sizes, seed: fit_rq_vae(
        vectors,
        sizes,
        RqVaeConfig(hidden=[32], latent=8, steps=200, batch_size=64, learning_rate=5e-3),
        seed,
        Silent(),
    ),
}
every_quantizer = pytest.mark.parametrize("fit", FITS.values(), ids=FITS)


def clusters(count: int = 4, each: int = 25, width: int = 6, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = 4 * generator.normal(size=(count, 1, width))
    points = (centres + 0.3 * generator.normal(size=(count, each, width))).reshape(-1, width)
    return (points / np.sqrt(np.square(points).sum(1).mean())).astype(np.float32)


@every_quantizer
def test_well_parted_clusters_share_no_first_code(fit: Fit) -> None:
    first = [set(cluster) for cluster in fit(clusters(), [12, 4], 0).codes[:, 0].reshape(4, 25).tolist()]
    assert sum(len(cluster) for cluster in first) == len(set().union(*first))


@every_quantizer
def test_each_level_brings_the_reconstruction_nearer(fit: Fit) -> None:
    vectors = clusters(each=50)
    fitted = fit(vectors, [8, 8, 8], 0)
    left = fitted.codebooks.latent(vectors)
    before = np.square(left).sum(1).mean()
    for level, codebook in enumerate(fitted.codebooks.codebooks):
        left = left - codebook[fitted.codes[:, level]]
        assert np.square(left).sum(1).mean() < before
        before = np.square(left).sum(1).mean()
    total = np.square(vectors - vectors.mean(0)).sum(1).mean()
    error = np.square(vectors - fitted.codebooks.reconstruct(fitted.codes)).sum(1).mean()
    assert error < 0.2 * total


@every_quantizer
def test_the_same_seed_gives_the_same_codebooks_another_seed_others(fit: Fit) -> None:
    vectors = clusters(each=50)
    one, same, other = (fit(vectors, [8, 8], seed) for seed in (3, 3, 4))
    for name, array in one.codebooks.arrays().items():
        np.testing.assert_array_equal(array, same.codebooks.arrays()[name])
    np.testing.assert_array_equal(one.codes, same.codes)
    assert not np.array_equal(one.codebooks.codebooks[0], other.codebooks.codebooks[0])


@every_quantizer
def test_stored_codebooks_assign_and_reconstruct_as_before(fit: Fit) -> None:
    vectors, later = clusters(), clusters(seed=1)
    fitted = fit(vectors, [4, 4], 0).codebooks
    again = ResidualCodebooks.from_arrays(fitted.arrays())
    codes = fitted.nearest(fitted.latent(later))
    np.testing.assert_array_equal(again.nearest(again.latent(later)), codes)
    np.testing.assert_array_equal(again.reconstruct(codes), fitted.reconstruct(codes))


@every_quantizer
@pytest.mark.parametrize("count", [1, 3])
def test_fewer_items_than_codes_and_items_all_alike_are_quantised_too(fit: Fit, count: int) -> None:
    vectors = np.zeros((count, 6), np.float32)
    fitted = fit(vectors, [4, 4], 0)
    assert fitted.codes.shape == (count, 2)
    assert all(np.isfinite(array).all() for array in fitted.codebooks.arrays().values())
    np.testing.assert_allclose(fitted.codebooks.reconstruct(fitted.codes), 0, atol=0.1)


def test_fitting_an_rq_vae_leaves_the_random_state_of_others_alone() -> None:
    import torch

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    FITS["rq-vae"](clusters(), [4], 0)
    assert torch.rand(1) == expected


@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_balanced_assignment_gives_every_centroid_its_share(n: int, k: int, seed: int, alike: bool) -> None:
    generator = np.random.default_rng(seed)
    points = np.zeros((n, 3), np.float32) if alike else generator.normal(size=(n, 3)).astype(np.float32)
    chosen = balanced_assignment(points, generator.normal(size=(k, 3)).astype(np.float32))
    counts = np.bincount(chosen, minlength=k)
    assert counts.sum() == n
    assert set(counts) <= {n // k, -(-n // k)}


def test_nearest_is_the_nearest_code_of_every_level() -> None:
    generator = np.random.default_rng(0)
    books = tuple(generator.normal(size=(5, 3)).astype(np.float32) for _ in range(3))
    latent = generator.normal(size=(40, 3)).astype(np.float32)
    codes = ResidualCodebooks(books).nearest(latent)
    for point, row in zip(latent, codes, strict=True):
        for book, code in zip(books, row, strict=True):
            assert np.linalg.norm(point - book, axis=1).argmin() == code
            point = point - book[code]


@given(st.integers(2, 300), st.integers(1, 10**6), st.integers(1, 6))
def test_codes_are_what_the_catalogue_can_fill_and_tell_apart(codes: int, items: int, levels: int) -> None:
    size = fillable(codes, items, levels)
    assert 1 <= size <= min(codes, items)
    assert size == codes or size**levels >= items


# Few codes, many items: everything collides.
SIZES = (2, 3, 4)
CAPACITY = math.prod(SIZES)


def quantized(items: int, seed: int) -> tuple[ResidualCodebooks, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    books = tuple(
        (generator.normal(size=(size, 2)) / 2**level).astype(np.float32) for level, size in enumerate(SIZES)
    )
    codebooks = ResidualCodebooks(books)
    latent = np.repeat(generator.normal(size=(items, 2)), 2, axis=0)[:items].astype(np.float32)
    return codebooks, latent, codebooks.nearest(latent)


none = np.zeros((0, 3), np.int32)


def distinct(codes: np.ndarray) -> int:
    return len(np.unique(codes, axis=0))


@given(st.integers(1, 2 * CAPACITY), st.integers(0, 2**31))
def test_reassigned_items_share_no_id_while_there_are_enough(items: int, seed: int) -> None:
    codebooks, latent, wanted = quantized(items, seed)
    codes = resolve("reassign", codebooks, latent, wanted, none)
    assert distinct(codes) == min(items, CAPACITY)
    # who is alone with its wish gets it, and of several the nearest does
    for row in np.unique(wanted, axis=0):
        same = np.flatnonzero((wanted == row).all(1))
        left = np.square(codebooks.residuals(latent[same], wanted[same])).sum(1)
        assert (codes[same[left.argmin()]] == row).all()


@given(st.integers(2, CAPACITY), st.integers(0, 2**31))
def test_a_reassigned_item_gets_the_nearest_free_code_of_its_prefix(items: int, seed: int) -> None:
    codebooks, latent, wanted = quantized(items, seed)
    codes = resolve("reassign", codebooks, latent, wanted, none)
    given_away = {tuple(row) for row in codes[(codes == wanted).all(1)].tolist()}
    for row in np.flatnonzero((codes != wanted).any(1)):
        prefix, left = wanted[row, :2], latent[row] - codebooks.codebooks[0][wanted[row, 0]]
        left = left - codebooks.codebooks[1][wanted[row, 1]]
        order = np.argsort(np.linalg.norm(left - codebooks.codebooks[2], axis=1), kind="stable")
        free = [(*prefix.tolist(), int(code)) for code in order]
        free = [option for option in free if option not in given_away]
        if free:
            assert tuple(codes[row].tolist()) == free[0]
        else:  # the prefix is full: at least as much of it is kept as has room
            assert (codes[row, :2] != prefix).any()
        given_away.add(tuple(codes[row].tolist()))


@given(
    st.integers(1, CAPACITY),
    st.integers(1, CAPACITY),
    st.integers(0, 2**31),
    st.sampled_from(["reassign", "extra-level", "allow"]),
)
def test_later_items_never_take_an_id_that_is_there(
    before: int, after: int, seed: int, rule: placement.Rule
) -> None:
    codebooks, latent, wanted = quantized(before + after, seed)
    old = resolve(rule, codebooks, latent[:before], wanted[:before], none, extra=2 * CAPACITY)
    kept = old.copy()
    new = resolve(rule, codebooks, latent[before:], wanted[before:], old, extra=2 * CAPACITY)
    np.testing.assert_array_equal(old, kept)
    together = distinct(np.concatenate([old, new]))
    if rule == "reassign":
        assert together == min(CAPACITY, before + after)
    elif rule == "extra-level":
        assert together == before + after
    else:
        np.testing.assert_array_equal(new, wanted[before:])


def test_an_extra_level_numbers_the_items_of_one_id_in_row_order() -> None:
    wanted = np.array([[1, 2], [0, 0], [1, 2], [1, 2]], np.int32)
    first = resolve("extra-level", ResidualCodebooks(()), np.empty((4, 0)), wanted, none[:, :3], extra=4)
    assert first[:, 2].tolist() == [0, 0, 1, 2]
    more = resolve("extra-level", ResidualCodebooks(()), np.empty((2, 0)), wanted[[0, 2]], first, extra=4)
    assert more[:, 2].tolist() == [3, 3]  # its codes have run out: the rest share the last


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 2**31))
def test_ids_beyond_64_bits_are_told_apart_too(seed: int) -> None:
    generator = np.random.default_rng(seed)
    codebooks = ResidualCodebooks((np.zeros((300, 1), np.float32),) * 9)
    latent = generator.normal(size=(20, 1)).astype(np.float32)
    codes = resolve("reassign", codebooks, latent, np.zeros((20, 9), np.int32), np.zeros((0, 9), np.int32))
    assert distinct(codes) == 20

"""The coordinates of a seed: distinct, the same on both ends, and every subset equally likely."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import comb

import numpy as np
import pytest

from flcore.ops.randk import random_coordinates
from flcore.reference import permutation

TILE = 65_536
SIZES = (1, 2, 15, 17, 255, 256, 257, 1025, TILE - 1, TILE, TILE + 1, 2 * TILE + 3)


@pytest.mark.parametrize("numel", SIZES)
def test_coordinates_equal_the_reference(numel):
    for k in sorted({0, 1, numel // 3, numel // 2, numel // 2 + 1, numel - 1, numel}):
        for seed, round in ((0, 0), (2**64 - 1, 2**64 - 1)):
            ours = random_coordinates(numel, k, seed=seed, round=round, variant="cpu")
            want = random_coordinates(numel, k, seed=seed, round=round, variant="reference")
            assert np.array_equal(ours, want)
            assert ours.size == k and np.all(np.diff(ours) > 0)
            assert k == 0 or (0 <= ours[0] and ours[-1] < numel)


def test_coordinates_of_huge_updates():
    for numel in (2**32 + 1, 2**36 + 3):
        ours = random_coordinates(numel, 500, seed=5, round=1)
        assert np.array_equal(ours, permutation.coordinates(numel, 500, 5, 1))
        assert np.unique(ours).size == 500 and ours[-1] > 0.9 * numel


def test_the_network_is_a_permutation():
    keys = np.arange(16, dtype=np.uint32) * np.uint32(0x9E3779B9)
    for bits in (8, 9, 13, 16):
        images = permutation.permute(np.arange(2**bits), bits, keys)
        assert np.array_equal(np.sort(images), np.arange(2**bits))


def test_keys_are_seed_and_round():
    """The same key gives the same set; another seed, or another round, another one."""
    sets = {
        (seed, round): tuple(random_coordinates(1000, 10, seed=seed, round=round))
        for seed in (0, 1, 2**63)
        for round in (0, 1, 2**31)
    }
    assert len(set(sets.values())) == len(sets)
    assert tuple(random_coordinates(1000, 10, seed=1, round=1)) == sets[1, 1]
    # of the round, 32 bits count
    assert tuple(random_coordinates(1000, 10, seed=1, round=2**32 + 1)) == sets[1, 1]


@pytest.mark.parametrize(("d", "k", "draws"), [(5, 2, 20_000), (7, 1, 20_000), (6, 4, 20_000)])
def test_every_subset_is_equally_likely(d, k, draws):
    """Chi-square over all subsets: the 99.9 % quantile of 9 or 6 or 14 degrees is below 37."""
    counts = Counter(tuple(random_coordinates(d, k, seed=s)) for s in range(draws))
    mean = draws / comb(d, k)
    assert len(counts) == comb(d, k)
    assert sum((c - mean) ** 2 / mean for c in counts.values()) < 37


def test_inclusion_and_pairs():
    """P(i) = k/d and P(i, j) = k (k - 1) / (d (d - 1)), to five standard deviations."""
    d, k, draws = 60, 15, 10_000
    together = np.zeros((d, d))
    for seed in range(draws):
        kept = random_coordinates(d, k, seed=seed, round=seed % 7)
        together[np.ix_(kept, kept)] += 1
    for got, p in (
        (np.diag(together), k / d),
        (together[np.triu_indices(d, 1)], k * (k - 1) / (d * (d - 1))),
    ):
        assert np.abs(got - draws * p).max() < 5 * np.sqrt(draws * p * (1 - p))


def test_rounds_are_independent():
    """Sets of consecutive rounds overlap in k^2/d coordinates on average."""
    d, k = 20_000, 1000
    sets = [random_coordinates(d, k, seed=9, round=t) for t in range(60)]
    shared = [np.intersect1d(a, b).size for a, b in pairwise(sets)]
    assert np.mean(shared) == pytest.approx(k * k / d, rel=0.1)


def test_positions_are_uniform():
    """1024 bins of a large update hold as many as they should, and each tile."""
    d, k = 2**24 + 12_345, 200_000
    kept = random_coordinates(d, k, seed=3)
    counts = np.bincount((kept * 1024) // d, minlength=1024)
    assert np.sum((counts - k / 1024) ** 2 / (k / 1024)) < 1024 + 5 * np.sqrt(2 * 1024)
    low = np.bincount(kept % 64, minlength=64)
    assert np.sum((low - k / 64) ** 2 / (k / 64)) < 64 + 5 * np.sqrt(2 * 64)

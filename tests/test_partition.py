"""Dealing examples to clients: nobody without data, nothing twice, the skew that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.errors import InvalidInputError
from flcore.simulation.partition import (
    check_partition,
    dirichlet_partition,
    dirichlet_sizes,
    iid_partition,
    long_tail,
    pathological_partition,
    split,
)

LABELS = np.random.default_rng(0).integers(0, 10, 1437)


def classes_per_client(partition) -> float:
    return float(np.mean([len(np.unique(LABELS[indices])) for indices in partition]))


@pytest.mark.parametrize("alpha", [None, 0.01, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("clients", [1, 50, 1437])
def test_clients_have_equal_sizes_and_share_no_example(alpha, clients):
    partition = split(LABELS, clients, alpha, np.random.default_rng(1))
    assert [len(indices) for indices in partition] == [1437 // clients] * clients
    dealt = np.concatenate(partition)
    assert len(np.unique(dealt)) == len(dealt)
    assert dealt.min() >= 0 and dealt.max() < 1437


def test_small_alpha_gives_few_classes_a_client():
    rng = np.random.default_rng(2)
    counts = [classes_per_client(dirichlet_partition(LABELS, 50, a, rng)) for a in (0.05, 0.5, 100)]
    assert counts[0] < 4 < counts[1] < 8 < counts[2]
    assert classes_per_client(iid_partition(LABELS, 50, rng)) > 8


def test_a_client_whose_classes_are_used_up_takes_others():
    # nearly one-hot priors, and one class with a single example: somebody must take what is left
    labels = np.array([0] + [1] * 99)
    partition = dirichlet_partition(labels, 10, 1e-3, np.random.default_rng(0))
    assert sorted(np.concatenate(partition).tolist()) == list(range(100))


def test_a_class_without_examples_is_never_drawn():
    labels = np.repeat([1, 4], 20)  # classes 0, 2 and 3 do not occur
    partition = dirichlet_partition(labels, 4, 0.1, np.random.default_rng(0))
    assert len(np.unique(np.concatenate(partition))) == 40


def test_class_frequencies_follow_the_prior_while_classes_last():
    # one client taking 200 of 20,000 examples: its counts are a plain draw from its prior
    labels = np.tile(np.arange(4), 5000)
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    partition = dirichlet_partition(labels, 100, 1.0, rng)
    for _ in range(4):
        again.permutation(5000)
    priors = again.dirichlet(np.ones(4), size=100)
    shares = np.array([np.bincount(labels[p], minlength=4) / 200 for p in partition])
    # standard error of a share of 200 draws is at most 0.035; the last slots run out of classes
    assert np.abs(shares - priors).mean() < 0.05


def test_same_generator_same_partition():
    a, b, c = (dirichlet_partition(LABELS, 20, 0.1, np.random.default_rng(s)) for s in (7, 7, 8))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_more_clients_than_examples_is_refused():
    with pytest.raises(InvalidInputError, match=r"some would have no data; use at most 1437"):
        split(LABELS, 1438, 0.05, np.random.default_rng(0))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(InvalidInputError, match="alpha: expected a positive number"):
        split(LABELS, 10, alpha, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ([], "got none"),
        ([np.array([0, 1]), np.array([], int)], "client 1 has no data"),
        ([np.array([0.5])], "client 0: expected a 1-D array of integers"),
        ([np.array([0, 10])], "client 0 refers to examples 0 to 10; there are 10"),
        ([np.array([-1])], "client 0 refers to examples -1"),
    ],
)
def test_a_partition_from_outside_is_checked(partition, message):
    with pytest.raises(InvalidInputError, match=message):
        check_partition(partition, 10)


# ---- the draws of a run's identity ----


def test_equal_splits_draw_what_they_always_drew():
    # recorded: a run's seed means these examples, so they may not change
    labels = np.arange(30) % 3
    iid = split(labels, 3, None, np.random.default_rng(0))
    skewed = split(labels, 3, 0.1, np.random.default_rng(0))
    assert [part[:4].tolist() for part in iid] == [[2, 11, 26, 21], [18, 25, 3, 29], [7, 5, 17, 14]]
    assert [part.tolist() for part in skewed] == [
        [4, 22, 13, 1, 19, 26, 10, 28, 27, 15],
        [16, 3, 25, 7, 24, 9, 21, 6, 18, 12],
        [11, 23, 20, 5, 8, 2, 29, 14, 17, 0],
    ]


# ---- Dirichlet shares of each class ----


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.5, 100.0])
@pytest.mark.parametrize(("clients", "least"), [(1, 1), (50, 1), (50, 28), (1437, 1)])
def test_dirichlet_sizes_deal_everything_and_nobody_falls_short(alpha, clients, least):
    parts = dirichlet_sizes(LABELS, clients, alpha, np.random.default_rng(1), least=least)
    assert len(parts) == clients and min(map(len, parts)) >= least
    assert sorted(np.concatenate(parts).tolist()) == list(range(1437))


def test_dirichlet_sizes_follow_the_shares_of_each_class():
    # with one class, no client is full beforehand: the cuts are those of the one Dirichlet draw
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    parts = dirichlet_sizes(np.zeros(10_000, int), 5, 0.7, rng)
    again.permutation(10_000)
    shares = again.dirichlet(np.full(5, 0.7))
    assert np.abs(np.array(list(map(len, parts))) - 10_000 * shares).max() <= 1


def test_dirichlet_sizes_spread_with_small_alpha():
    spread = [
        np.std([len(p) for p in dirichlet_sizes(LABELS, 20, a, np.random.default_rng(0))])
        for a in (0.05, 1.0, 1000.0)
    ]
    assert spread[0] > spread[1] > 5 > spread[2]
    few = dirichlet_sizes(LABELS, 20, 0.05, np.random.default_rng(0))
    assert classes_per_client(few) < 4


def test_dirichlet_sizes_refuse_what_cannot_be():
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidInputError, match="at least 29 examples each need 1450, and there"):
        dirichlet_sizes(LABELS, 50, 0.1, rng, least=29)
    with pytest.raises(InvalidInputError, match="least: expected a whole number from 1, got 0"):
        dirichlet_sizes(LABELS, 50, 0.1, rng, least=0)
    with pytest.raises(InvalidInputError, match="alpha: expected a positive number"):
        dirichlet_sizes(LABELS, 50, -1.0, rng)
    with pytest.raises(InvalidInputError, match="clients: expected at least 1, got 0"):
        dirichlet_sizes(LABELS, 0, 1.0, rng)


# ---- shards ----


def test_two_shards_a_client_by_hand():
    # 4 classes of 6 in a scrambled order, 6 clients x 2 shards = 12 shards of 2, none on a border
    labels = np.tile([2, 0, 3, 1], 6)
    parts = pathological_partition(labels, 6, 2, np.random.default_rng(0))
    assert [len(p) for p in parts] == [4] * 6
    assert sorted(np.concatenate(parts).tolist()) == list(range(24))
    for part in parts:
        assert labels[part[0]] == labels[part[1]] and labels[part[2]] == labels[part[3]]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_bound_the_classes_of_a_client(shards):
    parts = pathological_partition(LABELS, 20, shards, np.random.default_rng(0))
    size = 1437 // (20 * shards)
    assert [len(p) for p in parts] == [size * shards] * 20
    assert len(np.unique(np.concatenate(parts))) == 20 * size * shards
    # sorted labels: a shard shorter than every class holds at most two neighbouring classes
    assert size < np.bincount(LABELS).min()
    assert max(len(np.unique(LABELS[p])) for p in parts) <= 2 * shards
    assert classes_per_client(parts) <= shards * 1.6


def test_the_remainder_of_shards_is_random():
    labels = np.repeat([0, 1], [5, 6])  # 2 shards of 5: one example stays out, of either class
    left = {
        int(np.setdiff1d(range(11), np.concatenate(pathological_partition(labels, 2, 1, rng)))[0])
        for rng in map(np.random.default_rng, range(40))
    }
    assert min(left) < 5 <= max(left)


def test_impossible_shards_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidInputError, match="classes_per_client: expected 1 to 10, the number"):
        pathological_partition(LABELS, 10, 11, rng)
    with pytest.raises(InvalidInputError, match="1000 clients with 2 shards each need 2000"):
        pathological_partition(LABELS, 1000, 2, rng)
    with pytest.raises(InvalidInputError, match="some would have no data"):
        pathological_partition(LABELS, 2000, 2, rng)


# ---- long tail ----


def test_long_tail_by_hand():
    # 200 of each of 4 classes, factor 8: 200, 200/2, 200/4, 200/8
    labels = np.arange(800) % 4
    keep = long_tail(labels, 8, np.random.default_rng(0))
    assert np.bincount(labels[keep]).tolist() == [200, 100, 50, 25]
    assert np.array_equal(keep, np.unique(keep))


def test_long_tail_of_unequal_classes_keeps_its_profile():
    labels = np.repeat([0, 1, 2, 5], [90, 100, 12, 40])  # class 2 decides: 12 at factor 4**(2/3)
    counts = np.bincount(labels[long_tail(labels, 4, np.random.default_rng(0))])
    n_max = 12 * 4 ** (2 / 3)
    assert counts.tolist() == [int(n_max), int(n_max * 4 ** (-1 / 3)), 12, 0, 0, int(n_max / 4)]


def test_long_tail_of_factor_one_keeps_classes_alike_and_the_last_is_never_empty():
    counts = np.bincount(LABELS[long_tail(LABELS, 1, np.random.default_rng(0))])
    assert counts.tolist() == [np.bincount(LABELS).min()] * 10
    counts = np.bincount(LABELS[long_tail(LABELS, 1e6, np.random.default_rng(0))])
    assert counts[-1] == 1 and counts[0] == np.bincount(LABELS)[0]


def test_long_tail_refuses_what_is_none():
    rng = np.random.default_rng(0)
    for factor in (0.5, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="imbalance: expected a number from 1"):
            long_tail(LABELS, factor, rng)
    with pytest.raises(InvalidInputError, match="needs at least two classes, got 1"):
        long_tail(np.zeros(5, int), 2, rng)

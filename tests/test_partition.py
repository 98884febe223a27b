"""Dealing examples to clients: equal sizes, nothing twice, and the skew that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.errors import InvalidInputError
from flcore.simulation.partition import check_partition, dirichlet_partition, iid_partition, split

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

"""Partitions by what the data says itself: the domain, or the natural client, of each example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore.errors import InvalidInputError

__all__ = ["client_groups", "domain_partition", "natural_partition"]


def domain_partition(
    groups: np.ndarray, clients: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Give every client examples of one domain.

    Client k has domain ``k mod D`` of the D domains that occur, in increasing order of their
    ids; clients of one domain share its shuffled examples, in sizes that differ by at most one.

    Parameters
    ----------
    groups : (n,) integers
        Domain of each example.
    clients : int
        At least one for each domain.
    rng : numpy.random.Generator

    Returns
    -------
    list of `clients` int64 arrays, disjoint.

    Raises
    ------
    InvalidInputError
        If there are fewer clients than domains, or a domain has fewer examples than clients.
    """
    groups = _check_groups(groups)
    domains = np.unique(groups)
    if clients < len(domains):
        raise InvalidInputError(
            f"clients: a partition by domain needs at least one client for each of the "
            f"{len(domains)} domains, got {clients}"
        )
    parts: list[np.ndarray] = [np.empty(0, np.int64)] * clients
    for number, domain in enumerate(domains):
        members = range(number, clients, len(domains))
        pool = rng.permutation(np.flatnonzero(groups == domain))
        if len(pool) < len(members):
            raise InvalidInputError(
                f"clients: {len(members)} clients share the {len(pool)} examples of domain "
                f"{domain}, so some would have no data; use at most {len(pool) * len(domains)} "
                "clients"
            )
        for client, part in zip(members, np.array_split(pool, len(members)), strict=True):
            parts[client] = part
    return parts


def natural_partition(
    groups: np.ndarray, clients: int, rng: np.random.Generator, *, least: int = 1
) -> list[np.ndarray]:
    """Give every client the examples of one natural client, such as a writer or a speaker.

    Parameters
    ----------
    groups : (n,) integers
        Natural client of each example.
    clients : int
        If fewer than there are, they are drawn at random.
    rng : numpy.random.Generator
    least : int
        Natural clients with fewer examples are left out.

    Returns
    -------
    list of `clients` int64 arrays, in increasing order of the natural clients' ids.

    Raises
    ------
    InvalidInputError
        If there are not so many natural clients with `least` examples.
    """
    groups = _check_groups(groups)
    if clients < 1:
        raise InvalidInputError(f"clients: expected at least 1, got {clients}")
    present, counts = np.unique(groups, return_counts=True)
    large = present[counts >= least]
    if clients > len(large):
        raise InvalidInputError(
            f"clients: {clients} clients, but of the {len(present)} natural clients in the data "
            f"{len(large)} have at least {least} examples"
        )
    if clients < len(large):
        large = np.sort(rng.choice(large, clients, replace=False))
    return [np.flatnonzero(groups == group) for group in large]


def client_groups(groups: np.ndarray, partition: Sequence[np.ndarray]) -> np.ndarray:
    """Tell the group of each client, for an evaluation on test data of the same group.

    Parameters
    ----------
    groups : (n,) integers
        Group of each training example.
    partition : list of index arrays

    Returns
    -------
    (clients,) int64
        The group that all examples of a client belong to; -1 for a client of several.
    """
    groups = _check_groups(groups)
    own = [np.unique(groups[indices]) for indices in partition]
    return np.array([found[0] if len(found) == 1 else -1 for found in own], dtype=np.int64)


def _check_groups(groups: np.ndarray) -> np.ndarray:
    groups = np.asarray(groups)
    if groups.ndim != 1 or groups.dtype.kind not in "iu" or groups.size == 0:
        raise InvalidInputError(
            f"groups: expected a 1-D array of integers, one for each example, got "
            f"{groups.ndim}-D {groups.dtype} of {groups.size} elements"
        )
    return groups

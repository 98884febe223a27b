"""How the training examples are dealt to clients of equal size.

A partition is a list with one array of example indices for each client.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore.errors import InvalidInputError

__all__ = ["check_partition", "dirichlet_partition", "iid_partition", "split"]


def split(
    labels: np.ndarray, clients: int, alpha: float | None, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal by `dirichlet_partition`, or by `iid_partition` where `alpha` is None."""
    if alpha is None:
        return iid_partition(labels, clients, rng)
    return dirichlet_partition(labels, clients, alpha, rng)


def iid_partition(labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal shuffled examples, ``floor(n / clients)`` to each; the remainder stays unused.

    Parameters
    ----------
    labels : (n,) integers
        Only their number matters here.
    clients : int
    rng : numpy.random.Generator

    Returns
    -------
    list of `clients` int64 arrays of equal length, disjoint.
    """
    per_client = _examples_per_client(len(labels), clients)
    order = rng.permutation(len(labels))[: per_client * clients]
    return list(order.reshape(clients, per_client))


def dirichlet_partition(
    labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal examples so that each client has its own mixture of classes, and all the same size.

    Every client draws class probabilities from Dirichlet(alpha, ..., alpha).  A shuffled list
    that holds each client ``floor(n / clients)`` times is walked; every entry takes one random
    unused example, of a class drawn from the client's probabilities restricted to the classes
    that still have examples.  Once none of its own classes is left, a client draws uniformly from
    the classes that are.

    Parameters
    ----------
    labels : (n,) integers from 0
    clients : int
    alpha : float
        Concentration.  0.05: one or two classes a client; 1: uneven; 100: nearly alike.
    rng : numpy.random.Generator

    Returns
    -------
    list of `clients` int64 arrays of equal length, disjoint.

    Raises
    ------
    InvalidInputError
        If `alpha` is not positive, or there are more clients than examples.
    """
    labels = np.asarray(labels)
    if not (np.isfinite(alpha) and alpha > 0):
        raise InvalidInputError(
            f"alpha: expected a positive number, or None for an IID split, got {alpha!r}"
        )
    per_client = _examples_per_client(len(labels), clients)
    classes = int(labels.max()) + 1
    unused = [rng.permutation(np.flatnonzero(labels == c)).tolist() for c in range(classes)]
    left = np.array([len(pool) for pool in unused])
    probabilities = rng.dirichlet(np.full(classes, alpha), size=clients)
    slots = rng.permutation(np.repeat(np.arange(clients), per_client))
    taken: list[list[int]] = [[] for _ in range(clients)]
    for client in slots:
        weights = np.where(left > 0, probabilities[client], 0.0)
        if not weights.any():
            weights = (left > 0).astype(np.float64)
        cumulative = np.cumsum(weights)
        cumulative /= cumulative[-1]  # ends in exactly 1, and a draw is below 1
        # side="right" passes over classes of weight 0
        label = int(np.searchsorted(cumulative, rng.random(), side="right"))
        taken[client].append(unused[label].pop())
        left[label] -= 1
    return [np.array(indices, dtype=np.int64) for indices in taken]


def check_partition(partition: Sequence[np.ndarray], examples: int) -> list[np.ndarray]:
    """Check a partition that a caller brings: every client has data, and every index exists.

    Raises
    ------
    InvalidInputError
        Naming the client.
    """
    if len(partition) == 0:
        raise InvalidInputError("partition: expected one array of indices per client, got none")
    checked = []
    for client, indices in enumerate(partition):
        indices = np.asarray(indices)
        if indices.size == 0:
            raise InvalidInputError(
                f"partition: client {client} has no data; leave it out or give it examples"
            )
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise InvalidInputError(
                f"partition: client {client}: expected a 1-D array of integers, "
                f"got {indices.ndim}-D {indices.dtype}"
            )
        if indices.min() < 0 or indices.max() >= examples:
            raise InvalidInputError(
                f"partition: client {client} refers to examples {indices.min()} to "
                f"{indices.max()}; there are {examples}, counted from 0"
            )
        checked.append(indices.astype(np.int64))
    return checked


def _examples_per_client(examples: int, clients: int) -> int:
    if clients < 1:
        raise InvalidInputError(f"clients: expected at least 1, got {clients}")
    if clients > examples:
        raise InvalidInputError(
            f"clients: {clients} clients share {examples} training examples, so some would have "
            f"no data; use at most {examples} clients"
        )
    return examples // clients

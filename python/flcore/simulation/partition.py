"""How the training examples are dealt to clients by their labels.

A partition is a list with one array of example indices for each client.  Partitions by domain and
by natural client are in `flcore.simulation.groups`; `flcore.simulation.dealing` chooses by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore.errors import InvalidInputError

__all__ = [
    "check_partition",
    "dirichlet_partition",
    "dirichlet_sizes",
    "iid_partition",
    "long_tail",
    "pathological_partition",
    "split",
]


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
    _check_alpha(alpha)
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


def dirichlet_sizes(
    labels: np.ndarray,
    clients: int,
    alpha: float,
    rng: np.random.Generator,
    *,
    least: int = 1,
) -> list[np.ndarray]:
    """Deal each class by its own Dirichlet shares, so that clients differ in size, too.

    For every class, the shares of the clients are drawn from Dirichlet(alpha, ..., alpha) and the
    shuffled examples of the class are cut accordingly; clients that already have ``n / clients``
    examples or more get none.  All examples are dealt.  A client that ends up with fewer than
    `least` takes single random examples from whoever has the most.

    Parameters
    ----------
    labels : (n,) integers from 0
    clients : int
    alpha : float
        Concentration, see `dirichlet_partition`.
    rng : numpy.random.Generator
    least : int
        Fewest examples of a client.

    Returns
    -------
    list of `clients` int64 arrays of at least `least` elements, disjoint.

    Raises
    ------
    InvalidInputError
        If `alpha` is not positive, or there are fewer than ``clients * least`` examples.

    Notes
    -----
    Yurochkin et al., ICML 2019, arXiv 1905.12022; with the bound on full clients as in Li et al.,
    "Federated Learning on Non-IID Data Silos", ICDE 2022, arXiv 2102.02079.  There, a split with
    a client below the minimum is drawn again, which does not end for strong skew.
    """
    labels = np.asarray(labels)
    _check_alpha(alpha)
    _check_least(least)
    _examples_per_client(len(labels), clients)
    if clients * least > len(labels):
        raise InvalidInputError(
            f"least: {clients} clients with at least {least} examples each need "
            f"{clients * least}, and there are {len(labels)}"
        )
    taken: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        pool = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        room = np.array([len(own) * clients < len(labels) for own in taken])
        shares = np.where(room, shares, 0.0)
        if not shares.any():  # tiny alpha: those that can take have shares of exactly 0
            shares = room.astype(np.float64)
        cuts = np.rint(np.cumsum(shares / shares.sum())[:-1] * len(pool)).astype(np.int64)
        for own, part in zip(taken, np.split(pool, cuts), strict=True):
            own.extend(part.tolist())
    sizes = np.array([len(own) for own in taken])
    while sizes.min() < least:
        poor, rich = int(sizes.argmin()), int(sizes.argmax())
        taken[poor].append(taken[rich].pop(int(rng.integers(sizes[rich]))))
        sizes[poor] += 1
        sizes[rich] -= 1
    return [np.array(indices, dtype=np.int64) for indices in taken]


def pathological_partition(
    labels: np.ndarray, clients: int, classes_per_client: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Sort examples by label, cut them into equal shards, and deal every client so many shards.

    A shard across the border of two classes has both, and a client may get two shards of one
    class.  The remainder, fewer than ``clients * classes_per_client`` random examples, stays
    unused.

    Parameters
    ----------
    labels : (n,) integers from 0
    clients : int
    classes_per_client : int
        Shards of a client; 2 in the paper.
    rng : numpy.random.Generator

    Returns
    -------
    list of `clients` int64 arrays of equal length, disjoint.

    Raises
    ------
    InvalidInputError
        If there are more shards than examples, or more classes wanted than there are.

    Notes
    -----
    The "pathological non-IID partition" of McMahan et al., "Communication-Efficient Learning of
    Deep Networks from Decentralized Data", AISTATS 2017, arXiv 1602.05629.
    """
    labels = np.asarray(labels)
    _examples_per_client(len(labels), clients)
    classes = len(np.unique(labels))
    if not 1 <= classes_per_client <= classes:
        raise InvalidInputError(
            f"classes_per_client: expected 1 to {classes}, the number of classes, got "
            f"{classes_per_client!r}"
        )
    shards = clients * classes_per_client
    if shards > len(labels):
        raise InvalidInputError(
            f"clients: {clients} clients with {classes_per_client} shards each need {shards} "
            f"examples, and there are {len(labels)}"
        )
    used = rng.permutation(len(labels))[: len(labels) // shards * shards]
    by_label = used[np.argsort(labels[used], kind="stable")].reshape(shards, -1)
    return list(by_label[rng.permutation(shards)].reshape(clients, -1))


def long_tail(labels: np.ndarray, imbalance: float, rng: np.random.Generator) -> np.ndarray:
    """Choose examples so that classes shrink exponentially from the first to the last.

    Of C classes, in the order of their numbers, class c keeps ``n_c = n_max *
    imbalance**(-c / (C - 1))`` random examples, rounded down but at least one; `n_max` is the
    largest for which every class has enough.

    Parameters
    ----------
    labels : (n,) integers from 0
    imbalance : float
        Imbalance factor, first class over last class; 1: all classes alike.
    rng : numpy.random.Generator

    Returns
    -------
    (m,) int64
        Indices of the examples that stay, in increasing order.

    Raises
    ------
    InvalidInputError
        If `imbalance` is below 1, or there is only one class.

    Notes
    -----
    The profile of Cui et al., "Class-Balanced Loss", CVPR 2019, arXiv 1901.05555.

    Examples
    --------
    >>> labels = np.repeat([0, 1, 2], 100)
    >>> np.bincount(labels[long_tail(labels, 100, np.random.default_rng(0))])
    array([100,  10,   1])
    """
    labels = np.asarray(labels)
    if not (np.isfinite(imbalance) and imbalance >= 1):
        raise InvalidInputError(f"imbalance: expected a number from 1, got {imbalance!r}")
    present, counts = np.unique(labels, return_counts=True)
    if len(present) < 2:
        raise InvalidInputError(
            f"imbalance: a long tail needs at least two classes, got {len(present)}"
        )
    profile = float(imbalance) ** (-np.arange(len(present)) / (len(present) - 1))
    # 1e-9: the class that decides n_max keeps all it has in spite of rounding
    keep = np.maximum(np.floor((counts / profile).min() * profile + 1e-9), 1).astype(np.int64)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:n]
        for label, n in zip(present, keep, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


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


def _check_alpha(alpha: float) -> None:
    if not (np.isfinite(alpha) and alpha > 0):
        raise InvalidInputError(
            f"alpha: expected a positive number, or None for an IID split, got {alpha!r}"
        )


def _check_least(least: int) -> None:
    if isinstance(least, bool) or not isinstance(least, int) or least < 1:
        raise InvalidInputError(f"least: expected a whole number from 1, got {least!r}")

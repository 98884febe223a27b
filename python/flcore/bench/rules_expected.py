"""Robust rules by their definitions, in float64: what the contestants of `rules` must return.

A rule is a set of coefficients of the rows that follows from their n x n inner products, an order
statistic of every coordinate, or both.  The small problems are solved here in the most direct way
(enumeration, repetition), independent of flcore's solvers; order statistics are those of
`flcore.reference.select`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flcore.reference.select import order_statistic

__all__ = ["EXPECTED", "Expected", "Rows", "clip_radius", "gram_of"]

# float32 columns turned to float64 at a time
_BLOCK = 1 << 16


def gram_of(matrix: np.ndarray) -> np.ndarray:
    """Inner products of the rows of `matrix` (n, d), summed in float64; (n, n)."""
    total = np.zeros((len(matrix), len(matrix)))
    for start in range(0, matrix.shape[1], _BLOCK):
        block = matrix[:, start : start + _BLOCK].astype(np.float64)
        total += block @ block.T
    return total


@dataclass(frozen=True)
class Rows:
    """What the definitions look at.

    Attributes
    ----------
    gram : (n, n) float64
        Inner products over all coordinates.
    sample : (n, m) float64
        The values at the coordinates that are compared.
    numel : int
        All coordinates.
    """

    gram: np.ndarray
    sample: np.ndarray
    numel: int

    @property
    def distances(self) -> np.ndarray:
        """Squared distances (n, n)."""
        norms = np.diag(self.gram)
        return np.maximum(norms[:, None] + norms[None, :] - 2 * self.gram, 0.0)


@dataclass(frozen=True)
class Expected:
    """Result of a rule.

    Attributes
    ----------
    values : (m,) float64
        At the sampled coordinates.
    combined : int
        Rows that a second pass, after that over the inner products, has to read; 0 without one.
    """

    values: np.ndarray
    combined: int = 0


Definition = Callable[[Rows, int], Expected]


def _weighted(rows: Rows, weights: np.ndarray) -> Expected:
    return Expected(weights @ rows.sample, int(np.count_nonzero(weights)))


def _mean_of(rows: Rows, members: np.ndarray) -> Expected:
    weights = np.zeros(len(rows.gram))
    weights[members] = 1 / len(members)
    return _weighted(rows, weights)


def _statistic(op: str, keep_all_but_f: bool = False) -> Definition:
    def definition(rows: Rows, f: int) -> Expected:
        keep = len(rows.sample) - f if keep_all_but_f else 0
        return Expected(order_statistic(rows.sample, op, f=f, keep=keep))

    return definition


# ---- nearest rows --------------------------------------------------------------------------------


def _scores(distances: np.ndarray, neighbours: int) -> np.ndarray:
    """Sum of each row's smallest squared distances to others."""
    off_diagonal = distances + np.diag(np.full(len(distances), np.inf))
    return np.sort(off_diagonal, axis=1)[:, :neighbours].sum(axis=1)


def _krum(rows: Rows, f: int) -> Expected:
    scores = _scores(rows.distances, len(rows.gram) - f - 1)
    return _mean_of(rows, np.array([scores.argmin()]))


def _multi_krum(rows: Rows, f: int) -> Expected:
    n = len(rows.gram)
    return _mean_of(rows, _scores(rows.distances, n - f - 1).argsort(kind="stable")[: n - f])


def _bulyan(rows: Rows, f: int) -> Expected:
    distances = rows.distances
    left: list[int] = list(range(len(distances)))
    selected: list[int] = []
    for _ in range(len(left) - 2 * f):
        scores = _scores(distances[np.ix_(left, left)], max(1, len(left) - f - 2))
        selected.append(left.pop(int(scores.argmin())))
    keep = len(selected) - 2 * f
    values = order_statistic(rows.sample[selected], "near_median", keep=keep)
    return Expected(values, len(selected))


def _nnm_trimmed_mean(rows: Rows, f: int) -> Expected:
    keep = len(rows.gram) - f
    nearest = rows.distances.argsort(axis=1, kind="stable")[:, :keep]
    mixed = rows.sample[nearest].mean(axis=1)
    return Expected(order_statistic(mixed, "trimmed_mean", f=f), len(rows.gram))


# ---- best subset ---------------------------------------------------------------------------------


def _best_subset(rows: Rows, f: int, cost: Callable[[np.ndarray], float]) -> Expected:
    """Mean of the n - f rows of least cost, the first in lexicographic order."""
    n = len(rows.gram)
    subsets = (np.array(kept) for kept in itertools.combinations(range(n), n - f))
    return _mean_of(rows, min(subsets, key=cost))


def _mda(rows: Rows, f: int) -> Expected:
    distances = rows.distances
    return _best_subset(rows, f, lambda kept: float(distances[np.ix_(kept, kept)].max()))


def _smea(rows: Rows, f: int) -> Expected:
    def spread(kept: np.ndarray) -> float:
        centred = np.eye(len(kept)) - 1 / len(kept)
        return float(np.linalg.eigvalsh(centred @ rows.gram[np.ix_(kept, kept)] @ centred)[-1])

    return _best_subset(rows, f, spread)


# ---- iterations ----------------------------------------------------------------------------------


def _geometric_median(rows: Rows, f: int, nu: float = 0.1, steps: int = 3) -> Expected:
    weights = np.zeros(len(rows.gram))
    for _ in range(steps):
        squared = np.diag(rows.gram) - 2 * rows.gram @ weights + weights @ rows.gram @ weights
        weights = 1 / np.maximum(nu, np.sqrt(np.maximum(squared, 0.0)))
        weights /= weights.sum()
    return _weighted(rows, weights)


def _centered_clipping(rows: Rows, f: int) -> Expected:
    """One step from zero with the radius of `clip_radius`."""
    norms = np.sqrt(np.diag(rows.gram))
    return _weighted(rows, np.minimum(1.0, clip_radius(rows.numel) / norms) / len(norms))


def clip_radius(numel: int) -> float:
    """Return the typical norm of standard normal rows: about half of them are clipped."""
    return math.sqrt(numel)


def _caf(rows: Rows, f: int) -> Expected:
    """Drop the rows along the widest direction of the weighted covariance, exactly."""
    n = len(rows.gram)
    weights, best, smallest = np.ones(n), np.full(n, 1 / n), np.inf
    while weights.sum() > (n - 2 * f) * (1 + 1e-12):  # rounding is no weight
        p = weights / weights.sum()
        toward = rows.gram @ p
        centred = rows.gram - toward[:, None] - toward[None, :] + p @ toward
        root = np.sqrt(p)
        values, vectors = np.linalg.eigh(root[:, None] * centred * root[None, :])
        if values[-1] < smallest:
            best, smallest = p, values[-1]
        spread = (centred @ (root * vectors[:, -1])) ** 2
        weights = np.maximum(0.0, weights * (1 - spread / spread[weights > 0].max()))
    return _weighted(rows, best)


EXPECTED: dict[str, Definition] = {
    "mean": lambda rows, f: Expected(rows.sample.mean(axis=0)),
    "median": _statistic("median"),
    "trimmed_mean": _statistic("trimmed_mean"),
    "meamed": _statistic("near_median", keep_all_but_f=True),
    "phocas": _statistic("near_trimmed", keep_all_but_f=True),
    "krum": _krum,
    "multi_krum": _multi_krum,
    "bulyan": _bulyan,
    "geometric_median": _geometric_median,
    "centered_clipping": _centered_clipping,
    "mda": _mda,
    "smea": _smea,
    "caf": _caf,
    "nnm_trimmed_mean": _nnm_trimmed_mean,
}

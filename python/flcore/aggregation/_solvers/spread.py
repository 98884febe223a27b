"""Rows that spread least: subsets (SMEA) and weights (CAF) of smallest top covariance eigenvalue.

With S rows of weights p (sum one) and G their inner products about any fixed point, the covariance
``sum_i p_i (x_i - mu)(x_i - mu)^T`` has the nonzero eigenvalues of the n x n matrix
``diag(sqrt p) G_c diag(sqrt p)`` with ``G_c = G - (G p) 1^T - 1 (G p)^T + p^T G p``.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from flcore.errors import InvalidInputError

__all__ = ["filter_weights", "least_spread_subset"]

TIED = 1e-12  # eigenvalues closer than this, relative, are taken as equal
MOST_STEPS = 10_000  # of a filter that need not end


def _top(frame: np.ndarray, p: np.ndarray, active: np.ndarray) -> tuple[float, np.ndarray]:
    """Largest eigenvalue of the covariance of rows with weights p, and all rows along its vector.

    p (n,) is zero outside `active`. Returns ``(lambda, (x_i - mu)^T v)``.
    """
    toward = np.einsum("ij,j->i", frame, p)
    centred = frame - toward[:, None] - toward[None, :] + (p * toward).sum()
    root = np.sqrt(p[active])
    inner = root[:, None] * centred[active[:, None], active] * root[None, :]
    top = float(np.linalg.eigvalsh(inner)[-1])
    if top <= 0:
        return 0.0, np.zeros(len(p))
    vector = _eigenvector(inner, top)
    along = np.einsum("ij,j->i", centred[:, active], root * vector)
    return top, along / math.sqrt(top)


def _eigenvector(matrix: np.ndarray, value: float) -> np.ndarray:
    """Unit eigenvector of a known eigenvalue, by inverse iteration.

    `numpy.linalg.eigh` wakes the threads of the BLAS for 26 rows and more; on a busy machine it
    then takes milliseconds instead of 0.1, and the threads spin on into the next kernel.
    """
    n = len(matrix)
    shifted = matrix - value * (1 + 1e-13) * np.eye(n)
    vector = np.cos(np.arange(1, n + 1) ** 2.0)  # no direction that data would be orthogonal to
    for _ in range(3):
        vector = np.linalg.solve(shifted, vector)
        vector /= np.sqrt((vector**2).sum())
    return vector


def filter_weights(frame: np.ndarray, f: int, *, removed_count: bool = False) -> np.ndarray:
    """Weights of CAF: rows lose weight by how far they lie along the widest direction.

    From c = 1: (lambda, v) is the top eigenpair of the weighted covariance, and
    ``c_i <- c_i (1 - tau_i / max_j tau_j)`` with ``tau_i = ((x_i - mu)^T v)^2``, until the weights
    sum to n - 2 f. The step of smallest lambda wins. (Allouah et al., ICML 2025.)

    Parameters
    ----------
    frame : (n, n) float64
        Inner products about any fixed point near the rows.
    f : int
        2 f < n.
    removed_count : bool
        Whether j runs over the rows of weight 0 too. If not, a row leaves in each step, and 2 f
        steps are enough. If so, a removed row far out keeps the others from losing weight.

    Returns
    -------
    (n,) float64
        Sum to one.

    Raises
    ------
    InvalidInputError
        More than 10,000 steps (only with `removed_count`).
    """
    n = len(frame)
    c = np.ones(n)
    best, least = c / n, np.inf
    for _ in range(MOST_STEPS):
        if f == 0 or c.sum() <= (n - 2 * f) * (1 + TIED):
            return best
        p = c / c.sum()
        active = np.flatnonzero(c)
        top, along = _top(frame, p, active)
        if top < least:
            best, least = p, top
        if top <= TIED * (p * np.diagonal(frame)).sum():  # equal rows, up to rounding
            return best
        tau = along**2
        c = c * np.maximum(0.0, 1 - tau / (tau if removed_count else tau[active]).max())
    raise InvalidInputError(
        f"convention: the weights still sum to more than n - 2 f after {MOST_STEPS} steps, held up "
        "by updates far out that were removed; use the convention 'paper'"
    )


def least_spread_subset(frame: np.ndarray, keep: int, most: int) -> tuple[np.ndarray, float]:
    """Return the subset of `keep` rows whose covariance has the smallest top eigenvalue.

    Along any direction the variance of a subset is a lower bound of its eigenvalue, and costs one
    sum. So the subset of lowest bound is solved, its top direction raises the bounds of the others,
    and those above the best are dropped; when that drops little, the rest is solved one by one.

    Parameters
    ----------
    frame : (n, n) float64
        Inner products about any fixed point near the rows.
    keep : int
        1 .. n.
    most : int
        Limit on the number of subsets.

    Returns
    -------
    rows : (keep,) int
        Ascending. Of eigenvalues within 1e-12, relative, the first subset in lexicographic order.
    eigenvalue : float

    Raises
    ------
    InvalidInputError
        There are more than `most` subsets.
    """
    n = len(frame)
    count = math.comb(n, keep)
    if count > most:
        raise InvalidInputError(
            f"f: {n - keep} of {n} updates leave {count} subsets to search, more than "
            f"max_subsets = {most}; use a smaller f, or CAF"
        )
    # rows left out: the last combination leaves the first subset in lexicographic order
    out = np.array(list(itertools.combinations(range(n), n - keep)), dtype=int)[::-1]
    out = out.reshape(count, n - keep)
    open_ = np.arange(count)
    bounds = np.zeros(count)
    best, winner = np.inf, -1
    uniform = np.full(keep, 1 / keep)
    idle = 0  # tries in a row that dropped next to nothing
    while len(open_) and idle < 8:
        at = int(np.argmin(bounds))
        tried = int(open_[at])
        kept = _kept(out[tried : tried + 1], n)[0]
        p = np.zeros(n)
        p[kept] = uniform
        top, along = _top(frame, p, kept)
        best, winner = _better(best, winner, top, tried)
        bounds = np.maximum(bounds, _variances(along, keep, out[open_]) * (1 - TIED))
        bounds[at] = np.inf
        before = len(open_)
        limit = np.where(open_ < winner, best * (1 + TIED), best * (1 - TIED))
        open_, bounds = open_[bounds <= limit], bounds[bounds <= limit]
        idle = idle + 1 if len(open_) > 0.9 * before else 0
    for start in range(0, len(open_), 256):
        part = open_[start : start + 256]
        for tried, top in zip(part, _tops(frame, _kept(out[part], n)), strict=True):
            best, winner = _better(best, winner, float(top), int(tried))
    return _kept(out[winner : winner + 1], n)[0], best


def _better(best: float, winner: int, top: float, tried: int) -> tuple[float, int]:
    """Keep the smaller eigenvalue; of two that tie the earlier subset."""
    if winner < 0 or top < best * (1 - TIED) or (top <= best * (1 + TIED) and tried < winner):
        return top, tried
    return best, winner


def _kept(out: np.ndarray, n: int) -> np.ndarray:
    """Rows (subsets, keep) that stay when `out` (subsets, n - keep) go."""
    mask = np.ones((len(out), n), bool)
    np.put_along_axis(mask, out, False, axis=1)
    return np.nonzero(mask)[1].reshape(len(out), -1)


def _tops(frame: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Top eigenvalue of the covariance of each subset (subsets, m) of rows."""
    m = kept.shape[1]
    rows = frame[kept[:, :, None], kept[:, None, :]]
    toward = rows.mean(axis=2)
    centred = rows - toward[:, :, None] - toward[:, None, :] + toward.mean(axis=1)[:, None, None]
    return np.maximum(np.linalg.eigvalsh(centred)[:, -1] / m, 0.0)


def _variances(along: np.ndarray, keep: int, out: np.ndarray) -> np.ndarray:
    """Variance of every subset, given all rows along one direction of unit length."""
    gone = along[out]
    total = along.sum() - gone.sum(axis=1)
    squares = (along**2).sum() - (gone**2).sum(axis=1)
    return squares / keep - (total / keep) ** 2

"""Sums over nearest rows: scores of Krum, repeated Krum, nearest neighbours of every row."""

from __future__ import annotations

import numpy as np

__all__ = ["krum_scores", "nearest", "repeated_krum"]


def krum_scores(distances: np.ndarray, neighbours: int) -> np.ndarray:
    """Sum of the `neighbours` smallest distances of each row to the others.

    Parameters
    ----------
    distances : (n, n) float64
        Squared or not; the diagonal is not looked at.
    neighbours : int
        At most n - 1.

    Returns
    -------
    (n,) float64
    """
    away = distances.copy()
    np.fill_diagonal(away, np.inf)
    return np.sort(away, axis=1)[:, :neighbours].sum(axis=1)


def repeated_krum(distances: np.ndarray, index: np.ndarray, f: int, count: int) -> np.ndarray:
    """Take out the winner of Krum `count` times; the first phase of Bulyan.

    Among r rows that are left the scores count max(1, r - f - 2) neighbours; of equal scores the
    lowest `index` wins. (El Mhamdi et al., ICML 2018.)

    Parameters
    ----------
    distances : (n, n) float64
        Squared.
    index : (n,) int
    f, count : int

    Returns
    -------
    (count,) int
        Rows in the order of selection.
    """
    n = len(distances)
    away = distances.copy()
    np.fill_diagonal(away, np.inf)  # sorted behind everything: never counted
    by_distance = np.argsort(away, axis=1, kind="stable")
    ascending = np.take_along_axis(away, by_distance, axis=1)
    left = np.ones(n, bool)
    chosen = []
    for step in range(count):
        neighbours = min(max(1, n - step - f - 2), n - step - 1)
        present = left[by_distance]
        counted = present & (np.cumsum(present, axis=1) <= neighbours)
        scores = np.where(counted, ascending, 0.0).sum(axis=1)
        scores[~left] = np.inf
        winner = int(np.lexsort((index, scores))[0])
        left[winner] = False
        chosen.append(winner)
    return np.array(chosen, dtype=int)


def nearest(distances: np.ndarray, index: np.ndarray, keep: int) -> np.ndarray:
    """Return the `keep` rows nearest to each row, itself first; of equal ones the lowest `index`.

    Returns
    -------
    (n, keep) int
    """
    away = distances.copy()
    np.fill_diagonal(away, -1.0)
    by_index = np.argsort(index)
    return by_index[np.argsort(away[:, by_index], axis=1, kind="stable")[:, :keep]]

"""Largest distance within a subset, made as small as possible: the problem behind MDA.

A subset of m of the n rows has no pair farther apart than t exactly when the other n - m rows cover
all edges of the graph of pairs farther apart than t. Vertex cover with few vertices is solved by
branching, so that the subsets are never listed. Sets of rows are bits of Python integers.
"""

from __future__ import annotations

import numpy as np

from flcore.errors import InvalidInputError

__all__ = ["smallest_diameter"]

MOST_BRANCHES = 200_000  # some seconds
# Distances that agree to this, relative, are taken as equal: the differences of mixed rows (NNM)
# coincide in exact arithmetic, and rounding must not choose among subsets.
TIED = 1e-12


class _Cover:
    """Whether few vertices cover all edges; one object a problem, which counts its branches."""

    def __init__(self) -> None:
        self.branches = 0

    def exists(self, edges: list[int], alive: int, k: int) -> bool:
        """Whether removing at most k vertices leaves no edge within `alive`.

        Vertices with more than k edges are removed, neighbours of vertices with one edge too
        (no worse than the vertex itself), and any vertex of a cycle; on the rest, remove the
        vertex with most edges or all its neighbours.
        """
        while True:
            if k < 0:
                return False
            total, most, hub, leaf = 0, 0, -1, -1
            rest = alive
            while rest:
                bit = rest & -rest
                rest ^= bit
                vertex = bit.bit_length() - 1
                degree = (edges[vertex] & alive).bit_count()
                if degree == 0:
                    alive ^= bit
                    continue
                total += degree
                if degree == 1:
                    leaf = vertex
                if degree > most:
                    most, hub = degree, vertex
            if most == 0:
                return True
            if total > 2 * k * most:  # each removal takes at most `most` edges
                return False
            if most > k or (most <= 2 and leaf < 0):
                alive ^= 1 << hub
                k -= 1
            elif leaf >= 0:
                alive &= ~(edges[leaf] & alive)
                k -= 1
            else:
                self.branches += 1
                if self.branches > MOST_BRANCHES:
                    raise InvalidInputError(
                        "f: the exact search for the subset of smallest diameter was given up "
                        f"after {MOST_BRANCHES} branches; use a smaller f, or CAF"
                    )
                if self.exists(edges, alive ^ (1 << hub), k - 1):
                    return True
                neighbours = edges[hub] & alive
                alive &= ~(neighbours | (1 << hub))
                k -= most


def smallest_diameter(distances: np.ndarray, keep: int) -> np.ndarray:
    """Return the subset of `keep` rows whose largest distance is smallest.

    Parameters
    ----------
    distances : (n, n) float64
        Squared or not.
    keep : int
        1 .. n.

    Returns
    -------
    (keep,) int
        Ascending. Of several such subsets (distances equal to 1e-12, relative) the first in
        lexicographic order.

    Raises
    ------
    InvalidInputError
        The search took too long (it is exponential in n - keep in the worst case).
    """
    n = len(distances)
    out = n - keep
    if out == 0:
        return np.arange(n)
    everyone = (1 << n) - 1
    cover = _Cover()
    # a subset of m rows has m (m - 1) / 2 distances, so its largest is at least that smallest
    least = keep * (keep - 1) // 2 - 1
    levels = np.sort(distances[np.triu_indices(n, 1)])[max(least, 0) :]
    levels = np.unique(levels) if keep > 1 else np.zeros(1)
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if cover.exists(_farther(distances, levels[middle]), everyone, out):
            high = middle
        else:
            low = middle + 1
    edges = _farther(distances, levels[low])
    chosen: list[int] = []
    alive = everyone
    for row in range(n):
        bit = 1 << row
        if not alive & bit:
            continue
        conflicts = edges[row] & alive
        k = out - conflicts.bit_count()
        after = alive & ~(conflicts | bit)
        if not conflicts or (k >= 0 and cover.exists(edges, after, k)):
            chosen.append(row)
            alive, out = after, k
            if len(chosen) == keep:
                break
        else:
            alive ^= bit
            out -= 1
    return np.array(chosen, dtype=int)


def _farther(distances: np.ndarray, limit: float) -> list[int]:
    """Bits of the rows farther than `limit` from each row; none from itself."""
    far = distances > limit * (1 + TIED)
    np.fill_diagonal(far, False)
    packed = np.packbits(far, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]

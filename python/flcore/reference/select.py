"""Order statistics of every coordinate over n client rows: the definition.

With a_(1) <= ... <= a_(n) the sorted values of one coordinate:

median                   a_((n+1)/2), or of the two middle values their mean, the lower, the upper
trimmed_mean (f)         mean of a_(f+1) .. a_(n-f)                  (Yin et al., ICML 2018)
near_median (keep)       mean of the `keep` values nearest to the median        (MeaMed,
                         Xie et al., arXiv 1802.10116; Bulyan's second phase)
near_trimmed (f, keep)   mean of the `keep` values nearest to the trimmed mean  (Phocas,
                         Xie et al., arXiv 1805.09682)

Values at the same distance on both sides: the smaller one is taken. Mixed rows y = M x come before
the order statistic when a mixing matrix is given. A zero has the sign +.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore import _arrays
from flcore._arrays import View

__all__ = ["OPS", "comparators", "order_statistic", "select"]

OPS = ("median", "trimmed_mean", "near_median", "near_trimmed")  # enum SelectOp in csrc/api.h
NONFINITE = 1  # SelectFlags in csrc/api.h


def _median(a: np.ndarray, median: str) -> np.ndarray:
    lower, upper = a[(len(a) - 1) // 2], a[len(a) // 2]
    if median == "average":
        return lower * 0.5 + upper * 0.5 if len(a) % 2 == 0 else lower
    return lower if median == "lower" else upper


def _nearest(a: np.ndarray, center: np.ndarray, keep: int) -> np.ndarray:
    """Mean of the `keep` values nearest to `center`: a window of the sorted values.

    Moving the window from start j to j + 1 pays while the value that enters is nearer than the one
    that leaves: while their midpoint lies below the centre. That is true up to some j and false
    from there on. (The two middle values are equally far from their mean; midpoints see that,
    differences only up to rounding.)
    """
    start = np.zeros(a.shape[1], np.int64)
    for j in range(len(a) - keep):
        start += a[j] * 0.5 + a[j + keep] * 0.5 < center
    rank = np.arange(len(a))[:, None]
    inside = (rank >= start) & (rank < start + keep)
    return np.where(inside, a, 0.0).sum(axis=0) / keep


def order_statistic(
    values: np.ndarray, op: str, *, median: str = "average", f: int = 0, keep: int = 0
) -> np.ndarray:
    """Apply the op to each column of `values` (n, d); returns (d,)."""
    a = np.sort(values, axis=0)
    if op == "median":
        result = _median(a, median)
    elif op == "trimmed_mean":
        result = a[f : len(a) - f].mean(axis=0)
    elif op == "near_median":
        result = _nearest(a, _median(a, median), keep)
    else:
        result = _nearest(a, a[f : len(a) - f].mean(axis=0), keep)
    return result + 0.0


def select(
    rows: Sequence[Sequence[View]],
    *,
    layers: Sequence[View],
    op: str,
    median: str,
    f: int,
    keep: int,
    mix: Sequence[Sequence[tuple[int, float]]] | None,
    propagate: bool,
    out: Sequence[View],
) -> int:
    """Compute the module's formulas in float64; see `flcore.ops.select` for the arguments."""
    flags = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for j in range(len(layers)):
            x = np.stack([_arrays.to_float64(row[j].array) for row in rows])
            if mix is not None:
                x = np.stack([sum((w * x[i] for i, w in row), np.zeros(x.shape[1])) for row in mix])
            if not np.isfinite(x).all():
                flags |= NONFINITE
            result = order_statistic(x, op, median=median, f=f, keep=keep)
            result[np.isnan(x).any(axis=0)] = np.nan
            _arrays.assign(out[j].array, result)
    return 0 if propagate else flags


def comparators(
    n: int, first: int = 0, last: int | None = None
) -> tuple[list[tuple[int, int]], list[int]]:
    """Sorting network of Batcher's odd-even merge sort for n values, pruned to what is asked for.

    Returns compare-exchanges (wire that takes the smaller value, wire that takes the larger), in
    order, and the wires in sorted order. Only compare-exchanges that reach the sorted positions
    `first` .. `last` (all by default) are kept: walking backwards, one is needed when one of its
    two outputs is.

    K. E. Batcher, "Sorting networks and their applications", AFIPS 1968.
    """
    network: list[tuple[int, int]] = []

    def merge(a: list[int], b: list[int]) -> list[int]:
        if not a or not b:
            return a + b
        if len(a) == len(b) == 1:
            network.append((a[0], b[0]))
            return [a[0], b[0]]
        v, w = merge(a[::2], b[::2]), merge(a[1::2], b[1::2])
        merged = v[:1]
        for low, high in zip(w, v[1:]):  # noqa: B905  (v has up to two more)
            network.append((low, high))
            merged += [low, high]
        return merged + v[1 + len(w) :] + w[len(v) - 1 :]

    def sort(wires: list[int]) -> list[int]:
        half = (len(wires) + 1) // 2
        return merge(sort(wires[:half]), sort(wires[half:])) if len(wires) > 1 else wires

    order = sort(list(range(n)))
    needed = {order[i] for i in range(first, n if last is None else last + 1)}
    kept = []
    for low, high in reversed(network):
        if low in needed or high in needed:
            needed |= {low, high}
            kept.append((low, high))
    return kept[::-1], order

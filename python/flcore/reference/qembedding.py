"""Bags of table rows, and the gradient of the rows: the definition, in float64."""

from __future__ import annotations

import numpy as np

__all__ = ["bags", "scatter"]


def bags(
    rows: np.ndarray,
    index: np.ndarray,
    starts: np.ndarray,
    coefficients: np.ndarray | None = None,
    *,
    mean: bool = False,
    padding: int = -1,
) -> np.ndarray:
    """``out[b] = sum of c_e rows[index_e]`` over the entries e of bag b.

    Parameters
    ----------
    rows : (n, k) float64
        The table.
    index : (entries,) int64
        Row of each entry.
    starts : (bags + 1,) int64
        Entries ``starts[b] .. starts[b + 1] - 1`` belong to bag b.
    coefficients : (entries,), optional
        c; 1 by default.
    mean : bool
        Divide by the number of entries.
    padding : int
        Entries with this index are left out; -1: none.

    Returns
    -------
    (bags, k) float64; 0 for a bag without entries.
    """
    out = np.zeros((len(starts) - 1, rows.shape[1]))
    for b in range(len(out)):
        entries = np.arange(starts[b], starts[b + 1])
        entries = entries[index[entries] != padding]
        if not entries.size:
            continue
        values = rows[index[entries]]
        if coefficients is not None:
            values = values * np.asarray(coefficients, np.float64)[entries, None]
        out[b] = values.sum(axis=0) / (len(entries) if mean else 1)
    return out


def scatter(
    grad: np.ndarray,
    index: np.ndarray,
    starts: np.ndarray,
    coefficients: np.ndarray | None = None,
    *,
    rows: int,
    mean: bool = False,
    padding: int = -1,
) -> np.ndarray:
    """Gradient of the table: ``out[index_e] += c_e grad[b]`` for every entry e of every bag b.

    Parameters
    ----------
    grad : (bags, k) float64
        Gradient of what `bags` returned.
    index, starts, coefficients, mean, padding
        As for `bags`; with `mean` c is divided by the number of entries of the bag.
    rows : int
        n, of the table.

    Returns
    -------
    (n, k) float64
    """
    out = np.zeros((rows, grad.shape[1]))
    for b in range(len(starts) - 1):
        entries = [e for e in range(starts[b], starts[b + 1]) if index[e] != padding]
        for e in entries:
            c = 1.0 if coefficients is None else float(coefficients[e])
            out[index[e]] += (c / len(entries) if mean else c) * grad[b]
    return out

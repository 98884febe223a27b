"""Squared norms, squared distances and inner products of n client rows: the definition.

norms      ||x_i||^2
distances  ||x_i - x_j||^2, from differences, never from norms and products: those lose every digit
           when the rows share a large common part
products   <x_i, x_j>

over all coordinates of an update, or for each segment (layer) of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore import _arrays
from flcore._arrays import View

__all__ = ["KINDS", "gram"]

KINDS = ("norms", "distances", "products")  # enum GramKind in csrc/api.h


def gram(
    rows: Sequence[Sequence[View]],
    *,
    layers: Sequence[View],
    kind: str,
    wide: bool,
    segments: Sequence[Sequence[int]],
) -> np.ndarray:
    """Compute the module's formulas in float64, whatever `wide` says.

    `segments` lists the layers of each segment. Returns (segments, n) for "norms", else
    (segments, n, n) with the squared norms on the diagonal.
    """
    n = len(rows)
    result = np.zeros((len(segments), n, n))
    with np.errstate(over="ignore", invalid="ignore"):
        for s, members in enumerate(segments):
            for j in members:
                x = np.stack([_arrays.to_float64(row[j].array) for row in rows])
                for a in range(n):
                    result[s, a, a] += (x[a] * x[a]).sum()
                    if kind == "norms":
                        continue
                    for b in range(a):
                        term = x[a] * x[b] if kind == "products" else (x[a] - x[b]) ** 2
                        result[s, a, b] += term.sum()
                        result[s, b, a] = result[s, a, b]
    return np.diagonal(result, axis1=1, axis2=2).copy() if kind == "norms" else result

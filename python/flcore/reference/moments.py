"""Moments of layers and affine maps of them: the definition, in float64 and two passes.

mean_l = sum_j x_j / n_l        m2_l = sum_j (x_j - mean_l)^2        out_j = scale_l x_j + shift_l

x is a layer of a row, or a blend ``acc_weight acc + row_weight x`` of an accumulator and a row,
which is never written down; at row_weight 0 the row is not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore import _arrays
from flcore._arrays import View

__all__ = ["Blend", "accumulate_moments", "affine", "moments"]

Blend = tuple[Sequence[View], float, float]  # acc, acc_weight, row_weight

# Half a step beyond the largest number: results at and above this are infinite in the type.
LIMIT = {"float64": np.inf, "float32": 2.0**128 - 2.0**103, "float16": 65520.0}
LIMIT["bfloat16"] = 2.0**128 - 2.0**119


def _values(row: Sequence[View], layer: int, blend: Blend | None) -> np.ndarray:
    if blend is None:
        return _arrays.to_float64(row[layer].array)
    acc, acc_weight, row_weight = blend
    scaled = acc_weight * _arrays.to_float64(acc[layer].array)
    if row_weight == 0:
        return scaled
    return scaled + row_weight * _arrays.to_float64(row[layer].array)


def moments(
    rows: Sequence[Sequence[View]], *, blend: Blend | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and m2, (n, layers) float64 each, 0 for a layer of no values."""
    mean = np.zeros((len(rows), len(rows[0])))
    m2 = np.zeros_like(mean)
    with np.errstate(over="ignore", invalid="ignore"):
        for i, row in enumerate(rows):
            for j, layer in enumerate(row):
                if layer.numel:
                    x = _values(row, j, blend)
                    mean[i, j] = x.mean()
                    deviation = x - mean[i, j]
                    m2[i, j] = np.square(deviation - deviation.mean()).sum()  # the mean is rounded
    return mean, m2


def accumulate_moments(
    acc: Sequence[View], row: Sequence[View], weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Add ``weight * row`` to `acc`; return the moments of `row`, (1, layers) each."""
    with np.errstate(over="ignore", invalid="ignore"):
        for a, x in zip(acc, row, strict=True):
            total = _arrays.to_float64(a.array) + weight * _arrays.to_float64(x.array)
            _arrays.assign(a.array, total)
    return moments([row])


def affine(
    row: Sequence[View],
    scale: Sequence[float],
    shift: Sequence[float],
    *,
    out: Sequence[View],
    blend: Blend | None = None,
) -> bool:
    """Write the map of the module's first line; return whether a value of `out` is not finite."""
    bad = False
    with np.errstate(over="ignore", invalid="ignore"):
        for j, target in enumerate(out):
            result = scale[j] * _values(row, j, blend) + (shift[j] or -0.0)  # x + -0 is x
            bad |= not (np.abs(result) < LIMIT[target.dtype]).all()
            _arrays.assign(target.array, result)
    return bad

"""Weighted sum of client rows: the definition (McMahan et al., AISTATS 2017, Algorithm 1).

acc[j] = start[j] + sum_i weights[i] * rows[i][j]    for every layer j, element by element
out[j] = acc[j] / divisor,  in the dtype of the layer
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore import _arrays
from flcore._arrays import View

__all__ = ["combine", "combine_rows", "combine_scaled", "cut", "nonfinite"]

NONFINITE, OUT_OF_RANGE = 1, 2  # CombineFlags in csrc/api.h
BIN_UNIT = (2.0**7, 2.0**-33, 2.0**-73)
BIN_LIMIT = 2.0**46


def cut(values: np.ndarray) -> list[np.ndarray]:
    """Split float64 values into multiples of the three bin units; what is smaller is dropped.

    Adding and subtracting 1.5 * 2^52 units rounds to a multiple of the unit. Sums of multiples of
    one unit are exact while they stay below 2^53 units, so their order does not matter.
    """
    parts, rest = [], values
    for unit in BIN_UNIT:
        anchor = 1.5 * 2.0**52 * unit
        part = (rest + anchor) - anchor
        parts.append(part)
        rest = rest - part
    return parts


def combine(
    rows: Sequence[Sequence[View]],
    weights: Sequence[float],
    *,
    layers: Sequence[View],
    state: Sequence | None,
    out: Sequence[View] | None,
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """Compute the module's formula in float64; see `flcore.ops.combine` for the arguments."""
    flags = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for j, layer in enumerate(layers):
            bins = accumulate == "reproducible"
            shape = (3, layer.numel) if bins else (layer.numel,)
            acc = np.zeros(shape) if state is None else _arrays.to_float64(state[j]).reshape(shape)
            for row, w in zip(rows, weights, strict=True):
                product = w * _arrays.to_float64(row[j].array)
                if bins:
                    if not (np.abs(product) < BIN_LIMIT).all():
                        flags |= OUT_OF_RANGE
                    acc += cut(product)
                else:
                    acc += product
            total = (acc[0] + acc[1]) + acc[2] if bins else acc
            if out is None:
                assert state is not None
                _arrays.assign(state[j], acc)
                if not np.isfinite(total).all():
                    flags |= NONFINITE
            else:
                if not np.isfinite(total).all():
                    flags |= NONFINITE
                _arrays.assign(out[j].array, total / divisor)
    return flags if check else 0


def combine_scaled(
    rows: Sequence[Sequence[View]],
    weights: np.ndarray,
    *,
    layers: Sequence[View],
    state: None,
    out: Sequence[View],
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """Compute the formula with a weight for each layer of each row: `weights` is (n, layers)."""
    flags = 0
    for j, layer in enumerate(layers):
        flags |= combine(
            [[row[j]] for row in rows],
            [float(w) for w in weights[:, j]],
            layers=[layer],
            state=None,
            out=[out[j]],
            accumulate=accumulate,
            divisor=divisor,
            check=check,
        )
    return flags


def combine_rows(
    rows: Sequence[Sequence[View]],
    matrix: np.ndarray,
    *,
    layers: Sequence[View],
    out: Sequence[Sequence[View]],
    accumulate: str,
    check: bool,
) -> int:
    """Compute the formula for each line of `matrix` (m, n); zero coefficients are left out."""
    flags = 0
    for line, target in zip(matrix, out, strict=True):
        active = [int(i) for i in np.flatnonzero(line)]
        flags |= combine(
            [rows[i] for i in active],
            [float(line[i]) for i in active],
            layers=layers,
            state=None,
            out=target,
            accumulate=accumulate,
            divisor=1.0,
            check=check,
        )
    return flags


def nonfinite(rows: Sequence[Sequence[View]]) -> list[bool]:
    """Whether each row holds a NaN or an infinity."""
    return [
        any(not np.isfinite(_arrays.to_float64(layer.array)).all() for layer in row) for row in rows
    ]

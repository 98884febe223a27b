"""The CPU variant of moments and of affine maps: views to addresses (csrc/cpu/moments.isa.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore import _arrays, _native
from flcore._arrays import View
from flcore.reference.moments import Blend

__all__ = ["accumulate_moments", "affine", "moments"]


def moments(
    rows: Sequence[Sequence[View]], *, blend: Blend | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Variant `cpu`: mean and m2, (n, layers) each."""
    of_rows, _, of_blend = _native.core.MOMENTS_OF
    acc, acc_weight, row_weight = blend or ([], 0.0, 1.0)
    return _call(rows, of_rows if blend is None else of_blend, acc, acc_weight, row_weight)


def accumulate_moments(
    acc: Sequence[View], row: Sequence[View], weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Variant `cpu`: mean and m2, (1, layers) each."""
    return _call([row], _native.core.MOMENTS_OF[1], acc, 1.0, weight)


def _call(
    rows: Sequence[Sequence[View]],
    of: int,
    acc: Sequence[View],
    acc_weight: float,
    row_weight: float,
) -> tuple[np.ndarray, np.ndarray]:
    numel = [v.numel for v in rows[0]]
    mean, m2 = np.empty((2, len(rows), len(numel)))
    _native.core.moments(
        [v.ptr for row in rows for v in row],
        len(rows),
        numel,
        [v.code for v in rows[0]],
        of,
        [v.ptr for v in acc],
        acc_weight,
        row_weight,
        _arrays.address(mean),
        _arrays.address(m2),
        _native.threads_for(sum(numel) * len(rows)),
    )
    return mean, m2


def affine(
    row: Sequence[View],
    scale: Sequence[float],
    shift: Sequence[float],
    *,
    out: Sequence[View],
    blend: Blend | None = None,
) -> bool:
    """Variant `cpu`: whether a value of `out` is not finite."""
    acc, acc_weight, row_weight = blend or ([], 0.0, 1.0)
    numel = [v.numel for v in row]
    return _native.core.affine(
        [v.ptr for v in row],
        numel,
        [v.code for v in row],
        [v.ptr for v in acc],
        acc_weight,
        row_weight,
        scale,
        shift,
        [v.ptr for v in out],
        _native.threads_for(2 * sum(numel)),
    )

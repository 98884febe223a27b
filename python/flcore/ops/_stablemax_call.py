"""What one call of a StableMax kernel gets: arrays of the caller, where their rows lie, a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["STEPS", "CollapseCall", "StableMaxCall", "as_rows"]

# enum StableMaxStep in csrc/api.h
STEPS = ("stablemax", "log_stablemax", "stablemax_backward", "log_stablemax_backward")

Strides = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class StableMaxCall:
    """One step over the rows of an array.

    Attributes
    ----------
    step : int
        Index of `STEPS`.
    rows, classes, inner : int
        Element (i, k) of an array lies at
        ``(i // inner) * outer + (i % inner) * row + k * class``, in elements from its first.
    x, out : array
        Where from and where to; same dtype, any strides of that form. On a CPU either the class
        stride of all arrays is 1, or the row stride is.
    x_strides, v_strides, out_strides : tuple of int
        Their (outer, row, class).
    v : array, optional
        Gradient of the result, for the backward steps.
    """

    step: int
    rows: int
    classes: int
    inner: int
    x: Any
    x_strides: Strides
    out: Any
    out_strides: Strides
    v: Any = None
    v_strides: Strides = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class CollapseCall:
    """Logits (rows, classes) whose classes lie side by side, and int64 labels (rows,)."""

    x: Any
    labels: np.ndarray
    ignore_index: int
    unit: float


def as_rows(x: Any, call: StableMaxCall, strides: Strides) -> Any:
    """View (rows / inner, inner, classes) of an array of `call`."""
    shape = (call.rows // call.inner, call.inner, call.classes)
    if isinstance(x, np.ndarray):
        return np.lib.stride_tricks.as_strided(x, shape, [s * x.itemsize for s in strides])
    return x.detach().as_strided(shape, strides, x.storage_offset())

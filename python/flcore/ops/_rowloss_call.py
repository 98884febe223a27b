"""What a row loss is (`RowLossForm`) and what one call of a kernel gets (`RowCall`)."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flcore import _arrays
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["MAPS", "RowCall", "RowLossForm", "RowStats", "as_rows", "layout"]

MAPS = ("softmax", "stablemax", "taylor")  # enum RowMap in csrc/api.h


@dataclass(frozen=True)
class RowLossForm:
    """The loss of one row, apart from its arrays; numbers are checked when it is made.

    Parameters
    ----------
    map : {"stablemax", "softmax", "taylor"}
        What stands in the place of exp: the element map f.
    ignore_index : int
        Rows with this label have loss 0 and gradient 0 and are never read.
    label_smoothing : float
        Share of the target that is spread over the classes, in [0, 1].
    logit_scale : float
        Factor of the logits (an inverse temperature).
    margin : float
        Added to the logits of all classes but the target.
    z_loss : float
        Factor of ``(ln S)^2``.
    tau : float
        Member of the comp-sum family: 1 cross-entropy, 2 mean absolute error, 0 sum of
        exponentials, between 1 and 2 generalised cross-entropy. Not negative.
    label_offset : int
        Label of the first class.
    shard : bool
        The classes are one part of a vocabulary; labels outside belong to another part.

    Raises
    ------
    InvalidInputError, DTypeError
        A value out of range or of another type.
    """

    map: str = "stablemax"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    margin: float = 0.0
    z_loss: float = 0.0
    tau: float = 1.0
    label_offset: int = 0
    shard: bool = False

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise InvalidInputError(f"map: expected one of {MAPS}, got {self.map!r}")
        for name in ("ignore_index", "label_offset"):
            try:
                operator.index(getattr(self, name))
            except TypeError:
                got = getattr(self, name)
                raise DTypeError(f"{name}: expected an integer, got {got!r}") from None
        for name in ("label_smoothing", "logit_scale", "margin", "z_loss", "tau"):
            value = getattr(self, name)
            try:
                finite = math.isfinite(value)
            except TypeError:
                raise DTypeError(f"{name}: expected a number, got {value!r}") from None
            if not finite:
                raise InvalidInputError(f"{name}: expected a finite number, got {value!r}")
        if not 0 <= self.label_smoothing <= 1:
            raise InvalidInputError(
                f"label_smoothing: expected a number in [0, 1], got {self.label_smoothing!r}"
            )
        if self.tau < 0:
            raise InvalidInputError(f"tau: expected a number that is not negative, got {self.tau}")
        if self.shard and self.label_smoothing:
            raise InvalidInputError(
                "label_smoothing: a shard cannot smooth, its loss has a term for every class"
            )


class RowStats(NamedTuple):
    """Two or three numbers a row from which loss and gradient follow; shape of the labels.

    Attributes
    ----------
    rest : array, float32 (float64 for float64 logits)
        R: sum of ``e_k`` over all classes but the target; over all classes with soft targets.
    own : array
        ``e_y`` of the target; 0 with soft targets, or where the target lies in another shard.
    shift : array, optional
        What was taken from the exponents, softmax only: ``ln S = shift + log(rest + own)``.
    """

    rest: Any
    own: Any
    shift: Any = None


@dataclass
class RowCall:
    """Everything a variant gets: arrays of one library on one device, checked, and numbers.

    Element (i, k) of `x` lies at ``(i // inner) outer_stride + (i % inner) row_stride +
    k class_stride``, in elements; of `grad` likewise with its own strides and the same `inner`.
    """

    rows: int
    classes: int
    x: Any
    inner: int
    outer_stride: int
    row_stride: int
    class_stride: int
    form: RowLossForm
    compute: str  # "float32", or "float64" for float64 logits: dtype of the arrays below
    grad: Any = None
    grad_outer_stride: int = 0
    grad_row_stride: int = 0
    grad_class_stride: int = 0
    labels: Any = None  # (rows,) int32 or int64, contiguous; or
    soft: Any = None  # (rows, classes), dtype of x, contiguous
    valid: Any = None  # (rows,) bool
    weight: Any = None  # (classes,)
    prior: Any = None  # (classes,) log-prior for softmax, prior for the others
    row_scale: Any = None  # (rows,)
    upstream: Any = None  # (rows,)
    weight_sum: float = 0.0  # over the classes whose prior is not 0
    classes_present: float = 0.0  # number of those classes
    totals: Any = None  # the last two on the device, [2]; they are NaN then
    grad_scale: float = 1.0
    scale_tensor: Any = None  # [1] on the device: one more factor of the gradient
    loss: Any = None  # (rows,)
    rest: Any = None  # (rows,)
    own: Any = None  # (rows,)
    shift: Any = None  # (rows,)
    axis: int = -1  # dimension of the classes in the logits of the caller
    shape: tuple[int, ...] = ()  # of the caller's logits without it
    device: str = "cpu"


# ---- layouts -----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the rows of an array lie; see `RowCall`."""

    inner: int
    outer_stride: int
    row_stride: int
    class_stride: int


def strides_of(x: Any) -> tuple[int, ...]:
    """Strides in elements."""
    if isinstance(x, np.ndarray):
        return tuple(s // x.itemsize for s in x.strides)
    return x.stride()


def layout(
    shape: tuple[int, ...], strides: tuple[int, ...], class_dim: int, inner: int | None = None
) -> Layout | None:
    """Layout of the rows of an array, or None when it takes more than two levels of rows.

    Rows are numbered in the order of the other dimensions. `inner` asks for a split after that
    many rows.
    """
    levels: list[tuple[int, int]] = []
    for d in range(len(shape) - 1, -1, -1):
        n, stride = shape[d], strides[d]
        if d == class_dim or n == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * n, levels[-1][1])
        else:
            levels.append((n, stride))
    class_stride = strides[class_dim] if shape[class_dim] != 1 else 1
    if len(levels) > 2:
        return None
    if len(levels) == 2:
        (n, row), (_, outer) = levels
        return Layout(n, outer, row, class_stride) if inner in (None, n) else None
    n, row = levels[0] if levels else (1, shape[class_dim])
    if inner is None or inner == n:
        return Layout(n, 0, row, class_stride)
    return Layout(inner, inner * row, row, class_stride) if n % inner == 0 else None


def as_rows(x: Any, call: RowCall, gradient: bool = False) -> Any:
    """View (rows / inner, inner, classes) of `call.x`, or of `call.grad`."""
    strides = (
        (call.grad_outer_stride, call.grad_row_stride, call.grad_class_stride)
        if gradient
        else (call.outer_stride, call.row_stride, call.class_stride)
    )
    shape = (call.rows // call.inner if call.inner else 0, call.inner, call.classes)
    if isinstance(x, np.ndarray):
        steps = [s * x.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(x, shape, steps)
    return x.detach().as_strided(shape, strides, x.storage_offset())


def numpy64(x: Any) -> np.ndarray | None:
    """Return a float64 NumPy array of the shape of `x`; None stays None."""
    return None if x is None else _arrays.to_float64(x).reshape(tuple(x.shape))

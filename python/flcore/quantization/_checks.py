"""Checks of the parts that a quantised weight is made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays
from flcore import _weight_arrays as parts
from flcore.errors import DTypeError, InvalidInputError
from flcore.quantization._scheme import Scheme

__all__ = ["finite", "matrix_shape", "part", "row_index", "values"]


def matrix_shape(shape: Any) -> tuple[int, int]:
    """Return (n, k) or raise InvalidInputError."""
    try:
        n, k = (int(s) for s in shape)
    except (TypeError, ValueError):
        raise InvalidInputError(f"shape: expected (n, k), got {shape!r}") from None
    if n < 0 or k < 0:
        raise InvalidInputError(f"shape: expected (n, k), got {shape!r}")
    return n, k


def part(x: Any, name: str, shape: tuple[int, ...], dtype: str, other: Any) -> Any:
    """Return one part, contiguous; `other` is an array whose kind and device it must share.

    Raises
    ------
    DTypeError
        It is not an array of `dtype`.
    InvalidInputError
        It has another shape, kind or device.
    """
    if not _arrays.is_array(x):
        raise DTypeError(f"{name}: expected an array of {dtype}, got {type(x).__name__}")
    if not parts.part_dtype(x, dtype):
        raise DTypeError(f"{name}: expected {dtype}, got {_arrays.dtype_name(x)}")
    if tuple(x.shape) != shape:
        raise InvalidInputError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if other is not None and (
        _arrays.is_torch(x) != _arrays.is_torch(other)
        or _arrays.device_of(x) != _arrays.device_of(other)
    ):
        raise InvalidInputError(f"{name}: expected an array of the kind and device of codes")
    if not isinstance(x, np.ndarray):
        return x.detach().contiguous()
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    return parts.to_numpy(np.ascontiguousarray(x))


def finite(x: Any, name: str) -> None:
    """Raise InvalidInputError if a part holds a NaN or an infinity; uint16 is bfloat16."""
    if not isinstance(x, np.ndarray):
        good = bool(x.isfinite().all())
    elif x.dtype == np.uint16:
        good = bool(((x & 0x7F80) != 0x7F80).all())
    else:
        good = bool(np.isfinite(x).all())
    if not good:
        raise InvalidInputError(f"{name}: expected finite numbers")


def values(codes: Any, zeros: Any, scheme: Scheme) -> None:
    """Raise InvalidInputError if a zero or a code stands for no number."""
    if zeros is not None and scheme.kind == "float_zero":
        finite(zeros, "zeros")
    if scheme.kind == "integer_zero" and _arrays.numel(zeros) and int(zeros.max()) >> scheme.bits:
        raise InvalidInputError(
            f"zeros: expected 0 .. {2**scheme.bits - 1}, got {int(zeros.max())}"
        )
    if scheme.kind == "fp8" and _arrays.numel(codes):
        top = 0x7E if scheme.codebook == "e4m3" else 0x7B
        if int((codes & 0x7F).max()) > top:
            raise InvalidInputError(f"codes: a byte that is no finite {scheme.codebook} number")


def row_index(index: Any, n: int, other: Any) -> Any:
    """Return row numbers as an int64 array of the kind of `other`.

    Raises
    ------
    DTypeError
        They are not 1-D integers.
    InvalidInputError
        One is outside -n .. n - 1.
    """
    found = parts.to_numpy(index) if _arrays.is_torch(index) else np.asarray(index)
    if found.size == 0 and found.ndim == 1:
        found = found.astype(np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DTypeError(
            f"index: expected a slice or 1-D integers, got {found.dtype} {found.shape}"
        )
    if found.size and not (-n <= int(found.min()) and int(found.max()) < n):
        raise InvalidInputError(
            f"index: expected rows of 0 .. {n - 1}, got {found.min()} .. {found.max()}"
        )
    return parts.like(found.astype(np.int64), other)

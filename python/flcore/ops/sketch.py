"""Count sketches of updates: making one, summing, and finding the largest coordinates of the sum.

Validation and choice of variant; :mod:`flcore.compression` has the classes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore._arrays import View
from flcore._state import State
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops._encode import device_of, flat_float32, nonfinite_error, viewed
from flcore.reference import sketch as reference
from flcore.reference.wire_sketch import MAX_NUMEL, MAX_ROWS

__all__ = [
    "MAX_NUMEL",
    "MAX_ROWS",
    "check_shape",
    "estimate",
    "l2_estimate",
    "sketch",
    "sketch_scatter",
    "sketch_top_k",
]


def check_shape(rows: Any, columns: Any) -> None:
    """Raise `InvalidInputError` unless a table can have this shape."""
    if isinstance(rows, bool) or not isinstance(rows, int) or rows not in range(1, MAX_ROWS + 1, 2):
        raise InvalidInputError(f"rows: expected 1, 3, 5, 7 or 9, got {rows!r}")
    whole = isinstance(columns, int) and not isinstance(columns, bool)
    if not (whole and 1 <= columns < 2**32):
        raise InvalidInputError(f"columns: expected 1 <= columns < 2**32, got {columns!r}")


def sketch(
    update: Any,
    *,
    rows: int,
    columns: int,
    seed: int = 0,
    out: np.ndarray | None = None,
    variant: str | None = None,
) -> np.ndarray:
    """Return the count sketch of an update: ``cells[i, column_i(j)] += sign_i(j) u_j``.

    Linear in the update, with the same hashes for the same `seed` everywhere, so that tables can be
    added, averaged and summed securely. Reads the update once a row and makes `rows` scattered adds
    a coordinate. The table is the same bits for every variant, level and thread count: a cell takes
    its values in the order of the coordinates within each of up to 8 parts.

    Parameters
    ----------
    update : array, or list, tuple or dict of arrays
        float64, float32, float16 or bfloat16, on the CPU, up to 2**34 values. Coordinates count
        through the layers in order.
    rows, columns : int
        Shape of the table: 1, 3, 5, 7 or 9 rows.
    seed : int
        Names the hashes; 0 to 2**64 - 1.
    out : (rows, columns) float32 array, optional
        Contiguous; receives the table.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (rows, columns) float32 array

    Raises
    ------
    InvalidInputError, DTypeError
        Arguments that cannot be used.
    NonFiniteError
        The update, or a cell of the table, is not finite; `out` is then void.

    References
    ----------
    Rothchild et al., "FetchSGD", ICML 2020, arXiv 2007.07682.
    """
    layout, views, numel = viewed(update)
    check_shape(rows, columns)
    _check_seed(seed)
    if numel > MAX_NUMEL:
        raise InvalidInputError(f"update: expected at most 2**34 values, got {numel}")
    if out is None:
        out = np.empty((rows, columns), np.float32)
    elif _check_cells(out, "out").shape != (rows, columns) or not out.flags.writeable:
        raise InvalidInputError(
            f"out: expected a writable array ({rows}, {columns}), got {out.shape}"
        )
    finite = _variants.choose("sketch", device_of(views), variant)(views, seed, out)
    if not finite or not np.isfinite(out).all():
        raise nonfinite_error(views, layout)
    return out


def estimate(
    cells: np.ndarray,
    count: int,
    *,
    seed: int = 0,
    begin: int = 0,
    variant: str | None = None,
) -> np.ndarray:
    """Return what a table says about coordinates ``begin .. begin + count - 1``.

    The median over the rows of ``sign * cell``: within O(|u|_2 / sqrt(columns)) of u_j with a
    probability that grows with the number of rows.

    Parameters
    ----------
    cells : (rows, columns) float32 array
    count, begin : int
    seed : int
        That of the sketch.
    variant : {"reference", "cpu"}, optional

    Returns
    -------
    (count,) float32 array
    """
    _check_cells(cells)
    _check_seed(seed)
    if begin < 0 or count < 0 or begin + count > MAX_NUMEL:
        raise InvalidInputError(f"begin + count: expected 0 to 2**34, got {begin} + {count}")
    return _variants.choose("sketch_estimate", "cpu", variant)(cells, begin, count, seed)


def sketch_top_k(
    cells: np.ndarray, numel: int, k: int, *, seed: int = 0, variant: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k coordinates of the largest estimates, and the estimates.

    Exactly k: larger magnitude first, then the smaller index. Estimates are made twice, not stored.

    Parameters
    ----------
    cells : (rows, columns) float32 array
        Finite.
    numel : int
        Number of coordinates d of the update.
    k : int
        0 <= k <= d.
    seed : int
        That of the sketch.
    variant : {"reference", "cpu"}, optional

    Returns
    -------
    index : (k,) int64, increasing
    values : (k,) float32

    Raises
    ------
    InvalidInputError, DTypeError
        Arguments that cannot be used.
    NonFiniteError
        A cell is not finite.
    """
    _check_cells(cells)
    _check_seed(seed)
    if not 0 <= numel <= MAX_NUMEL or not 0 <= k <= numel:
        raise InvalidInputError(f"k: expected 0 <= k <= numel <= 2**34, got {k} of {numel}")
    if not np.isfinite(cells).all():
        raise NonFiniteError("cells: expected finite values")
    return _variants.choose("sketch_top_k", "cpu", variant)(cells, numel, k, seed)


def sketch_scatter(
    cells: np.ndarray,
    index: np.ndarray,
    values: np.ndarray | None,
    *,
    seed: int = 0,
    variant: str | None = None,
) -> None:
    """Add the sketch of a sparse vector to `cells`; without `values` set the cells it touches to 0.

    Parameters
    ----------
    cells : (rows, columns) float32 array
        Changed in place.
    index : (k,) int64
        Coordinates, 0 to 2**34 - 1.
    values : (k,) float32, or None
    seed : int
        That of the sketch.
    variant : {"reference", "cpu"}, optional
    """
    _check_cells(cells)
    _check_seed(seed)
    if not cells.flags.writeable:
        raise InvalidInputError("cells: the array is read-only; pass one that can be written")
    index = np.ascontiguousarray(index, np.int64)
    if index.ndim != 1 or (index.size and not 0 <= index.min() <= index.max() < MAX_NUMEL):
        raise InvalidInputError("index: expected one dimension of coordinates from 0 to 2**34 - 1")
    if values is not None:
        values = np.ascontiguousarray(values, np.float32)
        if values.shape != index.shape:
            raise InvalidInputError(f"values: expected shape {index.shape}, got {values.shape}")
    _variants.choose("sketch_scatter", "cpu", variant)(cells, index, values, seed)


def l2_estimate(cells: np.ndarray) -> float:
    """Return an estimate of the Euclidean norm: the median over the rows of the row's own norm."""
    squares = np.square(_check_cells(cells).astype(np.float64)).sum(axis=1)
    return float(np.sqrt(np.median(squares)))


def _check_cells(cells: Any, name: str = "cells") -> np.ndarray:
    if not isinstance(cells, np.ndarray) or cells.dtype != np.float32 or not cells.dtype.isnative:
        got = cells.dtype if isinstance(cells, np.ndarray) else type(cells).__name__
        raise DTypeError(f"{name}: expected a float32 NumPy array, got {got}")
    if cells.ndim != 2 or not cells.flags.c_contiguous:
        raise InvalidInputError(
            f"{name}: expected a contiguous array (rows, columns), got shape {cells.shape}"
        )
    check_shape(*cells.shape)
    return cells


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InvalidInputError(f"seed: expected 0 <= seed < 2**64, got {seed!r}")


# ---- variants ----------------------------------------------------------------------------------


def _hash(cells: np.ndarray, seed: int, work: int) -> dict[str, Any]:
    return {
        "cells": _arrays.address(cells),
        "seed": seed,
        "rows": cells.shape[0],
        "columns": cells.shape[1],
        "threads": _native.threads_for(work),
    }


def _cpu(views: Sequence[View], seed: int, out: np.ndarray) -> bool:
    numel = sum(v.numel for v in views)
    parts = reference.parts(numel, out.shape[1])
    more = np.empty((parts - 1, *out.shape), np.float32)
    return _native.core.sketch(
        layers=[v.ptr for v in views],
        numel=[v.numel for v in views],
        dtype=[v.code for v in views],
        state=State().native(),
        parts=parts,
        more=_arrays.address(more),
        **_hash(out, seed, numel),
    )


def _reference(views: Sequence[View], seed: int, out: np.ndarray) -> bool:
    u = flat_float32(views)
    if not np.isfinite(u).all():
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = reference.sketch(u, seed, *out.shape)
    return True


def _estimate_cpu(cells: np.ndarray, begin: int, count: int, seed: int) -> np.ndarray:
    out = np.empty(count, np.float32)
    _native.core.sketch_estimate(
        begin=begin, count=count, out=_arrays.address(out), **_hash(cells, seed, count)
    )
    return out


def _estimate_reference(cells: np.ndarray, begin: int, count: int, seed: int) -> np.ndarray:
    return reference.estimate(cells, np.arange(begin, begin + count), seed)


def _top_k_cpu(cells: np.ndarray, numel: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    index, values = np.empty(k, np.int64), np.empty(k, np.float32)
    _native.core.sketch_top_k(
        numel=numel,
        k=k,
        index=_arrays.address(index),
        values=_arrays.address(values),
        **_hash(cells, seed, numel),
    )
    return index, values


def _scatter_cpu(
    cells: np.ndarray, index: np.ndarray, values: np.ndarray | None, seed: int
) -> None:
    _native.core.sketch_scatter(
        index=_arrays.address(index),
        values=0 if values is None else _arrays.address(values),
        count=index.size,
        **_hash(cells, seed, index.size * cells.shape[0]),
    )


_variants.add("sketch", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("sketch", "reference", lambda: _reference, _variants.cpu_only)
_variants.add("sketch_estimate", "cpu", lambda: _estimate_cpu, _variants.cpu_only)
_variants.add("sketch_estimate", "reference", lambda: _estimate_reference, _variants.cpu_only)
_variants.add("sketch_top_k", "cpu", lambda: _top_k_cpu, _variants.cpu_only)
_variants.add("sketch_top_k", "reference", lambda: reference.top_k, _variants.cpu_only)
_variants.add("sketch_scatter", "cpu", lambda: _scatter_cpu, _variants.cpu_only)
_variants.add("sketch_scatter", "reference", lambda: reference.scatter, _variants.cpu_only)

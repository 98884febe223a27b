"""Entries of bags as a kernel takes them: checked indices, where bags start, and coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore import _arrays
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["MODES", "Bags", "parse_bags"]

MODES = ("sum", "mean", "none")


@dataclass(frozen=True, slots=True)
class Bags:
    """Entries of bags, in NumPy arrays.

    Attributes
    ----------
    index : (entries,) int64
        Row of each entry, within the table.
    starts : (bags + 1,) int64
        First entry of each bag, and the number of entries.
    coefficients : (entries,) float32 or None
        What entries are multiplied by; None: 1.
    mean : bool
        Whether a bag is divided by the number of its entries.
    padding : int
        Row whose entries do not count; -1: none.
    lead : tuple of int
        Shape of the result without its last dimension.
    """

    index: np.ndarray
    starts: np.ndarray
    coefficients: np.ndarray | None
    mean: bool
    padding: int
    lead: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of bags."""
        return len(self.starts) - 1

    def counts(self) -> np.ndarray:
        """Entries of each bag that count, (bags,) int64."""
        if self.padding < 0:
            return np.diff(self.starts)
        before = np.concatenate([[0], np.cumsum(self.index != self.padding)])
        return before[self.starts[1:]] - before[self.starts[:-1]]


def parse_bags(
    indices: Any,
    offsets: Any,
    mode: str,
    per_sample_weights: Any,
    padding_idx: int | None,
    rows: int,
) -> Bags:
    """Check the arguments of `flcore.ops.qembedding` for a table of `rows` rows.

    Raises
    ------
    InvalidInputError
        A mode, shape, offset or index that does not fit; the message names the first bad index.
    DTypeError
        Indices or offsets that are no integers, weights that are not floating.
    """
    if mode not in MODES:
        raise InvalidInputError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    index, shape = _integers(indices, "indices")
    if mode == "none":
        if offsets is not None or per_sample_weights is not None:
            name = "offsets" if offsets is not None else "per_sample_weights"
            raise InvalidInputError(f"{name}: mode 'none' has no bags; leave it out")
        starts, lead = np.arange(index.size + 1, dtype=np.int64), shape
    elif len(shape) == 2 and offsets is None:
        starts, lead = np.arange(shape[0] + 1, dtype=np.int64) * shape[1], shape[:1]
    elif len(shape) == 1 and offsets is not None:
        starts = _starts(offsets, index.size)
        lead = (len(starts) - 1,)
    else:
        raise InvalidInputError(
            "indices: expected one dimension and offsets, or two dimensions (bags, entries) and "
            f"no offsets, got the shape {shape} {'with' if offsets is not None else 'without'} "
            "offsets"
        )
    _check_range(index, rows)
    padding = -1 if padding_idx is None else _padding(padding_idx, rows)
    if mode == "none":
        padding = -1  # the row itself, as torch's embedding gives it
    coefficients = None
    if per_sample_weights is not None:
        if mode != "sum":
            raise InvalidInputError(f"per_sample_weights: they need mode 'sum', got {mode!r}")
        coefficients = _weights(per_sample_weights, shape)
    return Bags(index, starts, coefficients, mode == "mean", padding, lead)


def _integers(x: Any, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """Flat contiguous int64 values of an integer array, and its shape."""
    if not _arrays.is_array(x):
        raise DTypeError(
            f"{name}: expected a NumPy array or a torch tensor, got {type(x).__name__}"
        )
    if _arrays.is_torch(x):
        x = x.detach().cpu().numpy()
    if x.dtype.kind not in "iu":
        raise DTypeError(f"{name}: expected integers, got {x.dtype}")
    return np.ascontiguousarray(x, np.int64).reshape(-1), tuple(int(size) for size in x.shape)


def _starts(offsets: Any, entries: int) -> np.ndarray:
    values, shape = _integers(offsets, "offsets")
    if len(shape) != 1:
        raise InvalidInputError(f"offsets: expected one dimension, got the shape {shape}")
    if values.size and values[0] != 0:
        raise InvalidInputError(f"offsets: expected the first one to be 0, got {values[0]}")
    if not values.size and entries:
        raise InvalidInputError(f"offsets: expected a bag for {entries} indices, got none")
    starts = np.append(values, entries)
    falls = np.flatnonzero(np.diff(starts) < 0)
    if falls.size:
        b = int(falls[0])
        raise InvalidInputError(
            f"offsets: expected them not to fall nor to pass the {entries} indices, got "
            f"{starts[b]} before {starts[b + 1]} at position {b}"
        )
    return starts


def _check_range(index: np.ndarray, rows: int) -> None:
    if not index.size or (index.min() >= 0 and index.max() < rows):
        return
    bad = int(np.flatnonzero((index < 0) | (index >= rows))[0])
    raise InvalidInputError(
        f"indices: expected 0 to {rows - 1}, rows of the table, got {index[bad]} at position {bad}"
    )


def _padding(value: Any, rows: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise DTypeError(f"padding_idx: expected an integer or None, got {value!r}")
    if not -rows <= value < rows:
        raise InvalidInputError(f"padding_idx: expected a row of {rows}, got {value}")
    return int(value) % rows


def _weights(x: Any, shape: tuple[int, ...]) -> np.ndarray:
    if not _arrays.is_array(x) or not _arrays.is_float(x):
        got = _arrays.dtype_name(x) if _arrays.is_array(x) else type(x).__name__
        raise DTypeError(f"per_sample_weights: expected a floating array, got {got}")
    if tuple(x.shape) != shape:
        raise InvalidInputError(
            f"per_sample_weights: expected the shape of indices {shape}, got {tuple(x.shape)}"
        )
    if _arrays.is_torch(x):
        x = x.detach().cpu().float().numpy()
    return np.ascontiguousarray(x, np.float32).reshape(-1)

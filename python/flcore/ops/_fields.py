"""What encoders share: header fields checked, dtype of the source, words for what is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore._arrays import View
from flcore.errors import InvalidInputError

__all__ = ["check_fields", "find_nonfinite", "flat32", "source_dtype"]


def check_fields(*, round: int, seed: int, epoch: int, flags: int, tensors: bytes) -> None:
    """Raise `InvalidInputError` unless the header fields fit in a header."""
    for name, number, bits in (
        ("round", round, 64),
        ("seed", seed, 64),
        ("epoch", epoch, 32),
        ("flags", flags, 32),
    ):
        if not 0 <= number < 2**bits:
            raise InvalidInputError(f"{name}: expected 0 <= {name} < 2**{bits}, got {number}")
    if len(tensors) % 64:
        raise InvalidInputError(f"tensors: expected a multiple of 64 bytes, got {len(tensors)}")


def source_dtype(views: Sequence[View]) -> str:
    """Return what the header says: the common dtype, else float64 if any layer is, else float32."""
    kinds = {v.dtype for v in views}
    if len(kinds) == 1:
        return kinds.pop()
    return "float64" if "float64" in kinds else "float32"


def flat32(views: Sequence[View]) -> np.ndarray:
    """Return the layers as one float32 array (d,)."""
    with np.errstate(over="ignore"):
        layers: list[Any] = [_arrays.to_float64(v.array).astype(np.float32) for v in views]
    return np.concatenate([np.empty(0, np.float32), *layers])


def find_nonfinite(views: Sequence[View], layout: _updates.Layout) -> str:
    """Word where the first NaN or infinity is; the slow way, for the error message."""
    for i, v in enumerate(views):
        g = flat32([v])
        if not np.isfinite(g).all():
            at = int(np.flatnonzero(~np.isfinite(g))[0])
            return (
                f"{layout.label('update', i)}: expected finite float32 values, "
                f"got {g[at]} at flat position {at}; nothing was encoded and no state changed"
            )
    return (
        "update: finite, but with the state or in the encoding it overflows float32; nothing was "
        "encoded and no state changed"
    )

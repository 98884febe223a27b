"""What ops that turn an update into a packet share: checks, errors, float32 values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _updates
from flcore._arrays import View
from flcore._state import State
from flcore.errors import InvalidInputError, NonFiniteError

__all__ = [
    "check_header",
    "device_of",
    "flat_float32",
    "native_source",
    "nonfinite_error",
    "source_dtype",
    "viewed",
]


def viewed(update: Any) -> tuple[_updates.Layout, list[View], int]:
    """Return the layout of an update, its layers as views, and the number of coordinates."""
    layout, layers = _updates.flatten(update)
    views = layout.views(layers, "update")
    return layout, views, sum(v.numel for v in views)


def device_of(views: Sequence[View]) -> str:
    """Return the device of the first layer that is not on the CPU: what has to do without one."""
    return next((v.device for v in views if v.device != "cpu"), "cpu")


def native_source(views: Sequence[View], state: State) -> dict[str, Any]:
    """Return the arguments by which a native encoder gets update, state and threads."""
    return {
        "layers": [v.ptr for v in views],
        "numel": [v.numel for v in views],
        "dtype": [v.code for v in views],
        "state": state.native(),
        "threads": _native.threads_for(sum(v.numel for v in views)),
    }


def check_header(*, round: int, seed: int, epoch: int, flags: int, tensors: bytes) -> None:
    """Raise `InvalidInputError` unless the numbers fit into their fields of the header."""
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


def flat_float32(views: Sequence[View]) -> np.ndarray:
    """Return the layers one after another as float32 (numel,); for references and messages."""
    with np.errstate(over="ignore"):
        parts = [_arrays.to_float64(v.array).astype(np.float32).reshape(-1) for v in views]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def nonfinite_error(views: Sequence[View], layout: _updates.Layout) -> NonFiniteError:
    """Return the error that says where the first NaN or infinity is; the slow way."""
    for i, v in enumerate(views):
        g = flat_float32([v])
        if not np.isfinite(g).all():
            at = int(np.flatnonzero(~np.isfinite(g))[0])
            return NonFiniteError(
                f"{layout.label('update', i)}: expected finite float32 values, got {g[at]} at "
                f"flat position {at}; nothing was encoded and no state changed"
            )
    return NonFiniteError(
        "update: finite, but with the state it overflows float32; nothing was encoded and no "
        "state changed"
    )

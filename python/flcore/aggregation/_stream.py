"""What streaming aggregates share: their memory, and packets in the place of updates."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays
from flcore._arrays import View

__all__ = ["as_packet", "dense", "facts", "fresh", "zeros"]


def facts(x: Any, name: str) -> View:
    """View with dtype, size and device of a layer, and an empty array in its place."""
    empty = np.empty(0, x.dtype.newbyteorder("=")) if isinstance(x, np.ndarray) else x.new_empty(0)
    return _arrays.view(empty, name)._replace(numel=_arrays.numel(x))


def fresh(like: View, shape: tuple[int, ...]) -> View:
    """Return uninitialised memory of the library, dtype and device of a layer."""
    if isinstance(like.array, np.ndarray):
        return _arrays.view(np.empty(shape, like.array.dtype))
    return _arrays.view(like.array.new_empty(shape))


def zeros(layer: View, dtype: str) -> Any:
    """Accumulators of one layer: shape (numel,), or (3, numel) bins."""
    shape = (3, layer.numel) if dtype == "reproducible" else (layer.numel,)
    wide = dtype != "float32" or layer.dtype == "float64"
    if isinstance(layer.array, np.ndarray):
        return np.zeros(shape, np.float64 if wide else np.float32)
    torch = sys.modules["torch"]
    kind = torch.float64 if wide else torch.float32
    return torch.zeros(shape, dtype=kind, device=layer.array.device)


def as_packet(update: Any) -> Any:
    """Return the packet that `update` is or holds, or None when it is an update."""
    if isinstance(update, bytes | bytearray | memoryview):
        from flcore.compression import Packet

        return Packet.from_bytes(update)
    compression = sys.modules.get("flcore.compression")
    return update if compression and isinstance(update, compression.Packet) else None


def dense(packet: Any, layers: Sequence[View], *, wide: bool) -> list[View]:
    """Decode a packet into float32 layers; into float64 where they are, or all if `wide`."""
    from flcore.ops.decode import decode_into

    arrays = [
        np.empty(v.numel, np.float64 if wide or v.dtype == "float64" else np.float32)
        for v in layers
    ]
    decode_into(packet, arrays)
    return [_arrays.view(x) for x in arrays]

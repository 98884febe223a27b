"""Values of a sparse packet as they go on the wire: the definition in NumPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore.reference import wire_frame, wire_sparse

__all__ = ["Coded", "code_values", "round_values"]


class Coded(NamedTuple):
    """Coded values.

    ``raw`` bit patterns (k,); ``scales`` float32 (tiles,) with int8 values, else None; ``sent``
    float32 (k,), what a receiver decodes.
    """

    raw: np.ndarray
    scales: np.ndarray | None
    sent: np.ndarray


def round_values(u: np.ndarray, values: str) -> np.ndarray:
    """Return the bit patterns of float32 `u` in a floating dtype: nearest even, then clamped.

    A finite value beyond the largest finite number of the dtype becomes that number.
    """
    u = np.ascontiguousarray(u, np.float32)
    if values == "float32":
        return u.view(np.uint32)
    if values == "float16":
        return np.clip(u, -65504, 65504).astype(np.float16).view(np.uint16)
    bits = u.view(np.uint32)
    raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(raw & 0x7FFF == 0x7F80, raw - 1, raw).astype(np.uint16)


def code_values(u: np.ndarray, kept: np.ndarray, numel: int, values: str) -> Coded:
    """Code the values `u`, float32 (k,), of the coordinates `kept` of `numel`.

    int8: the largest magnitude of each tile of 65,536 coordinates takes code 127; scale and code
    are rounded to the nearest, ties to even; -128 is not used. The scale is at most what keeps
    every code below the largest number a packet may decode to.
    """
    if values != "int8":
        raw = round_values(u, values)
        return Coded(raw, None, wire_frame.decode_values(raw, values))
    tiles = wire_sparse.tiles(numel)
    counts = np.bincount(kept // wire_frame.TILE, minlength=tiles)
    most = np.float32(wire_sparse.LARGEST / 127 * (1 - 2.0**-24))
    parts = np.split(u, np.cumsum(counts)[:-1]) if tiles else []
    tops = np.array([np.abs(x).max(initial=0) for x in parts], np.float32)
    scales = np.minimum(tops / np.float32(127), most)
    each = np.repeat(scales, counts)
    ratio = np.divide(u, each, out=np.zeros_like(u), where=each > 0)
    codes = np.rint(np.clip(ratio, -127, 127)).astype(np.int8)
    return Coded(codes.view(np.uint8), scales, each * codes.astype(np.float32))

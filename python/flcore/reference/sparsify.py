"""Exact top-k with feedback: the definition in NumPy.

Arithmetic is float32 in a fixed order, so packets and state of every variant equal these byte for
byte. See :func:`flcore.ops.sparsify.sparsify` for the meaning of the arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore.reference import wire, wire_writer

__all__ = ["affine", "round_values", "select", "sparsify"]


def affine(
    g: np.ndarray, e: np.ndarray | None, h: np.ndarray | None, a: float, b: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``t = (b e + g) - h`` and ``u = (a e + g) - h``; absent terms are left out.

    All arrays float32 (d,); every operation rounds once.
    """
    t, u = g, g
    if e is not None:
        t, u = np.float32(b) * e + g, np.float32(a) * e + g
    if h is not None:
        t, u = t - h, u - h
    return t, u


def select(u: np.ndarray, k: int) -> np.ndarray:
    """Return the sorted indices of the k entries of `u` that come first: larger ``|u|``, then
    smaller index. ``|u|`` is compared through the integer bits(u) & 0x7fffffff.
    """  # noqa: D205
    key = np.ascontiguousarray(u, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    order = np.lexsort((np.arange(u.size), -key.astype(np.int64)))
    return np.sort(order[:k])


def round_values(u: np.ndarray, values: str) -> np.ndarray:
    """Return the bit patterns of float32 `u` in the wire dtype: nearest even, then clamped.

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


def sparsify(
    g: np.ndarray,
    *,
    k: int,
    e: np.ndarray | None,
    h: np.ndarray | None,
    a: float,
    b: float,
    values: str,
    index: str,
    tensors: bytes = b"",
    **fields: Any,
) -> bytes | None:
    """Return the packet and update `e`, `h` in place; None, with nothing written, if not finite.

    `g` is the whole gradient as float32 (d,); `fields` are the header fields of
    :func:`flcore.reference.wire_writer.build`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        t, u = affine(g, e, h, a, b)
    if not (np.isfinite(t).all() and np.isfinite(u).all()):
        return None
    kept = select(u, k)
    raw = round_values(u[kept], values)
    sent = wire.decode_values(raw, values)
    if e is not None:
        e[:] = t
        e[kept] -= sent
    if h is not None:
        h[kept] += sent
    return wire_writer.build(
        kept, raw, numel=g.size, values=values, index=index, tensors=tensors, **fields
    )

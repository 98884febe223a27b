"""Philox4x32-10 counter RNG in NumPy: the definition of every random bit flcore uses.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

A stream is named by ``(seed, round, tensor, client)`` and is a pure function of the position:
key words are the low and high half of the 64-bit ``seed``; counter words are
``c0 = i >> 2``, ``c1 = tensor``, ``c2 = round``, ``c3 = client``; element ``i`` is word ``i & 3``
of the block that this counter gives.
"""

from __future__ import annotations

import numpy as np

from flcore import _arrays
from flcore._arrays import View

__all__ = ["fill", "philox4x32_10", "random_bits", "random_uniform"]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox4x32_10(c0, c1, c2, c3, k0: int, k1: int) -> tuple[np.ndarray, ...]:
    """Ten Philox rounds on counters ``(c0, c1, c2, c3)`` with the key ``(k0, k1)``.

    Parameters
    ----------
    c0, c1, c2, c3 : array_like of integers below 2**32, broadcast against each other
    k0, k1 : int below 2**32

    Returns
    -------
    tuple of four uint32 arrays: the words of each block.
    """
    words = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    c0, c1, c2, c3 = words
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2  # 32 x 32 -> 64 bits, exact in uint64
        c0 = (p1 >> _HALF) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def random_bits(
    numel: int, seed: int, *, round: int = 0, tensor: int = 0, client: int = 0, offset: int = 0
) -> np.ndarray:
    """Elements ``offset .. offset + numel - 1`` of one stream, as ``(numel,)`` uint32."""
    first = offset >> 2
    last = (offset + numel + 3) >> 2
    blocks = np.arange(first, last, dtype=np.uint64)
    words = philox4x32_10(blocks, tensor, round, client, seed & 0xFFFFFFFF, seed >> 32)
    flat = np.stack(words, axis=1).reshape(-1)
    start = offset - 4 * first
    return np.ascontiguousarray(flat[start : start + numel])


def random_uniform(
    numel: int, seed: int, *, round: int = 0, tensor: int = 0, client: int = 0, offset: int = 0
) -> np.ndarray:
    """Uniform float32 in [0, 1): the upper 24 random bits times 2**-24, exact."""
    bits = random_bits(numel, seed, round=round, tensor=tensor, client=client, offset=offset)
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def fill(
    out: View, uniform: bool, seed: int, round: int, tensor: int, client: int, offset: int
) -> None:
    """Variant `reference` of the op: write the values, or the bits in their place, into `out`."""
    make = random_uniform if uniform else random_bits
    values = make(out.numel, seed, round=round, tensor=tensor, client=client, offset=offset)
    _arrays.assign(out.array, values.view(np.float32))

"""Secure sums in NumPy: the definition of the fixed-point words, their masks and their sums.

Nir, Langley, "ChaCha20 and Poly1305 for IETF Protocols", RFC 8439; Bonawitz et al., "Practical
Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017. The fixed-point arithmetic is
that of SecAgg+ in Flower.

A mask stream is a key of 32 and a nonce of 12 bytes. Its word ``i`` is word ``i & 15`` of the block
with counter ``i >> 4``, read as little-endian; streams have 2^36 words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays
from flcore._arrays import View
from flcore.reference.rng import random_bits

__all__ = [
    "add",
    "chacha20_block",
    "dequantize_sum",
    "keystream",
    "levels_of",
    "modular_sum",
    "quantize",
]

_CONSTANTS = np.frombuffer(b"expand 32-byte k", "<u4")
_ROUNDS = (  # columns, then diagonals
    (0, 4, 8, 12),
    (1, 5, 9, 13),
    (2, 6, 10, 14),
    (3, 7, 11, 15),
    (0, 5, 10, 15),
    (1, 6, 11, 12),
    (2, 7, 8, 13),
    (3, 4, 9, 14),
)


def _rotate(x: np.ndarray, k: int) -> np.ndarray:
    return (x << np.uint32(k)) | (x >> np.uint32(32 - k))


def chacha20_block(key: bytes, counter: Any, nonce: bytes) -> np.ndarray:
    """Blocks of the ChaCha20 keystream (RFC 8439, section 2.3), as words.

    Parameters
    ----------
    key : 32 bytes
    counter : array_like of integers below 2^32
    nonce : 12 bytes

    Returns
    -------
    (..., 16) uint32, the words of each block; as little-endian bytes they are the keystream.
    """
    counter = np.asarray(counter, np.uint32)
    fixed = [*_CONSTANTS, *np.frombuffer(key, "<u4"), counter, *np.frombuffer(nonce, "<u4")]
    start = [np.broadcast_to(np.uint32(word), counter.shape) for word in fixed]
    x = [word.copy() for word in start]
    with np.errstate(over="ignore"):  # a single block is made of scalars, whose wrap would warn
        for _ in range(10):
            for a, b, c, d in _ROUNDS:
                x[a] = x[a] + x[b]
                x[d] = _rotate(x[d] ^ x[a], 16)
                x[c] = x[c] + x[d]
                x[b] = _rotate(x[b] ^ x[c], 12)
                x[a] = x[a] + x[b]
                x[d] = _rotate(x[d] ^ x[a], 8)
                x[c] = x[c] + x[d]
                x[b] = _rotate(x[b] ^ x[c], 7)
        words = [word + first for word, first in zip(x, start, strict=True)]
    return np.stack(words, axis=-1)


def keystream(key: bytes, nonce: bytes, position: int, numel: int) -> np.ndarray:
    """Words ``position .. position + numel - 1`` of one stream, ``(numel,)`` uint32."""
    first, last = position >> 4, (position + numel + 15) >> 4
    words = chacha20_block(key, np.arange(first, last, dtype=np.uint64), nonce).reshape(-1)
    start = position - 16 * first
    return words[start : start + numel]


def levels_of(
    x: np.ndarray,
    scale: float,
    clip: float,
    levels: int,
    steps_per_unit: float,
    random: np.ndarray | None,
) -> np.ndarray:
    """Level of each value on the grid ``-clip .. clip`` of `levels` steps, ``(numel,)`` uint32.

    Parameters
    ----------
    x : (numel,) float64
    steps_per_unit : float
        ``levels / (2 clip)``.
    random : (numel,) uint32, optional
        Bits of the stochastic rounding; without them to the nearest level, ties to even.
    """
    y = np.clip(x * scale, -clip, clip)
    u = np.minimum((y + clip) * steps_per_unit, levels)
    if random is None:
        return np.rint(u).astype(np.uint32)
    up = np.ceil(u)
    down = random * 2.0**-32 < up - u  # exact: P = ceil(u) - u to 2^-32
    return (up - down).astype(np.uint32)


# ---- variants ----------------------------------------------------------------------------------


def quantize(
    x: View,
    out: View,
    *,
    scale: float,
    clip: float,
    levels: int,
    steps_per_unit: float,
    stream: tuple[int, int, int, int] | None,
    element: int,
    masks: Sequence[tuple[bytes, int, bytes]],
    position: int,
    bits: int,
) -> int:
    """Variant `reference`: words and masks into `out`; the number of values clipped, or -1."""
    values = _arrays.to_float64(x.array)
    if not np.isfinite(values).all():
        return -1
    random = None
    if stream is not None:
        seed, round, tensor, client = stream
        random = random_bits(
            x.numel, seed, round=round, tensor=tensor, client=client, offset=element
        )
    with np.errstate(over="ignore"):  # a product beyond float64 is clipped like any other
        words = levels_of(values, scale, clip, levels, steps_per_unit, random)
        clipped = int((np.abs(values * scale) > clip).sum())
    _flat(out)[:] = _masked(words, masks, position, bits)
    return clipped


def add(
    words: View,
    out: View,
    *,
    masks: Sequence[tuple[bytes, int, bytes]],
    position: int,
    bits: int,
) -> None:
    """Variant `reference`: ``out = words + masks`` modulo 2^bits."""
    _flat(out)[:] = _masked(_flat(words), masks, position, bits)


def modular_sum(rows: Sequence[View], acc: View, *, fresh: bool, bits: int) -> None:
    """Variant `reference`: ``acc = (acc +) sum of rows`` modulo 2^bits."""
    total = np.zeros(acc.numel, np.uint32) if fresh else _flat(acc).copy()
    for row in rows:
        total += _flat(row)
    _flat(acc)[:] = total & _low_bits(bits)


def dequantize_sum(words: View, out: View, *, top: int, factor: float) -> int:
    """Variant `reference`: ``out = (2 words - top) factor``; the number of words above `top`."""
    z = _flat(words).astype(np.int64)
    _arrays.assign(out.array, (2 * z - top) * factor)
    return int((z > top).sum())


def _masked(
    words: np.ndarray, masks: Sequence[tuple[bytes, int, bytes]], position: int, bits: int
) -> np.ndarray:
    total = words.copy()
    for key, sign, nonce in masks:
        stream = keystream(key, nonce, position, words.size)
        total = total + stream if sign > 0 else total - stream
    return total & _low_bits(bits)


def _low_bits(bits: int) -> np.uint32:
    return np.uint32((1 << bits) - 1)


def _flat(v: View) -> np.ndarray:
    array = v.array if isinstance(v.array, np.ndarray) else v.array.numpy()
    return array.reshape(-1)

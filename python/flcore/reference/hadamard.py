"""The randomised Hadamard transform of blocks: the definition in NumPy.

Signs come from a Philox stream, by coordinate; the transform adds and subtracts in the order
h = 1, 2, 4 .. m / 2, each ``(a, b) -> (a + b, a - b)`` for places i and i + h, so that every
variant has the same bits in float32. Integers are transformed exactly.

Suresh, Yu, Kumar, McMahan, "Distributed Mean Estimation with Limited Communication", ICML 2017,
arXiv 1611.00429.
"""

from __future__ import annotations

import math

import numpy as np

from flcore.reference import rng, streams

__all__ = ["flip", "hadamard", "lane_sum", "norm", "padded", "signs"]


def padded(n: int) -> int:
    """Return the next power of two, at least 1: the coordinates that a block of n becomes."""
    return 1 << max(n - 1, 0).bit_length()


def norm(m: int) -> np.float32:
    """Return ``m**-0.5`` for a power of two m: exact where that is one too, else rounded once."""
    k = m.bit_length() - 1
    root = 1.0 if k % 2 == 0 else math.sqrt(2)  # float32(sqrt(2)) times a power of two is exact
    return np.float32(np.float32(root) * np.float32(2.0 ** -((k + 1) // 2)))


def hadamard(x: np.ndarray) -> np.ndarray:
    """Return the Walsh-Hadamard transform of the last axis, not normalised, in the dtype of `x`.

    Parameters
    ----------
    x : (..., m) array, m a power of two
    """
    y, m, h = x.copy(), x.shape[-1], 1
    while h < m:
        pairs = y.reshape(*x.shape[:-1], m // (2 * h), 2, h)
        first, second = pairs[..., 0, :].copy(), pairs[..., 1, :].copy()
        pairs[..., 0, :], pairs[..., 1, :] = first + second, first - second
        h *= 2
    return y


def signs(first: int, count: int, seed: int, round: int) -> np.ndarray:
    """Return the signs of coordinates ``first .. first + count - 1``, (count,) bool, True = minus.

    `first` is a multiple of 32.
    """
    words = rng.random_bits(
        -(-count // 32), seed, round=round & 0xFFFFFFFF, tensor=streams.ROTATION, offset=first // 32
    )
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
    return bits[:count].astype(bool)


def flip(x: np.ndarray, minus: np.ndarray) -> np.ndarray:
    """Return `x` with the sign of every place changed where `minus` is True, zeros too."""
    return (x.view(np.uint32) ^ (minus.astype(np.uint32) << 31)).view(np.float32)


def lane_sum(x: np.ndarray) -> np.ndarray:
    """Return sums over the last axis of float32 `x`: 16 lanes in order, then a fixed tree."""
    m = x.shape[-1]
    rows = np.zeros((*x.shape[:-1], -(-m // 16) * 16), np.float32)
    rows[..., :m] = x
    rows = rows.reshape(*x.shape[:-1], -1, 16)
    lanes = np.zeros((*x.shape[:-1], 16), np.float32)
    for i in range(rows.shape[-2]):
        lanes = lanes + rows[..., i, :]
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]

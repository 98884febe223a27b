"""The coordinates that belong to a seed and a round: a keyed permutation, in NumPy.

A Feistel network over ``w = max(8, ceil(log2 d))`` bits permutes ``[0, 2^w)``: the upper
``w // 2`` bits L and the others R take turns, ``L ^= F(R)``, ``R ^= F(L)``, eight rounds in all.
The first k of P(0), P(1), P(2), ... that are below d are the coordinates; where ``2 k > d``, the
first d - k are those that are left out. Distinct by construction; as random as the network mixes.

Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
"""

from __future__ import annotations

import numpy as np

from flcore.reference import rng, streams

__all__ = ["ROUNDS", "coordinates", "permute"]

ROUNDS = 8
BITS_MIN = 8  # a smaller network would not mix
_CHUNK = 1 << 16


def permute(j: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Return P(j), uint64.

    Parameters
    ----------
    j : (n,) integers in [0, 2**bits)
    bits : int
        8 to 48.
    keys : (16,) uint32
        Two a round.
    """
    left, right = bits // 2, bits - bits // 2
    j = j.astype(np.uint64)
    upper = (j >> np.uint64(right)).astype(np.uint32)
    lower = (j & np.uint64(2**right - 1)).astype(np.uint32)
    for r in range(0, ROUNDS, 2):
        upper ^= _mixed(lower, *keys[2 * r : 2 * r + 2]) & np.uint32(2**left - 1)
        lower ^= _mixed(upper, *keys[2 * r + 2 : 2 * r + 4]) & np.uint32(2**right - 1)
    return (upper.astype(np.uint64) << np.uint64(right)) | lower


def _mixed(x: np.ndarray, a: np.uint32, b: np.uint32) -> np.ndarray:
    y = (x ^ a) * np.uint32(0x9E3779B1)
    y = ((y ^ (y >> np.uint32(15))) + b) * np.uint32(0x85EBCA77)
    return y ^ (y >> np.uint32(16))


def coordinates(numel: int, k: int, seed: int, round: int) -> np.ndarray:
    """Return k of `numel` coordinates, sorted, int64 (k,)."""
    bits = max(BITS_MIN, (numel - 1).bit_length())
    keys = rng.random_bits(2 * ROUNDS, seed, round=round & 0xFFFFFFFF, tensor=streams.RAND_K)
    drawn = numel - k if 2 * k > numel else k
    images, found, first = [np.empty(0, np.uint64)], 0, 0
    while found < drawn:
        image = permute(np.arange(first, min(first + _CHUNK, 2**bits)), bits, keys)
        images.append(image[image < numel])
        found += images[-1].size
        first += _CHUNK
    chosen = np.concatenate(images)[:drawn].astype(np.int64)
    if 2 * k <= numel:
        return np.sort(chosen)
    kept = np.ones(numel, bool)
    kept[chosen] = False
    return np.flatnonzero(kept)

"""Philox4x32-10 counter RNG in NumPy: the definition of every random bit flcore uses.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

A stream is named by ``(seed, round, tensor, client)`` and is a pure function of the position:
key words are the low and high half of the 64-bit ``seed``; counter words are
``c0 = i >> 2``, ``c1 = tensor``, ``c2 = round``, ``c3 = client``; element ``i`` is word ``i & 3``
of the block that this counter gives.

Normals are Box-Muller transforms of two neighbouring words, in float32 operations that every
variant repeats one by one: ``+ - * / sqrt`` rounded to nearest, and integer operations.

Box, Muller, "A note on the generation of random normal deviates", 1958.
"""

from __future__ import annotations

import numpy as np

from flcore import _arrays
from flcore._arrays import View

__all__ = ["fill", "philox4x32_10", "random_bits", "random_normal", "random_uniform"]

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


# Coefficients of csrc/box_muller.h, lowest power first (tests/test_rng.py compares the two).
_ATANH = ("0x1.5555p-2", "0x1.99d27cp-3", "0x1.1eb612p-3", "0x1.1ef86cp-3")
_SIN = ("0x1.21fb54p-4", "-0x1.4abbbap-1", "0x1.465e3p-4", "-0x1.2d7a86p-8")
_COS = ("0x1p0", "-0x1.3bd3ccp+0", "0x1.03c1dep-2", "-0x1.55c664p-6", "0x1.d9f7bep-11")
_LN2 = ("0x1.62e4p-1", "0x1.7f7d1cp-20")
_F = np.float32


def _horner(x: np.ndarray, coefficients: tuple[str, ...]) -> np.ndarray:
    value = x * _F(float.fromhex(coefficients[-1]))
    for c in coefficients[-2:0:-1]:
        value = (value + _F(float.fromhex(c))) * x
    return value + _F(float.fromhex(coefficients[0]))


def radius(word: np.ndarray) -> np.ndarray:
    """``sqrt(-2 ln u)`` for ``u = (word + 1) 2^-32`` in (0, 1].

    Parameters
    ----------
    word : (n,) uint32

    Returns
    -------
    (n,) float32, at most 6.6605
    """
    above = word >= 1 << 31  # u > 1/2: the distance to 1 is converted, so its digits survive
    whole = np.where(above, ~word, word + np.uint32(1)).astype(_F)
    # u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)) below 1/2; e = 0 above it
    shifted = whole.view(np.int32) + np.int32(0x3F800000 - 0x3F3504F3)
    mantissa = (shifted & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)
    f = np.where(above, whole * _F(-(2.0**-32)), mantissa.view(_F) - _F(1))
    e = np.where(above, 0, (shifted >> 23) - (127 + 32)).astype(_F)
    s = f / (f + _F(2))  # ln(1 + f) = 2 atanh(s)
    z = s * s
    half = s + s * (z * _horner(z, _ATANH))
    high, low = (_F(float.fromhex(part)) for part in _LN2)
    return np.sqrt((e * high + (half * _F(2) + e * low)) * _F(-2))


def turn(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of ``2 pi u`` for ``u = (word >> 7) 2^-25`` in [0, 1).

    Parameters
    ----------
    word : (n,) uint32

    Returns
    -------
    cosine, sine : (n,) float32
    """
    quarter = (word + np.uint32(1 << 29)) >> np.uint32(30)
    x = ((word << np.uint32(2)).view(np.int32) >> 9).astype(_F) * _F(2.0**-23)  # in [-1/2, 1/2)
    y = x * x
    s = x * _F(1.5) + x * _horner(y, _SIN)  # sin(pi x / 2); 1.5 x is exact
    c = _horner(y, _COS)
    odd = (quarter & 1).astype(bool)
    cosine = np.where(odd, s, c).view(np.uint32) ^ (((quarter + np.uint32(1)) & 2) << 30)
    sine = np.where(odd, c, s).view(np.uint32) ^ ((quarter & 2) << 30)
    return cosine.astype(np.uint32).view(_F), sine.astype(np.uint32).view(_F)


def random_normal(
    numel: int, seed: int, *, round: int = 0, tensor: int = 0, client: int = 0, offset: int = 0
) -> np.ndarray:
    """Standard normal float32: words 2k and 2k + 1 give elements 2k and 2k + 1."""
    first = offset & ~1
    pairs = (offset + numel + 1 - first) // 2
    bits = random_bits(2 * pairs, seed, round=round, tensor=tensor, client=client, offset=first)
    r = radius(bits[::2])
    cosine, sine = turn(bits[1::2])
    flat = np.stack([r * cosine, r * sine], axis=1).reshape(-1)
    return np.ascontiguousarray(flat[offset - first : offset - first + numel])


FORMS = {"bits": random_bits, "uniform": random_uniform, "normal": random_normal}


def fill(
    out: View, form: str, seed: int, round: int, tensor: int, client: int, offset: int
) -> None:
    """Variant `reference` of the op: write the values, or the bits in their place, into `out`."""
    make = FORMS[form]
    values = make(out.numel, seed, round=round, tensor=tensor, client=client, offset=offset)
    _arrays.assign(out.array, values.view(np.float32))

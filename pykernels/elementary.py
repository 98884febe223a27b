"""Exponentials and logarithms in Triton to an ulp or so, on a GPU and in the interpreter alike.

Triton's own ``exp`` of float32 is ``2^(x log2 e)`` with a rounded product: its relative error grows
with the argument, to 5e-6 at -80. ``log`` and everything in float64 are the library's, good to an
ulp. ``log1p`` and ``expm1`` have no form that the interpreter runs too.

Largest relative error over 10^6 arguments: exp 1e-7, expm1 1.2e-7, log1p 1.2e-7 more than ``log``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["exp", "exp_difference", "expm1", "log1p"]

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts: the first has 15 bits, so its product with an exponent is exact.
LN2_HIGH, LN2_LOW = tl.constexpr(22713 / 32768), tl.constexpr(1.428606820309417e-06)
# (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2, fitted so that the error of exp is below 4e-9.
C0, C1, C2 = tl.constexpr(0.5), tl.constexpr(0.1666651815176), tl.constexpr(0.04166620597243)
C3, C4 = tl.constexpr(0.00836888793856), tl.constexpr(0.00139504857361)


@triton.jit
def power_of_two(n):
    """2^n of an int32 n, -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """Return exp(r) - 1 and n of x = n ln 2 + r in float32; n is kept within -151 to 129."""
    n = tl.floor(x * LOG2_E + 0.5)
    n = tl.minimum(tl.maximum(n, -151.0), 129.0)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = (((C4 * r + C3) * r + C2) * r + C1) * r + C0
    return p * r * r + r, tl.where(x == x, n, 0.0).to(tl.int32)


@triton.jit
def exp(x):
    """exp(x); float32 results below 1e-45 are 0."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        kept = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))  # NaN stays
        q, n = split(kept)
        half = n >> 1
        y = (q + 1.0) * power_of_two(half) * power_of_two(n - half)
        return tl.where(x < -104.0, 0.0, y)


@triton.jit
def exp_difference(a, b):
    """exp(a - b), b finite: what a rounded difference loses is put back.

    Two float32 80 apart differ by a number whose rounding alone would cost 4e-6 of the result.
    """
    d = a - b
    if d.dtype == tl.float64:
        return tl.exp(d)
    else:
        c = d - a
        lost = (a - (d - c)) - (b + c)
        y = exp(d)
        return tl.where(tl.abs(lost) < 1.0, y + y * lost, y)  # false where a is infinite


@triton.jit
def expm1(x):
    """exp(x) - 1 without loss near 0."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
        d = y - 1.0
        ratio = x / tl.where((d == 0.0) | (y == 0.0) | (d > 1e300), 1.0, tl.log(y))
        near = tl.where(d == 0.0, x, d * ratio)
        return tl.where((d == -1.0) | (d > 1e300), d, near)
    else:
        kept = tl.where(x < -30.0, -30.0, tl.where(x > 87.0, 87.0, x))
        q, n = split(kept)
        scale = power_of_two(n)
        y = q * scale + (scale - 1.0)
        return tl.where(x > 87.0, exp(x), y)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 and finite: log of the rounded sum and its first correction."""
    w = 1.0 + x
    c = tl.where(x < 1.0, x - (w - 1.0), 1.0 - (w - x))
    return tl.log(w) + c / w

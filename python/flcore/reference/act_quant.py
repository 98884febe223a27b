r"""Dynamic quantisation of activations to 8 bits, one scale for a block of a row: the definition.

With a the largest \|x\| of a block, h its largest and l its least value, h >= 0 >= l:

============  =======================  ===========================  ==========================
codes         scale s                  zero point z                 code q
============  =======================  ===========================  ==========================
symmetric     a / 127                  0                            rne(x (127 / a)), int8
asymmetric    r / 127.5,               rne(-l (127.5 / r)),         rne(x (127.5 / r)) + z,
              r = h / 2 - l / 2        cut to 0 .. 255              cut to 0 .. 255, uint8
============  =======================  ===========================  ==========================

in float32, every operation rounded; x stands for itself in units of 2^-64 in a block whose a is
below that. x is close to s (q - z). A block of zeros has s = 0, z = 0 and codes 0; a block with a
value that is not finite has s = NaN, z = 0 and codes 0.
"""

from __future__ import annotations

import numpy as np

__all__ = ["quantize_activation", "quantize_block"]

SMALL = np.float32(2.0**-64)


def quantize_block(x: np.ndarray, asymmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantise blocks (rows, n) of float32; returns codes (rows, n), scales and zeros (rows,)."""
    f = np.float32
    finite = np.isfinite(x).all(axis=1)
    x = np.where(finite[:, None], x, f(0))
    top = np.abs(x).max(axis=1, initial=0)
    used = top > 0
    shift = np.where(top < SMALL, 1 / SMALL, f(1))
    x = x * shift[:, None]
    back = 1 / shift
    if asymmetric:
        low, high = x.min(axis=1, initial=0), x.max(axis=1, initial=0)
        span = np.where(used, high * f(0.5) - low * f(0.5), f(1))
        inverse, scale = f(127.5) / span, span / f(127.5) * back
        zero = np.clip(np.rint(-low * inverse), 0, 255)
        codes = np.clip(np.rint(x * inverse[:, None]) + zero[:, None], 0, 255)
    else:
        top = np.where(used, top * shift, f(1))
        inverse, scale = f(127) / top, top / f(127) * back
        zero = np.zeros(len(x), f)
        codes = np.rint(x * inverse[:, None])
    codes = np.where(used[:, None], codes, 0).astype(np.uint8 if asymmetric else np.int8)
    scale = np.where(finite, np.where(used, scale, f(0)), f(np.nan)).astype(f)
    return codes, scale, np.where(used, zero, 0).astype(np.uint8)


def quantize_activation(
    x: np.ndarray, block: int, asymmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Quantise rows (m, k) of float32 in blocks of `block` values, the last one may be short.

    Returns
    -------
    codes : (m, k) array of int8, or uint8 when asymmetric
    scales : (m, G) array of float32
    sums : (m, G) array of int32
        Sums of the codes of a block.
    zeros : (m, G) array of uint8
        Zero points, 0 for symmetric codes.
    """
    m, k = x.shape
    count = -(-k // block) if k else 0
    codes = np.zeros((m, k), np.uint8 if asymmetric else np.int8)
    scales, sums = np.zeros((m, count), np.float32), np.zeros((m, count), np.int32)
    zeros = np.zeros((m, count), np.uint8)
    for b in range(count):
        part = slice(b * block, (b + 1) * block)
        codes[:, part], scales[:, b], zeros[:, b] = quantize_block(x[:, part], asymmetric)
        sums[:, b] = codes[:, part].sum(axis=1, dtype=np.int64)
    return codes, scales, sums, zeros

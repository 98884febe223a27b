"""Rotated codes, DRIVE with one bit and EDEN with more: the definition in NumPy.

A block is multiplied by random signs S and the normalised Hadamard matrix, after which every input
looks normal, so that one quantiser fits all::

    z = m**-1/2 Had(S x)      c_j: the nearest centroid q of z_j m**1/2 / ||x||
    f = ||x||**2 / <q, z>     unbiased, over the random signs
    f = <q, z> / <q, q>       the error is least, for error feedback
    D = S Had(q) (f m**-1/2)

Code j: bit b - 1 is the sign (1 = negative), the lower bits count centroids from the smallest. A
last block of n coordinates is filled with zeros to m, the next power of two.

Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", NeurIPS 2021, arXiv 2105.08339;
Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for
Federated Learning", ICML 2022, arXiv 2108.08842. Centroids: Max, "Quantizing for minimum
distortion", IRE Trans. Inform. Theory 6, 1960.
"""

from __future__ import annotations

import numpy as np

from flcore.reference.buckets import Settings, over_buckets, pack, unpack
from flcore.reference.hadamard import flip, hadamard, lane_sum, norm, padded, signs
from flcore.reference.wire_bucket import BucketBody
from flcore.reference.wire_frame import Header

__all__ = ["CENTROIDS", "LARGEST", "bounds", "decode", "decode_update", "encode", "encode_update"]

CENTROIDS: dict[int, np.ndarray] = {
    bits: np.array(half, np.float32)
    for bits, half in {
        1: [1.0],
        2: [0.45278004, 1.51041761],
        3: [0.24509416, 0.75600525, 1.34390926, 2.15194567],
        4: [
            0.12839501,
            0.38804823,
            0.65675900,
            0.94234027,
            1.25623095,
            1.61804607,
            2.06901673,
            2.73258880,
        ],
    }.items()
}
"""Positive half of the Lloyd-Max centroids of N(0, 1) by bits. One bit needs no magnitude of its
own, the scale makes up for it: 1 keeps the transform of its codes an integer."""
LARGEST = np.float32(2.0**112)
"""Scales are cut here: every code then decodes to a finite value."""


def bounds(bits: int) -> np.ndarray:
    """Return the boundaries between centroids, in the middle, (2**(bits - 1) - 1,) float32."""
    q = CENTROIDS[bits]
    return (q[:-1] + q[1:]) * np.float32(0.5)


def _values(codes: np.ndarray, bits: int) -> np.ndarray:
    half = 1 << (bits - 1)
    q = CENTROIDS[bits][codes & (half - 1)]
    return np.where(codes & half, -q, q)


def encode(
    u: np.ndarray, minus: np.ndarray, bits: int, unbiased: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and codes of blocks.

    Parameters
    ----------
    u : (blocks, n) float32, finite
    minus : (blocks, m) bool
        Signs, True = minus; m is the next power of two from n on.
    bits : 1 to 4
    unbiased : bool
        Which scale.

    Returns
    -------
    scales : (blocks,) float32
    codes : (blocks, m) uint8
    """
    blocks, m = minus.shape
    x = np.zeros((blocks, m), np.float32)
    x[:, : u.shape[1]] = u
    # scaled by a power of two, exactly, so that no norm overflows or vanishes
    exponent = (np.abs(x).view(np.uint32).max(axis=1) >> 23).astype(np.int64)
    power = np.clip(254 - exponent, 1, 253)
    x = x * (power << 23).astype(np.uint32).view(np.float32)[:, None]
    squared = lane_sum(x * x)
    z = hadamard(flip(x, minus))
    empty = squared == 0
    safe = np.where(empty, np.float32(1), squared)
    inverse = np.float32(1) / np.sqrt(safe)
    y = np.abs(z) * inverse[:, None]
    index = np.zeros((blocks, m), np.uint8)
    for bound in bounds(bits):
        index += y >= bound
    codes = index | (z < 0).astype(np.uint8) << np.uint8(bits - 1)
    codes[empty] = 0
    q = CENTROIDS[bits][index]
    dot = norm(m) * lane_sum(q * np.abs(z))
    safe_dot = np.where(empty, np.float32(1), dot)
    f = safe / safe_dot if unbiased else dot / lane_sum(q * q)
    with np.errstate(over="ignore"):
        f = f * ((254 - power) << 23).astype(np.uint32).view(np.float32)
    return np.where(empty, np.float32(0), np.minimum(f, LARGEST)), codes


def decode(
    scales: np.ndarray, codes: np.ndarray, minus: np.ndarray, n: int, bits: int
) -> np.ndarray:
    """Return the blocks that scales and codes stand for, (blocks, n) float32.

    Parameters
    ----------
    scales : (blocks,) float32
    codes : (blocks, m) uint8
    minus : (blocks, m) bool
    n : int
        Coordinates of a block, at most m.
    bits : 1 to 4
    """
    y = hadamard(_values(codes, bits))
    d = flip((scales * norm(codes.shape[1]))[:, None] * y, minus)[:, :n]
    return np.where(scales[:, None] == 0, np.float32(0), d)


# ---- whole updates -----------------------------------------------------------------------------


def encode_update(u: np.ndarray, s: Settings, half: np.ndarray | None) -> tuple[bytes, bytes]:
    """Return the sections scales and codes of u, float32 (d,); nothing is rounded at random."""
    scales, codes = b"", b""
    for part, (count, n) in over_buckets(u.size, s.bucket):
        m = padded(n)
        minus = signs(part.start, count * m, s.seed, s.round).reshape(count, m)
        f, c = encode(u[part].reshape(count, n), minus, s.bits, s.measure == 0)
        scales += f.astype("<f4").tobytes()
        codes += pack(c.reshape(-1), s.bits, m)
    return scales, codes


def decode_update(h: Header, body: BucketBody) -> np.ndarray:
    """Return what a rotated packet stands for, float32 (d,)."""
    out, at = np.empty(h.numel, np.float32), 0
    for part, (count, n) in over_buckets(h.numel, h.tile):
        m, stride = padded(n), -(-padded(n) * h.bits // 8)
        minus = signs(part.start, count * m, h.seed, h.round).reshape(count, m)
        codes = unpack(body.codes[at : at + count * stride], count * m, h.bits, m)
        at += count * stride
        first = part.start // h.tile
        f = body.scales[first : first + count, 0]
        out[part] = decode(f, codes.reshape(count, m), minus, n, h.bits).reshape(-1)
    return out

"""Codes on an evenly spaced grid, sign, ternary, uniform and affine: the definition in NumPy.

Float32 in the order written, each operation rounded once; sums are float64 in 16 lanes, of which
lane c % 16 takes coordinate c of the bucket, and at the end lanes 8, 4, 2 and 1 apart are added.
Every variant gives these bits. With a random fraction r, rounding is floor(y + r), else half to
even.

Sources: Alistarh et al., "QSGD", NeurIPS 2017, arXiv 1610.02132; Karimireddy et al., "Error
Feedback Fixes SignSGD", ICML 2019, arXiv 1901.09847; Seide et al., "1-Bit Stochastic Gradient
Descent", Interspeech 2014; Wen et al., "TernGrad", NeurIPS 2017, arXiv 1705.07878.
"""

from __future__ import annotations

import numpy as np

from flcore.reference import buckets
from flcore.reference.buckets import Settings
from flcore.reference.wire_bucket import BucketBody
from flcore.reference.wire_frame import Header

__all__ = ["decode_update", "encode_update", "lane_sum"]

_LANES = 16


def lane_sum(x: np.ndarray) -> np.ndarray:
    """Return the sums of the rows of x, float64 (m, n), in the fixed order of lanes, (m,)."""
    m, n = x.shape
    padded = np.zeros((m, -(-n // _LANES), _LANES))
    padded.reshape(m, -1)[:, :n] = x
    lanes = np.add.accumulate(padded, axis=1)[:, -1]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def encode_update(u: np.ndarray, s: Settings, half: np.ndarray | None) -> tuple[bytes, bytes]:
    """Return scales and codes of a whole update (:mod:`flcore.reference.buckets`)."""
    scales, codes = b"", np.empty(u.size, np.uint8)
    for part, shape in buckets.over_buckets(u.size, s.bucket):
        rows = u[part].reshape(shape)
        r = None if half is None else buckets.fractions(half[part]).reshape(shape)
        found, q = _ENCODERS[s.codec](rows, s, r)
        scales += buckets.scale_bytes(found, s.values)
        codes[part] = q.reshape(-1)
    if s.codec == "ternary" and s.form == 1:
        return scales, _pack_trits(codes, s.bucket)
    return scales, buckets.pack(codes, s.bits, s.bucket)


def _grid(u, lo, unit, least, most, r):
    inverse = np.float32(1) / np.where(unit > 0, unit, np.float32(np.inf)).astype(np.float32)
    with np.errstate(over="ignore"):
        y = np.clip((u - lo) * inverse, np.float32(least), np.float32(most))
    return np.rint(y) if r is None else np.floor(y + r)


def _column(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).reshape(-1, 1)


def _norm_squared(u: np.ndarray) -> np.ndarray:
    return lane_sum(u.astype(np.float64) ** 2)


def _uniform(u: np.ndarray, s: Settings, r: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if s.measure == 1:
        unit = np.sqrt(_norm_squared(u)) / s.levels
    else:
        unit = np.abs(u).max(1) / np.float32(s.levels)
    unit = buckets.scale_values(_column(unit), buckets.scale_limit(1 << (s.bits - 1)), s.values)
    q = _grid(u, np.float32(0), unit, -s.levels, s.levels, r)
    return unit, q + ((1 << (s.bits - 1)) - 1)


def _ternary(u: np.ndarray, s: Settings, r: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    a = np.abs(u).max(1)
    if s.clip > 0:
        bound = _column(s.clip * np.sqrt(_norm_squared(u) / u.shape[1]))[:, 0]
        a = np.minimum(a, bound)
    a = buckets.scale_values(_column(a), buckets.scale_limit(2), s.values)
    return a, _grid(u, np.float32(0), a, -1, 1, r) + 1


def _affine(u: np.ndarray, s: Settings, r: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    steps = (1 << s.bits) - 1
    if s.measure == 2:
        wide, n = u.astype(np.float64), u.shape[1]
        below = lane_sum((wide < 0).astype(np.float64))
        negative, positive = lane_sum(np.minimum(wide, 0)), lane_sum(np.maximum(wide, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            high = np.where(below < n, positive / (n - below), negative / below)
            low = np.where(below > 0, negative / below, high)
        found = _affine_scales(low, high, steps, s.values)
        return found, (u >= 0).astype(np.uint8)
    low, high = u.min(1) + np.float32(0), u.max(1) + np.float32(0)
    found = _affine_scales(low.astype(np.float64), high.astype(np.float64), steps, s.values)
    return found, _grid(u, found[:, :1], found[:, 1:], 0, steps, r)


def _affine_scales(low: np.ndarray, high: np.ndarray, steps: int, values: str) -> np.ndarray:
    """Return lo and unit as stored, (m, 2): together at most WIRE_LARGEST."""
    least, limit = low.astype(np.float32), buckets.scale_limit(1)
    down = np.minimum(least, limit)
    if values == "bfloat16":
        down = (least.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    lo = np.where(least < 0, -buckets.scale_values(np.maximum(-least, 0), limit, values), down)
    size = np.abs(lo.astype(np.float64))
    rest = (buckets.WIRE_LARGEST - size) / steps
    top = buckets.scale_limit(steps)
    most = np.where(rest < top, rest, top).astype(np.float32)
    while True:
        over = (rest < top) & (most > 0)
        over &= size + steps * most.astype(np.float64) > buckets.WIRE_LARGEST
        if not over.any():
            break
        most[over] = np.nextafter(most[over], np.float32(0))
    with np.errstate(over="ignore"):
        unit = np.maximum((high - lo) / steps, 0).astype(np.float32)
    return np.stack([lo, buckets.scale_values(unit, most, values)], 1).astype(np.float32)


def _sign(u: np.ndarray, s: Settings, r: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    n = u.shape[1]
    if s.measure == 1:
        a = np.sqrt(_norm_squared(u) / n)
    else:
        a = lane_sum(np.abs(u).astype(np.float64)) / n
    a = buckets.scale_values(_column(a), buckets.scale_limit(1), s.values)
    return a, u < 0


_ENCODERS = {"sign": _sign, "ternary": _ternary, "uniform": _uniform, "affine": _affine}


# ---- decoding ------------------------------------------------------------------------------------


def decode_update(header: Header, body: BucketBody) -> np.ndarray:
    """Return what a packet stands for, float32 (d,)."""
    h = header
    if h.codec == "ternary" and h.form == 1:
        codes = _unpack_trits(body.codes, h.numel, h.tile)
    else:
        codes = buckets.unpack(body.codes, h.numel, h.bits, h.tile)
    scales = np.repeat(body.scales, h.tile, axis=0)[: h.numel]
    first = scales[:, 0] if scales.size else np.empty(0, np.float32)
    if h.codec == "sign":
        return np.where(codes == 1, -first, first)
    if h.codec == "affine":
        return first + scales[:, 1] * codes.astype(np.float32)
    middle = 1 if h.codec == "ternary" else (1 << (h.bits - 1)) - 1
    return first * (codes.astype(np.float32) - np.float32(middle))


_POWERS = 3 ** np.arange(5)


def _pack_trits(codes: np.ndarray, bucket: int) -> bytes:
    out = b""
    for part, (count, n) in buckets.over_buckets(codes.size, bucket):
        rows = np.zeros((count, -(-n // 5) * 5), np.int64)
        rows[:, :n] = codes[part].reshape(count, n)
        out += (rows.reshape(count, -1, 5) * _POWERS).sum(-1).astype(np.uint8).tobytes()
    return out


def _unpack_trits(data: np.ndarray, numel: int, bucket: int) -> np.ndarray:
    codes, start = np.empty(numel, np.uint8), 0
    for part, (count, n) in buckets.over_buckets(numel, bucket):
        stride = -(-n // 5)
        rows = data[start : start + count * stride].reshape(count, stride, 1)
        start += count * stride
        trits = (rows // _POWERS % 3).reshape(count, -1)[:, :n]
        codes[part] = trits.reshape(-1)
    return codes

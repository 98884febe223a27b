"""What the definitions of all codecs of buckets share: settings, random bits, codes as bytes.

An update of d numbers is cut into buckets of `Settings.bucket` coordinates, the last one perhaps
shorter. A codec supplies two functions on whole updates::

    encode_update(u, settings, half) -> (scales, codes), both bytes, as on the wire
    decode_update(header, body) -> float32 (d,)

with u float32 (d,), half the random bits uint16 (d,) or None, body a `wire_bucket.BucketBody`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore.reference import rng, streams

__all__ = [
    "WIRE_LARGEST",
    "Settings",
    "fractions",
    "over_buckets",
    "pack",
    "random_halves",
    "scale_bytes",
    "scale_limit",
    "scale_values",
    "unpack",
]

WIRE_LARGEST = 3.402823e38
"""No code decodes to more: a little less than the largest float32."""


@dataclass(frozen=True)
class Settings:
    """How buckets become codes; CodecArgs in csrc/api.h has the same.

    Attributes
    ----------
    codec : str
        Name of the codec on the wire.
    bits, form, bucket : int
        As in the header of a packet.
    values : str
        Type of the scales, "float32", "bfloat16" or "e8m0", or of dense values.
    stochastic : bool
        Rounding by random bits, else half to even.
    measure : int
        How a scale is found: 0 the codec's own way, 1 Euclidean norm, 2 two means.
    levels : int
        Uniform codec: positive levels in use.
    clip : float
        Ternary codec: magnitudes are cut at this many root mean squares of the bucket; 0: not.
    seed, round : int
        Of the header.
    extra : object
        What one codec alone needs.
    """

    codec: str
    bits: int
    bucket: int
    form: int = 0
    values: str = "float32"
    stochastic: bool = False
    measure: int = 0
    levels: int = 0
    clip: float = 0.0
    seed: int = 0
    round: int = 0
    extra: Any = None


def random_halves(numel: int, seed: int, round: int) -> np.ndarray:
    """Return the 16 random bits of each coordinate, uint16 (numel,)."""
    words = rng.random_bits(-(-numel // 2), seed, round=round & 0xFFFFFFFF, tensor=streams.ROUNDING)
    return words.astype("<u4").view("<u2")[:numel].astype(np.uint16)


def fractions(half: np.ndarray) -> np.ndarray:
    """Return ``(half + 1/2) 2**-16`` as float32, exact: uniform in (0, 1)."""
    return (half.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-16)


def over_buckets(numel: int, bucket: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Yield the whole buckets and the last short one: coordinates, and (buckets, length)."""
    whole = numel // bucket * bucket
    if whole:
        yield slice(0, whole), (whole // bucket, bucket)
    if whole < numel:
        yield slice(whole, numel), (1, numel - whole)


def pack(codes: np.ndarray, bits: int, bucket: int) -> bytes:
    """Return codes (numel,) as fields of `bits` bits, low ones first; a bucket starts at a byte."""
    out = b""
    for part, shape in over_buckets(codes.size, bucket):
        rows = codes[part].astype(np.uint32).reshape(shape)
        fields = (rows[..., None] >> np.arange(bits, dtype=np.uint32)) & 1
        flat = fields.astype(np.uint8).reshape(shape[0], -1)
        out += np.packbits(flat, axis=1, bitorder="little").tobytes()
    return out


def unpack(data: np.ndarray, numel: int, bits: int, bucket: int) -> np.ndarray:
    """Return the codes that `pack` made bytes of, uint32 (numel,)."""
    codes, start = np.empty(numel, np.uint32), 0
    for part, (count, n) in over_buckets(numel, bucket):
        stride = -(-n * bits // 8)
        rows = data[start : start + count * stride].reshape(count, stride)
        start += count * stride
        flat = np.unpackbits(rows, axis=1, bitorder="little", count=n * bits)
        weights = np.uint32(1) << np.arange(bits, dtype=np.uint32)
        codes[part] = (flat.reshape(count, n, bits) * weights).sum(-1, dtype=np.uint32).reshape(-1)
    return codes


# ---- scales ------------------------------------------------------------------------------------


def scale_limit(reach: float) -> np.float32:
    """Return the largest float32 of which `reach` times is not above WIRE_LARGEST."""
    x = np.float32(WIRE_LARGEST / reach)
    return np.nextafter(x, np.float32(0)) if float(x) * reach > WIRE_LARGEST else x


def scale_values(x: np.ndarray, limit: np.ndarray | np.floating, values: str) -> np.ndarray:
    """Return x >= 0 as it is read from the wire.

    At least 2**-126 unless 0, so that its inverse is finite; bfloat16 rounded up, so that nothing
    is clipped; never above the limit.
    """
    x = np.where(x > 0, np.maximum(x, np.float32(2.0**-126)), x)
    x = np.minimum(x, limit).astype(np.float32)
    if values != "bfloat16":
        return x
    up = (x.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    limit = np.broadcast_to(limit, x.shape).astype(np.float32)
    return np.where(up > limit.view(np.uint32), up - 0x10000, up).astype(np.uint32).view(np.float32)


def scale_bytes(x: np.ndarray, values: str) -> bytes:
    """Return scales of `scale_values` as on the wire."""
    if values == "bfloat16":
        return (x.view(np.uint32) >> 16).astype("<u2").tobytes()
    return x.astype("<f4").tobytes()


Encode = Callable[[np.ndarray, Settings, "np.ndarray | None"], "tuple[bytes, bytes]"]

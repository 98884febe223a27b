"""Codes that are small floating-point numbers: the definition in NumPy.

Float32 in a fixed order, every operation rounded once; a product with a power of two is exact
unless it leaves the range. Every variant gives these bits. Stochastic rounding takes 16 random bits
a coordinate, ``half``, as the number ``r = (half + 1/2) 2**-16``.

Sources: Horvath et al., "Natural Compression for Distributed Deep Learning", arXiv 1905.10988; OCP
Microscaling Formats (MX) Specification 1.0; Micikevicius et al., "FP8 Formats for Deep Learning",
arXiv 2209.05433; Dettmers et al., "QLoRA", arXiv 2305.14314 (the NF4 values).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flcore.reference import buckets
from flcore.reference.buckets import Settings
from flcore.reference.wire_bucket import BucketBody
from flcore.reference.wire_frame import Header

__all__ = [
    "FORMATS",
    "NF4",
    "Format",
    "block_scale",
    "cast",
    "code_values",
    "decode_update",
    "dense_bits",
    "dense_values",
    "encode_update",
    "largest",
    "max_scale",
    "natural_codes",
    "natural_values",
    "power_scale",
    "scale_values",
]


@dataclass(frozen=True)
class Format:
    """A small number format: sign, exponent and mantissa from the highest bit down.

    Attributes
    ----------
    form : int
        Number on the wire.
    bits, mantissa : int
        Width of a code and of its mantissa field.
    emin, emax : int
        Exponents of the smallest and of the largest normal numbers.
    top : int
        Code of the largest finite magnitude. Codes above it decode to the same number; no encoder
        writes them.
    """

    form: int
    bits: int
    mantissa: int
    emin: int
    emax: int
    top: int


FORMATS = {
    "e4m3": Format(1, 8, 3, -6, 8, 0x7E),
    "e5m2": Format(2, 8, 2, -14, 15, 0x7B),
    "e3m2": Format(3, 6, 2, -2, 4, 0x1F),
    "e2m3": Format(4, 6, 3, 0, 2, 0x1F),
    "e2m1": Format(5, 4, 1, 0, 2, 0x07),
    # two's complement, sixty-fourths; one exponent, so all its numbers are subnormal
    "int8": Format(6, 8, 6, 0, 0, 0x7F),
    # numbers of the codebook NF4, no fields
    "nf4": Format(7, 4, 0, 0, 0, 0x0F),
}

NAMES = {f.form: name for name, f in FORMATS.items()}

# Quantiles of a normal distribution between -1 and 1, with an exact 0.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def largest(name: str) -> float:
    """Return the largest magnitude that a code of format `name` stands for."""
    return float(np.abs(code_values(name)).max())


@lru_cache
def code_values(name: str) -> np.ndarray:
    """Return the numbers that the codes of format `name` stand for, (2**bits,) float32."""
    if name == "nf4":
        return NF4
    f = FORMATS[name]
    code = np.arange(2**f.bits)
    if name == "int8":
        signed = np.where(code < 128, code, code - 256)
        return (np.maximum(signed, -127) / 64).astype(np.float32)
    magnitude = np.minimum(code & (2 ** (f.bits - 1) - 1), f.top)
    exponent, mantissa = magnitude >> f.mantissa, magnitude & (2**f.mantissa - 1)
    hidden = np.where(exponent > 0, 2**f.mantissa, 0)
    value = np.ldexp(hidden + mantissa, np.maximum(exponent, 1) - 1 + f.emin - f.mantissa)
    return np.where(code >> (f.bits - 1), -value, value).astype(np.float32)


# ---- scales of the buckets u, (m, n) float32; each (m, 1) ----------------------------------------


def power_scale(u: np.ndarray, name: str) -> np.ndarray:
    """Return the least powers of two that bring all values into the format; 0 for zeros; float32.

    At least 2**-126, so that the scale is a normal number, and so small that no code overflows.
    """
    top = np.abs(u).max(axis=1, keepdims=True)
    fraction, exponent = np.frexp(top.astype(np.float64) / largest(name))  # fraction in [1/2, 1)
    power = np.clip(exponent - (fraction == 0.5), -126, 127 - FORMATS[name].emax)
    return np.where(top > 0, np.ldexp(np.float32(1), power), 0).astype(np.float32)


def block_scale(u: np.ndarray, name: str) -> np.ndarray:
    """Return E8M0 bytes: floor(log2 max|u|) - emax + 127, at least 0; uint8."""
    top = np.abs(u).max(axis=1, keepdims=True)
    byte = np.frexp(top)[1] - 1 - FORMATS[name].emax + 127
    return np.where(top > 0, np.maximum(byte, 0), 0).astype(np.uint8)


def max_scale(u: np.ndarray) -> np.ndarray:
    """Return max|u|, at most what a packet may hold; float32."""
    return np.minimum(np.abs(u).max(axis=1, keepdims=True), buckets.scale_limit(1))


def scale_values(scales: np.ndarray) -> np.ndarray:
    """Return stored scales as float32: bytes are E8M0, ``2**(byte - 127)``."""
    if scales.dtype != np.uint8:
        return scales
    return np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)


# ---- codes -------------------------------------------------------------------------------------


def cast(u: np.ndarray, scale: np.ndarray, name: str, half: np.ndarray | None = None) -> np.ndarray:
    """Return the codes of u / scale in format `name`, uint8 of the shape of `u`.

    `scale` is as `scale_values` gives it. To the nearest number, ties to an even code, or
    stochastically with random bits `half`; the magnitude rounds, so that signs are symmetric. What
    is too large becomes the largest number.
    """
    f = FORMATS[name]
    if name == "nf4":
        y = u / np.where(scale > 0, scale, np.float32(1))
        middle = (NF4[1:] + NF4[:-1]) / np.float32(2)
        return (y[..., None] > middle).sum(axis=-1).astype(np.uint8)  # a tie goes down
    wide = np.asarray(scale, np.float64)
    inverse = np.where(wide > 0, 1 / np.where(wide > 0, wide, 1), 0).astype(np.float32)
    y = np.abs(u) * inverse
    exponent = np.maximum(np.where(y > 0, np.frexp(y)[1] - 1, f.emin), f.emin)
    if name == "int8":
        exponent = np.zeros_like(exponent)
    z = np.ldexp(y, f.mantissa - exponent)  # in units of the last place
    if half is None:
        steps = np.rint(z).astype(np.int64)
    else:
        steps = np.floor(z + buckets.fractions(half)).astype(np.int64)
    magnitude = np.minimum(steps + ((exponent - f.emin).astype(np.int64) << f.mantissa), f.top)
    if name == "int8":
        return np.where(np.signbit(u), -magnitude, magnitude).astype(np.uint8)
    return (magnitude | np.signbit(u).astype(np.int64) << (f.bits - 1)).astype(np.uint8)


def natural_codes(u: np.ndarray, form: int, half: np.ndarray | None = None) -> np.ndarray:
    """Return codes of signed powers of two, (n,) uint16.

    ``|u| = m 2**e`` with 1 <= m < 2 becomes 2**(e + 1) with probability m - 1, else 2**e (nearest:
    up from m = 3/2 on): a random number is added below the exponent field and the carry decides.
    Form 0 is sign and exponent field, 9 bits, the magnitude at most 2**127. Form 1 is sign and 7
    bits, 0 or a power from 2**-108 to 2**18; below 2**-108 a value becomes 2**-108 or 0.
    """
    magnitude = np.abs(u)
    if form == 1:
        magnitude = magnitude * np.float32(2.0**-18)  # 2**-108 is then the least normal number
    bits = np.ascontiguousarray(magnitude).view(np.uint32).astype(np.int64)
    bits += 0x400000 if half is None else (half.astype(np.int64) << 7) + 64
    field = np.minimum(bits >> 23, 254 if form == 0 else 127)
    return (field | np.signbit(u).astype(np.int64) << (8 if form == 0 else 7)).astype(np.uint16)


def natural_values(codes: np.ndarray, form: int) -> np.ndarray:
    """Return the powers of two that codes of `natural_codes` stand for, float32; field 0 is 0."""
    code = codes.astype(np.uint32)
    sign = code >> (8 if form == 0 else 7) << 31
    field = np.minimum(code & 0xFF, 254) if form == 0 else code & 0x7F
    if form == 1:
        field = np.where(field > 0, field + 18, 0).astype(np.uint32)
    return (sign | field << 23).astype(np.uint32).view(np.float32)


def dense_bits(u: np.ndarray, dtype: str, half: np.ndarray | None = None) -> np.ndarray:
    """Return the bits of `u` in a storage type, (n,) uint32 or uint16.

    To the nearest number, ties to even, or stochastically; what is too large becomes the largest
    finite number.
    """
    u = np.ascontiguousarray(u, np.float32)
    bits = u.view(np.uint32).astype(np.int64)
    if dtype == "float32":
        return u.view(np.uint32).copy()
    sign, body = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    if dtype == "bfloat16":
        body = body + (0x7FFF + (body >> 16 & 1) if half is None else half.astype(np.int64))
        return (sign | np.minimum(body >> 16, 0x7F7F)).astype(np.uint16)
    if half is None:
        with np.errstate(over="ignore"):
            near = np.abs(u).astype(np.float16).view(np.uint16).astype(np.int64)
    else:  # 13 bits do not fit; among the subnormals whole steps are 2**-24
        up = half.astype(np.int64) >> 3
        step = np.abs(u) * np.float32(2.0**24) + up.astype(np.float32) * np.float32(2.0**-13)
        with np.errstate(invalid="ignore"):
            small = np.floor(np.minimum(step, np.float32(2.0**11))).astype(np.int64)
        near = np.where(body < 0x38800000, small, (body + up - 0x38000000) >> 13)
    return (sign | np.minimum(near, 0x7BFF)).astype(np.uint16)


def dense_values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return the numbers of `dense_bits` as float32."""
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- whole updates -------------------------------------------------------------------------------


def encode_update(u: np.ndarray, s: Settings, half: np.ndarray | None) -> tuple[bytes, bytes]:
    """Return scales and codes of a whole update (:mod:`flcore.reference.buckets`)."""
    if s.codec == "dense":
        return b"", dense_bits(u, s.values, half).astype(f"<u{s.bits // 8}").tobytes()
    if s.codec == "natural":
        return b"", buckets.pack(natural_codes(u, s.form, half), s.bits, s.bucket)
    name, scales, codes = NAMES[s.form], b"", np.empty(u.size, np.uint8)
    for part, shape in buckets.over_buckets(u.size, s.bucket):
        rows = u[part].reshape(shape)
        if name == "nf4":
            scale = max_scale(rows)
        else:
            scale = block_scale(rows, name) if s.values == "e8m0" else power_scale(rows, name)
        random = None if half is None else half[part].reshape(shape)
        codes[part] = cast(rows, scale_values(scale), name, random).reshape(-1)
        scales += scale.astype("u1" if s.values == "e8m0" else "<f4").tobytes()
    return scales, buckets.pack(codes, s.bits, s.bucket)


def decode_update(header: Header, body: BucketBody) -> np.ndarray:
    """Return what a packet stands for, float32 (d,)."""
    h = header
    if h.codec == "dense":
        raw = body.codes.view(f"<u{h.bits // 8}")
        return dense_values(raw.astype(raw.dtype.newbyteorder("=")), h.value_dtype)
    codes = buckets.unpack(body.codes, h.numel, h.bits, h.tile)
    if h.codec == "natural":
        return natural_values(codes, h.form)
    scales = np.repeat(scale_values(body.scales), h.tile, axis=0)[: h.numel, 0]
    return code_values(NAMES[h.form])[codes] * scales

"""Bucket packets: coordinates cut into buckets, for each some scales and one code a coordinate.

One shape for the codecs dense, sign, uniform, affine, natural, minifloat, ternary and rotated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore.reference.wire_frame import (
    CODES,
    MAX_BUCKET,
    SCALES,
    VALUE_BYTES,
    VALUE_CODES,
    Header,
    Parts,
    Rules,
    TensorEntry,
    all_finite,
    decode_values,
    need,
)

__all__ = [
    "CODEC_NAMES",
    "MINIFLOAT_BITS",
    "RULES",
    "BucketBody",
    "buckets",
    "code_bytes",
    "code_count",
    "scales_per_bucket",
]

CODEC_NAMES = (
    "dense",
    "sign",
    "uniform",
    "affine",
    "natural",
    "minifloat",
    "ternary",
    "rotated",
)
MINIFLOAT_BITS = {1: 8, 2: 8, 3: 6, 4: 6, 5: 4, 6: 8, 7: 4}
"""Bits by form: 1 e4m3, 2 e5m2, 3 e3m2, 4 e2m3, 5 e2m1, 6 int8 (64ths), 7 the codebook nf4."""
MINIFLOAT_EMAX = {1: 8, 2: 15, 3: 4, 4: 2, 5: 2, 6: 0, 7: 0}
MINIFLOAT_LARGEST = {1: 448.0, 2: 57344.0, 3: 28.0, 4: 7.5, 5: 6.0, 6: 127 / 64, 7: 1.0}
LARGEST = 3.402823e38  # a little less than the largest float32


class BucketBody(NamedTuple):
    """Contents of a bucket packet, checked.

    ``scales`` (buckets, scales a bucket): float32, or uint8 exponents of dtype e8m0. ``codes``
    uint8 [bytes], bucket after bucket as on the wire.
    """

    scales: np.ndarray
    codes: np.ndarray
    tensors: tuple[TensorEntry, ...]


def scales_per_bucket(codec: str) -> int:
    """Return how many scales a bucket has."""
    return {"dense": 0, "natural": 0, "affine": 2}.get(codec, 1)


def buckets(header: Header) -> int:
    """Return the number of buckets."""
    return -(-header.numel // header.tile)


def code_count(codec: str, n: int) -> int:
    """Return the codes of a bucket of n coordinates: a rotated block is a power of two."""
    return 1 << (n - 1).bit_length() if codec == "rotated" and n else n


def bucket_bytes(codec: str, form: int, bits: int, n: int) -> int:
    """Return the bytes of the codes of a bucket of n coordinates."""
    if codec == "ternary" and form == 1:
        return -(-n // 5)
    return -(-code_count(codec, n) * bits // 8)


def code_bytes(codec: str, form: int, bits: int, bucket: int, numel: int) -> int:
    """Return the bytes of all codes."""
    whole, rest = divmod(numel, bucket)
    return whole * bucket_bytes(codec, form, bits, bucket) + bucket_bytes(codec, form, bits, rest)


def _dtype_known(h: Header) -> bool:
    if h.codec == "dense":
        return h.value_dtype in ("float32", "float16", "bfloat16")
    if h.codec == "minifloat":
        return h.value_dtype in ("float32", "e8m0")
    if h.codec in ("natural", "rotated"):
        return h.value_dtype == "float32"
    return h.value_dtype in ("float32", "bfloat16")


def _form_known(h: Header) -> bool:
    if h.codec in ("natural", "ternary"):
        return h.form <= 1
    return h.form in MINIFLOAT_BITS if h.codec == "minifloat" else h.form == 0


def _bits_known(h: Header) -> bool:
    known: dict[str, object] = {
        "dense": [8 * VALUE_BYTES[VALUE_CODES[h.value_dtype]]],
        "sign": [1],
        "uniform": range(2, 9),
        "natural": [9 if h.form == 0 else 8],
        "minifloat": [MINIFLOAT_BITS.get(h.form)],
        "ternary": [2],
        "rotated": range(1, 5),
    }
    return h.bits in known.get(h.codec, range(1, 9))  # type: ignore[operator]


def _check_header(h: Header) -> None:
    code = VALUE_CODES[h.value_dtype]
    need(_dtype_known(h), f"value dtype {code} is not one that {h.codec} packets have")
    need(_form_known(h), f"form {h.form} is not one that {h.codec} packets have")
    need(_bits_known(h), f"{h.bits} bits a code are not what this form of {h.codec} packets has")
    need(
        1 <= h.tile <= MAX_BUCKET,
        f"expected buckets of 1 to {MAX_BUCKET} coordinates, got {h.tile}",
    )
    if h.codec == "rotated":
        need(
            h.tile & (h.tile - 1) == 0 and 256 <= h.tile <= 4096,
            f"expected blocks of a power of two from 256 to 4096, got {h.tile}",
        )


def _elements(h: Header) -> dict[int, int]:
    elements = {CODES: 1}
    if scales_per_bucket(h.codec):
        elements[SCALES] = VALUE_BYTES[VALUE_CODES[h.value_dtype]]
    return elements


def _check_lengths(parts: Parts) -> None:
    h = parts.header
    want = code_bytes(h.codec, h.form, h.bits, h.tile, h.numel)
    got = parts.need(CODES, "codes")
    need(got == want, f"section type 2: expected {want} bytes for {h.numel} coordinates, got {got}")
    if per_bucket := scales_per_bucket(h.codec):
        want = per_bucket * buckets(h) * VALUE_BYTES[VALUE_CODES[h.value_dtype]]
        got = parts.need(SCALES, "scales")
        need(
            got == want,
            f"section type 1: expected {want} bytes for {buckets(h)} buckets, got {got}",
        )


def _reach(h: Header) -> float:
    """Return the largest magnitude of a decoded value over the scale, intermediates included."""
    return {
        "uniform": float(1 << max(h.bits - 1, 0)),
        "affine": float((1 << h.bits) - 1),
        "minifloat": MINIFLOAT_LARGEST.get(h.form, 1.0),
        "ternary": 2.0,
        "rotated": 4.0 * h.tile,
    }.get(h.codec, 1.0)


def _check_scales(parts: Parts) -> np.ndarray:
    h = parts.header
    if h.value_dtype == "e8m0":
        exponents = parts.view(SCALES, "u1")
        top = 254 - MINIFLOAT_EMAX[h.form]
        need(bool(np.all(exponents <= top)), f"a scale: expected an exponent up to {top}")
        return exponents.reshape(-1, 1)
    raw = parts.view(SCALES, f"<u{VALUE_BYTES[VALUE_CODES[h.value_dtype]]}")
    scales = decode_values(raw, h.value_dtype).reshape(-1, scales_per_bucket(h.codec))
    units = scales[:, -1].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        most = _reach(h) * units
        if h.codec == "affine":
            most = most + np.abs(scales[:, 0].astype(np.float64))
    plural = "its scales are" if h.codec == "affine" else "its scale is"
    good = ~np.signbit(units) & (most <= LARGEST)
    bad = int(np.argmin(good)) if good.size else 0
    need(bool(good.all()), f"bucket {bad}: {plural} negative, not finite, or too large")
    return scales


def _check_padding(parts: Parts) -> None:
    h = parts.header
    codes = parts.view(CODES, "u1")
    if not h.numel:
        return
    whole = (buckets(h) - 1) * bucket_bytes(h.codec, h.form, h.bits, h.tile)
    last = h.numel - (buckets(h) - 1) * h.tile
    stride = whole // max(buckets(h) - 1, 1) or 1
    for row, n in (
        (codes[:whole].reshape(-1, stride), h.tile),
        (codes[whole:].reshape(1, -1), last),
    ):
        if not row.size:
            continue
        if h.codec == "ternary" and h.form == 1:
            need(bool(np.all(row < 243)), "a byte of five trits is above 242")
            need(
                bool(np.all(row[:, -1] < (243, 3, 9, 27, 81)[n % 5])),
                "a trit after the last coordinate of a bucket is set",
            )
            continue
        used = code_count(h.codec, n) * h.bits % 8
        need(
            used == 0 or not np.any(row[:, -1] >> used),
            "a bit after the last code of a bucket is set",
        )


def _contents(parts: Parts, tensors: tuple[TensorEntry, ...]) -> BucketBody:
    h = parts.header
    codes = parts.view(CODES, "u1")
    if h.codec == "dense":
        raw = parts.view(CODES, f"<u{h.bits // 8}")
        need(all_finite(raw, VALUE_CODES[h.value_dtype]), "a value is not finite")
    none = np.empty((buckets(h), 0), np.float32)
    scales = _check_scales(parts) if scales_per_bucket(h.codec) else none
    if h.codec != "dense":
        _check_padding(parts)
    return BucketBody(scales, codes, tensors)


RULES = Rules(_check_header, _elements, _check_lengths, _contents)

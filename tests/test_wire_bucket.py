"""Bucket packets: golden bytes, the two readers against each other, every check."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from flcore.compression import Packet, PacketError
from flcore.reference import wire, wire_writer
from flcore.reference.wire_bucket import CODEC_NAMES, bucket_bytes, code_bytes, scales_per_bucket
from flcore.reference.wire_frame import VALUE_BYTES, VALUE_CODES
from test_wire import changed, golden, refuse, sealed

SCALES, CODES = 1, 2


def packet(codec, numel, scales=b"", codes=None, *, bits, bucket, form=0, values="float32", **rest):
    """Return a packet of `codec`; codes are zero unless given."""
    if codes is None:
        codes = bytes(code_bytes(codec, form, bits, bucket, numel))
    bodies = [(SCALES, VALUE_BYTES[VALUE_CODES[values]], scales)] if scales else []
    return wire_writer.frame(
        [*bodies, (CODES, 1, codes)],
        codec=codec,
        numel=numel,
        values=values,
        form=form,
        bits=bits,
        tile=bucket,
        **rest,
    )


def f32(*numbers: float) -> bytes:
    return np.array(numbers, "<f4").tobytes()


# Five values of 4 bits in buckets of four: units 0.5 and 2, codes (14, 0, 7, 9), (8).
UNIFORM4 = golden(
    195,
    {
        0: "464c4355 01 00 4000 0300 0000 01000000",
        16: "0500000000000000 8300000000000000 0200000000000000 0300000000000000",
        48: "04000000 01 01 00 04 04000000 6b48698f",
        64: "02000000 00000000",
        72: "0100 0000 04000000 8000000000000000 0800000000000000",
        96: "0200 0000 01000000 c000000000000000 0300000000000000",
        128: "0000003f 00000040",
        192: "0e 97 08",
    },
)


def test_golden_packet():
    data = packet(
        "uniform",
        5,
        f32(0.5, 2),
        bytes.fromhex("0e9708"),
        bits=4,
        bucket=4,
        round=2,
        seed=3,
        epoch=4,
    )
    assert data.hex() == UNIFORM4.hex()
    header, body = wire.parse(data)
    assert (header.codec, header.bits, header.tile, header.form) == ("uniform", 4, 4, 0)
    assert body.scales.tolist() == [[0.5], [2.0]] and body.codes.tolist() == [0x0E, 0x97, 0x08]
    assert Packet.from_bytes(data).header == header


def settings():
    for values in ("float32", "float16", "bfloat16"):
        yield "dense", 0, 8 * VALUE_BYTES[VALUE_CODES[values]], 65536, values
    for bucket in (1, 3, 8, 500, 65536):
        for values in ("float32", "bfloat16"):
            yield "sign", 0, 1, bucket, values
            yield "ternary", 0, 2, bucket, values
            yield "ternary", 1, 2, bucket, values
        for bits in range(1, 9):
            yield "affine", 0, bits, bucket, "float32"
            if bits > 1:
                yield "uniform", 0, bits, bucket, "bfloat16"
        yield "natural", 0, 9, bucket, "float32"
        yield "natural", 1, 8, bucket, "float32"
    for form, bits in {1: 8, 2: 8, 3: 6, 4: 6, 5: 4, 6: 8, 7: 4}.items():
        yield "minifloat", form, bits, 32, "e8m0"
        yield "minifloat", form, bits, 256, "float32"
    for bits in range(1, 5):
        yield "rotated", 0, bits, 1024, "float32"


@pytest.mark.parametrize(("codec", "form", "bits", "bucket", "values"), [*settings()])
def test_both_readers_take_every_form(codec, form, bits, bucket, values):
    size = VALUE_BYTES[VALUE_CODES[values]]
    for numel in (0, 1, 7, bucket, bucket + 1, 2 * bucket + 3):
        if numel > 70_000:
            continue
        count = -(-numel // bucket) * scales_per_bucket(codec)
        data = packet(
            codec, numel, bytes(count * size), bits=bits, bucket=bucket, form=form, values=values
        )
        if scales_per_bucket(codec) and not numel:
            refuse(data, "section type 1 .scales. is missing")
            continue
        if len(data) - 64 > 8 * numel + 4096:
            refuse(data, "at most")
            continue
        header, body = wire.parse(data)
        assert header.numel == Packet.from_bytes(data).k == numel
        assert body.codes.size == code_bytes(codec, form, bits, bucket, numel)
        assert body.scales.shape == (-(-numel // bucket), scales_per_bucket(codec))
        for change in (data + b"\0", data[:-1]):
            refuse(sealed(change), "the header says")


def test_bytes_of_a_bucket():
    assert bucket_bytes("uniform", 0, 4, 500) == 250 and bucket_bytes("uniform", 0, 3, 5) == 2
    assert bucket_bytes("ternary", 1, 2, 11) == 3
    assert bucket_bytes("rotated", 0, 2, 5) == 2  # eight codes
    assert bucket_bytes("rotated", 0, 1, 0) == 0
    assert code_bytes("sign", 0, 1, 3, 7) == 3


@pytest.mark.parametrize(
    ("at", "fmt", "value", "match"),
    [
        (53, "B", 2, "value dtype 2 is not one that uniform packets have"),
        (53, "B", 6, "value dtype: expected 1"),
        (54, "B", 1, "form 1 is not one that uniform packets have"),
        (55, "B", 1, "1 bits a code are not what this form of uniform packets has"),
        (55, "B", 9, "9 bits a code"),
        (55, "B", 5, "section type 2: expected 4 bytes for 5 coordinates, got 3"),
        (56, "I", 0, "expected buckets of 1 to 65536 coordinates, got 0"),
        (56, "I", 65537, "expected buckets of 1 to 65536"),
        (56, "I", 6, "section type 1: expected 4 bytes for 1 buckets, got 8"),
        (8, "H", 2, "4 bits a code are not what this form of sign packets has"),
        (72, "H", 2, "expected elements of 1 bytes, got 4"),
        (72, "H", 4, r"section type 4 is unknown for codec 3 \(uniform\)"),
        (96, "H", 1, "appears twice"),
        (128, "I", 0x7F800000, "bucket 0: its scale is negative, not finite, or too large"),
        (132, "I", 0x7FC00000, "bucket 1: its scale"),
        (128, "I", 0xBF000000, "bucket 0: its scale"),
        (128, "I", 0x80000000, "bucket 0: its scale"),
        (128, "f", 3.402823e38 / 7, "bucket 0: its scale"),
        (194, "B", 0x18, "a bit after"),
    ],
)
def test_each_field_is_checked(at, fmt, value, match):
    refuse(changed(UNIFORM4, at, fmt, value), match)


def test_what_one_codec_alone_checks():
    refuse(packet("affine", 4, f32(3e38, 1e38), bits=1, bucket=8), "its scales are negative")
    refuse(packet("affine", 4, f32(0, -1), bits=1, bucket=8), "its scales are negative")
    assert wire.parse(packet("affine", 4, f32(-3e38, 1e37), bits=1, bucket=8))
    refuse(packet("ternary", 6, f32(1), b"\xf3\0", bits=2, bucket=8, form=1), "above 242")
    refuse(packet("ternary", 6, f32(1), b"\0\3", bits=2, bucket=8, form=1), "a trit after")
    refuse(packet("sign", 3, f32(1), b"\x08", bits=1, bucket=8), "a bit after")
    two = f32(1, 1)
    refuse(packet("sign", 6, two, b"\x08\x00", bits=1, bucket=3), "a bit after")
    refuse(packet("sign", 6, two, b"\x00\x08", bits=1, bucket=3), "a bit after")
    nan = struct.pack("<3e", 1, np.nan, 2)
    refuse(packet("dense", 3, b"", nan, bits=16, bucket=65536, values="float16"), "not finite")
    exponent = packet("minifloat", 4, b"\xff", bits=8, bucket=32, form=1, values="e8m0")
    refuse(exponent, "expected an exponent up to 246")
    refuse(packet("rotated", 4, f32(1e36), bits=1, bucket=1024), "its scale is")
    refuse(packet("rotated", 4, f32(1), bits=1, bucket=1000), "a power of two from 256 to 4096")
    refuse(packet("rotated", 4, f32(1), bits=1, bucket=8192), "a power of two from 256 to 4096")
    assert set(CODEC_NAMES) == set(wire.RULES) - {"sparse", "low_rank", "sketch", "thc"}


def test_every_single_bit_flip_is_refused():
    data = UNIFORM4
    for bit in range(8 * len(data)):
        buffer = bytearray(data)
        buffer[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PacketError):
            Packet.from_bytes(bytes(buffer))

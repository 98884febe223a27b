"""The packet format: golden bytes, the two readers and writers against each other, every check."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest

from flcore import _native
from flcore.compression import EControl, Encoder, Limits, Packet, TopK, peek
from flcore.errors import InvalidInputError, PacketError
from flcore.ops.sparsify import sparsify
from flcore.reference import wire, wire_writer
from support import ROOT, unaligned

G = np.array([4, -3, 2, 1, 0.5], np.float32)


def golden(size: int, parts: dict[int, str]) -> bytes:
    """Return `size` bytes, zero except for the hexadecimal `parts` at their offsets."""
    data = bytearray(size)
    for offset, text in parts.items():
        part = bytes.fromhex(text)
        data[offset : offset + len(part)] = part
    return bytes(data)


def sealed(buffer: bytes | bytearray) -> bytes:
    """Put the right checksum into the header."""
    buffer = bytearray(buffer)
    buffer[60:64] = bytes(4)
    struct.pack_into("<I", buffer, 60, _native.core.crc32c(bytes(buffer)))
    return bytes(buffer)


def changed(data: bytes, at: int, fmt: str, value: int) -> bytes:
    """Overwrite one field of a packet and seal it again."""
    buffer = bytearray(data)
    struct.pack_into("<" + fmt, buffer, at, value)
    return sealed(buffer)


def refuse(data: bytes, match: str, limits: Limits | None = None) -> None:
    """Both readers refuse, in the same words."""
    with pytest.raises(PacketError, match=match):
        Packet.from_bytes(data, limits)
    with pytest.raises(PacketError, match=match):
        wire.parse(data, limits)


# ---- golden packets: these bytes never change within major version 1 ---------------------------

# The packet of docs/packet.md: 4 and -3 at coordinates 0 and 1 of 5.
TILE16_FLOAT32 = golden(
    328,
    {
        0: "464c4355 01 00 4000 0100 0000 01000000",
        16: "0500000000000000 0801000000000000 0700000000000000 0900000000000000",
        48: "00000000 01 01 02 20 00000100 f720df9e",
        64: "03000000 00000000",
        72: "0300 0000 04000000 c000000000000000 0400000000000000",
        96: "0400 0000 02000000 0001000000000000 0400000000000000",
        120: "0500 0000 04000000 4001000000000000 0800000000000000",
        192: "02000000",
        256: "0000 0100",
        320: "00008040 000040c0",
    },
)
# The first packet of EControl: increments (flag 16), values in bfloat16, one bit a coordinate.
BITMASK_BFLOAT16 = golden(
    324,
    {
        0: "464c4355 01 00 4000 0100 0000 11000000",
        16: "0500000000000000 0401000000000000 0100000000000000 0000000000000000",
        48: "00000000 01 03 01 10 00000100 230718f1",
        64: "03000000 00000000",
        72: "0300 0000 04000000 c000000000000000 0400000000000000",
        96: "0400 0000 01000000 0001000000000000 0100000000000000",
        120: "0500 0000 02000000 4001000000000000 0400000000000000",
        192: "02000000",
        256: "03",
        320: "8040 40c0",
    },
)
# Three float16 values and a tensor table of one unnamed tensor of shape (5,).
TILE16_FLOAT16_TABLE = golden(
    448,
    {
        0: "464c4355 01 00 4000 0100 0000 01000000",
        16: "0500000000000000 8001000000000000 0000000000000000 0000000000000000",
        48: "00000000 01 02 02 10 00000100 29391fe7",
        64: "04000000 00000000",
        72: "0300 0000 04000000 c000000000000000 0400000000000000",
        96: "0400 0000 02000000 0001000000000000 0600000000000000",
        120: "0500 0000 02000000 4001000000000000 0600000000000000",
        144: "0900 0000 40000000 8001000000000000 4000000000000000",
        192: "03000000",
        256: "0000 0100 0200",
        320: "0044 00c2 0040",
        384: "25232284e49cf2cb 0000000000000000 0500000000000000 01 00000000000000 05000000",
    },
)


@pytest.mark.parametrize(
    ("codec", "feedback", "table", "fields", "want"),
    [
        (TopK(k=2, index="tile16"), None, False, {"round": 7, "seed": 9}, TILE16_FLOAT32),
        (
            TopK(k=2, values="bfloat16", index="bitmask"),
            EControl(),
            False,
            {"round": 1},
            BITMASK_BFLOAT16,
        ),
        (TopK(k=3, values="float16", index="tile16"), None, True, {}, TILE16_FLOAT16_TABLE),
    ],
)
def test_golden_packets(codec, feedback, table, fields, want):
    packet = Encoder(codec, feedback, like=G, tensor_table=table).encode(G, **fields)
    assert bytes(packet).hex() == want.hex()
    header, body = wire.parse(want)
    assert body.indices.tolist() == list(range(codec.k))
    assert body.values.tolist() == G[: codec.k].tolist()
    assert header == peek(want) == packet.header
    assert body.tensors == (((0xCBF29CE484222325, 0, (5,)),) if table else ())


def test_the_documented_packet_is_this_one():
    text = (ROOT / "docs/packet.md").read_text().split("```")[1]
    parts = {}
    for line in text.strip().splitlines():
        offset, _, rest = line.strip().partition(" ")
        parts[int(offset)] = re.match(r" *((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)", rest)[1]
    assert golden(328, parts) == TILE16_FLOAT32


def test_checksum_is_crc32c():
    # RFC 3720, B.4: 32 bytes of zeros, of ones, and counting up
    for data, want in (
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ):
        assert wire.crc32c(data) == _native.core.crc32c(data) == want


@pytest.mark.parametrize("size", [7, 4095, 3 * 4096 - 1, 3 * 4096, 3 * 4096 + 9, 40_000])
def test_checksum_of_long_and_unaligned_data(size, rng):
    data = rng.integers(0, 256, size, dtype=np.uint8)
    want = wire.crc32c(data.tobytes())
    for offset in (0, 1, 7):
        assert _native.core.crc32c(unaligned(data, offset)) == want
    half = size // 2
    assert _native.core.crc32c(data[half:], _native.core.crc32c(data[:half])) == want


@pytest.mark.parametrize("size", [2**19 - 1, 2**19, 2**20 + 13])
def test_checksum_in_parts(size, rng):
    data = rng.integers(0, 256, size, dtype=np.uint8)
    want = _native.core.crc32c(data, 77)
    for threads in (2, 3, 64, 1000):
        assert _native.core.crc32c(data, 77, threads) == want
    assert _native.core.crc32c(data[1:], _native.core.crc32c(data[:1], 77), 2) == want


def test_header_fields_reach_the_reader():
    packet = sparsify(
        G, k=1, round=2**64 - 1, seed=2**63, epoch=2**32 - 1, flags=4, values="float16"
    )
    header = peek(packet)
    assert (header.round, header.seed, header.epoch) == (2**64 - 1, 2**63, 2**32 - 1)
    assert (header.codec, header.numel, header.nbytes) == ("sparse", 5, packet.size)
    assert (header.source_dtype, header.value_dtype, header.bits) == ("float32", "float16", 16)
    assert (header.index, header.tile, header.flags) == ("tile16", 65536, 1 | 4)
    assert not header.nonfinite and not header.increment


# ---- both readers agree, also at odd addresses -------------------------------------------------


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 4097, 65535, 65536, 65537, 131_073])
@pytest.mark.parametrize("index", ["tile16", "bitmask"])
def test_round_trip_of_arbitrary_supports(numel, index, rng):
    for k in sorted({0, min(numel, 1), numel // 3, numel}):
        kept = np.sort(rng.choice(numel, k, replace=False))
        values = rng.standard_normal(k).astype(np.float32)
        data = wire_writer.build(
            kept, values.view(np.uint32), numel=numel, values="float32", index=index
        )
        assert len(data) == wire_writer.packet_nbytes(numel, k, index, "float32")
        _, body = wire.parse(data)
        assert np.array_equal(body.indices, kept) and np.array_equal(body.values, values)
        for offset in (0, 1):
            packet = Packet.from_bytes(unaligned(np.frombuffer(data, np.uint8), offset))
            assert packet.k == k and packet.header.numel == numel


def test_bits_per_kept_entry(rng):
    """16 bits of index an entry, 32.2 bits in all with 16-bit values at 1 %."""
    packet = sparsify(rng.standard_normal(10**6), k=10_000, values="bfloat16")
    assert 8 * packet.size / 10_000 <= 32.6  # d = 10^6: the 192-byte frame and tile counts show
    nbytes = wire_writer.packet_nbytes(10**7, 10**5, "tile16", "bfloat16")
    assert 8 * nbytes / 10**5 <= 32.2


def test_private_sections_are_skipped():
    data = bytearray(TILE16_FLOAT32)
    struct.pack_into("<I", data, 64, 4)
    entry = struct.pack("<HHIQQ", 0x8001, 0xFFFF, 7, 384, 5)
    data[144:168] = entry
    data += bytes(384 - len(data)) + b"hello"
    struct.pack_into("<Q", data, 24, len(data) - 64)
    packet = Packet.from_bytes(sealed(data))
    assert packet.k == 2 and wire.parse(sealed(data))[1].indices.tolist() == [0, 1]


def test_packets_without_checksum_are_read():
    data = bytearray(TILE16_FLOAT32)
    struct.pack_into("<I", data, 12, 0)
    struct.pack_into("<I", data, 60, 0)
    assert Packet.from_bytes(bytes(data)).k == wire.parse(bytes(data))[1].indices.size == 2


# ---- every check -------------------------------------------------------------------------------


def test_every_single_bit_flip_is_refused():
    for data in (TILE16_FLOAT32, BITMASK_BFLOAT16):
        for bit in range(8 * len(data)):
            buffer = bytearray(data)
            buffer[bit // 8] ^= 1 << bit % 8
            with pytest.raises(PacketError):
                Packet.from_bytes(bytes(buffer))


def test_every_truncation_is_refused():
    for size in range(len(TILE16_FLOAT32)):
        with pytest.raises(PacketError):
            Packet.from_bytes(TILE16_FLOAT32[:size])
    refuse(TILE16_FLOAT32 + b"\0", "the header says 328 bytes, the buffer holds 329")
    refuse(b"", "expected at least 64 bytes, got 0")


@pytest.mark.parametrize(
    ("at", "fmt", "value", "match"),
    [
        (0, "4s", b"FLCX", "magic bytes 'FLCU'"),
        (4, "B", 2, "expected format version 1, got 2"),
        (6, "H", 128, "expected a header of 64 bytes, got 128"),
        (8, "H", 99, r"codec: expected 0 \(dense\), 1 \(sparse\), .* got 99"),
        (10, "H", 1, "expected revision 0"),
        (12, "I", 1 | 8, "unknown for codec 1"),
        (12, "I", 1 | 1 << 31, "unknown for codec 1"),
        (16, "Q", 2**60, "claims 1152921504606846976 coordinates.*max_numel is 4294967296"),
        (16, "Q", 2**64 - 1, "claims 18446744073709551615 coordinates"),
        (16, "Q", 6 * 65536, "section type 3: expected 24 bytes"),
        (24, "Q", 2**60, "claims a payload of 1152921504606846976 bytes.*max_payload_bytes"),
        (24, "Q", 263, "the header says 327 bytes, the buffer holds 328"),
        (52, "B", 4, "source dtype: expected 0"),
        (53, "B", 0, "value dtype: expected 1"),
        (54, "B", 5, "index coding: expected 0"),
        (54, "B", 0, "section type 4 is unknown"),
        (55, "B", 16, "expected 32 bits a value"),
        (56, "I", 4096, "expected tiles of 65536 coordinates, got 4096"),
        (64, "I", 2, "expected offset 128"),
        (64, "I", 2**31, "claims 2147483648 sections, there is room for 10"),
        (68, "I", 1, "reserved word"),
        (72, "H", 6, "section type 6 is unknown"),
        (72, "H", 4, "expected elements of 2 bytes, got 4"),
        (74, "H", 1, "unknown flags"),
        (76, "I", 8, "expected elements of 4 bytes, got 8"),
        (80, "Q", 193, "expected offset 192"),
        (80, "Q", 2**63, "expected offset 192"),
        (88, "Q", 2**64 - 64, "leaves the packet of 328"),
        (104, "Q", 192, "expected offset 256"),
        (136, "Q", 7, "the sections end at byte 327, the packet at 328"),
        (188, "B", 1, "padding before section 0"),
        (255, "B", 1, "padding before section 1"),
        (192, "I", 1, "the tile counts sum to 1, there are 2 values"),
        (192, "I", 6, "a tile count exceeds the coordinates of its tile"),
        (192, "I", 2**32 - 1, "a tile count exceeds"),
        (256, "H", 1, "the indices of a? ?tile.* do not increase"),
        (258, "H", 5, "is not below 5"),
        (320, "I", 0x7F800000, "a value is not finite"),
        (324, "I", 0xFFC00000, "a value is not finite"),
    ],
)
def test_each_field_is_checked(at, fmt, value, match):
    refuse(changed(TILE16_FLOAT32, at, fmt, value), match)


@pytest.mark.parametrize(
    ("at", "fmt", "value", "match"),
    [
        (256, "B", 0b100011, "pad bit"),
        (256, "B", 0b00111, "the bitmask does not match the tile counts"),
        (322, "H", 0x7F80, "a value is not finite"),
    ],
)
def test_bitmask_contents_are_checked(at, fmt, value, match):
    refuse(changed(BITMASK_BFLOAT16, at, fmt, value), match)


@pytest.mark.parametrize(
    ("at", "fmt", "value", "match"),
    [
        (392, "Q", 1, "expected offset 0, got 1"),
        (400, "Q", 4, "its dimensions"),
        (408, "B", 9, "at most 8 dimensions"),
        (409, "B", 1, "its padding is not zero"),
        (416, "I", 6, "its dimensions"),
        (420, "I", 1, "an unused dimension is not zero"),
    ],
)
def test_tensor_table_is_checked(at, fmt, value, match):
    refuse(changed(TILE16_FLOAT16_TABLE, at, fmt, value), match)


def test_tensor_table_must_cover_the_update():
    def packet(shapes):
        table = wire_writer.pack_tensors([str(i) for i in range(len(shapes))], shapes)
        return sparsify(G, k=2, tensors=table).tobytes()

    entries = Packet.from_bytes(packet([(2, 1), (0, 7), (3,)])).tensors
    assert [(t.offset, t.shape) for t in entries] == [(0, (2, 1)), (2, (0, 7)), (2, (3,))]
    assert entries[0].name_hash == wire_writer.name_hash("0")
    refuse(packet([(2,)]), "the tensor table covers 2 of 5 coordinates")
    refuse(packet([(6,)]), "ends beyond coordinate 5")
    with pytest.raises(InvalidInputError, match="at most 8 dimensions"):
        wire_writer.pack_tensors(["x"], [(1,) * 9])


def test_overflowing_tensor_dimensions_are_refused():
    buffer = bytearray(TILE16_FLOAT16_TABLE)
    struct.pack_into("<QB", buffer, 400, 0, 8)  # 2^(32*8) would wrap to 0
    struct.pack_into("<8I", buffer, 416, *[2**31] * 8)
    refuse(sealed(buffer), "its dimensions")


def test_limits_of_the_receiver():
    refuse(TILE16_FLOAT32, "max_numel is 4$", Limits(max_numel=4))
    refuse(TILE16_FLOAT32, "max_payload_bytes is 263$", Limits(max_payload_bytes=263))
    refuse(TILE16_FLOAT16_TABLE, "1 tensors.*max_tensors is 0", Limits(max_tensors=0))
    assert Packet.from_bytes(TILE16_FLOAT32, Limits(5, 264, 0)).k == 2
    for bad in ({"max_numel": -1}, {"max_numel": 2**49}, {"max_tensors": 1.5}):
        with pytest.raises(InvalidInputError, match=next(iter(bad))):
            Limits(**bad)


def test_payload_beyond_eight_bytes_a_coordinate_is_refused():
    data = bytearray(TILE16_FLOAT32)
    struct.pack_into("<I", data, 64, 4)
    data[144:168] = struct.pack("<HHIQQ", 0x8001, 0, 1, 384, 8000)
    data += bytes(384 - len(data) + 8000)
    struct.pack_into("<Q", data, 24, len(data) - 64)
    refuse(sealed(data), "a payload of 8320 bytes for 5 coordinates, at most 4136")


def test_a_packet_that_claims_2_to_the_60_values_allocates_nothing():
    import tracemalloc

    data = changed(TILE16_FLOAT32, 16, "Q", 2**47)
    data = changed(data, 88, "Q", 2**33)  # as many tile counts as that needs
    tracemalloc.start()
    refuse(data, "leaves the packet", Limits(max_numel=2**48))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()

"""Sparse packets in every index coding and value type: bytes, both readers, both ways back."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from flcore import _native, ops
from flcore.aggregation import Median
from flcore.compression import EF14, Encoder, Packet, RandK, Threshold, TopK, decode, decode_add
from flcore.errors import PacketError
from flcore.ops.decode import decode_add_into, decode_into
from flcore.ops.sparsify import sparsify
from flcore.reference import permutation, wire, wire_sparse, wire_writer
from flcore.reference.sparse_values import code_values
from support import outputs_per_level, unaligned

TILE = 65_536
CODINGS = ("tile16", "bitmask", "bitpack", "rice", "seeded")
VALUES = tuple(wire.VALUE_DTYPES)
SIZES = (0, 1, 17, 4097, TILE - 1, TILE, TILE + 1)


def build(rng, numel: int, k: int, index: str, values: str, **fields) -> bytes:
    """A packet of random values at random coordinates, as the reference writes it."""
    kept = np.sort(rng.choice(numel, k, replace=False)) if numel else np.empty(0, np.int64)
    if index == "seeded":
        kept = permutation.coordinates(numel, k, 0, 0)
    coded = code_values(rng.standard_normal(k).astype(np.float32), kept, numel, values)
    return wire_writer.build(
        kept, coded.raw, numel=numel, values=values, index=index, scales=coded.scales, **fields
    )


def sealed(buffer: bytes | bytearray) -> bytes:
    buffer = bytearray(buffer)
    buffer[60:64] = bytes(4)
    struct.pack_into("<I", buffer, 60, _native.core.crc32c(bytes(buffer)))
    return bytes(buffer)


def changed(data: bytes, at: int, fmt: str, value: int) -> bytes:
    buffer = bytearray(data)
    struct.pack_into("<" + fmt, buffer, at, value)
    return sealed(buffer)


def refuse(data: bytes, match: str) -> None:
    """Both readers refuse, in the same words."""
    with pytest.raises(PacketError, match=match):
        Packet.from_bytes(data)
    with pytest.raises(PacketError, match=match):
        wire.parse(data)


# ---- golden packets: these bytes never change within major version 1 ---------------------------

SUPPORT = np.array([3, 5, 6, 20, 21, 60])  # gaps 3, 1, 0, 13, 0, 38
SENT = np.array([1, -2, 0.5, 4, -0.25, 3], np.float32)


def golden(index: str, values: str) -> bytes:
    update = np.zeros(64, np.float32)
    update[SUPPORT] = SENT
    return sparsify(update, k=6, index=index, values=values, round=7, seed=9).tobytes()


def sections(data: bytes) -> dict[int, str]:
    count = struct.unpack_from("<I", data, 64)[0]
    entries = [struct.unpack_from("<HHIQQ", data, 72 + 24 * i) for i in range(count)]
    return {kind: data[at : at + length].hex(" ") for kind, _, _, at, length in entries}


@pytest.mark.parametrize(
    ("index", "values", "form", "want"),
    [
        (
            "rice",
            "bfloat16",
            "03 04 10",
            {3: "06 00 00 00", 4: "04 00 03 31 0a 87 b0", 5: "80 3f 00 c0 00 3f 80 40 80 be 40 40"},
        ),
        (
            "bitpack",
            "float16",
            "02 03 10",
            {3: "06 00 00 00", 4: "06 43 00 34 80 09", 5: "00 3c 00 c0 00 38 00 44 00 b4 00 42"},
        ),
        (  # scale 4/127; codes of 31.75, -63.5, 15.875, 127, -7.9375, 95.25
            "tile16",
            "int8",
            "04 02 08",
            {
                1: "04 02 01 3d",
                3: "06 00 00 00",
                4: "03 00 05 00 06 00 14 00 15 00 3c 00",
                5: "20 c0 10 7f f8 5f",
            },
        ),
    ],
)
def test_golden_sections(index, values, form, want):
    data = golden(index, values)
    assert data[53:56].hex(" ") == form
    assert sections(data) == want
    for variant in ("reference", "cpu"):
        update = np.zeros(64, np.float32)
        update[SUPPORT] = SENT
        other = sparsify(update, k=6, index=index, values=values, round=7, seed=9, variant=variant)
        assert other.tobytes() == data
    body = wire.parse(data)[1]
    assert body.indices.tolist() == SUPPORT.tolist()
    if values != "int8":
        assert body.values.tolist() == SENT.tolist()
    else:
        scale = np.float32(4) / np.float32(127)
        codes = np.float32([32, -64, 16, 127, -8, 95])
        assert body.values.tolist() == (scale * codes).tolist()


def test_golden_seeded_packet():
    """Seed 9 and round 7 choose these six of 64 coordinates, in every version 1."""
    data = ops.randk.randk(np.arange(64, dtype=np.float32), k=6, round=7, seed=9).tobytes()
    assert wire.parse(data)[1].indices.tolist() == GOLDEN_SEEDED
    assert sections(data).keys() == {3, 5} and data[53:56].hex(" ") == "01 00 20"
    assert np.flatnonzero(decode(data)).tolist() == GOLDEN_SEEDED
    # 2 k > d: the first d - k of the permutation are those that are left out
    rest = ops.randk.random_coordinates(64, 58, seed=9, round=7)
    assert np.setdiff1d(np.arange(64), rest).tolist() == GOLDEN_SEEDED


GOLDEN_SEEDED = [7, 8, 15, 29, 46, 56]


# ---- every coding, value type and size ---------------------------------------------------------


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("index", CODINGS)
def test_both_readers_and_both_ways_back(numel, index, rng):
    for i, k in enumerate(sorted({0, min(numel, 1), numel // 50, numel})):
        values = VALUES[i]
        data = build(rng, numel, k, index, values)
        header, body = wire.parse(data)
        assert (header.index, header.value_dtype) == (index, values)
        assert body.indices.size == k and len(data) <= wire_writer.packet_nbytes(
            numel, k, index, values
        )
        for offset in (0, 1):
            packet = Packet.from_bytes(unaligned(np.frombuffer(data, np.uint8), offset))
            assert packet.k == k and packet.header == header
            start = rng.standard_normal(numel).astype(np.float32)
            ours, want = start.copy(), start.copy()
            decode_add_into([packet], [0.3], [ours], variant="cpu")
            decode_add_into([packet], [0.3], [want], variant="reference")
            assert ours.tobytes() == want.tobytes()
            decode_into(packet, [ours], variant="cpu")
            decode_into(packet, [want], variant="reference")
            assert ours.tobytes() == want.tobytes()


@pytest.mark.parametrize("index", ["tile16", "bitmask", "bitpack", "rice", "auto", "smallest"])
@pytest.mark.parametrize("values", VALUES)
def test_encoders_write_what_the_reference_writes(index, values, rng):
    for numel, k in ((1, 1), (300, 30), (TILE + 100, 2000), (TILE + 100, 60_000)):
        g = rng.standard_normal(numel).astype(np.float32)
        ours = sparsify(g, k=k, index=index, values=values, variant="cpu")
        want = sparsify(g, k=k, index=index, values=values, variant="reference")
        assert ours.tobytes() == want.tobytes()
        assert decode(ours.tobytes()).any()


def test_codings_hold_the_same_update(rng):
    g = rng.standard_normal(200_000).astype(np.float32)
    packets = {i: sparsify(g, k=5000, index=i).tobytes() for i in wire.INDEX_CODINGS}
    assert len({decode(p).tobytes() for p in packets.values()}) == 1
    sizes = {i: len(p) for i, p in packets.items()}
    assert sizes["rice"] < sizes["bitpack"] < sizes["tile16"] < sizes["bitmask"]


@pytest.mark.parametrize(
    ("share", "auto", "smallest"),
    [(0.001, "tile16", "rice"), (0.01, "tile16", "rice"), (0.1, "bitmask", "rice"),
     (0.5, "bitmask", "bitmask")],
)  # fmt: skip
def test_choice_of_the_coding(share, auto, smallest, rng):
    """Of a clustered support bitpack can be the smallest; ties go to the simpler coding."""
    g = rng.standard_normal(100_000).astype(np.float32)
    k = int(share * g.size)
    for index, want in (("auto", auto), ("smallest", smallest)):
        packet = Packet.from_bytes(sparsify(g, k=k, index=index))
        assert packet.header.index == want
        sizes = [sparsify(g, k=k, index=i).size for i in wire_sparse.CHOICES[index]]
        assert packet.nbytes == min(sizes)
    runs = np.zeros(TILE, np.float32)
    runs[: 128 * 20] = 1  # widths 0: 20 bytes
    assert Packet.from_bytes(sparsify(runs, k=2560, index="smallest")).header.index == "bitpack"
    one = np.eye(1, 40, 20, dtype=np.float32)[0]
    assert Packet.from_bytes(sparsify(one, k=1, index="smallest")).header.index == "tile16"
    assert Packet.from_bytes(sparsify(one[:16], k=1, index="auto")).header.index == "tile16"


@pytest.mark.parametrize("numel", [10_000_000, 2**22])
def test_bits_per_kept_entry(numel, rng):
    """1 %, 16-bit values, uniform support, whole packets: tile16 <= 32.2, Rice <= 24.3."""
    g = rng.standard_normal(numel, np.float32)
    k = numel // 100
    for index, most in (("tile16", 32.2), ("bitpack", 25.8), ("rice", 24.3)):
        packet = Encoder(TopK(k=k, values="bfloat16", index=index), like=g).encode(g)
        assert 8 * packet.nbytes / k <= most
    seeded = Encoder(RandK(k=k, values="bfloat16"), like=g).encode(g)
    assert 8 * seeded.nbytes / k <= 16.2


def test_codecs_take_every_coding(rng):
    g = rng.standard_normal(3000).astype(np.float32)
    for index in ("smallest", "rice", "bitpack"):
        for codec in (
            TopK(ratio=0.02, index=index, values="int8"),
            TopK(ratio=0.02, index=index, scope="tile", tile=500),
            Threshold(ratio=0.02, index=index),
        ):
            encoder = Encoder(codec, EF14(), like=g)
            total = np.zeros(3000, np.float32)
            for t in range(3):
                total += decode(encoder.encode(g, round=t))
            assert np.allclose(total + encoder.e, 3 * g, atol=1e-5)


def test_rules_read_ranges_of_a_tile(rng):
    """Robust rules ask for a few thousand coordinates at a time, wherever they begin."""
    numel = TILE + 3001
    packets = [
        Packet.from_bytes(build(rng, numel, k, index, values))
        for index in CODINGS
        for values, k in (("int8", numel // 3), ("float32", 50), ("bfloat16", numel - 1))
    ]
    rows = [decode(p) for p in packets]
    assert np.array_equal(Median()(packets), Median()(rows))
    assert np.array_equal(ops.gram(packets).norms, ops.gram(rows).norms)


DIGESTS = """
import hashlib, numpy as np
from flcore.compression import Packet, decode, decode_add
from flcore.ops.randk import randk
from flcore.ops.sparsify import sparsify
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (17, 4097, 70_001):
    g = rng.standard_normal(numel)
    packets = [
        sparsify(g, k=numel // 9, values=v, index=i).tobytes()
        for v in ("float32", "int8") for i in ("bitpack", "rice", "smallest")
    ]
    packets.append(randk(g, k=numel // 7, values="int8").tobytes())
    out = rng.standard_normal(numel)
    digest.update(decode_add(packets, np.linspace(-1, 1, 7), out).tobytes())
    digest.update(b"".join(packets) + decode(packets[1]).tobytes())
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


# ---- every check -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "at", "fmt", "value", "match"),
    [
        ("rice", 54, "B", 3, "indices.*(bits|bytes)"),
        ("rice", 104, "Q", 192, "expected offset 256"),
        ("rice", 112, "Q", 8, "indices: expected 7 bytes, got 8"),
        ("rice", 100, "I", 2, "expected elements of 1 bytes, got 2"),
        ("rice", 256, "H", 3, "indices: expected 6 bytes, got 7"),
        ("rice", 256, "H", 5, "indices: expected 8 bytes, got 7"),
        ("rice", 256, "H", 8193, "at most 8192 bytes"),
        ("rice", 258, "B", 16, "a parameter of at most 15, got 16"),
        ("rice", 258, "B", 2, "indices of tile 0: "),
        ("rice", 262, "B", 0xB1, "indices of tile 0: a pad bit is set"),
        ("rice", 259, "B", 0xFF, "indices of tile 0: "),
        ("bitpack", 256, "B", 17, "a width of at most 16 bits, got 17"),
        ("bitpack", 256, "B", 5, "indices: expected 5 bytes, got 6"),
        ("bitpack", 256, "B", 7, "indices: expected 7 bytes, got 6"),
        ("bitpack", 261, "B", 0x89, "indices of tile 0: a coordinate beyond|a pad bit"),
        ("bitpack", 261, "B", 0x00, "a width larger than its gaps need"),
    ],
)
def test_coded_indices_are_checked(index, at, fmt, value, match):
    values = {"rice": "bfloat16", "bitpack": "float16"}[index]
    refuse(changed(golden(index, values), at, fmt, value), match)


def test_coordinates_beyond_the_last_tile_are_refused():
    for index in ("bitpack", "rice"):
        data = golden(index, "float32")
        assert wire.parse(changed(data, 16, "Q", 61))[1].indices[-1] == 60
        refuse(changed(data, 16, "Q", 60), "indices of tile 0: a coordinate beyond the tile")


@pytest.mark.parametrize(
    ("at", "fmt", "value", "match"),
    [
        (53, "B", 5, "value dtype: expected 1"),
        (55, "B", 16, "expected 8 bits a value"),
        (72, "H", 2, "section type 2 is unknown"),
        (76, "I", 1, "expected elements of 4 bytes, got 1"),
        (192, "f", -1.0, "tile 0: a scale is negative, not finite or too large"),
        (192, "f", -0.0, "tile 0: a scale is negative, not finite or too large"),
        (192, "f", np.nan, "tile 0: a scale is negative, not finite or too large"),
        (192, "f", np.inf, "tile 0: a scale is negative, not finite or too large"),
        (192, "f", 2.7e36, "tile 0: a scale is negative, not finite or too large"),
        (384, "B", 0x80, "a value is -128, which is not used"),
        (389, "B", 0x80, "a value is -128, which is not used"),
    ],
)
def test_int8_values_are_checked(at, fmt, value, match):
    refuse(changed(golden("tile16", "int8"), at, fmt, value), match)


def test_scales_belong_to_int8_packets_alone():
    data = bytearray(golden("tile16", "float32"))
    data[72:74] = struct.pack("<H", 1)  # counts become scales
    refuse(sealed(data), "section type 1 is unknown")
    eight = bytearray(golden("tile16", "int8"))
    eight[72:74] = struct.pack("<H", 0x8001)  # scales become private
    refuse(sealed(eight), r"section type 1 \(scales\) is missing")


def test_seeded_packets_are_checked():
    g = np.arange(1, TILE + 101, dtype=np.float32)
    data = ops.randk.randk(g, k=600, seed=3).tobytes()
    assert Packet.from_bytes(changed(data, 12, "I", 1 | 4)).k == 600
    at = struct.unpack_from("<Q", data, 80)[0]
    counts = struct.unpack_from("<2I", data, at)
    # another seed or round chooses other coordinates, of which other tiles hold others
    assert counts[1] > 0
    moved = bytearray(data)
    struct.pack_into("<2I", moved, at, counts[0] - 1, counts[1] + 1)
    refuse(sealed(moved), "the tile counts are not those that the seed gives")
    refuse(changed(data, 40, "Q", 4), "the tile counts are not those that the seed gives")
    refuse(changed(data, 54, "B", 2), r"section type 4 \(indices\) is missing")
    indices = golden("tile16", "float32")
    refuse(changed(indices, 54, "B", 0), "section type 4 is unknown")


@pytest.mark.parametrize("index", CODINGS)
def test_every_single_bit_flip_is_refused(index, rng):
    data = build(rng, 300, 9, index, "int8")
    for bit in range(8 * len(data)):
        buffer = bytearray(data)
        buffer[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PacketError):
            Packet.from_bytes(bytes(buffer))


@pytest.mark.parametrize("index", CODINGS)
def test_readers_agree_about_contents_changed_and_sealed(index, rng):
    accepted = 0
    for case in range(300):
        numel = int(rng.integers(1, 400)) if case % 4 else TILE + int(rng.integers(1, 50))
        k = int(rng.integers(0, min(numel, 60) + 1))
        data = bytearray(build(rng, numel, k, index, VALUES[case % 4]))
        low = 64 if case % 2 else 8
        for _ in range(int(rng.integers(1, 3))):
            data[rng.integers(low, len(data))] ^= 1 << int(rng.integers(8))
        results = []
        for parse in (lambda d: Packet.from_bytes(d).body(), lambda d: wire.parse(d)[1]):
            try:
                body = parse(sealed(data))
                results.append((body.indices.tobytes(), body.values.tobytes()))
                accepted += 1
            except PacketError:
                results.append(None)
        assert results[0] == results[1], f"case {case}"
        if results[0] is not None:
            out = np.zeros(wire.read_header(sealed(data)).numel, np.float32)
            decode_add([sealed(data)], [1.0], out)
            assert np.array_equal(out[body.indices], body.values + np.float32(0))
    assert accepted > 20

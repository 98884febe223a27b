"""THC packets: every variant's bytes, levels and threads, and what readers and ops refuse."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore._state import State
from flcore.compression import (
    EF14,
    THC,
    Encoder,
    Packet,
    PacketError,
    decode,
    decode_sum,
    thc_sum,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.decode import ParsedPacket
from flcore.ops.decode import decode as decode_packet
from flcore.ops.thc import block_norms, thc, thc_mean
from flcore.reference import wire, wire_writer
from flcore.reference.rng import random_bits
from support import outputs_per_level
from test_thc import CODECS, TABLE
from test_wire import golden

SIZES = (1, 2, 3, 5, 255, 256, 257, 700, 1024, 1025, 5001)


# Five values with 4 bits, filled up to eight: clip 2 and a norm of 8, the table, eight codes.
GOLDEN = golden(
    324,
    {
        0: "464c4355 01 00 4000 0b00 0000 01000000",
        16: "0500000000000000 0401000000000000 0300000000000000 0700000000000000",
        48: "02000000 01 01 00 04 00010000 6dd99954",
        64: "03000000 00000000",
        72: "0a00 0000 04000000 c000000000000000 0800000000000000",
        96: "0800 0000 02000000 0001000000000000 2000000000000000",
        120: "0200 0000 01000000 4001000000000000 0400000000000000",
        192: "00000040 00000041",
        256: "0000 0300 0500 0700 0900 0b00 0d00 0e00 1000 1100 1300 1500 1700 1900 1b00 1e00",
        320: "58 25 58 37",
    },
)


def test_golden_packet():
    x = np.array([4, -3, 2, -1, 0.5], np.float32)
    for variant in ("cpu", "reference"):
        p = thc(
            x, norms=[8.0], table=TABLE, clip=2.0, block=256, seed=7, round=3, client=1, epoch=2,
            variant=variant,
        )  # fmt: skip
        assert p.tobytes() == GOLDEN
    # decoded from the words of docs/packet.md alone
    y = [2 * TABLE[GOLDEN[320 + j // 2] >> 4 * (j % 2) & 15] - 30 for j in range(8)]
    word = int(random_bits(1, 7, round=3, tensor=0x52)[0])
    for i in range(5):
        total = sum((-1) ** bin(i & j).count("1") * y[j] for j in range(8))
        value = total * 2.0 * 8.0 / (30 * 8) * (-1 if word >> i & 1 else 1)
        assert decode(Packet.from_bytes(GOLDEN))[i] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("numel", SIZES)
def test_equals_the_reference(numel, rng):
    for i, codec in enumerate(CODECS):
        g = (rng.standard_normal(numel) * 10.0 ** rng.integers(-30, 30)).astype(np.float32)
        results = []
        for variant in ("cpu", "reference"):
            start = np.random.default_rng(i)
            e, h = ((start.standard_normal(numel) * np.abs(g).max()).astype("f4") for _ in "eh")
            state = State(e=e, h=h, a=0.5, b=0.9)
            if i % 2:
                state.spare = {"e": np.empty_like(e), "h": np.empty_like(h)}
            norms = block_norms(g, block=256, state=state, variant=variant)
            if codec.norms == "all":
                norms = np.sqrt(np.square(norms, dtype=np.float64).sum(keepdims=True))
            p = thc(
                g, norms=norms, table=codec.table, clip=codec.clip_at, bits=codec.bits, block=256,
                state=state, client=2**32 + i, seed=2**63 + 9, round=2**33 + 1, variant=variant,
            )  # fmt: skip
            sums, total = thc_sum([p, p, p], [1, 2, 5])
            options = {"numel": numel, "block": 256, "bits": codec.bits, "norms": norms}
            mean = thc_mean(
                sums, total, table=codec.table, clip=codec.clip_at, seed=3, variant=variant,
                **options,
            )  # fmt: skip
            d = decode_packet(ParsedPacket(p.copy()), variant=variant)
            parts = (norms, p, state.e, state.h, sums, mean, d)
            results.append([x.tobytes() for x in parts])
        assert results[0] == results[1], codec


DIGESTS = """
import hashlib, numpy as np
from flcore.compression import EControl, Encoder, THC, decode, decode_sum, thc_sum
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (1, 17, 300, 1025, 66_001):
    for codec in (THC(), THC(bits=2, block=256, norms="all"), THC(granularity=255, block=4096)):
        g = [rng.standard_normal(numel).astype(np.float32), rng.standard_normal(5)]
        encoder = Encoder(codec, EControl(), like=g, client=7)
        for t in range(3):
            p = encoder.encode(g, round=t, norm=encoder.norm(g))
            sums, total = thc_sum([p] * 11)
            for x in (encoder.e, encoder.h, decode(p), sums, decode_sum(sums, total, p)):
                digest.update(x.tobytes())
            digest.update(bytes(p))
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes(rng):
    g = rng.standard_normal(200_001).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        encoder = Encoder(THC(), EF14(), like=g)
        norms = encoder.norm(g)
        p = encoder.encode(g, norm=norms)
        d = decode_sum(*thc_sum([p, p]), p)
        results.append((norms.tobytes(), bytes(p), encoder.e.tobytes(), d.tobytes()))
    assert results[0] == results[1] == results[2]


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "bits: expected 2 or 4"),
        ({"granularity": 14}, "granularity: expected an integer from 15 to 255"),
        ({"granularity": 256}, "granularity"),
        ({"granularity": 30.0}, "granularity"),
        ({"clip": 0}, "clip: expected a share"),
        ({"clip": 0.6}, "clip"),
        ({"block": 100}, "block"),
        ({"norms": "layer"}, "norms: expected block or all"),
    ],
)
def test_settings_that_cannot_be_used(options, words):
    with pytest.raises(InvalidInputError, match=words):
        THC(**options)


def test_settings_round_trip():
    codec = THC(bits=2, granularity=12, clip=0.1, block=256, norms="all")
    assert THC.from_dict(codec.to_dict()) == codec and codec.shared_seed
    assert [THC().eta(9), codec.eta(9)] == [0.5, 0.3]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"norms": [1.0, 2.0]}, InvalidInputError, "norms: expected one, or 3"),
        ({"norms": [-1.0]}, InvalidInputError, "norms: expected numbers from 0"),
        ({"norms": [np.nan]}, InvalidInputError, "norms"),
        ({"norms": [2.0**121]}, InvalidInputError, "norms"),
        ({"norms": ["a"]}, DTypeError, "norms: expected numbers"),
        ({"clip": 17.0}, InvalidInputError, "clip"),
        ({"clip": 0.0}, InvalidInputError, "clip"),
        ({"table": range(1, 17)}, InvalidInputError, "table"),
        ({"table": [0, *range(2, 17)]}, InvalidInputError, "mirror image"),
        ({"table": range(4)}, InvalidInputError, "table: expected 16"),
        ({"bits": 8}, InvalidInputError, "bits"),
        ({"block": 64}, InvalidInputError, "block"),
        ({"seed": -1}, InvalidInputError, "seed"),
    ],
)
def test_op_refuses_what_no_reader_takes(options, error, words):
    given = {"norms": [1.0], "table": TABLE, "clip": 2.0, "block": 1024, **options}
    with pytest.raises(error, match=words):
        thc(np.ones(2100, np.float32), **given)


def test_non_finite_updates_change_nothing(rng):
    g = rng.standard_normal(3000).astype(np.float32)
    g[2999] = np.inf
    state = State(e=rng.standard_normal(3000).astype(np.float32))
    before = state.e.copy()
    with pytest.raises(NonFiniteError):
        thc(g, norms=[1.0], table=TABLE, clip=2.0, state=state)
    with pytest.raises(NonFiniteError):
        block_norms(g, block=256)
    with pytest.raises(NonFiniteError, match="norm is above"):
        block_norms(np.full(300, 1e38, np.float32), block=256)
    assert np.array_equal(state.e, before)


def test_readers_refuse_broken_packets(rng):
    g = rng.standard_normal(601).astype(np.float32)
    numbers = np.array([2.0, 30.0, 30.0, 20.0], "<f4")
    table = np.array(TABLE, "<u2")
    good = {10: numbers.tobytes(), 8: table.tobytes(), 2: bytes(320)}
    header = {"numel": 601, "values": "float32", "form": 0, "bits": 4, "tile": 256}

    def packet(sections=None, **fields) -> bytes:
        found = {**good, **(sections or {})}
        bodies = [(k, {10: 4, 8: 2, 2: 1}[k], found[k]) for k in (10, 8, 2)]
        return wire_writer.frame(bodies, codec="thc", **{**header, **fields})

    assert Packet.from_bytes(packet()).header.codec == "thc" and g.size == 601
    one = np.array([2.0, 30.0], "<f4").tobytes()
    assert not np.isnan(decode(packet({10: one}, form=1))).any()

    def numbers_with(at, value):
        x = numbers.copy()
        x[at] = value
        return {10: x.tobytes()}

    def table_with(at, value):
        x = table.copy()
        x[at] = value
        return {8: x.tobytes()}

    broken = [
        packet(form=2),
        packet(bits=3),
        packet(tile=128),
        packet(tile=300),
        packet(values="bfloat16"),
        packet(form=1),
        packet({10: numbers.tobytes()[:-4]}),
        packet({8: table.tobytes() + b"00"}),
        packet({2: bytes(319)}),
        packet({2: bytes(321)}),
        packet(numbers_with(0, np.nan)),
        packet(numbers_with(0, 17)),
        packet(numbers_with(0, 0)),
        packet(numbers_with(0, -2)),
        packet(numbers_with(1, np.nan)),
        packet(numbers_with(2, np.inf)),
        packet(numbers_with(3, -1)),
        packet(numbers_with(3, -0.0)),
        packet(numbers_with(3, 2e36)),
        packet(table_with(0, 1)),
        packet(table_with(15, 31)),
        packet(table_with(15, 256)),
        packet(table_with(3, 5)),
        packet(table_with(3, 8)),
    ]
    for i, data in enumerate(broken):
        for read in (lambda x: Packet.from_bytes(x), wire.parse):
            with pytest.raises(PacketError):
                read(data)
                raise AssertionError(f"broken packet {i} was read")
    last = wire_writer.frame(
        [(10, 4, one), (8, 2, table.tobytes()), (2, 1, b"\x10")],
        codec="thc", **{**header, "numel": 1},
    )  # fmt: skip
    for read in (Packet.from_bytes, wire.parse):
        with pytest.raises(PacketError, match="after the last code"):
            read(last)

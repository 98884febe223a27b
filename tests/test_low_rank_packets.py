"""Low-rank packets: what they decode to, and packets that lie."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.compression import Packet, PacketError, decode, decode_add
from flcore.ops import low_rank as ops
from flcore.reference import decode as reference_decode
from flcore.reference import wire, wire_writer
from flcore.reference.low_rank import Plan
from support import unaligned

SHAPES = [(70, 1500), (5,), (130, 40), (3, 0), (33, 7, 3), (1, 9000), ()]
RANKS = [3, 0, 2, 0, 7, 0, 0]


def table(shapes) -> bytes:
    return wire_writer.pack_tensors([""] * len(shapes), list(shapes))


# ---- decoding, and packets that lie --------------------------------------------------------------


@pytest.mark.parametrize("values", ops.VALUES)
def test_decoding_gives_the_product(values, rng):
    update = [np.asarray(rng.standard_normal(s), np.float32) for s in SHAPES]
    plan = Plan.of(SHAPES, RANKS)
    start = ops.revive(plan, None, 5, 0)
    packet, _ = ops.low_rank(update, plan=plan, start=start, values=values, tensors=table(SHAPES))
    data = packet.tobytes()
    want = reference_decode.dense(*wire.parse(data))
    assert decode(data).tobytes() == want.tobytes()
    cut = [unaligned(np.zeros(n, t)) for n, t in ((70_001, np.float32), (5, np.float64))]
    cut.append(np.zeros(want.size - 70_006, np.float32))
    decode_add([data, data], [0.5, -2.0], cut)
    expected = [np.zeros(x.size, x.dtype) for x in cut]
    reference_decode.add([wire.parse(data)] * 2, [0.5, -2.0], expected)
    assert [x.tobytes() for x in cut] == [x.tobytes() for x in expected]


def packet_of(shapes, ranks, tile=4, change=None, **fields) -> bytes:
    plan = Plan.of(shapes, ranks)
    bodies = {3: np.array(ranks, "<u4").tobytes()}
    bodies |= {
        k: np.ones(n, "<f4").tobytes() for k, n in ((5, plan.values), (6, plan.p), (7, plan.q))
    }
    bodies |= change or {}
    settings = {"numel": sum(plan.numel), "values": "float32", "form": 0, "bits": 32} | fields
    settings.setdefault("tensors", table(shapes))
    return wire_writer.frame(
        [(k, 4, b) for k, b in bodies.items() if b is not None],
        codec="low_rank", tile=tile, **settings,
    )  # fmt: skip


GOOD: dict = {"shapes": [(6, 10), (3,), (2, 5)], "ranks": [2, 0, 0]}
HUGE = np.full(12, 1e30, "<f4").tobytes()
LIES = {
    "rank above the header's": {"tile": 1},
    "rank above a side": {"ranks": [7, 0, 0], "tile": 8, "change": {3: b"\7" + bytes(11)}},
    "rank of a vector": {"change": {3: b"\2\0\0\0\1" + bytes(7)}},
    "rank not given": {"change": {3: bytes(8)}},
    "rank too many": {"change": {3: bytes(16)}},
    "no table": {"tensors": b""},
    "no ranks": {"change": {3: None}},
    "no P": {"change": {6: None}},
    "P too short": {"change": {6: bytes(44)}},
    "Q too long": {"change": {7: bytes(84)}},
    "values too long": {"change": {5: bytes(56)}},
    "NaN in P": {"change": {6: bytes(44) + b"\0\0\xc0\x7f"}},
    "infinity in the values": {"change": {5: bytes(48) + b"\0\0\x80\x7f"}},
    "product overflows": {"change": {6: HUGE, 7: np.full(20, 1e9, "<f4").tobytes()}},
    "rank 0 in the header": {"tile": 0},
    "rank 33 in the header": {"tile": 33},
    "form": {"form": 1},
    "bits": {"bits": 16},
    "float16": {"values": "float16", "bits": 16},
    "unknown section": {"change": {2: b""}},
    "table of other coordinates": {"numel": 74},
}


@pytest.mark.parametrize("lie", LIES)
def test_both_readers_refuse(lie):
    good = packet_of(**GOOD)
    assert wire.parse(good)[1].ranks.tolist() == [2, 0, 0]
    assert Packet.from_bytes(good).header.tile == 4
    arguments = {**GOOD, **LIES[lie]}
    data = packet_of(**arguments)
    with pytest.raises(PacketError):
        wire.parse(data)
    with pytest.raises(PacketError):
        Packet.from_bytes(data)


def test_largest_product_is_accepted_and_finite():
    top = {6: np.full(12, 1.3e19, "<f4").tobytes(), 7: np.full(20, 1.3e19, "<f4").tobytes()}
    data = packet_of(**GOOD, change=top)
    assert np.isfinite(decode(data)).all() and wire.parse(data)

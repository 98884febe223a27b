"""Packets from streams, in pieces, and as arrays of other libraries."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from flcore.compression import Encoder, Limits, Packet, PacketReader, RandK, Sign, TopK, split
from flcore.errors import DTypeError, InvalidInputError, PacketError

G = np.random.default_rng(3).standard_normal(3000).astype(np.float32)
PACKETS = {
    "topk": Encoder(TopK(k=40), like=G).encode(G, round=1),
    "rice": Encoder(TopK(k=40, index="rice", values="int8"), like=G).encode(G, round=1),
    "randk": Encoder(RandK(k=40), like=G).encode(G, round=1),
    "sign": Encoder(Sign(), like=G).encode(G, round=1),
    "empty": Encoder(TopK(k=1), like=np.empty(0, np.float32)).encode(np.empty(0, np.float32)),
}


def chunks(data: bytes, sizes) -> list[bytes]:
    """Cut `data` into pieces of these sizes and the rest."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [data[a:b] for a, b in zip(ends, [*ends[1:], len(data)], strict=True)]


@pytest.mark.parametrize("name", PACKETS)
def test_any_cut_gives_the_packet(name, rng):
    data = bytes(PACKETS[name])
    cuts = [[], [1] * len(data), [63], [64], [65], [0, 64, 0], [len(data) - 1], [len(data)]]
    cuts += [rng.integers(0, 90, 30).tolist() for _ in range(10)]
    for sizes in cuts:
        reader = PacketReader()
        for chunk in chunks(data, sizes):
            assert reader.feed(chunk) is None
        assert reader.done and reader.missing == 0 and reader.received == len(data)
        assert reader.packet() == PACKETS[name] and reader.packet() is reader.packet()


@pytest.mark.parametrize(
    "kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)]
)
def test_kinds_of_chunks(kind):
    data = bytes(PACKETS["topk"])
    reader = PacketReader()
    reader.feed(kind(data[:100]))
    reader.feed(kind(data[100:]))
    assert bytes(reader.packet()) == data


def test_chunks_may_be_reused():
    """Bytes are copied: a transport can write its next message into the same buffer."""
    data, buffer, reader = bytes(PACKETS["topk"]), bytearray(50), PacketReader()
    for at in range(0, len(data), 50):
        piece = data[at : at + 50]
        buffer[: len(piece)] = piece
        reader.feed(memoryview(buffer)[: len(piece)])
    assert bytes(reader.packet()) == data


def test_what_is_known_on_the_way():
    data, reader = bytes(PACKETS["topk"]), PacketReader()
    assert (reader.header, reader.missing, reader.done) == (None, 64, False)
    with pytest.raises(PacketError, match="0 of 64 bytes of the header have come"):
        reader.packet()
    reader.feed(data[:63])
    assert (reader.header, reader.missing) == (None, 1)
    reader.feed(data[63:64])
    assert reader.header == PACKETS["topk"].header and reader.missing == len(data) - 64
    with pytest.raises(PacketError, match=f"64 of {len(data)} bytes of the packet have come"):
        reader.packet()
    reader.feed(data[64:])
    assert reader.done


# ---- streams of several packets ----------------------------------------------------------------


def test_packets_behind_one_another(rng):
    want = [PACKETS[name] for name in ("topk", "empty", "rice", "sign")]
    stream = b"".join(bytes(p) for p in want)
    for sizes in ([], [100] * 5, rng.integers(1, 300, 12).tolist()):
        got, reader = [], PacketReader()
        for chunk in chunks(stream, sizes):
            rest = reader.feed(chunk, rest=True)
            while reader.done:
                got.append(reader.packet())
                reader = PacketReader()
                rest = reader.feed(rest, rest=True)
            assert len(rest) == 0
        assert got == want and reader.received == 0


def test_bytes_behind_the_packet_are_refused():
    data = bytes(PACKETS["topk"])
    for pieces in ([data + b"x"], [data, b"x"], [data[:10], data[10:] + b"xyz"]):
        reader = PacketReader()
        with pytest.raises(PacketError, match=f"bytes follow the {len(data)} of the packet"):
            for piece in pieces:
                reader.feed(piece)
        with pytest.raises(PacketError, match="bytes follow"):
            reader.packet()
        assert not reader.missing
    reader = PacketReader()
    reader.feed(data)
    reader.feed(b"")  # nothing is no surplus
    assert bytes(reader.feed(b"xyz", rest=True)) == b"xyz" and reader.packet() == PACKETS["topk"]


# ---- hostile streams ---------------------------------------------------------------------------


def header(**fields: int) -> bytes:
    data = bytearray(bytes(PACKETS["topk"])[:64])
    for name, value in fields.items():
        struct.pack_into("<Q", data, {"numel": 16, "payload": 24}[name], value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "limits", "match"),
    [
        (b"FLCX" + bytes(60), None, "magic bytes"),
        (bytes(64), None, "magic bytes"),
        (header(payload=2**60), None, "max_payload_bytes is 34359738368"),
        (header(numel=2**60), None, "max_numel is 4294967296"),
        (header(), Limits(max_numel=2999), "max_numel is 2999"),
        (header(), Limits(max_payload_bytes=100), "max_payload_bytes is 100"),
        (header(payload=2**34), None, "a payload of 17179869184 bytes for 3000 coordinates"),
    ],
)
def test_headers_are_checked_before_memory_is_taken(data, limits, match):
    reader = PacketReader(limits)
    tracemalloc.start()
    reader.feed(data[:60])
    with pytest.raises(PacketError, match=match):
        reader.feed(data[60:] + bytes(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    for call in (lambda: reader.feed(b"x"), reader.packet):
        with pytest.raises(PacketError, match=match):
            call()
    assert reader.header is None and not reader.done


def test_memory_is_that_of_the_packet():
    g = np.ones(500_000, np.float32)
    data = bytes(Encoder(TopK(k=200_000), like=g).encode(g))
    pieces = chunks(data, [4096] * 100)
    reader = PacketReader()
    tracemalloc.start()
    for piece in pieces:
        reader.feed(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) <= peak < len(data) + 50_000


def test_contents_are_checked_at_the_end():
    for name, packet in PACKETS.items():
        data = bytearray(bytes(packet))
        data[-1 if name != "empty" else 40] ^= 1
        reader = PacketReader()
        reader.feed(data)
        assert reader.done
        with pytest.raises(PacketError, match="checksum"):
            reader.packet()


@pytest.mark.parametrize("bad", ["text", 3, None, [1, 2], np.zeros(4), np.zeros((4, 4), "u1").T])
def test_chunks_that_are_not_bytes(bad):
    reader = PacketReader()
    reader.feed(bytes(PACKETS["topk"])[:70])
    with pytest.raises(DTypeError, match="chunk: expected"):
        reader.feed(bad)
    reader.feed(bytes(PACKETS["topk"])[70:])
    assert reader.packet() == PACKETS["topk"]


# ---- cutting -----------------------------------------------------------------------------------


def test_split():
    packet = PACKETS["topk"]
    for size in (1, 63, 64, packet.nbytes - 1, packet.nbytes, packet.nbytes + 1, 2**22):
        pieces = list(split(packet, size))
        assert b"".join(pieces) == bytes(packet)
        assert {len(p) for p in pieces[:-1]} <= {size} and 0 < len(pieces[-1]) <= size
        assert all(isinstance(p, memoryview) and p.readonly for p in pieces)
    assert b"".join(split(bytes(packet), 100)) == bytes(packet)
    assert b"".join(split(packet.to_numpy(), 100)) == bytes(packet)
    assert list(split(b"", 5)) == []
    for size in (0, -1, 1.5, True, "4"):
        with pytest.raises(InvalidInputError, match="max_bytes: expected a positive integer"):
            split(packet, size)
    with pytest.raises(DTypeError, match="packet: expected bytes, got str"):
        split("text", 5)


# ---- as arrays of other libraries --------------------------------------------------------------


def test_dlpack_into_numpy():
    packet = PACKETS["topk"]
    array = np.from_dlpack(packet)
    assert array.dtype == np.uint8 and array.tobytes() == bytes(packet)
    assert not np.shares_memory(array, packet.to_numpy())
    assert packet.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="as a copy only"):
        packet.__dlpack__(copy=False)
    with pytest.raises(BufferError, match="lies on the CPU"):
        packet.__dlpack__(dl_device=(2, 0))
    assert packet.__dlpack__(dl_device=(1, 0), copy=True) is not None


def test_torch_tensors_of_a_packet_may_change():
    torch = pytest.importorskip("torch")
    packet = PACKETS["rice"]
    before = bytes(packet)
    for tensor in (torch.from_dlpack(packet), packet.to_torch()):
        assert tensor.dtype == torch.uint8 and tensor.shape == (packet.nbytes,)
        assert Packet.from_bytes(tensor) == packet
        tensor.zero_()
        assert bytes(packet) == before


def test_buffers():
    packet = PACKETS["sign"]
    view = memoryview(packet.to_numpy())
    assert view.readonly and bytes(view) == bytes(packet)
    assert np.shares_memory(np.frombuffer(view, np.uint8), packet.to_numpy())

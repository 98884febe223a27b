"""Encoder, codecs and packets as objects: structures, state, settings, errors."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from flcore.aggregation import Accumulator
from flcore.compression import (
    EF14,
    EControl,
    Encoder,
    Limits,
    Packet,
    PacketError,
    TopK,
    decode,
    peek,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError

G = np.array([4, -3, 2, 1], np.float32)


# ---- updates -----------------------------------------------------------------------------------


def test_structures_give_the_same_packet(rng):
    torch = pytest.importorskip("torch")
    g = rng.standard_normal(600).astype(np.float32)
    parts = [g[:100].reshape(10, 10), g[100:103], g[103:]]
    named = {"a": parts[0], "b": parts[1], "c": parts[2]}
    tensors = [torch.from_numpy(p.copy()) for p in parts]
    want = None
    for update in (g, parts, tuple(parts), named, tensors, torch.from_numpy(g)):
        packet = Encoder(TopK(ratio=0.05), EControl(), like=update).encode(update, round=3)
        want = want or packet
        assert packet == want and hash(packet) == hash(want)
    like_tensors = decode(want, like=tensors)
    assert [t.shape for t in like_tensors] == [t.shape for t in tensors]
    reordered = {name: named[name] for name in ("c", "a", "b")}
    assert Encoder(TopK(ratio=0.05), EControl(), like=named).encode(reordered, round=3) == want


def test_tensor_table_names_the_layers():
    update = {"fc.weight": np.ones((3, 2), np.float32), "fc.bias": np.ones(3, np.float32)}
    packet = Encoder(TopK(k=4), like=update, tensor_table=True).encode(update)
    assert [(t.offset, t.shape) for t in packet.tensors] == [(0, (3, 2)), (6, (3,))]
    assert Encoder(TopK(k=4), like=update).encode(update).tensors == ()


def test_updates_that_do_not_fit():
    like = {"w": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)}
    encoder = Encoder(TopK(k=1), EF14(), like=like)
    for update, error, match in (
        ({"w": np.zeros(4, np.float32)}, InvalidInputError, r"missing \['b'\]"),
        ({"w": np.zeros(5, np.float32), "b": like["b"]}, InvalidInputError, r"update\['w'\].*\(5,"),
        ({"w": np.zeros(4), "b": like["b"]}, DTypeError, "float64"),
        (np.zeros(6, np.float32), DTypeError, "expected a dict"),
    ):
        with pytest.raises(error, match=match):
            encoder.encode(update)
    assert encoder.epoch == 0 and not encoder.e.any()
    with pytest.raises(DTypeError, match=r"like\['n'\].*int64; leave integer buffers out"):
        Encoder(TopK(k=1), like={"n": np.arange(3)})
    with pytest.raises(DTypeError, match="codec: expected a codec such as TopK, got str"):
        Encoder("topk", like=G)
    with pytest.raises(DTypeError, match=r"feedback: expected an error control .*, got str"):
        Encoder(TopK(k=1), "ef14", like=G)
    with pytest.raises(InvalidInputError, match="nonfinite: expected raise or skip"):
        Encoder(TopK(k=1), like=G, nonfinite="exclude")


def test_empty_update():
    encoder = Encoder(TopK(ratio=0.1), EControl(), like=np.empty(0, np.float32))
    packet = Packet.from_bytes(bytes(encoder.encode(np.empty(0, np.float32))))
    assert (packet.k, packet.header.numel, packet.ratio) == (0, 0, 0.0)


def test_values_that_are_not_finite(rng):
    g = rng.standard_normal(70_000).astype(np.float32)
    bad = g.copy()
    bad[66_000] = np.nan
    for policy in ("raise", "skip"):
        encoder = Encoder(TopK(ratio=0.01), EControl(), like=g, nonfinite=policy)
        encoder.encode(g)
        before = {k: np.copy(v) for k, v in encoder.state_dict().items()}
        if policy == "raise":
            with pytest.raises(NonFiniteError, match=r"update: .*nan at flat position 66000"):
                encoder.encode(bad)
        else:
            packet = Packet.from_bytes(bytes(encoder.encode(bad, round=5)))
            assert packet.k == 0 and packet.header.nonfinite and packet.header.increment
            assert packet.header.epoch == 1 and not decode(packet).any()
        after = encoder.state_dict()
        assert all(np.array_equal(before[k], after[k]) for k in before)


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [None, EF14(), EControl()])
def test_a_saved_encoder_goes_on_bit_for_bit(feedback, rng, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    updates = [rng.standard_normal(500).astype(np.float32) for _ in range(6)]
    first = Encoder(TopK(ratio=0.05), feedback, like=updates[0])
    for t in range(3):
        first.encode(updates[t], round=t)
    state = first.state_dict()
    arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
    plain = {k: v for k, v in state.items() if k not in arrays}
    assert all(type(v) in (int, str) for v in plain.values())
    safetensors.save_file(arrays, tmp_path / "state.safetensors")
    loaded = safetensors.load_file(tmp_path / "state.safetensors") | plain
    second = Encoder(TopK(ratio=0.05), feedback, like=updates[0])
    second.load_state_dict(loaded)
    for t in range(3, 6):
        assert first.encode(updates[t], round=t) == second.encode(updates[t], round=t)
    second.load_state_dict(state)  # the saved copy did not move
    assert second.epoch == 3


def test_epoch_counts_the_packets_of_a_state():
    encoder = Encoder(TopK(k=1), EF14(), like=G)
    assert [encoder.encode(G).header.epoch for _ in range(3)] == [0, 1, 2]
    saved = encoder.state_dict()
    encoder.encode(G)
    encoder.load_state_dict(saved)  # an old state: the server, at 4, sees 3
    assert encoder.encode(G).header.epoch == 3
    encoder.reset()  # lost its state: the server sees 0
    assert encoder.encode(G).header.epoch == 0 and encoder.e.tolist() == [0, -3, 2, 1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"feedback": "ef14"}, r"state\['feedback'\]: expected 'econtrol', got 'ef14'"),
        ({"numel": 5}, r"state\['numel'\]: expected 4, got 5"),
        ({"epoch": -1}, r"state\['epoch'\]"),
        ({"e": np.zeros(4)}, r"state\['e'\]: expected float32"),
        ({"h": np.zeros(3, np.float32)}, r"state\['h'\]: expected float32 of shape \(4,\)"),
        ({"h": np.full(4, np.nan, np.float32)}, r"state\['h'\]: expected finite"),
        ({"x": 1}, "state: expected the keys"),
    ],
)
def test_states_that_do_not_fit(change, match):
    encoder = Encoder(TopK(k=1), EControl(), like=G)
    encoder.encode(G)
    before = encoder.state_dict()
    with pytest.raises(InvalidInputError, match=match):
        encoder.load_state_dict(before | change)
    assert all(np.array_equal(v, encoder.state_dict()[k]) for k, v in before.items())


# ---- codecs and packets as objects -------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [TopK(ratio=0.01), TopK(k=7, values="float16"), EF14(0.9), EControl(), EControl(0.1)],
)
def test_settings_are_values(settings):
    assert type(settings).from_dict(settings.to_dict()) == settings
    assert len({settings, type(settings).from_dict(settings.to_dict())}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.k = 3
    with pytest.raises(InvalidInputError, match="has no speed"):
        type(settings).from_dict(settings.to_dict() | {"speed": 1})
    with pytest.raises(InvalidInputError, match="has no name"):  # a class constant is no setting
        type(settings).from_dict(settings.to_dict() | {"name": "other"})
    for key in ("codec", "feedback"):
        with pytest.raises(InvalidInputError, match=r"expected|has no"):
            type(settings).from_dict(settings.to_dict() | {key: "other"})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TopK(), "either ratio or k"),
        (lambda: TopK(ratio=0.1, k=3), "either ratio or k"),
        (lambda: TopK(ratio=0.0), "ratio: expected 0 < ratio <= 1"),
        (lambda: TopK(ratio=float("nan")), "ratio: expected"),
        (lambda: TopK(k=0), "k: expected an integer of at least 1"),
        (lambda: TopK(k=True), "k: expected an integer"),
        (lambda: TopK(k=1, values="int4"), "values: expected one of"),
        (lambda: TopK(k=1, index="zip"), "index: expected auto"),
        (lambda: EF14(decay=1.5), "decay: expected a number from 0 to 1"),
        (lambda: EControl(eta=-1), "eta: expected a number >= 0"),
        (lambda: EControl(eta="best"), "eta: expected a number >= 0"),
    ],
)
def test_settings_that_cannot_be_used(make, match):
    with pytest.raises(InvalidInputError, match=match):
        make()


def test_number_of_entries():
    for ratio, numel, want in (
        (0.01, 1000, 10),
        (0.01, 1001, 11),
        (0.07, 100, 7),  # not 8: 0.07 * 100 is a little more than 7 in binary
        (0.01, 1, 1),
        (0.01, 0, 0),
        (1, 5, 5),
        (1e-9, 10, 1),
    ):
        assert TopK(ratio=ratio).count(numel) == want
    assert TopK(k=10).count(3) == 3


def test_packet_is_bytes_that_cannot_change(rng):
    g = rng.standard_normal(5000).astype(np.float32)
    packet = Encoder(TopK(ratio=0.01), like=g).encode(g, round=2)
    array = packet.to_numpy()
    assert array.dtype == np.uint8 and array.ndim == 1 and array.tobytes() == bytes(packet)
    assert packet.nbytes == array.size == len(bytes(packet)) == packet.header.nbytes
    assert packet.ratio == 4 * 5000 / packet.nbytes > 30
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    buffer = np.array(array)
    received = Packet.from_bytes(buffer)
    buffer[:] = 0  # what was checked is a copy
    assert received == packet == pickle.loads(pickle.dumps(packet))
    assert received != decode(packet).tobytes() and "50 of 5000 float32" in repr(received)
    for kind in (bytearray, memoryview):
        assert Packet.from_bytes(kind(bytes(packet))) == packet
        assert peek(kind(bytes(packet)[:64])) == peek(packet) == packet.header


def test_packet_from_torch_and_wrong_types():
    torch = pytest.importorskip("torch")
    packet = Encoder(TopK(k=1), like=G).encode(G)
    assert Packet.from_bytes(torch.from_numpy(np.array(packet.to_numpy()))) == packet
    for wrong, match in (
        ("text", "got str"),
        (np.zeros(100), "got 1-D array of float64"),
        (np.zeros((10, 10), np.uint8), "got 2-D array of uint8"),
    ):
        with pytest.raises(DTypeError, match=match):
            Packet.from_bytes(wrong)
    with pytest.raises(PacketError, match="max_numel"):
        Packet.from_bytes(bytes(packet), Limits(max_numel=3))
    with pytest.raises(PacketError, match="at least 64 bytes"):
        peek(b"FLCU")


def test_accumulator_adds_packets(rng):
    like = {"w": np.zeros((20, 10), np.float32), "b": np.zeros(10, np.float32)}
    updates = [
        {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in like.items()}
        for _ in range(4)
    ]
    packets = [Encoder(TopK(ratio=0.2), like=like).encode(u) for u in updates]
    for dtype in ("float32", "float64", "reproducible"):
        accumulator = Accumulator(like, dtype=dtype)
        for packet, weight in zip(packets, (1, 2, 3, 4), strict=True):
            accumulator.add(packet, weight)
        mean = accumulator.result()
        want = sum(w * decode(p).astype(float) for p, w in zip(packets, (1, 2, 3, 4), strict=True))
        got = np.concatenate([mean["w"].reshape(-1), mean["b"]])
        assert np.abs(got - want / 10).max() < 1e-6

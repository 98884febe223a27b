"""Random coordinates: a fair subset, the same on both ends, and packets like the reference's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import flcore
from flcore._state import State
from flcore.compression import (
    CODECS,
    EF14,
    EF21,
    EControl,
    Encoder,
    Packet,
    RandK,
    decode,
    decode_add,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.randk import randk, random_coordinates
from flcore.reference import wire
from support import np_dtype, outputs_per_level, unaligned

TILE = 65_536
VALUES = tuple(wire.VALUE_DTYPES)


def buffers(numel: int, names: str, dtype: str = "float32", spares: bool = True) -> State:
    """Return a state with random content; half precision as bits."""
    rng = np.random.default_rng(numel)

    def make(name: str) -> np.ndarray:
        x = rng.standard_normal(numel).astype(np.float32)
        return x if name == "h" or dtype == "float32" else (x.view(np.uint32) >> 16).astype("u2")

    state = State(**{name: make(name) for name in names}, a=0.25, b=1.0, p=0.5, q=0.5)
    if spares:
        state.spare = {n: np.full_like(x, 7) for n, x in state.buffers().items() if n != "h"}
    return state


def run(update, variant, state, **options):
    """Packets of two rounds and the state behind them, as bytes."""
    state = replace(
        state,
        **{name: x.copy() for name, x in state.buffers().items()},
        spare={name: x.copy() for name, x in state.spare.items()},
    )
    packets = [
        randk(update, state=state, round=t, seed=11, variant=variant, **options).tobytes()
        for t in (3, 4)
    ]
    return packets, {name: x.tobytes() for name, x in state.buffers().items()}


def same(update, state, **options):
    ours, want = run(update, "cpu", state, **options), run(update, "reference", state, **options)
    assert ours[0] == want[0], "packets differ"
    assert ours[1] == want[1], "states differ"
    return ours


# ---- packets -----------------------------------------------------------------------------------


def test_packet_holds_values_only(rng):
    g = rng.standard_normal(100_000).astype(np.float32)
    data = randk(g, k=1000, seed=5, round=2)
    packet = Packet.from_bytes(data)
    kept = random_coordinates(100_000, 1000, seed=5, round=2)
    assert packet.header.index == "seeded" and packet.k == 1000
    # frame of two sections, two tile counts, values
    assert data.size == 128 + 64 + 4000
    want = np.zeros(100_000, np.float32)
    want[kept] = g[kept]
    assert np.array_equal(decode(packet), want)
    assert np.array_equal(packet.body().indices, kept)


@pytest.mark.parametrize("numel", [1, 17, 257, 1025, TILE, TILE + 1])
@pytest.mark.parametrize("names", ["", "e", "h", "eh", "ehv", "v"])
def test_equals_the_reference(numel, names, rng):
    g = rng.standard_normal(numel).astype(np.float32)
    for i, k in enumerate(sorted({1, -(-numel // 100), max(1, numel - 1), numel})):
        options = {"values": VALUES[i % 4], "scaled": i % 2 == 1, "k": k}
        same(g, buffers(numel, names), **options)
        same(g, buffers(numel, names, spares=False), **options)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("mask", [False, True])
def test_states_in_bfloat16(values, mask, rng):
    g = rng.standard_normal(70_000).astype(np.float32)
    state = replace(buffers(70_000, "ehv", "bfloat16"), mask=mask)
    same(g, state, k=700, values=values)


def test_only_what_was_sent_leaves_the_memory(rng):
    """e' = t - D everywhere, h' = h + D, exactly."""
    g = rng.standard_normal(1000).astype(np.float32)
    state = buffers(1000, "eh")
    e, h = state.e.copy(), state.h.copy()
    sent = decode(randk(g, k=100, values="int8", state=state).tobytes())
    assert np.count_nonzero(sent) >= 95
    assert np.array_equal(state.e, ((e + g) - h) - sent)
    assert np.array_equal(state.h, h + sent)


def test_empty_update():
    for variant in ("reference", "cpu"):
        data = randk(np.empty(0, np.float32), k=0, variant=variant)
        assert Packet.from_bytes(data).k == 0 and data.size == 128


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_of_the_update(dtype, rng):
    g = rng.standard_normal(5001).astype(np_dtype(dtype))
    packets, _ = same(g, buffers(5001, "e"), k=50)
    assert wire.read_header(packets[0]).source_dtype == dtype
    strided = np.repeat(g, 2)[::2]
    read_only = g.copy()
    read_only.flags.writeable = False
    for other in (unaligned(g), strided, read_only, [g[:17], g[17:17], g[17:]]):
        assert run(other, "cpu", buffers(5001, "e"), k=50)[0] == packets


# ---- the unbiased form -------------------------------------------------------------------------


def test_scaled_packets_are_the_update_on_average():
    """E[(d/k) u_S] = u and E|D - u|^2 = (d/k - 1) |u|^2: 1e5 draws, five standard errors."""
    d, k, draws = 20, 5, 20_000
    u = np.random.default_rng(1).standard_normal(d).astype(np.float32)
    total, error = np.zeros(d), np.zeros(draws)
    for seed in range(draws):
        kept = random_coordinates(d, k, seed=seed)
        sent = np.zeros(d)
        sent[kept] = np.float32(d / k) * u[kept]
        total += sent
        error[seed] = np.sum((sent - u) ** 2)
    deviation = np.abs(u) * np.sqrt((d / k - 1) / draws)
    assert np.all(np.abs(total / draws - u) < 5 * deviation)
    assert error.mean() == pytest.approx((d / k - 1) * np.sum(u**2), rel=0.02)
    # and this is what a packet holds
    sent = decode(randk(u, k=k, scaled=True, seed=3).tobytes())
    kept = random_coordinates(d, k, seed=3)
    assert np.array_equal(sent[kept], np.float32(d / k) * u[kept])


def test_unscaled_packets_contract():
    """|u - C(u)|^2 <= (1 - k/d) |u|^2 on average over seeds, with equality for equal magnitudes."""
    d, k = 200, 20
    u = np.random.default_rng(1).standard_normal(d)
    rest = []
    for seed in range(2000):
        kept = random_coordinates(d, k, seed=seed)
        rest.append(np.sum(u**2) - np.sum(u[kept] ** 2))
    assert np.mean(rest) == pytest.approx((1 - k / d) * np.sum(u**2), rel=0.01)


# ---- int8 values -------------------------------------------------------------------------------


def test_int8_worked_example():
    """Largest magnitude 127 units of 2: codes 127, -64 (of -63.5), 2 (of 1.5), 0 (of 0.5), -0."""
    g = np.array([254, -127, 3, 1, -1, 0], np.float32)
    packet = Packet.from_bytes(randk(g, k=6, values="int8"))
    assert decode(packet).tolist() == [254, -128, 4, 0, 0, 0]
    # frame of four sections, scales, counts, values
    assert packet.header.bits == 8 and packet.nbytes == 320 + 6


def test_int8_scales_are_those_of_tiles(rng):
    g = np.r_[rng.standard_normal(TILE), 1e-6 * rng.standard_normal(TILE), np.zeros(TILE)]
    packet = Packet.from_bytes(randk(g, k=3000, values="int8"))
    body = packet.body()
    assert np.array_equal(decode(packet)[body.indices], body.values)
    for tile in range(3):
        kept = body.indices[body.indices // TILE == tile]
        top = np.abs(g[kept]).max()
        error = np.abs(decode(packet)[kept] - g[kept]).max()
        assert error <= top / 254 * 1.001


@pytest.mark.parametrize("top", [3.4028235e38, 1e-38, 1e-42, 1e-45])
def test_int8_at_the_ends_of_float32(top):
    g = np.array([top, -top, top / 2, -top / 3, 0], np.float32)
    packets, _ = same(g, buffers(5, ""), k=5, values="int8")
    got = decode(packets[0])
    assert np.isfinite(got).all()
    assert np.abs(got - g).max() <= top / 127 + 127 * 1.5e-45


# ---- with error control ------------------------------------------------------------------------


def test_ef14_sends_everything_in_the_end(rng):
    """Of a constant update, the sum of what was sent falls behind by one memory."""
    g = rng.standard_normal(300).astype(np.float32)
    encoder = Encoder(RandK(k=30), EF14(), like=g)
    total = np.zeros(300)
    for t in range(300):
        total += decode(encoder.encode(g, round=t))
    assert np.abs(total / 300 - g).max() < 0.4 * np.abs(g).max()
    assert np.allclose(total + encoder.e, 300 * g, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("feedback", [EF21(), EControl()])
def test_estimates_of_client_and_server_agree(feedback, rng):
    encoder = Encoder(RandK(ratio=0.1, values="bfloat16"), feedback, like=np.zeros(500, np.float32))
    server = np.zeros(500, np.float32)
    for t in range(50):
        packet = encoder.encode(rng.standard_normal(500).astype(np.float32), round=t, seed=2)
        decode_add([bytes(packet)], [1.0], server)
    assert server.tobytes() == encoder.h.tobytes()


def test_clients_draw_their_own_coordinates_unless_shared(rng):
    g = rng.standard_normal(1000).astype(np.float32)
    for shared, want in ((False, 3), (True, 1)):
        codec = RandK(k=50, shared=shared)
        encoders = [Encoder(codec, like=g, client=i) for i in range(3)]
        sets = {tuple(e.encode(g, round=1, seed=4).body().indices) for e in encoders}
        assert len(sets) == want
    # values of shared packets sum like the updates
    codec = RandK(k=50, shared=True)
    packets = [Encoder(codec, like=g, client=i).encode((i + 1) * g, seed=4) for i in range(3)]
    values = sum(p.body().values for p in packets)
    assert np.allclose(values, 6 * g[packets[0].body().indices], rtol=1e-6)


def test_settings():
    codec = RandK(ratio=0.01, scaled=True, values="int8", shared=True)
    assert CODECS["randk"].from_dict(codec.to_dict()) == codec
    assert RandK(ratio=0.07).count(100) == 7 and RandK(k=9).count(4) == 4
    assert RandK(k=5).eta(100) == 0.05
    assert codec.shared_seed and not RandK(k=1).shared_seed
    for make, match in (
        (lambda: RandK(), "expected either ratio or k"),
        (lambda: RandK(ratio=0.1, k=1), "expected either ratio or k"),
        (lambda: RandK(ratio=0), "0 < ratio <= 1"),
        (lambda: RandK(k=0), "k: expected an integer"),
        (lambda: RandK(k=True), "k: expected an integer"),
        (lambda: RandK(k=1, values="int4"), "values: expected one of"),
        (lambda: RandK(k=1, scaled=1), "scaled: expected a bool"),
        (lambda: RandK(k=1, shared="yes"), "shared: expected a bool"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            make()


# ---- the same bits everywhere ------------------------------------------------------------------

DIGESTS = """
import hashlib, numpy as np
from flcore._state import State
from flcore.ops.randk import randk, random_coordinates
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (17, 65537, 300_001):
    digest.update(random_coordinates(numel, numel // 3, seed=7).tobytes())
    for values in ("float32", "float16", "bfloat16", "int8"):
        g = rng.standard_normal(numel)
        state = State(**{n: rng.standard_normal(numel).astype(np.float32) for n in "ehv"}, a=0.1)
        state.p = state.q = 0.5
        for k in (1, numel // 50 + 1, numel - 1):
            digest.update(randk(g, k=k, state=state, values=values, round=k).tobytes())
        digest.update(b"".join(x.tobytes() for x in state.buffers().values()))
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes(rng):
    g = rng.standard_normal(600_000).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.append(run(g, "cpu", buffers(600_000, "eh"), k=50_000, values="int8"))
        results.append(run(g, "cpu", buffers(600_000, ""), k=500_000))
        results.append(random_coordinates(1_300_000, 600_000, seed=1).tobytes())  # a team draws
    assert results[:3] == results[3:6] == results[6:]


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spares", [False, True])
def test_nothing_is_written_when_a_value_is_not_finite(bad, spares, rng):
    for place in ("g", "e", "h"):
        g = rng.standard_normal(70_001).astype(np.float32)
        state = buffers(70_001, "eh", spares=spares)
        {"g": g, "e": state.e, "h": state.h}[place][66_000] = bad
        before = {name: x.tobytes() for name, x in state.buffers().items()}
        for variant in ("reference", "cpu"):
            with pytest.raises(NonFiniteError, match="no state changed"):
                randk(g, k=5, state=state, variant=variant)
            assert {name: x.tobytes() for name, x in state.buffers().items()} == before


def test_scaled_values_may_overflow():
    g = np.full(100, 1e38, np.float32)
    for spares in (False, True):
        state = buffers(100, "e", spares=spares)
        before = state.e.tobytes()
        for variant in ("reference", "cpu"):
            with pytest.raises(NonFiniteError):
                randk(g, k=1, scaled=True, state=state, variant=variant)
            assert state.e.tobytes() == before
    assert decode(randk(g, k=1).tobytes()).max() == np.float32(1e38)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": 0}, InvalidInputError, "k: expected an integer from 1 to 8, got 0"),
        ({"k": 9}, InvalidInputError, "k: expected an integer from 1 to 8, got 9"),
        ({"k": 1.0}, InvalidInputError, "k: expected"),
        ({"values": "int4"}, InvalidInputError, "values: expected one of float32"),
        ({"round": -1}, InvalidInputError, "round: expected 0 <= round"),
        ({"seed": 2**64}, InvalidInputError, "seed: expected 0 <= seed"),
        ({"tensors": b"x"}, InvalidInputError, "multiple of 64 bytes"),
        ({"state": State(e=np.zeros(8))}, DTypeError, "e: expected a float32"),
        ({"state": State(e=np.zeros(7, np.float32))}, InvalidInputError, "shape"),
        ({"variant": "cuda"}, Exception, "randk has no cuda variant"),
    ],
)
def test_mistakes_are_named(change, error, match):
    with pytest.raises(error, match=match):
        randk(np.ones(8, np.float32), **{"k": 1, **change})
    with pytest.raises(DTypeError, match="update"):
        randk(np.ones(8, np.int32), k=1)
    with pytest.raises(InvalidInputError, match="k: expected"):
        random_coordinates(5, 6)

"""Error control: the worked examples of the papers, and the laws that hold in every round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flcore.aggregation import Accumulator
from flcore.compression import EF14, EControl, Encoder, Packet, TopK, decode
from flcore.errors import NonFiniteError
from support import np_dtype

G = np.array([4, -3, 2, 1], np.float32)


def integers(rng, d):
    """Small integers: every float32 sum of them in these tests is exact, so laws are equalities."""
    return rng.integers(-8, 9, d).astype(np.float32)


# ---- EControl ----------------------------------------------------------------------------------


def test_econtrol_worked_example():
    encoder = Encoder(TopK(k=1), EControl(eta=0.5), like=G)
    for sent, e, h in (
        ([4, 0, 0, 0], [0, -3, 2, 1], [4, 0, 0, 0]),
        ([0, -4.5, 0, 0], [0, -1.5, 4, 2], [4, -4.5, 0, 0]),
        ([0, 0, 4, 0], [0, 0, 2, 3], [4, -4.5, 4, 0]),
        ([0, 0, 0, 2.5], [0, 1.5, 0, 1.5], [4, -4.5, 4, 2.5]),
    ):
        packet = encoder.encode(G)
        assert decode(packet).tolist() == sent
        assert encoder.e.tolist() == e and encoder.h.tolist() == h
        assert packet.header.increment


def test_econtrol_telescopes_exactly(rng):
    """e^T = sum_t (g^t - h^{t+1}) for any compressor and eta."""
    d = 300
    encoder = Encoder(TopK(k=7), EControl(eta=0.5), like=np.zeros(d, np.float32))
    total = np.zeros(d)
    for t in range(4):  # few rounds and eta a power of two: no float32 operation rounds
        g = integers(rng, d)
        encoder.encode(g, round=t)
        total += g.astype(np.float64) - encoder.h
    assert np.array_equal(encoder.e, total)


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16"])
def test_server_sum_equals_mean_of_client_states(values, rng):
    """H = mean h_i after every round, half the clients absent; client and packet agree on D."""
    n, d = 6, 200
    clients = [
        Encoder(TopK(ratio=0.1, values=values), EControl(), like=np.zeros(d)) for _ in range(n)
    ]
    replicas = np.zeros((n, d), np.float32)
    server = np.zeros(d)
    for t in range(30):
        packets = {}
        for i in rng.permutation(n)[: n // 2]:
            packets[i] = clients[i].encode(rng.standard_normal(d) + i, round=t)
        accumulator = Accumulator(np.zeros(d), dtype="float64")
        for i, packet in packets.items():
            accumulator.add(Packet.from_bytes(bytes(packet)), 1.0)
            replicas[i] += decode(packet)
        server += accumulator.result(divisor=n)
        assert all(np.array_equal(replicas[i], clients[i].h) for i in range(n))
        mean = np.mean([c.h.astype(np.float64) for c in clients], axis=0)
        drift = 1e-6 if values == "float32" else 1e-12  # h + D rounds in float32 only there
        assert np.abs(server - mean).max() < drift


def test_econtrol_virtual_iterate():
    """xt = x - gamma mean(e) moves by -gamma mean(g), to float32 rounding of the state."""
    rng = np.random.default_rng(3)
    n, d, gamma = 4, 100, 0.125
    clients = [Encoder(TopK(k=5), EControl(), like=np.zeros(d)) for _ in range(n)]
    x = server = np.zeros(d)
    for _ in range(10):
        before = x - gamma * np.mean([c.e for c in clients], axis=0, dtype=np.float64)
        gradients = [rng.standard_normal(d).astype(np.float32) for _ in range(n)]
        packets = [c.encode(g.astype(np.float64)) for c, g in zip(clients, gradients, strict=True)]
        server = server + np.mean([decode(p) for p in packets], axis=0, dtype=np.float64)
        x = x - gamma * server
        after = x - gamma * np.mean([c.e for c in clients], axis=0, dtype=np.float64)
        step = gamma * np.mean(gradients, axis=0, dtype=np.float64)
        assert np.abs(after - (before - step)).max() < 1e-5


def test_econtrol_without_compression_is_sgd(rng):
    """C = identity: D = eta e + g - h, h' = g + eta e, e' = (1 - eta) e; from e = 0, h' = g."""
    encoder = Encoder(TopK(ratio=1.0), EControl(eta=0.25), like=np.zeros(50, np.float32))
    for _ in range(5):
        g = integers(rng, 50)
        before = encoder.h.copy()
        assert np.array_equal(decode(encoder.encode(g)), g - before)
        assert np.array_equal(encoder.h, g) and not encoder.e.any()


def test_econtrol_closed_form(rng):
    """Selected: e' = (1 - eta) e, h' = g + eta e. Others: e' = e + g - h, h' = h."""
    d, eta = 500, 0.5
    encoder = Encoder(TopK(k=40), EControl(eta=eta), like=np.zeros(d, np.float32))
    for _ in range(3):
        g, e, h = integers(rng, d), encoder.e.copy(), encoder.h.copy()
        kept = encoder.encode(g).body().indices
        rest = np.setdiff1d(np.arange(d), kept)
        assert np.array_equal(encoder.e[kept], (1 - eta) * e[kept])
        assert np.array_equal(encoder.h[kept], g[kept] + eta * e[kept])
        assert np.array_equal(encoder.e[rest], (e + g - h)[rest])
        assert np.array_equal(encoder.h[rest], h[rest])


def test_econtrol_converges_on_a_fixed_gradient_and_diverges_beyond_the_edge():
    rng = np.random.default_rng(0)
    g = rng.standard_normal(500)
    errors = {}
    for eta in ("auto", 4 * 50 / 500):
        encoder = Encoder(TopK(k=50), EControl(eta=eta), like=g)
        try:
            for _ in range(600):
                encoder.encode(g)
        except NonFiniteError:
            errors[eta] = np.inf
            continue
        errors[eta] = np.linalg.norm(g - encoder.h) / np.linalg.norm(g)
    assert errors["auto"] < 1e-6 and errors[0.4] > 1e3


# ---- EF14 --------------------------------------------------------------------------------------


def test_ef14_worked_example():
    encoder = Encoder(TopK(k=1), EF14(), like=G)
    for sent, e in (
        ([4, 0, 0, 0], [0, -3, 2, 1]),
        ([0, -6, 0, 0], [4, 0, 4, 2]),
        ([8, 0, 0, 0], [0, -3, 6, 3]),
        ([0, 0, 8, 0], [4, -6, 0, 4]),
    ):
        packet = encoder.encode(G)
        assert decode(packet).tolist() == sent and encoder.e.tolist() == e
        assert encoder.h is None and not packet.header.increment


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_ef14_conserves_everything(values, dtype, rng):
    """D + e' = e + g in every round, exactly: what is rounded away on the wire stays in e."""
    encoder = Encoder(TopK(k=30, values=values), EF14(), like=np.zeros(1000, np_dtype(dtype)))
    for t in range(5):
        g = (3 * rng.standard_normal(1000)).astype(np_dtype(dtype))
        whole = encoder.e + g.astype(np.float32)
        packet = encoder.encode(g, round=t)
        sent = decode(packet)
        assert np.count_nonzero(sent) == 30
        assert np.array_equal(sent.astype(np.float64) + encoder.e, whole)


def test_ef14_without_compression_is_sgd(rng):
    encoder = Encoder(TopK(ratio=1.0), EF14(), like=np.zeros(99))
    for _ in range(3):
        g = rng.standard_normal(99)
        assert np.array_equal(decode(encoder.encode(g)), g.astype(np.float32))
        assert not encoder.e.any()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_top_k_is_a_contraction(d, seed, ratio):
    """||u - C(u)||^2 <= (1 - k/d) ||u||^2, with equality when all magnitudes agree."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(d) * 10.0 ** rng.integers(-3, 4)
    encoder = Encoder(TopK(ratio=ratio), EF14(), like=u)
    encoder.encode(u)
    k, u32 = encoder.k, u.astype(np.float32).astype(np.float64)
    assert np.sum(encoder.e.astype(np.float64) ** 2) <= (1 - k / d) * np.sum(u32**2) * (1 + 1e-12)
    signs = np.sign(u)
    encoder.reset()
    encoder.encode(signs)
    assert np.sum(encoder.e**2) == d - k
    shuffled = Encoder(TopK(ratio=ratio), like=u).encode(rng.permutation(u)).body().values
    kept = Encoder(TopK(ratio=ratio), like=u).encode(u).body().values
    assert np.array_equal(np.sort(np.abs(shuffled)), np.sort(np.abs(kept)))


def test_ef14_decay_forgets():
    encoder = Encoder(TopK(k=1), EF14(decay=0.5), like=G)
    encoder.encode(G)
    encoder.encode(G)
    assert encoder.e.tolist() == [4, 0, 3, 1.5]

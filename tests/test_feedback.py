"""Error control: the worked examples of the papers, and the laws that hold in every round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flcore._state import State
from flcore.aggregation import Accumulator
from flcore.compression import (
    CODECS,
    DGC,
    EF14,
    EF21,
    Downlink,
    EControl,
    Encoder,
    Packet,
    Replica,
    Sign,
    TopK,
    decode,
)
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.reference import feedback as reference
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


def test_ef14_virtual_iterate(rng):
    """x - gamma mean(e) moves by -gamma mean(g), exactly where no sum rounds."""
    n, d, gamma = 4, 60, 0.5
    clients = [Encoder(TopK(k=5), EF14(), like=np.zeros(d, np.float32)) for _ in range(n)]
    x = np.zeros(d)
    for t in range(6):
        before = x - gamma * np.mean([c.e for c in clients], axis=0)
        g = np.stack([integers(rng, d) for _ in range(n)])
        packets = [c.encode(gi, round=t) for c, gi in zip(clients, g, strict=True)]
        x = x - gamma * np.mean([decode(p) for p in packets], axis=0)
        after = x - gamma * np.mean([c.e for c in clients], axis=0)
        assert np.array_equal(after, before - gamma * g.mean(axis=0))


def test_ef14_memory_is_bounded(rng):
    """||e||^2 <= 4 (1 - delta) G^2 / delta^2 for updates of norm G, with delta = k/d."""
    d, k = 100, 10
    encoder = Encoder(TopK(k=k), EF14(), like=np.zeros(d))
    delta, largest = k / d, 0.0
    for t in range(300):
        g = rng.standard_normal(d)
        encoder.encode(g / np.linalg.norm(g), round=t)
        largest = max(largest, float(np.sum(encoder.e.astype(float) ** 2)))
    assert 1 < largest <= 4 * (1 - delta) / delta**2


# ---- why error feedback: signs alone fail ------------------------------------------------------


def walk(feedback, gradient, x, lr, steps, low=-np.inf, high=np.inf):
    """Steps along the decoded signs of the gradient, of length lr without feedback."""
    encoder = Encoder(Sign(), feedback, like=np.float32(x))
    for t in range(steps):
        sent = decode(encoder.encode(gradient(x).astype(np.float32), round=t))
        x = np.clip(x - np.float32(lr) * (sent if feedback else np.sign(sent)), low, high)
    return x


def test_signs_never_leave_a_line_that_feedback_leaves():
    """f = |x1 + x2| / 2 + |x1 - x2|: signs are always +-(1, -1), so x1 + x2 never changes."""

    def f(x):
        return abs(x.sum()) / 2 + abs(x[0] - x[1])

    def gradient(x):
        return np.sign(x.sum()) / 2 + np.sign(x[0] - x[1]) * np.array([1, -1])

    start = np.array([1, 0.9], np.float32)
    stuck = walk(None, gradient, start, 0.01, 2000)
    assert stuck.sum() == pytest.approx(1.9) and f(stuck) > 0.9
    assert f(walk(EF14(), gradient, start, 0.01, 2000)) < 0.05


def test_signs_of_skewed_noise_lead_the_wrong_way():
    """x / 4 on [-1, 1] with gradients 4 (one time in four) and -1: the mean is 1/4, most are -1."""
    ends = {}
    for feedback in (None, EF14()):
        rng = np.random.default_rng(0)

        def gradient(x, rng=rng):
            return np.array([4.0 if rng.random() < 0.25 else -1.0])

        ends[feedback] = walk(feedback, gradient, np.zeros(1, np.float32), 0.01, 5000, -1, 1)[0]
    assert ends[None] > 0.9 and ends[EF14()] < -0.9


# ---- every codec -------------------------------------------------------------------------------

FORMS = [EF14(0.75), EF21(), EF21(momentum=0.25), EControl(), DGC()]
SPECIAL = {
    "topk": {"ratio": 0.1},
    "randk": {"ratio": 0.1},
    "threshold": {"ratio": 0.1},
    "sketch": {"columns": 40},
}
WITH_MEMORY = [name for name, codec in CODECS.items() if codec.takes_feedback]


def like(rng):
    """A matrix and a vector, of values with zeros of both signs, subnormal and large ones."""
    update = {"w": rng.standard_normal((40, 30)), "b": 1e-3 * rng.standard_normal(71)}
    update["w"][3, :4] = 0.0, -0.0, 1e-41, 1e6
    return {name: x.astype(np.float32) for name, x in update.items()}


def flat(update):
    return np.concatenate([x.reshape(-1) for x in update.values()])


def make(name):
    return CODECS[name](**SPECIAL.get(name, {}))


@pytest.mark.parametrize("feedback", FORMS, ids=repr)
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_state_follows_what_a_receiver_decodes(name, feedback, rng):
    """e = t - D, h = h + D and v = s bit for bit, with D decoded from the bytes that are sent.

    A replica of h that adds the packets has the same bits.
    """
    encoder = Encoder(make(name), feedback, like=like(rng), client=1)
    replica = Replica(np.zeros(encoder.numel, np.float32))
    for t in range(4):
        g = like(rng)
        before = {n: getattr(encoder, n).copy() for n in feedback.kept}
        packet = encoder.encode(g, round=t, seed=5)
        factors = feedback.factors(encoder.codec, encoder.numel, t)._asdict()
        block = reference.form(flat(g), State(**before, **factors))
        sent = decode(bytes(packet))
        if "e" in before:
            assert np.array_equal(encoder.e, block.t - sent)
        if "h" in before:
            assert np.array_equal(encoder.h, before["h"] + sent)
            assert np.array_equal(replica.apply(bytes(packet)), encoder.h)
        if "v" in before:
            masked = np.where(sent != 0, np.float32(0), block.s) if factors["mask"] else block.s
            assert np.array_equal(encoder.v, masked)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_update_that_is_not_finite_changes_nothing(name, in_place, rng):
    for feedback in (EF14(), EControl(), DGC()):
        encoder = Encoder(make(name), feedback, like=like(rng), in_place=in_place)
        encoder.encode(like(rng), seed=2)
        before = encoder.state_dict()
        for value, at in (
            (np.nan, ("w", (0, 0))),
            (np.inf, ("b", (70,))),
            (-np.inf, ("w", (39, 3))),
        ):
            bad = like(rng)
            bad[at[0]][at[1]] = value
            with pytest.raises(NonFiniteError):
                encoder.encode(bad, round=1, seed=2)
            after = encoder.state_dict()
            assert before.keys() == after.keys()
            assert all(np.array_equal(before[k], after[k]) for k in before)


def test_sketches_have_no_memory_at_the_client():
    with pytest.raises(InvalidInputError, match="feedback: expected None with Sketch, got EF14"):
        Encoder(make("sketch"), EF14(), like=np.zeros(1000))


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_state_of_every_codec_can_be_saved(name, rng):
    one = Encoder(make(name), EControl(), like=like(rng), client=3, state_dtype="bfloat16")
    for t in range(3):
        one.encode(like(rng), round=t, seed=9)
    two = Encoder(make(name), EControl(), like=like(rng), client=3, state_dtype="bfloat16")
    two.load_state_dict(one.state_dict())
    for t in range(3, 6):
        g = like(rng)
        assert one.encode(g, round=t, seed=9) == two.encode(g, round=t, seed=9)
    one = Downlink(make(name), EF14(), like=like(rng))
    reply = one.send(like(rng), round=1, seed=2)
    assert flat(one.value).tobytes() == decode(reply).tobytes()

"""1-bit Adam: the two-worker example by hand, its conservation law, and what v does when frozen."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.compression import EF14, Encoder, OneBitAdam, OneBitServer, Packet, Sign, TopK, decode
from flcore.compression._floats import Dense
from flcore.errors import InvalidInputError, NonFiniteError, PacketError

IDENTITY = Dense("float32")


def start(n, d, codec=None, freeze_step=1, **options):
    """Return n workers and a server at x = 0."""
    x = np.zeros(d, np.float32)
    workers = [OneBitAdam(x, freeze_step=freeze_step, codec=codec, **options) for _ in range(n)]
    return workers, OneBitServer(x, freeze_step=freeze_step, codec=codec)


def step(workers, server, gradients):
    """One step of all; returns what the server sent, decoded."""
    packets = [w.message(g) for w, g in zip(workers, gradients, strict=True)]
    reply = server.reduce([bytes(p) for p in packets])
    for w in workers:
        w.apply(bytes(reply))
    return decode(reply)


def test_worked_example_of_two_workers():
    """Momenta (1, -2, 3, -4) and (2, 2, -1, -1): with beta_1 = 0 they are the gradients."""
    workers, server = start(2, 4, Sign(scale="l2"), betas=(0.0, 0.9))
    step(workers, server, np.ones((2, 4), np.float32))
    m = np.array([[1, -2, 3, -4], [2, 2, -1, -1]], np.float32)
    packets = [w.message(g) for w, g in zip(workers, m, strict=True)]
    scales = [np.abs(decode(p)) for p in packets]
    assert np.allclose(scales, [[2.738613] * 4, [1.581139] * 4], atol=1e-6)
    mean = np.mean([decode(p) for p in packets], axis=0)
    assert np.allclose(mean, [2.159876, -0.578737, 0.578737, -2.159876], atol=1e-6)
    out = decode(server.reduce(packets))
    assert np.allclose(out, 1.581139 * np.array([1, -1, 1, -1]), atol=1e-6)
    assert np.allclose(server.e, [0.578737, 1.002402, -1.002402, -0.578737], atol=1e-6)
    left = np.mean([w.e for w in workers], axis=0)
    assert np.allclose(out + server.e + left, [1.5, 0, 1, -2.5], atol=1e-6)


@pytest.mark.parametrize("codec", [Sign(bucket=8), TopK(ratio=0.25)], ids=repr)
def test_nothing_is_lost_and_workers_agree(codec, rng):
    """out + es' + mean(e_i') = mean(m_i) + es + mean(e_i) in every step; x the same bits."""
    n, d = 3, 45
    workers, server = start(n, d, codec, freeze_step=2)
    for t in range(12):
        before = server.e + np.mean([w.e for w in workers], axis=0)
        packets = [w.message(rng.standard_normal(d).astype(np.float32)) for w in workers]
        m = np.mean([w.m for w in workers], axis=0)
        reply = server.reduce(packets)
        if t >= 2:
            after = decode(reply) + server.e + np.mean([w.e for w in workers], axis=0)
            assert np.abs(after - (m + before)).max() < 1e-5
            assert len(bytes(reply)) < 4 * d + 200
        else:
            assert packets[0].header.codec == "dense"
        xs = [w.apply(reply) for w in workers]
        assert all(x.tobytes() == xs[0].tobytes() for x in xs)
        assert all(w.m.tobytes() == workers[0].m.tobytes() for w in workers)
        assert all(w.v.tobytes() == workers[0].v.tobytes() for w in workers)


@pytest.mark.parametrize("scale", ["mean", "l2"])
def test_one_worker_is_compressed_once(scale, rng):
    """What the server gets is a scaled sign already: it sends the same, nothing is left."""
    workers, server = start(1, 64, Sign(bucket=64, scale=scale))
    step(workers, server, np.ones((1, 64), np.float32))
    packet = workers[0].message(rng.standard_normal(64).astype(np.float32))
    out = decode(server.reduce([packet]))
    assert np.allclose(out, decode(packet), rtol=1e-6)
    assert np.abs(server.e).max() < 1e-6 * np.abs(out).max() and workers[0].e.any()


def test_without_compression_it_is_adam_with_frozen_variance(rng):
    n, d, freeze, lr, wd, eps = 2, 30, 4, 0.01, 0.1, 1e-6
    workers, server = start(
        n, d, IDENTITY, freeze, lr=lr, betas=(0.9, 0.99), eps=eps, weight_decay=wd, floor=0.0
    )
    x = m = v = np.zeros(d)
    for t in range(12):
        g = rng.standard_normal((n, d)).astype(np.float32) + 1
        mean = g.mean(axis=0, dtype=np.float64)
        m = 0.9 * m + 0.1 * mean
        if t < freeze:
            v = 0.99 * v + 0.01 * mean**2
        x = x - lr * (m / (np.sqrt(v) + eps) + wd * x)
        step(workers, server, g)
        assert np.allclose(workers[0].params, x, rtol=1e-5, atol=1e-6)
        assert np.allclose(workers[1].v, v, rtol=1e-5)
    assert not workers[0].e.any() and not server.e.any()


def test_last_bucket_has_a_scale_of_its_own_values():
    workers, server = start(1, 13, Sign(bucket=8), betas=(0.0, 0.9))
    step(workers, server, np.ones((1, 13), np.float32))
    g = np.r_[np.full(8, 4.0), np.full(5, -1.0)].astype(np.float32)
    packet = workers[0].message(g)
    assert decode(packet).tolist() == g.tolist() and not workers[0].e.any()


def test_frozen_variance_has_a_floor_and_dead_coordinates_stay():
    """A coordinate with gradients of 1e-6 so far does not move a thousand times the others."""
    d = 8
    moved = {}
    for floor in (0.0, 0.01):
        workers, server = start(1, d, IDENTITY, betas=(0.0, 0.5), floor=floor, lr=1.0)
        first = np.ones(d, np.float32)
        first[0], first[1] = 1e-6, 0.0
        step(workers, server, [first])
        before = workers[0].params
        step(workers, server, [np.full(d, 0.5, np.float32)])
        moved[floor] = before - workers[0].params
        assert moved[floor][1] == 0 and workers[0].m[1] == 0
    assert moved[0.0][0] > 1e5
    assert 5 < moved[0.01][0] / moved[0.01][2] < 12
    assert moved[0.01][2:].tobytes() == moved[0.0][2:].tobytes()


def test_noisy_quadratic():
    """Curvatures 1 to 100, workers that disagree: as good as Adam; without memory signs stall."""
    n, d, steps = 8, 100, 600
    h = np.linspace(1, 100, d)
    pull = 10 * np.random.default_rng(1).standard_normal(d) * np.r_[7, [-1] * 7][:, None]

    def loss_after(freeze, codec, feedback=True):
        rng = np.random.default_rng(0)
        workers = [
            OneBitAdam(
                np.ones(d, np.float32), freeze_step=freeze, lr=0.02, codec=codec, betas=(0.9, 0.99)
            )
            for _ in range(n)
        ]
        server = OneBitServer(np.ones(d), freeze_step=freeze, codec=codec)
        losses = []
        for t in range(steps):
            for w in workers:
                w.lr = 0.02 * (1 - t / steps)
            x = workers[0].params
            g = (h * x + pull + 10 * rng.standard_normal((n, d))).astype(np.float32)
            step(workers, server, g)
            if not feedback:
                for w in (*workers, server):
                    w.e.fill(0)
            losses.append(0.5 * np.sum(h * workers[0].params.astype(float) ** 2))
        return np.mean(losses[-50:])

    adam, one_bit = loss_after(steps, None), loss_after(steps // 5, Sign(bucket=100))
    naive = loss_after(steps // 5, Sign(bucket=100), feedback=False)
    assert one_bit < 4 * adam
    assert naive > 10 * one_bit


def test_structures_saved_state_and_weights(rng):
    like = {"w": np.ones((4, 5), np.float64), "b": np.zeros(5, np.float32)}
    worker = OneBitAdam(like, freeze_step=2, client=7)
    server = OneBitServer(like, freeze_step=2)

    def gradient():
        return {k: rng.standard_normal(x.shape).astype(x.dtype) for k, x in like.items()}

    for _ in range(4):
        x = worker.apply(server.reduce([worker.message(gradient())]))
    assert x["w"].shape == (4, 5) and x["w"].dtype == np.float64 and x["b"].dtype == np.float32
    other, second = OneBitAdam(like, freeze_step=2, client=7), OneBitServer(like, freeze_step=2)
    other.load_state_dict(worker.state_dict())
    second.load_state_dict(server.state_dict())
    g = gradient()
    one, two = worker.message(g, seed=3), other.message(g, seed=3)
    assert one == two and one.header.round == 4
    reply = server.reduce([one])
    assert reply == second.reduce([two])
    assert worker.apply(reply)["w"].tobytes() == other.apply(reply)["w"].tobytes()
    state = worker.state_dict()
    for change in ({"x": np.zeros(3)}, {"step": -1}, {"second": np.full(25, np.nan, np.float32)}):
        with pytest.raises(InvalidInputError, match="state"):
            worker.load_state_dict(state | change)
    flat = np.zeros(6, np.float32)
    server = OneBitServer(flat, freeze_step=1)
    packets = [Encoder(IDENTITY, like=flat).encode(flat + i) for i in (1, 5)]
    assert np.allclose(decode(server.reduce(packets, weights=[3, 1])), 2.0)


def test_steps_and_values_that_do_not_fit():
    workers, server = start(2, 4, freeze_step=2)
    g = np.ones(4, np.float32)
    packets = [w.message(g) for w in workers]
    with pytest.raises(InvalidInputError, match="packets: expected at least one"):
        server.reduce([])
    with pytest.raises(PacketError, match="step: expected 0, got 3"):
        server.reduce([packets[0], Encoder(Sign(), EF14(), like=g).encode(g, round=3)])
    with pytest.raises(PacketError, match="values: expected 4, got 3"):
        server.reduce([Encoder(Sign(), like=g[:3]).encode(g[:3])])
    with pytest.raises(InvalidInputError, match="weights"):
        server.reduce(packets, weights=[1, -1])
    assert server.step == 0
    reply = server.reduce(packets)
    workers[0].apply(reply)
    with pytest.raises(PacketError, match="step: expected 1, got 0"):
        workers[0].apply(reply)
    workers[1].apply(Packet.from_bytes(bytes(reply)))  # also without a message of its own
    with pytest.raises(NonFiniteError):
        workers[0].message(g * np.float32(np.nan))
    big = start(1, 4, lr=3e38)[0][0]
    before = big.state_dict()
    with pytest.raises(NonFiniteError, match="step 0: the new parameters are not finite"):
        for k in range(2):
            big.apply(Encoder(IDENTITY, like=g).encode(g * np.float32(1e19), round=k))
    assert all(np.array_equal(before[k], x) for k, x in big.state_dict().items())
    for options, match in (
        ({"freeze_step": 0}, "freeze_step: expected a whole number from 1"),
        ({"freeze_step": 1, "betas": (1.0, 0.9)}, r"betas\[0\]: expected 0 <="),
        ({"freeze_step": 1, "lr": -1}, "lr: expected 0 <= lr"),
        ({"freeze_step": 1, "floor": float("nan")}, "floor: expected"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            OneBitAdam(g, **options)
    with pytest.raises(NonFiniteError, match="params: expected finite"):
        OneBitAdam(g * np.float32(np.inf), freeze_step=1)

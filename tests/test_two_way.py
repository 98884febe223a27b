"""Both ways compressed: server and clients hold the same bits; the relatives of EF21."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import FedAvgM
from flcore.compression import (
    EF14,
    EF21,
    ControlledSum,
    Downlink,
    EControl,
    Encoder,
    EpochError,
    Packet,
    PacketError,
    Replica,
    TopK,
    decode,
    decode_add,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError

G = np.array([4, -3, 2, 1], np.float32)
FORMS = [None, EF14(), EF21(), EF21(momentum=0.5), EControl()]


class Quadratics:
    """n clients, f_i = ||x - c_i||^2 / 2: gradients x - c_i, smallest sum at the mean of c."""

    def __init__(self, rng, n=4, d=40):
        self.n, self.d = n, d
        self.c = rng.standard_normal((n, d)) + np.arange(n)[:, None]
        self.best = self.c.mean(axis=0)

    def path(self, compress, lr=0.2, rounds=60):
        """Yield x while it steps along what `compress` makes of the gradients."""
        x = np.zeros(self.d)
        for t in range(rounds):
            x = x - lr * compress(t, x - self.c)
            yield x


def ef21(problem, codec, start="zero"):
    """The mean of the estimates as a function of round and gradients; the server as attribute."""
    clients = [
        Encoder(codec, EF21(), like=np.zeros(problem.d), start=start) for _ in range(problem.n)
    ]
    server = ControlledSum(np.zeros(problem.d), problem.n)

    def compress(t, gradients):
        for i, (client, g) in enumerate(zip(clients, gradients, strict=True)):
            server.add(i, client.encode(g, round=t))
        return server.result()

    return compress


# ---- one broadcast -----------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
@pytest.mark.parametrize("feedback", FORMS, ids=repr)
def test_server_and_clients_hold_the_same_bits(feedback, values, rng):
    like = {"w": np.zeros((30, 4), np.float32), "b": np.zeros(30, np.float32)}
    server = Downlink(TopK(ratio=0.1, values=values), feedback, like=like)
    clients = [Replica(like), Replica(like)]
    for t in range(20):
        mean = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in like.items()}
        packet = server.send(mean, round=t)
        for client, sent in zip(clients, (packet, bytes(packet)), strict=True):
            got = client.apply(sent)
            for name in like:
                assert got[name].tobytes() == server.value[name].tobytes()
    if feedback is None or feedback == EF14():
        assert np.array_equal(clients[0]._value, decode(packet))
    else:
        assert clients[0]._value.tobytes() == server.encoder.h.tobytes()


def test_two_way_error_feedback_conserves(rng):
    """D + e' = M + e at the server, with M the mean of what the clients sent."""
    d, n = 100, 4
    clients = [Encoder(TopK(k=20), EF14(), like=np.zeros(d, np.float32)) for _ in range(n)]
    server = Downlink(TopK(k=10), EF14(), like=np.zeros(d, np.float32))
    updates, sent = np.zeros(d), np.zeros(d)
    for t in range(5):
        g = rng.integers(-64, 65, (n, d)).astype(np.float32)  # sums in float32 are exact
        packets = [c.encode(x, round=t) for c, x in zip(clients, g, strict=True)]
        mean = decode_add(packets, [1 / n] * n, np.zeros(d, np.float32))
        before = server.encoder.e.copy()
        server.send(mean, round=t)
        assert np.array_equal(server.value + server.encoder.e, mean + before)
        updates += g.mean(axis=0)
        sent += server.value
    rest = server.encoder.e + np.mean([c.e for c in clients], axis=0)
    assert np.array_equal(sent + rest, updates)


def test_broadcasts_that_were_missed():
    server = Downlink(TopK(k=1), EF21(), like=G)
    client = Replica(G)
    assert client.apply(server.resync()).tolist() == [0] * 4 and client.epoch == 0
    first = server.send(G)
    for _ in range(2):
        assert client.apply(first).tolist() == [4, 0, 0, 0]  # once, however often it comes
    server.send(G)
    third = server.send(G)
    with pytest.raises(EpochError, match=r"expected epoch 1, got 2: .*Downlink.resync") as caught:
        client.apply(third)
    assert (caught.value.expected, caught.value.got) == (1, 2)
    assert client.value.tolist() == [4, 0, 0, 0]
    assert client.apply(server.resync()).tolist() == [4, -3, 2, 0]
    late = Replica(G)
    late.apply(server.resync())
    last = server.send(G)
    assert late.apply(last).tolist() == client.apply(last).tolist() == G.tolist()
    with pytest.raises(InvalidInputError, match="only EControl and EF21 keep an h"):
        Downlink(TopK(k=1), EF14(), like=G).resync()


def test_packets_that_are_not_right():
    client = Replica(G, G)
    with pytest.raises(PacketError, match="expected 4 values, got 2"):
        client.apply(Encoder(TopK(k=1), like=G[:2]).encode(G[:2]))
    packet = bytearray(bytes(Encoder(TopK(k=1), like=G).encode(G)))
    packet[-1] ^= 1
    with pytest.raises(PacketError):
        client.apply(packet)
    skipped = Encoder(TopK(k=1), like=G, nonfinite="skip").encode(G * np.float32(np.nan))
    assert client.apply(skipped).tolist() == G.tolist()
    with pytest.raises(DTypeError, match=r"like: expected .*int64"):
        Replica(np.arange(3))
    with pytest.raises(NonFiniteError, match="values: expected finite"):
        Replica(G, G * np.float32(np.inf))


def test_saved_downlink_goes_on_bit_for_bit(rng):
    for feedback in FORMS:
        one = Downlink(TopK(k=3), feedback, like=np.zeros(50))
        for t in range(3):
            one.send(rng.standard_normal(50), round=t)
        two = Downlink(TopK(k=3), feedback, like=np.zeros(50))
        state = one.state_dict()
        two.load_state_dict(state)
        assert np.array_equal(one.value, two.value)
        m = rng.standard_normal(50)
        assert one.send(m, round=3) == two.send(m, round=3)
        assert np.array_equal(one.value, two.value)
        with pytest.raises(InvalidInputError, match=r"state\['value'\]: expected float32"):
            two.load_state_dict(state | {"value": np.zeros(3, np.float32)})
        del state["value"]
        with pytest.raises(InvalidInputError, match=r"state\['value'\]"):
            two.load_state_dict(state)


# ---- relatives of EF21 -------------------------------------------------------------------------


def test_ef21_both_ways(rng):
    """EF21-BC: without compression on the way back it is EF21; with, it still converges."""
    problem = Quadratics(rng)

    def both_ways(codec):
        upward, server = ef21(problem, TopK(k=4)), Downlink(codec, EF21(), like=np.zeros(40))
        client = Replica(np.zeros(40))

        def compress(t, gradients):
            packet = server.send(upward(t, gradients), round=t)
            s = client.apply(Packet.from_bytes(bytes(packet)))
            assert s.tobytes() == server.value.tobytes()
            return s

        return compress

    plain = np.array(list(problem.path(ef21(problem, TopK(k=4)))))
    whole = np.array(list(problem.path(both_ways(TopK(ratio=1.0)))))
    assert np.abs(plain - whole).max() < 1e-5  # M - S and S + D round to float32
    *_, x = problem.path(both_ways(TopK(k=8)), lr=0.05, rounds=600)
    assert np.abs(x - problem.best).max() < 1e-4


def test_ef21_compressed_models(rng):
    """EF21-P: the model itself is broadcast, and gradients are taken at the replica."""
    problem = Quadratics(rng)
    start = rng.standard_normal(40).astype(np.float32)
    server = Downlink(TopK(k=4), EF21(), like=start)
    server.start_at(start)
    replicas = [Replica(start, start) for _ in range(problem.n)]
    x, w = start.astype(np.float64), [start] * problem.n
    for t in range(300):
        x = x - 0.1 * np.mean([wi - c for wi, c in zip(w, problem.c, strict=True)], axis=0)
        packet = server.send(x.astype(np.float32), round=t)
        w = [replica.apply(packet) for replica in replicas]
        assert all(wi.tobytes() == server.value.tobytes() for wi in w)
    assert np.abs(x - problem.best).max() < 1e-6


def test_ef21_heavy_ball(rng):
    """EF21-HB: x <- x - lr V, V <- eta V + H is FedAvgM along H; eta = 0 is EF21."""
    problem, lr, eta = Quadratics(rng), 0.05, 0.5
    paths = {}
    for momentum in (0.0, eta):
        compress, x = ef21(problem, TopK(k=4), start="dense"), np.zeros(40)
        optimizer = FedAvgM(lr=lr, momentum=momentum)
        path = []
        for t in range(200):
            x = optimizer.step(x, [-compress(t, x - problem.c)])
            path.append(x)
        paths[momentum] = np.array(path)
    plain = np.array(list(problem.path(ef21(problem, TopK(k=4), start="dense"), lr, 200)))
    assert np.abs(paths[0.0] - plain).max() < 1e-12
    compress, x, v = ef21(problem, TopK(k=4), start="dense"), np.zeros(40), np.zeros(40)
    for t in range(200):
        v = eta * v + compress(t, x - problem.c)
        x = x - lr * v
        assert np.abs(x - paths[eta][t]).max() < 1e-12
    assert np.abs(x - problem.best).max() < 1e-4


def test_ef21_plus(rng):
    """EF21+ sends C(g - h) or, replacing h, C(g), whichever comes closer to g."""
    d, codec = 40, TopK(k=4)
    encoder = Encoder(codec, EF21(), like=np.zeros(d, np.float32))
    plain = Encoder(codec, EF21(), like=np.zeros(d, np.float32))
    server = ControlledSum(np.zeros(d), 1, keep_h=True)
    replaced = 0
    for t in range(40):
        g = (rng.standard_normal(d) * 10.0 ** rng.integers(-2, 2)).astype(np.float32)
        before = encoder.state_dict()
        packet = encoder.encode(g, round=t)
        gaps = [np.sum((g - encoder.h) ** 2)]
        alone = Encoder(codec, EF21(), like=g)
        alone.load_state_dict(before | {"h": np.zeros(d, np.float32)})
        alone.encode(g, round=t)
        gaps.append(np.sum((g - alone.h) ** 2))
        if gaps[1] < gaps[0]:
            encoder.load_state_dict(alone.state_dict())
            packet, replaced = encoder.resync(round=t), replaced + 1
        assert server.add(0, packet)
        plain.encode(g, round=t)
        assert np.sum((g - encoder.h) ** 2) == min(gaps)
        assert server.h(0).tobytes() == encoder.h.tobytes()
    assert 5 < replaced < 40

"""The server's sum of estimates: in step with its clients, whatever is lost or repeated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flcore.compression import (
    EF14,
    EF21,
    ControlledSum,
    EControl,
    Encoder,
    EpochError,
    PacketError,
    TopK,
    decode,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError

G = np.array([4, -3, 2, 1], np.float32)
TOP = TopK(ratio=0.1)


def mean_h(clients, weights):
    """The float64 mean that the server should hold."""
    return np.average([c.h.astype(np.float64) for c in clients], axis=0, weights=weights)


def gradients(rng, n, d):
    return rng.standard_normal((n, d)).astype(np.float32) + np.arange(n, dtype=np.float32)[:, None]


@pytest.mark.parametrize("keep_h", [False, True, "folder"])
@pytest.mark.parametrize("feedback", [EF21(), EF21(momentum=0.2), EControl()], ids=repr)
def test_two_hundred_rounds_with_drop_outs(feedback, keep_h, rng, tmp_path):
    """30 % of the clients are absent in a round: h agrees bit for bit, H with the mean of all h."""
    n, d = 8, 300
    weights = [1.0, 2.0, 3.5, 1.0, 0.25, 4.0, 1.0, 7.0]
    clients = [Encoder(TOP, feedback, like=np.zeros(d, np.float32), client=i) for i in range(n)]
    keep = tmp_path / "h" if keep_h == "folder" else keep_h
    server = ControlledSum(np.zeros(d), sum(weights), keep_h=keep)
    for t in range(200):
        present = np.flatnonzero(rng.random(n) < 0.7)
        for i, g in zip(present, gradients(rng, present.size, d), strict=True):
            assert server.add(int(i), bytes(clients[i].encode(g, round=t)), weights[i])
        if t % 20 == 19:
            want = mean_h(clients, weights)
            assert np.abs(server.result() - want).max() <= 1e-5 * np.abs(want).max()
    for i in range(n):
        if keep_h:
            assert server.h(i).tobytes() == clients[i].h.tobytes()
    if keep_h == "folder":
        files = sorted((tmp_path / "h").iterdir())
        assert [f.stat().st_size for f in files] == [4 * d] * n


def test_sum_is_the_mean_of_the_estimates_in_every_round(rng):
    """Exactly, where the estimates are sums of few small integers."""
    n, d = 4, 100
    clients = [Encoder(TOP, EF21(), like=np.zeros(d, np.float32)) for _ in range(n)]
    server = ControlledSum(np.zeros(d), n)
    for t in range(30):
        for i in np.flatnonzero(rng.random(n) < 0.5):
            g = rng.integers(-8, 9, d).astype(np.float32)
            server.add(int(i), clients[i].encode(g, round=t))
        assert np.array_equal(server.result(), mean_h(clients, np.ones(n)))


def test_partial_participation_with_everybody_is_the_whole(rng):
    """EF21-PP with all clients present is EF21: x follows the same path."""
    n, d, lr = 3, 40, 0.1
    points = rng.standard_normal((n, d))

    def path(sampled):
        clients = [Encoder(TOP, EF21(), like=np.zeros(d)) for _ in range(n)]
        server, x = ControlledSum(np.zeros(d), n), np.zeros(d)
        for t in range(20):
            for i in sampled(t):
                server.add(i, clients[i].encode(x - points[i], round=t))
            x = x - lr * server.result()
        return x

    everybody = path(lambda t: range(n))
    assert np.array_equal(everybody, path(lambda t: np.arange(n).tolist()))
    assert not np.array_equal(everybody, path(lambda t: [t % n]))


# ---- packets that do not follow ----------------------------------------------------------------


def pair(keep_h=True, rounds=3):
    encoder = Encoder(TopK(k=1), EControl(eta=0.5), like=G)
    server = ControlledSum(G, 1.0, keep_h=keep_h)
    packets = [encoder.encode(G, round=t) for t in range(rounds)]
    for packet in packets:
        assert server.add("a", packet)
    return encoder, server, packets


@pytest.mark.parametrize("keep_h", [False, True])
def test_repeated_packets_are_added_once(keep_h):
    encoder, server, packets = pair(keep_h)
    before = server.result()
    for packet in reversed(packets):
        assert not server.add("a", packet) and not server.add("a", bytes(packet))
    assert np.array_equal(server.result(), before) and not server.waiting
    assert server.add("a", encoder.encode(G))
    assert np.array_equal(server.result(), encoder.h)


def test_lost_packet_is_added_late_or_replaced():
    encoder, server, _ = pair()
    lost, after = encoder.encode(G), encoder.encode(G)
    with pytest.raises(EpochError, match="expected epoch 3, got 4: 1 before it were not") as caught:
        server.add("a", after)
    assert (caught.value.client, caught.value.expected, caught.value.got) == ("a", 3, 4)
    assert server.add("a", lost) and server.add("a", after)
    assert np.array_equal(server.result(), encoder.h)
    encoder.encode(G)
    latest = encoder.encode(G)
    with pytest.raises(EpochError):
        server.add("a", latest)
    assert server.add("a", encoder.resync()) and not server.waiting
    assert np.array_equal(server.result(), encoder.h)
    assert not server.add("a", encoder.resync())  # a repeated one
    assert server.add("a", encoder.encode(G))
    assert np.array_equal(server.h("a"), encoder.h)


@pytest.mark.parametrize("way", ["forget", "resync"])
def test_client_that_started_anew(way):
    _, server, _ = pair()
    encoder = Encoder(TopK(k=1), EControl(eta=0.5), like=G)
    first = encoder.encode(2 * G)
    with pytest.raises(EpochError, match="expected epoch 3, got 0: it started anew; forget"):
        server.add("a", first)
    assert server.waiting == ["a"]
    if way == "forget":
        server.forget("a")
        assert not server.result().any() and server.add("a", first)
    else:
        for _ in range(2):
            with pytest.raises(EpochError, match=r"it started anew|it took an old state"):
                server.add("a", encoder.encode(2 * G))
        with pytest.raises(EpochError, match="got 3: its count fell back before"):
            server.add("a", encoder.encode(2 * G))  # the count fits again, the state does not
        assert server.add("a", encoder.resync())
    assert np.array_equal(server.result(), encoder.h) and not server.waiting
    assert server.add("a", encoder.encode(2 * G))
    assert np.array_equal(server.h("a"), encoder.h)


def test_client_that_took_an_old_state():
    encoder, server, _ = pair()
    saved = encoder.state_dict()
    for _ in range(2):
        server.add("a", encoder.encode(G))
    encoder.load_state_dict(saved)
    assert not server.add("a", encoder.encode(G))  # the very packet that was added before
    packet = encoder.encode(2 * G)
    with pytest.raises(EpochError, match="expected epoch 5, got 4: it took an old state"):
        server.add("a", packet)
    server.add("a", encoder.resync())
    assert np.array_equal(server.result(), encoder.h)


def test_resynchronising_everybody_without_their_estimates(rng):
    n, d = 3, 50
    clients = [Encoder(TOP, EControl(), like=np.zeros(d)) for _ in range(n)]
    server = ControlledSum(np.zeros(d), n)
    for t in range(5):
        for i in range(n):
            server.add(i, clients[i].encode(rng.standard_normal(d), round=t))
    clients[1] = Encoder(TOP, EControl(), like=np.zeros(d))  # its state is lost
    packet = clients[1].encode(rng.standard_normal(d))
    with pytest.raises(EpochError):
        server.add(1, packet)
    with pytest.raises(InvalidInputError, match="known only with keep_h"):
        server.add(1, clients[1].resync())
    with pytest.raises(InvalidInputError, match="forget\\(\\) all clients instead"):
        server.forget(1)
    server.forget()
    for i in range(n):
        assert server.add(i, clients[i].resync())
    assert np.allclose(server.result(), mean_h(clients, np.ones(n)), rtol=1e-14)
    for i in range(n):
        assert server.add(i, clients[i].encode(rng.standard_normal(d)))
    assert np.allclose(server.result(), mean_h(clients, np.ones(n)), rtol=1e-6)


def test_resync_states_that_nothing_was_sent():
    encoder = Encoder(TopK(k=1), EF21(), like=G)
    server = ControlledSum(G, 1)
    assert encoder.resync().header.epoch == 2**32 - 1
    assert server.add(0, encoder.resync()) and server.add(0, encoder.encode(G))
    assert np.array_equal(server.result(), [4, 0, 0, 0])


@pytest.mark.parametrize("feedback", [EF21(), EF21(momentum=0.5), EControl()], ids=repr)
def test_warm_start_sends_the_first_update_in_full(feedback):
    encoder = Encoder(TopK(k=1), feedback, like=G, start="dense")
    server = ControlledSum(G, 1)
    first = encoder.encode(G)
    assert server.add(0, first) and first.header.epoch == 0
    assert np.array_equal(server.result(), G) and np.array_equal(encoder.h, G)
    second = encoder.encode(2 * G)
    assert second.header.increment and np.count_nonzero(decode(second)) == 1
    assert server.add(0, second)
    assert np.array_equal(server.result(), encoder.h)


def test_lost_rounds_and_restarts_at_random(rng):
    """Whatever happens, a server that does as the errors say ends in step with its clients."""
    n, d = 5, 80
    clients = [Encoder(TOP, EControl(), like=np.zeros(d)) for _ in range(n)]
    server = ControlledSum(np.zeros(d), n, keep_h=True)
    saved = [c.state_dict() for c in clients]
    refused = 0
    for t in range(200):
        for i in np.flatnonzero(rng.random(n) < 0.7).tolist():
            event = rng.random()
            if event < 0.02:
                clients[i].reset()
            elif event < 0.04:
                clients[i].load_state_dict(saved[i])
            elif event < 0.06:
                saved[i] = clients[i].state_dict()
            packet = clients[i].encode(rng.standard_normal(d), round=t)
            if event > 0.95:
                continue  # lost on its way
            try:
                server.add(i, packet)
            except EpochError:
                refused += 1
                assert server.add(i, clients[i].resync(round=t))
            if event > 0.9:
                assert not server.add(i, packet)  # twice
    for i in range(n):
        server.add(i, clients[i].resync(round=200))
        assert server.h(i).tobytes() == clients[i].h.tobytes()
    assert refused > 20
    want = mean_h(clients, np.ones(n))
    assert np.abs(server.result() - want).max() < 1e-6
    server.refresh()
    assert np.abs(server.result() - want).max() < 1e-15


# ---- weights, units, state ---------------------------------------------------------------------


def test_weights_stay_unless_estimates_are_kept(rng):
    clients = [Encoder(TopK(k=2), EF21(), like=G) for _ in range(2)]
    server = ControlledSum(G, 3.0)
    for i in range(2):
        server.add(i, clients[i].encode((i + 1) * G), weight=i + 1)
    with pytest.raises(InvalidInputError, match=r"expected 2.0 as before for client 1, got 1.0"):
        server.add(1, clients[1].encode(G), weight=1)
    with pytest.raises(InvalidInputError, match=r"the weights sum to 4.0, more than the total"):
        server.add(2, Encoder(TopK(k=1), EF21(), like=G).encode(G))
    server = ControlledSum(G, 3.0, keep_h=True)
    clients = [Encoder(TopK(k=2), EF21(), like=G) for _ in range(2)]
    for i in range(2):
        server.add(i, clients[i].encode((i + 1) * G), weight=i + 1)
    server.add(1, clients[1].encode(G), weight=0.5)
    assert server.total_weight == 1.5
    assert np.allclose(server.result(), mean_h(clients, [1, 0.5]))


def test_another_unit_of_the_updates(rng):
    """A rate that halves: e, h, H scale along, bit for bit, and nothing is lost."""
    d = 60
    clients = [Encoder(TopK(k=6), EControl(), like=np.zeros(d)) for _ in range(2)]
    scaled = [Encoder(TopK(k=6), EControl(), like=np.zeros(d)) for _ in range(2)]
    servers = [ControlledSum(np.zeros(d), 2, keep_h=True) for _ in range(2)]
    for t in range(6):
        if t == 3:
            for encoder in scaled:
                encoder.rescale(0.5)
            servers[1].rescale(0.5)
        for i in range(2):
            g = rng.standard_normal(d)
            servers[0].add(i, clients[i].encode(g, round=t))
            servers[1].add(i, scaled[i].encode(g if t < 3 else g / 2, round=t))
    assert np.array_equal(servers[0].result() / 2, servers[1].result())
    for i in range(2):
        assert np.array_equal(clients[i].e / 2, scaled[i].e)
        assert servers[1].h(i).tobytes() == scaled[i].h.tobytes()
    for wrong in (0, -1, float("nan"), float("inf"), "2", True):
        with pytest.raises(InvalidInputError, match="factor: expected a positive finite"):
            servers[0].rescale(wrong)


@pytest.mark.parametrize("keep_h", [False, True])
def test_saved_server_goes_on_bit_for_bit(keep_h, rng, tmp_path):
    encoder, server, packets = pair(keep_h)
    state = server.state_dict()
    plain = {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}
    state = json.loads(json.dumps(plain)) | {
        k: v for k, v in state.items() if isinstance(v, np.ndarray)
    }
    keep = tmp_path if keep_h else False
    other = ControlledSum(G, 9.0, keep_h=keep)
    other.load_state_dict(state)
    packet = encoder.encode(G)
    assert other.add("a", packet) and server.add("a", packet)
    assert not other.add("a", packets[1])
    assert np.array_equal(server.result(), other.result())
    if keep_h:
        assert np.array_equal(other.h("a"), encoder.h)
    for change, match in (
        ({"numel": 3}, r"state\['numel'\]"),
        ({"sum": np.zeros(4, np.float32)}, r"state\['sum'\]: expected float64"),
        ({"sum": np.full(4, np.inf)}, "expected finite"),
        ({"total_weight": 0}, "total_weight"),
        ({"clients": [{"client": 1}]}, "state"),
        ({"more": 1}, "state: expected"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            other.load_state_dict(state | change)
    assert np.array_equal(server.result(), other.result())


def test_structures_and_types():
    torch = pytest.importorskip("torch")
    like = {"w": torch.zeros(2, 1, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.bfloat16)}
    encoder = Encoder(TopK(k=4), EF21(), like=G)
    server = ControlledSum(like, 2.0, dtype="float32")
    server.add(0, encoder.encode(G))
    mean = server.result()
    assert mean["w"].tolist() == [[2.0], [-1.5]] and mean["b"].dtype == torch.bfloat16
    out = {name: torch.ones_like(x) for name, x in like.items()}
    assert server.result(out=out) is out and out["b"].tolist() == [1.0, 0.5]


def test_packets_that_do_not_belong():
    server = ControlledSum(G, 1)
    with pytest.raises(PacketError, match="expected 4 values, got 5"):
        server.add(0, Encoder(TopK(k=1), EF21(), like=np.zeros(4)).encode(np.zeros(4)) and
                   Encoder(TopK(k=1), EF21(), like=np.zeros(5)).encode(np.zeros(5)))  # fmt: skip
    with pytest.raises(PacketError, match="its encoder needs EControl or EF21"):
        server.add(0, Encoder(TopK(k=1), EF14(), like=G).encode(G))
    with pytest.raises(PacketError):
        server.add(0, b"FLCU")
    with pytest.raises(DTypeError):
        server.add(0, "text")
    with pytest.raises(EpochError, match="expected epoch 0, got 1"):
        encoder = Encoder(TopK(k=1), EF21(), like=G)
        encoder.encode(G)
        server.add(0, encoder.encode(G))
    with pytest.raises(InvalidInputError, match="made without keep_h"):
        server.h(0)
    with pytest.raises(InvalidInputError, match="made without keep_h"):
        server.refresh()
    assert not server.result().any() and not server.waiting
    for arguments, error, match in (
        (((np.arange(3),), 1), DTypeError, "like.*int64"),
        ((G, 0), InvalidInputError, "total_weight: expected a positive"),
        ((G, "1"), InvalidInputError, "total_weight: expected a positive"),
    ):
        with pytest.raises(error, match=match):
            ControlledSum(*arguments)
    with pytest.raises(InvalidInputError, match="dtype: expected float64 or float32"):
        ControlledSum(G, 1, dtype="float16")


def test_updates_that_were_not_finite():
    encoder = Encoder(TopK(k=1), EControl(), like=G, nonfinite="skip")
    server = ControlledSum(G, 1)
    server.add(0, encoder.encode(G))
    before = server.result()
    assert not server.add(0, encoder.encode(np.full_like(G, np.nan)))
    assert np.array_equal(server.result(), before)
    assert server.add(0, encoder.encode(G))
    encoder = Encoder(TopK(k=1), EControl(), like=G, start="dense")
    with pytest.raises(NonFiniteError):
        encoder.encode(np.full_like(G, np.inf))
    assert encoder.epoch == 0 and not encoder.h.any()

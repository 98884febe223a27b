"""LowRank in an encoder, and PowerSGD over rounds: error rules, clients that come and go."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import Accumulator, Median, TrimmedMean
from flcore.compression import (
    CODECS,
    EF14,
    EControl,
    Encoder,
    LowRank,
    PowerSGD,
    PowerSGDClient,
    Sketch,
    TopK,
    decode,
    decode_add,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.reference import low_rank as reference

SHAPES = [(40, 30), (7,), (20, 5, 6)]


def update_of(rng, shapes=SHAPES):
    return [np.asarray(rng.standard_normal(s), np.float32) for s in shapes]


def flat(update) -> np.ndarray:
    return np.concatenate([x.reshape(-1) for x in update])


# ---- the codec -----------------------------------------------------------------------------------


def test_encoder_keeps_what_is_not_sent(rng):
    first = update_of(rng)
    encoder = Encoder(LowRank(rank=2), EF14(), like=first)
    sent, total = np.zeros(encoder.numel), np.zeros(encoder.numel)
    for i in range(5):
        g = update_of(rng)
        total += flat(g)
        sent += decode(encoder.encode(g, round=i, seed=1))
    np.testing.assert_allclose(sent + encoder.e, total, atol=2e-5)
    assert not encoder.e[1200:1207].any()  # the vector is sent as it is


def test_warm_start_follows_the_largest_directions(rng):
    g = (rng.standard_normal((60, 50)) * 0.9 ** np.arange(50)).astype(np.float32)
    warm, losses = Encoder(LowRank(rank=3), like=g), []
    for i in range(8):
        losses.append(np.linalg.norm(g - decode(warm.encode(g, round=i, seed=1), like=g)))
    best = np.sqrt((np.linalg.svd(g)[1][3:] ** 2).sum())
    cold = Encoder(LowRank(rank=3), like=g)
    assert best <= losses[-1] < 1.05 * best < losses[0]
    assert np.linalg.norm(g - decode(cold.encode(g, seed=1), like=g)) == losses[0]


def test_packets_save_what_the_factors_say(rng):
    g = rng.standard_normal((400, 300)).astype(np.float32)
    assert Encoder(LowRank(rank=4), like=g).encode(g).nbytes < 4 * 4 * 700 + 600
    half = Encoder(LowRank(rank=4, values="bfloat16"), like=g).encode(g)
    assert half.nbytes < 2 * 4 * 700 + 600 and half.header.value_dtype == "bfloat16"


def test_start_sends_whole_packets_first(rng):
    g = update_of(rng)
    encoder = Encoder(LowRank(rank=1, start=2), EF14(), like=g)
    sizes = []
    for i in range(4):
        packet = encoder.encode(g, round=i)
        sizes.append(packet.nbytes)
        if i < 2:
            assert decode(packet).tobytes() == flat(g).tobytes() and not encoder.e.any()
    assert sizes[0] == sizes[1] > 4 * 1807 > sizes[2] == sizes[3]


@pytest.mark.parametrize("feedback", [None, EF14(), EControl()])
def test_a_restored_encoder_goes_on_bit_for_bit(feedback, rng):
    updates = [update_of(rng) for _ in range(5)]
    one = Encoder(LowRank(rank=2, start=1), feedback, like=updates[0], client=3)
    for i in range(3):
        one.encode(updates[i], round=i, seed=8)
    two = Encoder(LowRank(rank=2, start=1), feedback, like=updates[0], client=3)
    two.load_state_dict(one.state_dict())
    for i in range(3, 5):
        assert one.encode(updates[i], round=i, seed=8) == two.encode(updates[i], round=i, seed=8)
    one.reset()
    fresh = Encoder(LowRank(rank=2, start=1), feedback, like=updates[0], client=3)
    for i in range(2):
        assert one.encode(updates[i], round=i, seed=8) == fresh.encode(updates[i], round=i, seed=8)


def test_a_failed_update_changes_nothing(rng):
    good, bad = update_of(rng), update_of(rng)
    bad[2][3, 2, 1] = np.nan
    encoder = Encoder(LowRank(), EF14(), like=good)
    encoder.encode(good)
    before = encoder.state_dict()
    with pytest.raises(NonFiniteError, match=r"update\[2\].*nan"):
        encoder.encode(bad)
    after = encoder.state_dict()
    assert all(np.array_equal(before[k], after[k]) for k in before)
    skipping = Encoder(LowRank(), EF14(), like=good, nonfinite="skip")
    assert skipping.encode(bad).header.nonfinite and not skipping.e.any()


def test_any_mix_of_codecs_adds_up(rng):
    g = update_of(rng)
    packets = [
        Encoder(codec, like=g).encode(g, seed=2)
        for codec in (LowRank(rank=1), TopK(k=9), LowRank(rank=2, values="bfloat16"))
    ]
    out = np.zeros(1807, np.float32)
    decode_add(packets, [1.0, -0.5, 2.0], out)
    want = np.zeros(1807, np.float32)
    for p, w in zip(packets, (1.0, -0.5, 2.0), strict=True):
        want = want + np.float32(w) * decode(p)
    assert np.array_equal(out, want)


def test_robust_rules_read_the_packets(rng):
    updates = [update_of(rng) for _ in range(5)]
    codecs = (LowRank(rank=1), LowRank(rank=2), Sketch(columns=200, rows=3), TopK(k=900))
    packets = [
        Encoder(codecs[i % 4], like=g, client=i).encode(g, seed=2) for i, g in enumerate(updates)
    ]
    dense = np.stack([decode(p) for p in packets])
    assert np.array_equal(TrimmedMean(1)(packets), TrimmedMean(1)(dense))
    assert np.array_equal(Median()(packets), Median()(dense))
    total = Accumulator(np.zeros(1807, np.float32))
    for p in packets:
        total.add(p, 2.0)
    np.testing.assert_allclose(total.result(), dense.mean(axis=0), atol=1e-5)


def test_settings(rng):
    codec = LowRank(rank=3, values="bfloat16", start=4)
    assert LowRank.from_dict(codec.to_dict()) == codec and CODECS["low_rank"] is LowRank
    assert hash(codec) == hash(LowRank(rank=3, values="bfloat16", start=4))
    for options, match in (
        ({"rank": 0}, "rank: expected an integer from 1 to 32"),
        ({"rank": 33}, "rank"),
        ({"rank": True}, "rank"),
        ({"min_compression": -1}, "min_compression"),
        ({"min_compression": float("nan")}, "min_compression"),
        ({"values": "float16"}, "values: expected one of float32, bfloat16"),
        ({"start": -1}, "start"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            LowRank(**options)
    with pytest.raises(InvalidInputError, match="at most 8 dimensions"):
        Encoder(LowRank(), like=np.zeros((1,) * 9, np.float32))


# ---- messages that are summed --------------------------------------------------------------------


def make(shapes=SHAPES, clients=4, rank=2, **options):
    like = [np.zeros(s, np.float32) for s in shapes]
    settings = {"rank": rank, "min_compression": 1.0, "seed": 5}
    return PowerSGD(like, **settings), [
        PowerSGDClient(like, **settings, **options) for _ in range(clients)
    ]


def test_rounds_follow_the_definition(rng):
    server, clients = make()
    e = [[np.zeros(s) for s in SHAPES] for _ in clients]
    for t in range(6):
        factor = server.plan.parts(server.factor.copy(), "p" if t % 2 else "q")
        assert all(c.factor.tobytes() == server.factor.tobytes() for c in clients)
        updates = [update_of(rng) for _ in clients]
        messages = [c.message(g) for c, g in zip(clients, updates, strict=True)]
        packet = server.step(messages)
        for c in clients:
            c.settle(packet)
        got = decode(packet, like=updates[0])
        for layer, shape in enumerate(SHAPES):
            u = [(g[layer] + x[layer]) for g, x in zip(updates, e, strict=True)]
            mean = sum(u) / len(u)
            if len(shape) == 1:
                want = mean
                for x in e:
                    x[layer] = np.zeros(shape)
            else:
                f = factor[layer].astype(float)  # orthonormal: P of n rows or Q^T of r rows
                matrix = mean.reshape(shape[0], -1)
                np.testing.assert_allclose(f.T @ f if t % 2 else f @ f.T, np.eye(2), atol=1e-6)
                want = (f @ f.T @ matrix if t % 2 else matrix @ f.T @ f).reshape(shape)
                for x, own in zip(e, u, strict=True):
                    x[layer] = own - want
            np.testing.assert_allclose(got[layer], want, atol=1e-4)
        for c, x in zip(clients, e, strict=True):
            np.testing.assert_allclose(c.e, flat(x), atol=2e-4)


def test_residuals_sum_to_what_the_sum_lacks(rng):
    server, clients = make(clients=5)
    for _ in range(5):
        updates = [update_of(rng) for _ in clients]
        u = sum(flat(g) + c.e for g, c in zip(updates, clients, strict=True))
        packet = server.step([c.message(g) for c, g in zip(clients, updates, strict=True)])
        for c in clients:
            c.settle(packet)
        left = sum(c.e.astype(float) for c in clients)
        np.testing.assert_allclose(left, u - 5 * decode(packet), atol=1e-4)


def test_the_own_error_needs_no_answer(rng):
    server, clients = make(error="own", clients=2)
    for t in range(4):
        updates = [update_of(rng) for _ in clients]
        messages = []
        for c, g in zip(clients, updates, strict=True):
            u = flat(g) + c.e
            m = c.message(g)
            p, q = (c.factor, m[: server.plan.q]) if t % 2 else (m[: server.plan.p], c.factor)
            sent = [
                reference.product(x, y).reshape(-1) if r else np.zeros(n, np.float32)
                for x, y, r, n in zip(server.plan.parts(p, "p"), server.plan.parts(q, "q"),
                                      server.plan.rank, server.plan.numel, strict=True)
            ]  # fmt: skip
            want = u - np.concatenate(sent)
            want[1200:1207] = 0
            np.testing.assert_allclose(c.e, want, atol=1e-5)
            messages.append(m)
        packet = server.step(messages, weights=[1, 3])
        for c in clients:
            before = c.e.copy()
            c.settle(packet)
            assert np.array_equal(c.e, before)


def test_messages_may_be_summed_anywhere(rng):
    one, clients = make()
    two, _ = make()
    for _ in range(3):
        messages = [c.message(update_of(rng)) for c in clients]
        mean = (np.sum(messages, axis=0, dtype=np.float64) / len(messages)).astype(np.float32)
        packet, other = one.step(messages), two.step_mean(mean)
        np.testing.assert_allclose(decode(packet), decode(other), atol=1e-5)
        for c in clients:
            c.settle(packet)
        two.factor = one.factor


def test_a_client_that_was_away_takes_the_last_packet(rng):
    server, (here, away) = make(clients=2)
    for t in range(5):
        messages = [here.message(update_of(rng))]
        if t == 0:
            messages.append(away.message(update_of(rng)))
        packet = server.step(messages)
        here.settle(packet)
        if t in (0, 3):
            away.settle(packet)
    assert away.round == 4 and here.round == server.round == 5
    away.settle(packet)
    assert away.factor.tobytes() == here.factor.tobytes() == server.factor.tobytes()
    with pytest.raises(InvalidInputError, match="round 5 or a later one, got 4"):
        away.settle(packet)


def test_layers_without_gradient_come_alive(rng):
    server, (client,) = make(clients=1)
    zero = [np.zeros(s, np.float32) for s in SHAPES]
    for _ in range(3):
        client.settle(server.step([client.message(zero)]))
    g = update_of(rng)
    packet = server.step([client.message(g)])
    client.settle(packet)
    sent = decode(packet, like=g)
    assert all(x.any() for x in sent) and client.factor.tobytes() == server.factor.tobytes()


def test_mistakes_of_rounds_are_named(rng):
    server, (client, _) = make(clients=2)
    g = update_of(rng)
    message = client.message(g)
    with pytest.raises(InvalidInputError, match="round 0 has one already"):
        client.message(g)
    with pytest.raises(InvalidInputError, match="at least one"):
        server.step([])
    with pytest.raises(InvalidInputError, match=r"messages\[0\]: expected"):
        server.step([message[1:]])
    with pytest.raises(DTypeError, match=r"messages\[0\]: expected a float32"):
        server.step([message.astype(float)])
    with pytest.raises(InvalidInputError, match="weights"):
        server.step([message], weights=[0])
    bad = message.copy()
    bad[3] = np.inf
    with pytest.raises(NonFiniteError):
        server.step([bad])
    assert server.round == 0
    other = Encoder(TopK(k=3), like=g).encode(g)
    with pytest.raises(InvalidInputError, match="expected low_rank factors"):
        client.settle(other)
    with pytest.raises(InvalidInputError, match="error: expected common or own"):
        PowerSGDClient(g, error="all")
    g[0][0, 0] = np.nan
    before = client.e.copy()
    client.settle(server.step([message]))
    before = client.e.copy()
    with pytest.raises(NonFiniteError):
        client.message(g)
    assert np.array_equal(client.e, before)

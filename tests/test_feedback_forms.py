"""LoCo, EF21 with and without momentum, and DGC: the examples of the papers and their limits."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.compression import CODECS, DGC, EF14, EF21, FEEDBACKS, EControl, Encoder, TopK, decode
from flcore.compression._codec import Codec
from flcore.errors import InvalidInputError

G = np.array([4, -3, 2, 1], np.float32)


def test_tables_of_settings():
    assert CODECS["topk"] is TopK and all(issubclass(c, Codec) for c in CODECS.values())
    assert all(CODECS[name].name == name for name in CODECS)
    for feedback in (EF14(0.9, reset_every=5), EF21(0.1), EF21(), EControl(), DGC(0.8, False)):
        described = feedback.to_dict()
        assert FEEDBACKS[described["feedback"]].from_dict(described) == feedback


def test_loco_decays_and_forgets():
    encoder = Encoder(TopK(k=1), EF14(decay=0.5, reset_every=2), like=G)
    for sent, e in (
        ([4, 0, 0, 0], [0, -3, 2, 1]),
        ([0, -4.5, 0, 0], [4, 0, 3, 1.5]),
        ([4, 0, 0, 0], [0, -3, 2, 1]),  # as the first: e was forgotten
        ([0, -4.5, 0, 0], [4, 0, 3, 1.5]),
    ):
        assert decode(encoder.encode(G)).tolist() == sent and encoder.e.tolist() == e


def test_ef21_worked_example():
    encoder = Encoder(TopK(k=1), EF21(), like=G)
    for at, value in ((0, 4), (1, -3), (2, 2), (3, 1)):
        packet = encoder.encode(G)
        assert packet.header.increment
        assert packet.body().indices.tolist() == [at] and packet.body().values.tolist() == [value]
    assert encoder.h.tolist() == G.tolist()
    assert not decode(encoder.encode(G)).any()


def test_ef21_momentum_worked_example():
    encoder = Encoder(TopK(k=1), EF21(momentum=0.5), like=G)
    for v, at, value in (
        ([2, -1.5, 1, 0.5], 0, 2),
        ([3, -2.25, 1.5, 0.75], 1, -2.25),
        ([3.5, -2.625, 1.75, 0.875], 2, 1.75),
    ):
        packet = encoder.encode(G)
        assert encoder.v.tolist() == v
        assert packet.body().indices.tolist() == [at] and packet.body().values.tolist() == [value]


def test_ef21_without_compression_is_the_update(rng):
    """h = g; with momentum, its running mean."""
    plain = Encoder(TopK(ratio=1.0), EF21(), like=np.zeros(50, np.float32))
    mean = Encoder(TopK(ratio=1.0), EF21(momentum=0.25), like=np.zeros(50, np.float32))
    v = np.zeros(50)
    for _ in range(4):
        g = rng.integers(-8, 9, 50).astype(np.float32)  # sums in float32 are exact
        plain.encode(g)
        mean.encode(g)
        v = 0.75 * v + 0.25 * g
        assert np.array_equal(plain.h, g) and np.array_equal(mean.h, v)


def test_ef21_with_all_the_momentum_is_ef21(rng):
    plain, one = (Encoder(TopK(k=6), f, like=np.zeros(60)) for f in (EF21(), EF21(momentum=1.0)))
    for t in range(10):
        g = rng.standard_normal(60)
        assert plain.encode(g, round=t) == one.encode(g, round=t)


def test_ef21_contracts_and_recovers_a_fixed_update(rng):
    """||g - h'||^2 <= (1 - k/d) ||g - h||^2, and exact after d/k rounds."""
    d, k = 60, 7
    g = rng.standard_normal(d).astype(np.float32)
    encoder = Encoder(TopK(k=k), EF21(), like=g)
    gap = np.sum(g.astype(float) ** 2)
    for _ in range(-(-d // k)):
        encoder.encode(g)
        left = np.sum((g.astype(float) - encoder.h) ** 2)
        assert left <= (1 - k / d) * gap
        gap = left
    assert np.array_equal(encoder.h, g)


def test_econtrol_without_memory_is_ef21_bit_for_bit(rng):
    one, two = (Encoder(TopK(k=6), f, like=np.zeros(60)) for f in (EControl(0.0), EF21()))
    for t in range(20):
        g = rng.standard_normal(60)
        assert one.encode(g, round=t) == two.encode(g, round=t)
        assert one.h.tobytes() == two.h.tobytes()


def test_dgc_worked_example():
    g = G
    encoder = Encoder(TopK(k=1), DGC(momentum=0.9), like=g)
    for m, e, at, value in (
        ([0, -3, 2, 1], [0, -3, 2, 1], 0, 4),
        ([4, 0, 3.8, 1.9], [4, 0, 5.8, 2.9], 1, -8.7),
    ):
        packet = encoder.encode(g)
        assert packet.body().indices.tolist() == [at]
        assert np.allclose(packet.body().values, value)
        assert np.allclose(encoder.v, m) and np.allclose(encoder.e, e)
        assert not packet.header.increment
    packet = encoder.encode(g)
    assert packet.body().indices.tolist() == [0] and np.allclose(packet.body().values, 11.6)


def test_dgc_without_compression_is_momentum(rng):
    encoder = Encoder(TopK(ratio=1.0), DGC(0.5, masking=False), like=np.zeros(40, np.float32))
    m = np.zeros(40)
    for _ in range(5):
        g = rng.integers(-8, 9, 40).astype(np.float32)
        m = 0.5 * m + g
        assert np.array_equal(decode(encoder.encode(g)), m)
        assert not encoder.e.any() and np.array_equal(encoder.v, m)


def test_density_of_the_warm_up():
    assert [DGC.density(epoch) for epoch in range(6)] == [0.25, 1 / 16, 1 / 64, 1 / 256, 1e-3, 1e-3]
    assert DGC.density(1, target=0.1) == 0.1
    encoder = Encoder(TopK(ratio=0.001), DGC(), like=np.zeros(1000))
    for epoch, k in ((0, 250), (1, 63), (4, 1)):
        codec = TopK(ratio=DGC.density(epoch))
        assert encoder.encode(np.ones(1000), codec=codec).k == k
    for arguments in ((-1,), (0.5,), (True,), (0, 0.0), (0, 2)):
        with pytest.raises(InvalidInputError, match=r"epoch: expected|target: expected"):
            DGC.density(*arguments)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EF14(reset_every=0), "reset_every: expected at least 1"),
        (lambda: EF14(reset_every=1.5), "reset_every: expected a whole number"),
        (lambda: EF21(momentum=0.0), "momentum: expected a number above 0"),
        (lambda: EF21(momentum=2), "momentum: expected a number above 0"),
        (lambda: DGC(momentum=-0.1), "momentum: expected a number from 0 to 1"),
        (lambda: DGC(masking=1), "masking: expected True or False"),
    ],
)
def test_settings_that_cannot_be_used(make, match):
    with pytest.raises(InvalidInputError, match=match):
        make()

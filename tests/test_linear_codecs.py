"""What the codecs on a grid promise: bias, error bounds, exact cases, settings, use with memory."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.compression import (
    CODECS,
    EF14,
    AbsMax,
    Affine,
    Encoder,
    Packet,
    Sign,
    Ternary,
    Uniform,
    decode,
    decode_add,
    from_text,
)
from flcore.errors import InvalidInputError
from flcore.reference import wire

U = np.array([0.5, -1, 2, 0, -0.25, 0.25, 0, 1], np.float32)
ALL = [
    Sign(),
    Sign(scale="l2", bucket=300),
    Sign(scale="two_means", scale_dtype="bfloat16"),
    Ternary(bucket=100),
    Ternary(clip=2.5, packing="bits"),
    *(AbsMax(bits=b) for b in range(2, 9)),
    AbsMax(bits=4, bucket=64, rounding="stochastic", scale_dtype="bfloat16"),
    Uniform(levels=4),
    Uniform(levels=127, rounding="nearest"),
    *(Affine(bits=b) for b in range(1, 9)),
    Affine(bits=2, rounding="stochastic", scale_dtype="bfloat16"),
]
IDS = [codec.to_text() for codec in ALL]


def sent(codec, u, round=0, seed=0):
    """What a server decodes, float64."""
    u = np.asarray(u, np.float32)
    packet = Encoder(codec, like=u).encode(u, round=round, seed=seed)
    return np.asarray(decode(Packet.from_bytes(bytes(packet)))).astype(np.float64)


def draws(codec, count, u=U):
    """Many decodings of u, (count, len(u)): its copies are the buckets of one update."""
    return sent(codec, np.tile(u, count), seed=1).reshape(count, -1)


def nmse(codec, u):
    x = np.asarray(u, np.float64)
    return float(((sent(codec, u) - x) ** 2).sum() / (x**2).sum())


# ---- unbiased codecs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "unit"),
    [
        (Uniform(levels=4, bucket=8), np.sqrt(6.375) / 4),
        (Uniform(levels=1, bucket=8), np.sqrt(6.375)),
        (AbsMax(bits=2, bucket=8, rounding="stochastic"), 2.0),
        (AbsMax(bits=4, bucket=8, rounding="stochastic"), 2 / 7),
        (Ternary(bucket=8), 2.0),
    ],
    ids=lambda x: x.to_text() if hasattr(x, "to_text") else "",
)
def test_unbiased_with_the_variance_of_the_formula(codec, unit):
    """E D = u within 4 sigma, sum of variances ``unit**2 f (1 - f)`` within 2 %."""
    count = 100_000
    d = draws(codec, count)
    f = np.abs(U) / unit % 1
    variance = unit**2 * f * (1 - f)
    sigma = np.sqrt(variance / count) + 1e-6
    assert (np.abs(d.mean(0) - U) <= 4 * sigma).all()
    assert ((d - U) ** 2).sum(1).mean() == pytest.approx(variance.sum(), rel=0.02)


def test_affine_is_unbiased():
    d = draws(Affine(bits=2, bucket=8, rounding="stochastic"), 50_000)
    assert np.abs(d.mean(0) - U).max() < 4 * 0.5 / np.sqrt(50_000)


def test_ternary_takes_three_values():
    d = draws(Ternary(bucket=8), 1000)
    assert set(np.unique(d)) == {-2.0, 0.0, 2.0}
    assert (d[:, 2] == 2).all() and (d[:, 3] == 0).all()
    assert sent(Ternary(), np.zeros(9)).tolist() == [0.0] * 9


def test_ternary_clip(rng):
    """Clipping at 2.5 root mean squares: about 32 % of the codes are not 0, and the error 1.0."""
    u = rng.standard_normal(65_536)
    clipped, free = Ternary(bucket=65_536, clip=2.5), Ternary(bucket=65_536)
    assert np.count_nonzero(sent(clipped, u)) / u.size == pytest.approx(0.317, abs=0.01)
    assert nmse(clipped, u) == pytest.approx(1.01, abs=0.05)
    assert nmse(free, u) > 2
    assert np.abs(sent(clipped, u)).max() == pytest.approx(2.5, rel=0.02)


def test_new_rounds_and_seeds_draw_new_numbers():
    codec = AbsMax(bits=2, rounding="stochastic")
    u = np.linspace(-1, 1, 500)
    first = sent(codec, u, round=1, seed=1)
    assert np.array_equal(first, sent(codec, u, round=1, seed=1))
    assert not np.array_equal(first, sent(codec, u, round=2, seed=1))
    assert not np.array_equal(first, sent(codec, u, round=1, seed=2))


# ---- error bounds --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_errors_stay_within_the_step(bits, scale_dtype, rng):
    """At most one unit when stochastic, half a unit when nearest; a little float32 rounding."""
    u = rng.standard_normal(5000).astype(np.float32) * np.repeat(10.0 ** np.arange(-10, 10), 250)
    u = u.astype(np.float32)
    a = np.repeat(np.abs(u.reshape(-1, 250)).max(1), 250).astype(np.float64)
    loose = 1 + 2.0**-7 if scale_dtype == "bfloat16" else 1 + 2.0**-14
    steps = 2 ** (bits - 1) - 1
    for rounding, most in (("nearest", 0.5), ("stochastic", 1.0)):
        codec = AbsMax(bits=bits, bucket=250, rounding=rounding, scale_dtype=scale_dtype)
        assert (np.abs(sent(codec, u) - u) <= most * loose * a / steps).all()
        low, high = (np.repeat(f(u.reshape(-1, 250), 1), 250) for f in (np.min, np.max))
        codec = Affine(bits=bits, bucket=250, rounding=rounding, scale_dtype=scale_dtype)
        size = high.astype(np.float64) - low + (np.abs(low) / 64 if loose > 1.001 else 0)
        allowed = most * loose * size / (2**bits - 1) + 1e-6 * np.abs(a)
        assert (np.abs(sent(codec, u) - u) <= allowed).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_nearest_rounding_twice_changes_nothing(bits, rng):
    u = rng.standard_normal(4000)
    codec = AbsMax(bits=bits, bucket=100)
    once = sent(codec, u)
    assert np.abs(sent(codec, once) - once).max() <= 1e-6 * np.abs(once).max()


# The table of squared errors of the literature, 2 % to 10 % around it.
@pytest.mark.parametrize(
    ("codec", "normal", "laplace"),
    [
        (AbsMax(bits=8, bucket=256), 5e-5, 1e-4),
        (AbsMax(bits=4, bucket=64), 0.0116, 0.0199),
        (AbsMax(bits=4, bucket=32), 0.0094, 0.0147),
        (Uniform(levels=127, bucket=512), 0.0053, None),
        (Affine(bits=4, bucket=1024, rounding="stochastic"), 0.032, None),
        (Sign(bucket=65_536), 1 - 2 / np.pi, 0.5),
        (Sign(bucket=65_536, scale="l2"), 0.404, None),
    ],
    ids=lambda x: x.to_text() if hasattr(x, "to_text") else "",
)
def test_squared_errors(codec, normal, laplace):
    rng = np.random.default_rng(0)
    assert nmse(codec, rng.standard_normal(262_144)) == pytest.approx(normal, rel=0.1)
    if laplace:
        assert nmse(codec, rng.laplace(size=262_144)) == pytest.approx(laplace, rel=0.1)


# ---- exact cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_ends_and_constant_blocks_are_exact(bits):
    u = np.concatenate([np.full(64, -3.3), np.linspace(-1, 3, 64), np.full(64, 0.7)])
    got = sent(Affine(bits=bits, bucket=64), u)
    want = u.astype(np.float32).astype(np.float64)
    assert np.array_equal(got[:64], want[:64]) and np.array_equal(got[128:], want[128:])
    assert got[64] == -1 and abs(got[127] - 3) <= 2.0**-21


@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_zeros_and_short_buckets(codec):
    assert not sent(codec, np.zeros(777)).any()
    assert np.isfinite(sent(codec, [2.5])).all() and sent(codec, []).size == 0
    if not isinstance(codec, Uniform) and codec.scale_dtype == "float32":
        assert sent(codec, [2.5]) == pytest.approx([2.5], rel=1e-6)
    ends = np.zeros(codec.bucket + 1)
    ends[-1] = 4.0
    assert np.isfinite(sent(codec, ends)).all() and not sent(codec, ends)[:-1].any()


@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_huge_tiny_and_mixed_values_decode_finite(codec):
    top = float(np.finfo(np.float32).max)
    for u in ([top, -top, 0, 1], [top] * 9, [-top] * 9, [1e-45, -1e-45, 1e-40, 0], [top, 1e-45]):
        assert np.isfinite(sent(codec, u)).all()
        assert np.abs(sent(codec, u)).max() <= top


def test_scales_of_bfloat16_are_rounded_up(rng):
    """So that nothing is cut: the last point of the grid is at or above the largest magnitude."""
    u = rng.standard_normal(10_000).astype(np.float32)
    top = np.abs(u).reshape(-1, 100).max(1)
    for bits in (2, 4, 8):
        codec = AbsMax(bits=bits, bucket=100, scale_dtype="bfloat16")
        body = wire.parse(bytes(Encoder(codec, like=u).encode(u)))[1]
        grid = body.scales[:, 0] * (2 ** (bits - 1) - 1)
        assert (grid >= top).all() and (grid <= top * (1 + 2.0**-7)).all()


# ---- sign ----------------------------------------------------------------------------------------


def test_sign_has_one_magnitude_and_the_least_error(rng):
    u = rng.standard_normal(5000).astype(np.float32).astype(np.float64)
    got = sent(Sign(bucket=5000), u)
    a = abs(got[0])
    assert (np.abs(got) == a).all() and a == pytest.approx(np.abs(u).mean(), rel=1e-7)
    assert np.array_equal(got < 0, u < 0)
    error = ((got - u) ** 2).sum()
    assert error == pytest.approx((u**2).sum() - np.abs(u).sum() ** 2 / u.size, rel=1e-6)
    for other in (0.99, 1.01):
        assert ((other * got - u) ** 2).sum() > error


def test_zeros_are_positive():
    got = sent(Sign(bucket=4), [0.0, -0.0, 4.0, -4.0])
    assert got.tolist() == [2, 2, 2, -2]


def test_two_means_is_never_worse(rng):
    for u in (rng.standard_normal(3000), rng.exponential(size=3000), rng.lognormal(size=3000) - 1):
        assert nmse(Sign(bucket=500, scale="two_means"), u) <= nmse(Sign(bucket=500), u) + 1e-7
    got = sent(Sign(bucket=4, scale="two_means"), [1, 3, -1, -5])
    assert got.tolist() == [2, 2, -3, -3]


def test_the_norm_as_scale_is_no_contraction(rng):
    """A vector with 1 % non-zeros: the error is larger than the vector, not so with the mean."""
    u = np.where(rng.random(50_000) < 0.01, rng.standard_normal(50_000), 0)
    assert nmse(Sign(bucket=50_000, scale="l2"), u) == pytest.approx(1.84, abs=0.05)
    assert nmse(Sign(bucket=50_000), u) < 1
    heavy = rng.lognormal(sigma=1.5, size=50_000) * rng.choice([-1, 1], 50_000)
    assert nmse(Sign(bucket=50_000, scale="l2"), heavy) > 1


# ---- with error feedback -------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [c for c in ALL if "l2" not in c.to_text()], ids=str)
def test_memory_conserves_what_was_not_sent(codec, rng):
    """Over many rounds, sum of sent + e = sum of gradients."""
    encoder, total, all_sent = None, np.zeros(1500), np.zeros(1500)
    for t in range(20):
        g = rng.standard_normal(1500).astype(np.float32)
        encoder = encoder or Encoder(codec, EF14(), like=g)
        all_sent += decode(encoder.encode(g, round=t))
        total += g
    bound = 20 * 2.0**-22 * (np.abs(total).max() + np.abs(encoder.e).max() + 20)
    assert np.abs(all_sent + encoder.e - total).max() <= bound


def run_signs(steps, feedback):
    """f = 0.5 |x1 + x2| + |x1 - x2| from (1, 0.9), signs with steps of 0.01."""
    x = np.array([1.0, 0.9])
    encoder = Encoder(Sign(bucket=2), feedback, like=np.zeros(2, np.float32))
    best = []
    for t in range(steps):
        total, apart = np.sign(x.sum()), np.sign(x[0] - x[1])
        g = (0.01 * np.array([0.5 * total + apart, 0.5 * total - apart])).astype(np.float32)
        d = decode(encoder.encode(g, round=t)).astype(np.float64)
        x -= d if feedback else 0.01 * np.sign(d)
        best.append(0.5 * abs(x.sum()) + abs(x[0] - x[1]))
    return x, float(np.mean(best[-100:]))


def test_feedback_fixes_signs():
    """Karimireddy et al. 2019: signs alone never change x1 + x2, with feedback they converge."""
    x, stuck = run_signs(600, None)
    assert x.sum() == pytest.approx(1.9, abs=1e-6) and stuck > 0.9
    _, fixed = run_signs(600, EF14())
    assert fixed < 0.05


def test_feedback_fixes_the_wrong_direction(rng):
    """Min x / 4 on [-1, 1] with gradients 4 (1 in 4) or -1: signs go up, feedback goes down."""
    ends = []
    for feedback in (None, EF14()):
        x, encoder = 0.0, Encoder(Sign(bucket=1), feedback, like=np.zeros(1, np.float32))
        for t in range(1500):
            g = 0.01 * (4.0 if rng.random() < 0.25 else -1.0)
            d = float(decode(encoder.encode(np.array([g], np.float32), round=t))[0])
            x = float(np.clip(x - (d if feedback else 0.01 * np.sign(d)), -1, 1))
        ends.append(x)
    assert ends[0] > 0.9 and ends[1] < -0.5


# ---- packets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_sums_are_those_of_the_decoded_packets(codec, rng):
    """Adding three packets gives the bits of decoding each and adding in float32."""
    updates = [rng.standard_normal(3000).astype(np.float32) for _ in range(3)]
    packets = [Encoder(codec, like=u).encode(u, round=1, seed=i) for i, u in enumerate(updates)]
    weights = [0.3, -1.7, 2.0]
    total = rng.standard_normal(3000).astype(np.float32)
    want = total.copy()
    for packet, weight in zip(packets, weights, strict=True):
        want = want + np.float32(weight) * np.asarray(decode(packet))
    decode_add(packets, weights, total)
    assert np.array_equal(total, want)


@pytest.mark.parametrize(
    ("codec", "nbytes"),
    [
        (Sign(bucket=500), 100_000 // 8 + 200 * 4 + 100),
        (Sign(bucket=512), 12_500 + 196 * 4),
        (AbsMax(bits=8, bucket=500), 100_000 + 200 * 4),
        (AbsMax(bits=4, bucket=500, scale_dtype="bfloat16"), 50_000 + 200 * 2),
        (AbsMax(bits=3, bucket=512), 37_500 + 196 * 4),
        (Affine(bits=2, bucket=512), 25_000 + 196 * 8),
        (Ternary(bucket=500), 20_000 + 200 * 4),
        (Uniform(levels=7, bucket=512), 50_000 + 196 * 4),
        (Uniform(levels=8, bucket=512), 62_500 + 196 * 4),
    ],
    ids=str,
)
def test_bytes_on_the_wire(codec, nbytes):
    u = np.ones(100_000, np.float32)
    packet = Encoder(codec, like=u).encode(u)
    assert 0 <= packet.nbytes - nbytes <= 256


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_settings_survive(codec):
    assert CODECS[codec.name].from_dict(codec.to_dict()) == codec
    assert from_text(CODECS, codec.to_text()) == codec and hash(codec) == hash(codec)


def test_strength_of_the_memory():
    assert [c.eta(10) for c in (Sign(), Ternary(), AbsMax(bits=2), Affine(bits=1))] == [0.3] * 4
    assert [c.eta(10) for c in (AbsMax(bits=3), AbsMax(), Uniform(), Affine(bits=4))] == [0.5] * 4
    assert Uniform(levels=1).eta(10) == 0.3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Sign(bucket=0), "bucket: expected an integer from 1 to 65536, got 0"),
        (lambda: Sign(scale="two_means", bucket=1), "bucket: expected an integer from 2"),
        (lambda: Sign(scale="max"), "scale: expected one of mean, l2, two_means"),
        (lambda: Sign(scale_dtype="float16"), "scale_dtype: expected one of float32, bfloat16"),
        (lambda: Ternary(clip=0.0), "clip: expected None or a number above 0"),
        (lambda: Ternary(packing="bytes"), "packing: expected one of trits, bits"),
        (lambda: AbsMax(bits=1), "bits: expected an integer from 2 to 8, got 1"),
        (lambda: AbsMax(bits=True), "bits: expected an integer"),
        (lambda: AbsMax(rounding="up"), "rounding: expected one of nearest, stochastic"),
        (lambda: AbsMax(bucket=65_537), "bucket: expected an integer from 1 to 65536"),
        (lambda: Uniform(levels=128), "levels: expected an integer from 1 to 127"),
        (lambda: Affine(bits=0), "bits: expected an integer from 1 to 8"),
        (lambda: Affine(bucket=1), "bucket: expected an integer from 2"),
    ],
)
def test_mistakes_are_named(make, match):
    with pytest.raises(InvalidInputError, match=match):
        make()

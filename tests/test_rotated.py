"""Rotated codes: the worked example, what a rotation promises, and every variant's bytes."""

from __future__ import annotations

import numpy as np
import pytest

from flcore._state import State
from flcore.compression import (
    DGC,
    EF14,
    EF21,
    EControl,
    Encoder,
    Rotated,
    decode,
    decode_add,
)
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.decode import ParsedPacket
from flcore.ops.decode import decode as decode_packet
from flcore.ops.quantize import quantize
from flcore.reference import codes_rotated as reference
from flcore.reference import hadamard as h
from flcore.reference import wire

BITS = (1, 2, 3, 4)
MEASURES = ("unbiased", "mse")
NMSE = {1: 0.571, 2: 0.133, 3: 0.0358, 4: 0.0096}
LEAST = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}


def sent(g, bits=4, block=1024, **options) -> np.ndarray:
    packet = quantize(g, codec="rotated", bits=bits, bucket=block, **options)
    return decode_packet(ParsedPacket(packet))


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    want = want.astype(np.float64)
    return float(np.square(got - want).sum() / np.square(want).sum())


def random_state(kept: str, numel: int, seed: int, mask: bool = False) -> State:
    rng = np.random.default_rng(seed)
    buffers = {
        name: rng.standard_normal(numel).astype(np.float32) for name in "ehv" if name in kept
    }
    return State(**buffers, a=0.5, b=0.9, p=0.3, q=0.7, mask=mask)


# ---- worked example -----------------------------------------------------------------------------


def test_worked_example():
    """x = (4, -3, 2, -1), S = (1, -1, 1, 1): z = (4, 2, 3, -1)."""
    x = np.array([[4, -3, 2, -1]], np.float32)
    minus = np.array([[False, True, False, False]])
    assert (h.hadamard(h.flip(x, minus)) * h.norm(4)).tolist() == [[4, 2, 3, -1]]
    for unbiased, scale, want in (
        (True, 3.0, [3, -3, 3, -3]),
        (False, 2.5, [2.5, -2.5, 2.5, -2.5]),
    ):
        f, codes = reference.encode(x, minus, 1, unbiased)
        assert f.tolist() == [scale] and codes.tolist() == [[0, 0, 0, 1]]
        d = reference.decode(f, codes, minus, 4, 1)
        assert d.tolist() == [want]
        assert nmse(d, x) == pytest.approx(0.2 if unbiased else 1 / 6, abs=1e-7)
    assert float((3 * x * np.sign(x)).sum()) == 30 == float((x * x).sum())


def test_worked_example_through_the_kernel():
    """A seed whose first signs are those of the example, up to the sign of the whole."""
    x = np.array([4, -3, 2, -1], np.float32)
    seed = next(
        s for s in range(100) if h.signs(0, 4, s, 0).tolist() == [False, True, False, False]
    )
    assert sent(x, 1, 256, seed=seed).tolist() == [3, -3, 3, -3]
    assert sent(x, 1, 256, seed=seed, measure="mse").tolist() == [2.5, -2.5, 2.5, -2.5]
    packet = quantize(x, codec="rotated", bits=1, bucket=256, seed=seed)
    header, body = wire.parse(packet.tobytes())
    assert (header.codec, header.bits, header.tile, header.seed) == ("rotated", 1, 256, seed)
    assert body.scales.tolist() == [[3.0]] and body.codes.tolist() == [0b1000]


@pytest.mark.parametrize("bits", BITS)
def test_centroids_are_those_of_a_normal_distribution(bits):
    """Every centroid is the mean of its cell: the condition of Lloyd and Max."""
    if bits == 1:  # any magnitude will do, the scale makes up for it
        assert reference.CENTROIDS[1].tolist() == [1]
        return
    from statistics import NormalDist

    normal = NormalDist()
    edges = [0.0, *map(float, reference.bounds(bits)), 20.0]
    for q, low, high in zip(reference.CENTROIDS[bits], edges[:-1], edges[1:], strict=True):
        mean = (normal.pdf(low) - normal.pdf(high)) / (normal.cdf(high) - normal.cdf(low))
        assert mean == pytest.approx(float(q), abs=2e-4)


# ---- what the codes promise --------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [256, 512, 4096])
def test_scales_keep_their_identities(bits, block, rng):
    for x in (rng.standard_normal(4096), rng.lognormal(0, 2, 4096), rng.standard_cauchy(4096)):
        x = x.astype(np.float32)
        rows = x.astype(np.float64).reshape(-1, block)
        squares = np.square(rows).sum(1)
        d = sent(x, bits, block, seed=3).astype(np.float64).reshape(-1, block)
        np.testing.assert_allclose((d * rows).sum(1), squares, rtol=2e-6)
        d = sent(x, bits, block, seed=3, measure="mse").astype(np.float64).reshape(-1, block)
        assert (np.abs(((d - rows) * d).sum(1)) < 2e-6 * squares).all()


@pytest.mark.parametrize("bits", BITS)
def test_error_of_normal_input(bits, rng):
    x = rng.standard_normal(2**18).astype(np.float32)
    for block in (256, 1024, 4096):
        tolerance = 0.03 if block == 256 else 0.02  # a block's own norm is less uncertain
        assert nmse(sent(x, bits, block), x) == pytest.approx(NMSE[bits], rel=tolerance)
        assert nmse(sent(x, bits, block, measure="mse"), x) == pytest.approx(
            LEAST[bits], rel=tolerance
        )


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("lognormal", {(1, 256): 0.375, (2, 256): 0.113, (4, 256): 0.0084, (2, 1024): 0.117}),
        ("sparse", {(1, 256): 0.318, (2, 256): 0.070, (1, 1024): 0.495, (4, 4096): 0.0091}),
    ],
)
def test_smaller_blocks_follow_heavy_tails(name, table, rng):
    """Measured errors for inputs whose entries differ, over several draws."""
    for (bits, block), want in table.items():
        found = []
        for _ in range(4):
            x = rng.lognormal(0, 1.5, 2**18) * rng.choice([-1, 1], 2**18)
            if name == "sparse":
                x = rng.standard_normal(2**18) * (rng.random(2**18) < 0.01)
            found.append(nmse(sent(x, bits, block, seed=len(found)), x))
        assert np.mean(found) == pytest.approx(want, rel=0.12)


@pytest.mark.parametrize("bits", BITS)
def test_unbiased_over_seeds(bits, rng):
    x = rng.standard_normal(256).astype(np.float32)
    mean = np.mean([sent(x, bits, 256, seed=seed) for seed in range(2000)], axis=0, dtype=float)
    assert 0.7 * NMSE[bits] < 2000 * nmse(mean, x) < 1.4 * NMSE[bits]
    mean = np.mean([sent(x, bits, 256, round=r) for r in range(500)], axis=0, dtype=float)
    assert 500 * nmse(mean, x) < 1.4 * NMSE[bits]  # a new round has new signs
    # one Hadamard matrix does not mix a few dominating entries as a uniform rotation would
    heavy = rng.lognormal(0, 1, 1024).astype(np.float32)
    mean = np.mean([sent(heavy, bits, seed=seed) for seed in range(2000)], axis=0, dtype=float)
    assert nmse(mean, heavy) < 1.4 * NMSE[bits] / 2000 + (2e-3 if bits < 3 else 1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [256, 1024])
def test_zeros_and_one_hot_blocks(bits, block):
    x = np.zeros(3 * block, np.float32)
    x[block + 7] = -2.5
    for measure in MEASURES:
        d = sent(x, bits, block, measure=measure)
        assert np.isfinite(d).all() and (d[:block] == 0).all() and (d[2 * block :] == 0).all()
        assert d[block + 7] == pytest.approx(-2.5, rel=1e-6)
        assert np.count_nonzero(d) == 1
    packet = quantize(x, codec="rotated", bits=bits, bucket=block)
    _, body = wire.parse(packet.tobytes())
    assert body.scales[0] == 0 and body.scales[1] > 0


def test_clients_with_signs_of_their_own_average_out(rng):
    """n identical clients: NMSE / n with independent signs, no gain at all with shared ones."""
    x = rng.standard_normal(2**14).astype(np.float32)
    for bits in (1, 4):
        for shared, want in ((False, NMSE[bits] / 16), (True, NMSE[bits])):
            codec = Rotated(bits, shared=shared)
            packets = [Encoder(codec, like=x, client=i).encode(x, seed=5) for i in range(16)]
            mean = np.zeros(x.size, np.float32)
            decode_add(packets, [1 / 16] * 16, mean)
            assert nmse(mean, x) == pytest.approx(want, rel=0.05)
            assert (packets[0].header.seed == packets[1].header.seed) == shared


def test_similar_clients(rng):
    """16 clients with correlation .9: measured .0353 at one bit with signs of their own."""
    common = rng.standard_normal(2**16)
    clients = [
        (np.sqrt(0.9) * common + np.sqrt(0.1) * rng.standard_normal(2**16)).astype(np.float32)
        for _ in range(16)
    ]
    mean = np.mean(clients, axis=0)
    for bits, own, shared in ((1, 0.0353, 0.241), (4, 0.00060, 0.00112)):
        alone = np.mean([sent(c, bits, seed=i) for i, c in enumerate(clients)], axis=0)
        alike = np.mean([sent(c, bits, seed=9) for c in clients], axis=0)
        share = np.square(mean).sum() / np.square(clients[0]).sum()  # of a client's own norm
        assert share * nmse(alone, mean) == pytest.approx(own, rel=0.05)
        assert share * nmse(alike, mean) == pytest.approx(shared, rel=0.25)


# ---- the codec ---------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [None, EF14(), EF21(), EControl(), DGC(momentum=0.5)])
def test_encoder_with_every_error_control(feedback, rng):
    g = [rng.standard_normal((30, 40)).astype(np.float32), rng.standard_normal(77).astype("f4")]
    for codec in (Rotated(bits=2, unbiased=False), Rotated()):
        encoder = Encoder(codec, feedback, like=g, client=1)
        total = np.zeros(1277)
        for t in range(30):
            packet = encoder.encode(g, round=t, seed=8)
            assert packet.header.codec == "rotated" and packet.header.round == t
            total += decode(packet)
        flat = np.concatenate([x.reshape(-1) for x in g])
        if isinstance(feedback, EF14):  # everything but the last error has arrived
            assert nmse(total / 30, flat) < 1e-3
        if isinstance(feedback, EF21):
            assert nmse(total, flat) < 1e-4


def test_settings_round_trip_and_strength():
    codec = Rotated(bits=1, block=256, unbiased=False, shared=True)
    assert Rotated.from_dict(codec.to_dict()) == codec and codec.shared_seed
    assert not Rotated().shared_seed and Rotated() == Rotated(4, 1024, True, False)
    assert [Rotated(b).eta(10) for b in BITS] == [0.3, 0.3, 0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 0}, "bits: expected 1, 2, 3 or 4"),
        ({"bits": 5}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 1.5}, "bits"),
        ({"block": 128}, "block: expected 256"),
        ({"block": 1000}, "block"),
        ({"block": 8192}, "block"),
        ({"unbiased": 1}, "unbiased: expected True or False"),
        ({"shared": "no"}, "shared"),
    ],
)
def test_settings_that_cannot_be_used(options, words):
    with pytest.raises(InvalidInputError, match=words):
        Rotated(**options)


@pytest.mark.parametrize("options", [{"bits": 5}, {"bucket": 100}, {"measure": "l2"}, {"form": 1}])
def test_op_refuses_what_no_reader_takes(options):
    with pytest.raises(InvalidInputError):
        quantize(
            np.ones(3, np.float32), **{"codec": "rotated", "bits": 4, "bucket": 256, **options}
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_updates_change_nothing(bad, rng):
    for in_place in (True, False):
        state = random_state("eh", 3000, 2)
        if not in_place:
            state.spare = {k: np.empty_like(x) for k, x in state.buffers().items()}
        before = [x.copy() for x in state.buffers().values()]
        g = rng.standard_normal(3000).astype(np.float32)
        g[2999] = bad
        with pytest.raises(NonFiniteError):
            quantize(g, codec="rotated", bits=4, bucket=256, state=state)
        for x, y in zip(before, state.buffers().values(), strict=True):
            assert np.array_equal(x, y)


def test_empty_update():
    packets = [
        quantize(np.empty(0, np.float32), codec="rotated", bits=4, bucket=256, variant=v)
        for v in ("cpu", "reference")
    ]
    assert np.array_equal(*packets) and decode_packet(ParsedPacket(packets[0])).size == 0

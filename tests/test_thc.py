"""THC: codes that add as integers. Worked values, what the grid promises, every variant's bytes."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from flcore.compression import (
    EF14,
    EF21,
    THC,
    EControl,
    Encoder,
    Rotated,
    agree_norms,
    decode,
    decode_add,
    decode_sum,
    thc_sum,
)
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops.decode import ParsedPacket
from flcore.ops.decode import decode as decode_packet
from flcore.ops.thc import thc
from flcore.reference import codes_thc as reference
from flcore.reference import wire

TABLE = (0, 3, 5, 7, 9, 11, 13, 14, 16, 17, 19, 21, 23, 25, 27, 30)
CODECS = (
    THC(),
    THC(granularity=15),
    THC(bits=2, granularity=9),
    THC(bits=2, granularity=3, norms="all"),
    THC(granularity=255, block=256, norms="all", clip=1e-3),
)


def nmse(got, want) -> float:
    want = np.asarray(want, np.float64)
    return float(np.square(got - want).sum() / np.square(want).sum())


def round_of(codec, updates, seed=4, round=0, feedback=None, quantile=1.0):
    """Return encoders, packets after the exchange of norms."""
    encoders = [Encoder(codec, feedback, like=g, client=i) for i, g in enumerate(updates)]
    told = [e.norm(g) for e, g in zip(encoders, updates, strict=True)]
    agreed = agree_norms(told, quantile)
    packets = [
        e.encode(g, round=round, seed=seed, norm=agreed)
        for e, g in zip(encoders, updates, strict=True)
    ]
    return encoders, packets


def similar(n, d, rng, correlation=0.9):
    common = rng.standard_normal(d)
    noise = rng.standard_normal((n, d))
    rows = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * noise
    return list(rows.astype(np.float32))


# ---- the grid ----------------------------------------------------------------------------------


def test_table_of_the_published_code_is_the_best_one():
    """Clipped at a share of 1/32, 16 values on a grid of 30: the table its server has built in."""
    assert THC().table == TABLE
    assert THC().clip_at == pytest.approx(NormalDist().inv_cdf(1 - 1 / 64), abs=2**-12)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("clip", [1e-4, 1 / 32, 0.3])
def test_tables_are_symmetric_and_increasing(bits, clip):
    last = (1 << bits) - 1
    for g in (last, last + 1, 30, 31, 60, 255):
        codec = THC(bits=bits, granularity=g, clip=clip)
        table = np.array(codec.table)
        assert table[0] == 0 and table[-1] == g and table.size == last + 1
        assert (np.diff(table) > 0).all() and (table + table[::-1] == g).all()
    assert THC(bits=bits, granularity=last).table == tuple(range(last + 1))  # uniform


def test_table_has_the_least_error_of_all():
    """Against every symmetric table with four values, and draws of the error it claims."""
    g, t = 11, 2.0
    rng = np.random.default_rng(3)
    y = np.clip(rng.standard_normal(400_000), -t, t) * g / (2 * t) + g / 2
    errors = {}
    for i in range(1, (g - 1) // 2 + 1):
        table = np.array([0, i, g - i, g])
        j = np.clip(np.searchsorted(table, y, "right") - 1, 0, 2)
        errors[i] = float(np.mean((y - table[j]) * (table[j + 1] - y)))
    best = reference.grid_table(2, g, t)
    assert best[1] == min(errors, key=errors.get)


def test_worked_block():
    """x = (4, -3, 2, -1) with a norm of 8 and S = (1, -1, 1, 1): z = (4, 2, 3, -1), p by hand."""
    from flcore.reference import hadamard

    x = np.array([4, -3, 2, -1], np.float32)
    want_signs = [False, True, False, False]
    seed = next(s for s in range(99) if hadamard.signs(0, 4, s, 0).tolist() == want_signs)
    # g = 3, t = 1.5: p = (z 2 / 8) 3 / 3 + 1.5 = z / 4 + 1.5 = (2.5, 2, 2.25, 1.25)
    options = {"norms": [8.0], "table": range(4), "clip": 1.5, "bits": 2, "block": 256}
    found = set()
    for client in range(40):
        p = thc(x, client=client, seed=seed, **options)
        _, body = wire.parse(p.tobytes())
        assert body.norms.tolist() == [8.0] and body.clip == 1.5 and body.codes.size == 1
        codes = [int(body.codes[0]) >> s & 3 for s in (0, 2, 4, 6)]
        assert codes[0] in (2, 3) and codes[1] == 2 and codes[2] in (2, 3) and codes[3] in (1, 2)
        found.add(tuple(codes))
        # D = S Had(2 T - 3) 1.5 * 8 / (3 * 4)
        a, b, c, d = (2 * k - 3 for k in codes)
        want = [a + b + c + d, -(a - b + c - d), a + b - c - d, a - b - c + d]
        assert decode_packet(ParsedPacket(p)).tolist() == want
    assert len(found) == 8  # each of the three may go either way


@pytest.mark.parametrize("codec", CODECS)
def test_unbiased_where_nothing_is_cut(codec, rng):
    """10,000 draws of 256 values against the spread of a single one."""
    x = rng.standard_normal(256).astype(np.float32)
    g, t = codec.granularity, codec.clip_at
    norms = [8 * np.linalg.norm(x)]  # all within a quarter of the grid
    total, squares = np.zeros(256), np.zeros(256)
    draws = 10_000 if codec is CODECS[0] else 1000
    for client in range(draws):
        d = decode_packet(
            ParsedPacket(
                thc(x, norms=norms, table=codec.table, clip=t, bits=codec.bits, block=256,
                    client=client)
            )
        ).astype(np.float64)  # fmt: skip
        total += d
        squares += np.square(d - x)
    spread = np.sqrt(squares / draws)
    assert (np.abs(total / draws - x) < 5 * spread / np.sqrt(draws)).all()
    step = np.diff(codec.table).max() * 2 * t / g * norms[0] / 16
    assert spread.max() < step


@pytest.mark.parametrize("codec", CODECS)
def test_decoded_values_stay_in_range(codec, rng):
    """Rotated values are at most t l / sqrt(m), those of the update at most t l."""
    for x in (rng.standard_cauchy(4096), np.full(4096, 3e5)):
        x = x.astype(np.float32)
        encoder = Encoder(codec, like=x)
        norms = encoder.norm(x)
        d = decode(encoder.encode(x, norm=norms / 4))  # everything is far outside
        assert np.isfinite(d).all()
        scale = np.repeat(norms / 4, 4096 // norms.size)
        root = 1 if norms.size > 1 else np.sqrt(codec.block / 4096)
        assert (np.abs(d) <= codec.clip_at * scale * root * (1 + 1e-6)).all()


def test_one_client_with_a_fine_grid_keeps_the_update(rng):
    x = rng.standard_normal(5000).astype(np.float32)
    errors = [
        nmse(decode(Encoder(THC(granularity=g, clip=1e-4), like=x).encode(x)), x)
        for g in (15, 30, 255)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.03


# ---- sums --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("numel", [1, 3, 300, 5001])
def test_decoding_the_sum_is_the_mean_of_what_is_decoded(codec, numel, rng):
    updates = similar(4, numel, rng)
    _, packets = round_of(codec, updates)
    sums, total = thc_sum(packets)
    assert total == 4 and sums.dtype == np.uint8 if codec.granularity <= 63 else np.uint16
    # integers: the sum of codes is the sum of table values
    bodies = [wire.parse(bytes(p))[1] for p in packets]
    from flcore.reference import buckets

    want = sum(
        b.table[buckets.unpack(b.codes, sums.size, codec.bits, sums.size)].astype(int)
        for b in bodies
    )
    assert np.array_equal(sums, want)
    got = decode_sum(sums, total, packets[0])
    mean = np.mean([decode(p) for p in packets], axis=0, dtype=np.float64)
    size = np.abs([decode(p) for p in packets]).max()
    np.testing.assert_allclose(got, mean, atol=2e-7 * size)
    alone = decode_sum(*thc_sum(packets[:1]), packets[0])
    assert alone.tobytes() == decode(packets[0]).tobytes()
    dense = np.zeros(numel, np.float32)
    decode_add(packets, [0.25] * 4, dense)
    np.testing.assert_allclose(got, dense, atol=4e-7 * size)


def test_sums_widen_and_stay_exact():
    x = np.ones(600, np.float32)
    for n, dtype in ((1, "uint8"), (8, "uint8"), (9, "uint16"), (40, "uint16")):
        _, packets = round_of(THC(clip=1e-4), [x] * n)
        sums, total = thc_sum(packets)
        assert sums.dtype == dtype and total == n and sums.max() <= 30 * n
        assert nmse(decode_sum(sums, total, packets[-1]), x) < 0.04 / n
    with pytest.raises(InvalidInputError, match="sums can reach 1200"):
        thc_sum(packets, lanes="uint8")
    assert thc_sum(packets, lanes="uint32")[0].dtype == np.uint32


def test_weighted_and_partial_sums(rng):
    updates = similar(5, 3000, rng)
    _, packets = round_of(THC(), updates)
    weights = [1, 2, 3, 7, 12]
    sums, total = thc_sum(packets, weights)
    assert total == 25
    want = np.average([decode(p) for p in packets], axis=0, weights=weights)
    np.testing.assert_allclose(decode_sum(sums, total, packets[2]), want, atol=1e-5)
    first, a = thc_sum(packets[:2])
    rest, b = thc_sum(packets[2:])  # late clients: two sums are one
    whole, n = thc_sum(packets)
    assert np.array_equal(first.astype(np.uint16) + rest, whole) and a + b == n
    assert nmse(decode_sum(first, a, packets[0]), np.mean(updates[:2], axis=0)) < 0.02
    with pytest.raises(DTypeError, match="expected an integer"):
        thc_sum(packets, [0.2] * 5)


def test_error_of_a_mean_falls_with_the_clients(rng):
    """16 similar normal vectors, 4 bits, uniform grid cut at 3 sigma: .0019; 64: .00063."""
    share = 2 * (1 - NormalDist().cdf(3.0))
    codec = THC(granularity=15, clip=share)
    assert codec.clip_at == pytest.approx(3, abs=1e-3)
    for n, want in ((16, 0.0019), (64, 0.00063)):
        updates = similar(n, 2**15, rng)
        _, packets = round_of(codec, updates)
        found = nmse(decode_sum(*thc_sum(packets), packets[0]), np.mean(updates, axis=0))
        assert found == pytest.approx(want, rel=0.15)
    one = [Encoder(Rotated(1, shared=True), like=g).encode(g, seed=4) for g in updates]
    total = np.zeros(2**15, np.float32)
    decode_add(one, [1 / 64] * 64, total)
    assert 0.15 < nmse(total, np.mean(updates, axis=0)) < 0.3  # one bit, no random rounding


def test_norms_of_blocks_follow_layers_of_different_scale(rng):
    update = [rng.standard_normal(4096) * 100, rng.standard_normal(4096)]
    flat = np.concatenate(update)
    errors = {}
    for norms in ("block", "all"):
        _, packets = round_of(THC(norms=norms), [update] * 2)
        errors[norms] = nmse(decode_sum(*thc_sum(packets), packets[0])[4096:], flat[4096:])
    assert errors["block"] < 0.02 and errors["all"] > 1


def test_packets_that_do_not_belong_together(rng):
    updates = similar(2, 3000, rng)
    _, packets = round_of(THC(), updates)
    others = {
        "seed": round_of(THC(), updates, seed=5)[1],
        "round": round_of(THC(), updates, round=5)[1],
        "norms": round_of(THC(), [2 * g for g in updates])[1],
        "table": round_of(THC(granularity=31), updates)[1],
        "bits": round_of(THC(bits=2), updates)[1],
        "block": round_of(THC(block=256), updates)[1],
        "numel": round_of(THC(), [g[:2999] for g in updates])[1],
    }
    for name, other in others.items():
        with pytest.raises(InvalidInputError, match=rf"packets\[1\]: its {name} is not that"):
            thc_sum([packets[0], other[1]])
    rotated = Encoder(Rotated(), like=updates[0]).encode(updates[0])
    with pytest.raises(InvalidInputError, match="expected a packet of the codec thc, got rotated"):
        thc_sum([packets[0], rotated])
    with pytest.raises(InvalidInputError, match="at least one"):
        thc_sum([])
    sums, total = thc_sum(packets)
    with pytest.raises(InvalidInputError, match="codec thc"):
        decode_sum(sums, total, rotated)
    with pytest.raises(InvalidInputError, match="sums: expected shape"):
        decode_sum(sums[:-1], total, packets[0])
    with pytest.raises(InvalidInputError, match="sums: expected at most"):
        decode_sum(sums, 1, packets[0])
    with pytest.raises(InvalidInputError, match="total: expected 1 to"):
        decode_sum(sums, 0, packets[0])
    with pytest.raises(DTypeError, match="uint8, uint16 or uint32"):
        decode_sum(sums.astype(np.int64), total, packets[0])


def test_agreeing_on_norms():
    rows = [np.array([1, 5], "f4"), np.array([3, 2], "f4"), np.array([100, 4], "f4")]
    assert agree_norms(rows).tolist() == [100, 5]
    assert agree_norms(rows, 0.5).tolist() == [3, 4]
    for bad, words in (
        ([], "at least one"),
        ([rows[0], rows[0][:1]], r"norms\[1\]: expected shape \(2,\)"),
        ([rows[0], -rows[0]], "finite numbers >= 0"),
        ([rows[0], rows[0] * np.nan], "finite"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            agree_norms(bad)
    with pytest.raises(InvalidInputError, match="quantile"):
        agree_norms(rows, 0)


# ---- feedback, zeros, the same bytes everywhere ------------------------------------------------


@pytest.mark.parametrize("feedback", [EF14(), EF21(), EControl()])
def test_what_is_cut_or_rounded_stays_in_the_memory(feedback, rng):
    updates = similar(3, 2000, rng)
    encoders = [Encoder(THC(bits=2, granularity=9), feedback, like=g, client=i)
                for i, g in enumerate(updates)]  # fmt: skip
    total = np.zeros(2000)
    for t in range(40):
        norms = agree_norms([e.norm(g) for e, g in zip(encoders, updates, strict=True)], 0.7)
        before = [None if e.e is None else e.e.copy() for e in encoders]
        packets = [e.encode(g, t, 3, norm=norms) for e, g in zip(encoders, updates, strict=True)]
        if isinstance(feedback, EF14):
            for e, g, old, p in zip(encoders, updates, before, packets, strict=True):
                np.testing.assert_allclose(decode(p) + e.e, g + old, rtol=1e-5, atol=1e-5)
        total += decode_sum(*thc_sum(packets), packets[0])
    mean = np.mean(updates, axis=0)
    if isinstance(feedback, EF14):
        assert nmse(total / 40, mean) < 0.01
    if isinstance(feedback, EF21):
        assert nmse(total, mean) < 0.01


@pytest.mark.parametrize("codec", CODECS)
def test_zeros(codec):
    zeros = np.zeros(3000, np.float32)
    encoders, packets = round_of(codec, [zeros] * 3, feedback=EF14())
    sums, total = thc_sum(packets)
    assert not sums.any() and not decode_sum(sums, total, packets[0]).any()
    assert not decode(packets[0]).any() and not encoders[0].e.any()
    half = zeros.copy()
    half[:1024] = 1
    _, packets = round_of(codec, [half] * 2)
    d = decode_sum(*thc_sum(packets), packets[0])
    assert np.isfinite(d).all() and (codec.norms == "all" or not d[1024:].any())
    packet = Encoder(codec, like=np.empty(0)).encode(np.empty(0))
    assert decode(packet).size == 0 and thc_sum([packet])[0].size == 0

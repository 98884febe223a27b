"""Majority votes of packed signs: rules by hand, bits, ties, weights, levels, threads, errors."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _arrays, _native, _variants
from flcore.aggregation import MajorityVote
from flcore.compression import Packet
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops.decode import ParsedPacket, decode
from flcore.ops.vote import FORMS, vote, vote_packet
from flcore.reference import wire_frame as wire
from flcore.reference import wire_writer
from support import HAS_TORCH, outputs_per_level

VARIANTS = list(_variants.available("vote"))


def sign_packet(negative: np.ndarray, bucket: int = 65536, scale: float = 1.0) -> ParsedPacket:
    """Pack (d,) bools: bucket after bucket, each from a byte on."""
    numel = negative.size
    codes = b"".join(
        np.packbits(negative[i : i + bucket], bitorder="little").tobytes()
        for i in range(0, numel, bucket)
    )
    scales = np.full(-(-numel // bucket), scale, "<f4").tobytes()
    frame = _native.core.PacketFrame(
        codec=wire.CODECS["sign"],
        numel=numel,
        value_dtype=1,
        form=0,
        bits=1,
        tile=bucket,
        source_dtype=1,
        flags=0,
        round=0,
        seed=0,
        epoch=0,
        sections=[(wire.SCALES, 4, len(scales)), (wire.CODES, 1, len(codes))],
    )
    data = np.zeros(frame.nbytes, np.uint8)
    for kind, section in ((wire.SCALES, scales), (wire.CODES, codes)):
        data[frame.offset(kind) :][: len(section)] = np.frombuffer(section, np.uint8)
    frame.seal(_arrays.address(data))
    return ParsedPacket(data)


def random_bits(n: int, numel: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, numel)) < 0.5


# ---- by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_and_four_clients_by_hand(variant):
    negative = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 1], [0, 1, 0, 1, 1], [1, 1, 1, 0, 0]], bool)
    packets = [sign_packet(row) for row in negative]
    odd = vote(packets[:3], variant=variant)
    np.testing.assert_array_equal(odd, np.float32([1, -1, -1, -1, -1]))
    assert odd.dtype == np.float32
    # even: 1, 3, 3, 2 and 3 negative of 4
    np.testing.assert_array_equal(vote(packets, variant=variant), np.float32([1, -1, -1, 0, -1]))
    bits = vote(packets, form="bits", variant=variant)
    np.testing.assert_array_equal(bits, np.uint8([0b10110]))  # the tie is positive
    np.testing.assert_array_equal(
        vote(packets, form="sum", variant=variant), np.float32([2, -2, -2, 0, -2])
    )
    # weights 1, 1, 3: the third decides
    weighted = vote(packets[:3], [1, 1, 3], form="sum", variant=variant)
    np.testing.assert_array_equal(weighted, np.float32([5, -3, 1, -3, -5]))
    np.testing.assert_array_equal(
        vote(packets[:3], [1, 1, 3], variant=variant), np.float32([1, -1, 1, -1, -1])
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_weights_are_counted(variant):
    """Sums of 0.1 would not cancel exactly; a count does."""
    packets = [sign_packet(row) for row in np.eye(6, 6, dtype=bool) | (np.arange(6) < 2)]
    signs = vote(packets, [0.1] * 6, variant=variant)
    np.testing.assert_array_equal(signs, vote(packets, variant=variant))
    tied = [sign_packet(np.array([i % 2 == 0])) for i in range(6)]
    assert vote(tied, [0.1] * 6, variant=variant)[0] == 0
    total = vote(tied[:2], [0.25, 0.25], form="sum", variant=variant)
    assert total[0] == 0 and not np.signbit(total[0])
    assert vote(tied[::2], [0.25] * 3, form="sum", variant=variant)[0] == -0.75


# ---- against the integer sum -------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [*range(1, 34), 63, 64, 65, 127, 128, 255, 257])
def test_vote_is_the_sign_of_the_sum(n, variant):
    numel = 1031
    negative = random_bits(n, numel, n)
    packets = [sign_packet(row) for row in negative]
    total = np.where(negative, -1, 1).sum(axis=0)
    np.testing.assert_array_equal(vote(packets, variant=variant), np.sign(total))
    bits = np.packbits(total < 0, bitorder="little")
    np.testing.assert_array_equal(vote(packets, form="bits", variant=variant), bits)
    np.testing.assert_array_equal(vote(packets, form="sum", variant=variant), total)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 63, 64, 65, 511, 513, 16383, 16384, 16385, 70001])
@pytest.mark.parametrize("bucket", [1, 5, 8, 61, 500, 1000, 4096, 65536])
def test_sizes_and_buckets(numel, bucket):
    if numel > 20000 and bucket < 50:
        pytest.skip("as many scales as codes")
    negative = random_bits(5, numel, numel + bucket)
    packets = [sign_packet(row, bucket) for row in negative]
    total = np.where(negative, -1, 1).sum(axis=0)
    np.testing.assert_array_equal(vote(packets), np.sign(total))
    bits = vote(packets, form="bits")
    np.testing.assert_array_equal(bits, np.packbits(total < 0, bitorder="little"))
    weights = np.float32([0.5, 1.25, 0.1, 2, 0.7])
    expected = np.zeros(numel, np.float32)
    for row, w in zip(negative, weights, strict=True):
        expected = expected + np.where(row, -w, w)
    got = vote(packets, weights, form="sum")
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(vote(packets, weights), np.sign(expected))
    np.testing.assert_array_equal(
        vote(packets, weights, form="bits"), np.packbits(expected < 0, bitorder="little")
    )


def test_rows_may_differ_in_bucket_and_scale():
    negative = random_bits(9, 2003)
    packets = [
        sign_packet(row, bucket, scale)
        for row, bucket, scale in zip(
            negative, [1, 3, 8, 17, 64, 100, 999, 2003, 65536], np.arange(9), strict=True
        )
    ]
    np.testing.assert_array_equal(vote(packets), np.sign(9 - 2 * negative.sum(axis=0)))
    for variant in VARIANTS:
        np.testing.assert_array_equal(vote(packets, variant=variant), vote(packets))


def test_a_minority_never_flips_a_unanimous_coordinate():
    n, numel = 21, 3000
    negative = np.repeat(random_bits(1, numel), n, axis=0)
    honest = vote([sign_packet(row) for row in negative])
    for minority in (1, 5, 10):
        flipped = negative.copy()
        flipped[:minority] ^= True
        np.testing.assert_array_equal(vote([sign_packet(row) for row in flipped]), honest)
    flipped[:11] = ~negative[:11]
    np.testing.assert_array_equal(vote([sign_packet(row) for row in flipped]), -honest)


def test_weight_zero_is_not_read():
    negative = random_bits(3, 100)
    packets = [sign_packet(row) for row in negative]
    np.testing.assert_array_equal(vote(packets, [1, 0, 2]), vote(packets[::2], [1, 2]))
    np.testing.assert_array_equal(vote(packets, [0, 3, 0]), vote(packets[1:2]))


# ---- levels and threads ------------------------------------------------------------------------

SCRIPT = """
import sys, zlib
sys.path.insert(0, "tests")
import numpy as np, flcore
from flcore.ops.vote import vote
from test_vote import random_bits, sign_packet
flcore.set_num_threads(3)
for n, numel, bucket in ((1, 17, 8), (31, 150_001, 65536), (40, 150_001, 999), (300, 20_000, 64)):
    packets = [sign_packet(row, bucket) for row in random_bits(n, numel)]
    for weights in (None, np.linspace(0.1, 3, n)):
        for form in ("signs", "bits", "sum"):
            print(zlib.crc32(vote(packets, weights, form=form).tobytes()))
"""


def test_same_bits_at_every_level():
    printed = outputs_per_level(SCRIPT)
    assert len(set(printed.values())) == 1 and len(printed) >= 1


def test_same_bits_for_any_number_of_threads():
    packets = [sign_packet(row, 4096) for row in random_bits(12, 200_003)]
    weights = np.linspace(0.1, 2, 12)
    results = []
    for threads in (1, 2, 5):
        with _native.num_threads(threads):
            results.append([vote(packets, w, form=f) for w in (None, weights) for f in FORMS])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- out and the packet for the way down ---------------------------------------------------------


def test_out_is_filled_and_nothing_else():
    packets = [sign_packet(row) for row in random_bits(4, 77)]
    for form in FORMS:
        expected = vote(packets, form=form)
        memory = np.full(expected.nbytes + 65, 0xA5, np.uint8)  # at an odd address
        if form == "bits":
            out = memory[33 : 33 + expected.size]
        else:
            out = memory[33 : 33 + expected.nbytes].view(np.float32)
        assert vote(packets, form=form, out=out) is out
        np.testing.assert_array_equal(out, expected)
        assert (memory[:33] == 0xA5).all() and (memory[33 + expected.nbytes :] == 0xA5).all()


@pytest.mark.parametrize("numel", [0, 1, 1000, 65536, 65537, 140_000])
def test_packet_decodes_to_the_vote_with_ties_positive(numel):
    packets = [sign_packet(row) for row in random_bits(4, numel)]
    data = vote_packet(packets, scale=0.5, round=7, seed=9, epoch=3)
    packet = ParsedPacket(data)  # checks every byte
    header = packet.header
    assert (header.codec, header.round, header.seed, header.epoch) == ("sign", 7, 9, 3)
    signs = vote(packets)
    np.testing.assert_array_equal(decode(packet), np.where(signs < 0, -0.5, 0.5))
    again = vote([packet])  # a vote can be voted on
    np.testing.assert_array_equal(again, np.where(signs < 0, -1, 1))


def test_packet_takes_weights():
    packets = [sign_packet(row) for row in random_bits(3, 500)]
    weights = [1.0, 1.5, 4.0]
    packet = ParsedPacket(vote_packet(packets, weights))
    np.testing.assert_array_equal(decode(packet), vote(packets, weights))


# ---- errors ------------------------------------------------------------------------------------


def sparse_packet(numel: int) -> ParsedPacket:
    data = wire_writer.build(
        np.array([1]), np.array([0], np.uint32), numel=numel, values="float32", index="tile16"
    )
    return ParsedPacket(np.frombuffer(data, np.uint8))


def test_errors_name_the_argument():
    packets = [sign_packet(row) for row in random_bits(2, 10)]
    with pytest.raises(InvalidInputError, match="packets: expected at least one"):
        vote([])
    with pytest.raises(DTypeError, match=r"packets\[1\]: expected a packet, got ndarray"):
        vote([packets[0], np.zeros(10)])
    with pytest.raises(InvalidInputError, match=r"packets\[1\]: expected the codec sign"):
        vote([packets[0], sparse_packet(10)])
    with pytest.raises(InvalidInputError, match=r"packets\[1\]: holds 11 coordinates"):
        vote([packets[0], sign_packet(np.zeros(11, bool))])
    with pytest.raises(InvalidInputError, match=r"weights\[0\]: expected a number >= 0"):
        vote(packets, [-1, 2])
    with pytest.raises(InvalidInputError, match="weights: expected a positive sum"):
        vote(packets, [0, 0])
    with pytest.raises(InvalidInputError, match="form: expected one of"):
        vote(packets, form="dense")
    with pytest.raises(DTypeError, match="out: expected a NumPy array of float32, got float64"):
        vote(packets, out=np.zeros(10))
    with pytest.raises(InvalidInputError, match=r"out: expected a contiguous, .* \(10,\)"):
        vote(packets, out=np.zeros(9, np.float32))
    with pytest.raises(InvalidInputError, match="out: expected a contiguous"):
        vote(packets, out=np.zeros(20, np.float32)[::2])
    for scale in (-1.0, np.nan, np.inf, 1e39):
        with pytest.raises(InvalidInputError, match="scale: expected a finite number >= 0"):
            vote_packet(packets, scale=scale)


# ---- the rule ----------------------------------------------------------------------------------


def test_rule_on_updates_and_on_their_packets():
    rng = np.random.default_rng(0)
    updates = list(np.float32(rng.integers(-3, 4, (6, 700))))
    signs = [np.where(u < 0, -1, 1) for u in updates]  # the sign of 0 is +1
    expected = np.float32(np.sign(np.sum(signs, axis=0)))
    packets = [sign_packet(u < 0, 100, scale=5.0) for u in updates]
    rule = MajorityVote()
    np.testing.assert_array_equal(rule(updates), expected)
    np.testing.assert_array_equal(rule(np.stack(updates)), expected)
    np.testing.assert_array_equal(rule(packets), expected)
    np.testing.assert_array_equal(
        rule([bytes(p.to_numpy()) for p in map(as_packet, packets)]), expected
    )
    weights = [1, 2, 3, 4, 5, 6.5]
    expected = np.float32(np.sign(np.einsum("i,ij->j", weights, signs)))
    np.testing.assert_array_equal(rule(updates, weights), expected)
    np.testing.assert_array_equal(MajorityVote(scale=0.25)(packets, weights), 0.25 * expected)


def as_packet(parsed: ParsedPacket) -> Packet:
    return Packet(parsed._buffer, trusted=True)


def test_rule_keeps_structure_and_dtype():
    rng = np.random.default_rng(1)
    rows = [
        {"a": rng.standard_normal((3, 5)), "b": np.float16(rng.standard_normal(7))} for _ in "123"
    ]
    got = MajorityVote()(rows)
    for name in ("a", "b"):
        assert got[name].dtype == rows[0][name].dtype
        expected = np.sign(sum(np.sign(row[name]) for row in rows))
        np.testing.assert_array_equal(got[name], expected)
    packets = [sign_packet(np.concatenate([row["a"].ravel(), row["b"]]) < 0) for row in rows]
    again = MajorityVote()(packets, like=rows[0])
    out = {"a": np.zeros((3, 5)), "b": np.zeros(7, np.float16)}
    assert MajorityVote()(packets, like=rows[0], out=out) is out
    for name in ("a", "b"):
        np.testing.assert_array_equal(again[name], got[name])
        np.testing.assert_array_equal(out[name], got[name])


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_rule_takes_torch():
    import torch

    rows = [torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16) * s for s in (1, 1, -1)]
    got = MajorityVote()(rows)
    assert got.dtype == torch.bfloat16 and got.tolist() == [1, -1, 1]


def test_rule_makes_the_packet_for_the_way_down():
    packets = [sign_packet(row) for row in random_bits(4, 999)]
    down = MajorityVote(scale=2.0).packet(packets, round=3)
    assert isinstance(down, Packet) and down.header.round == 3
    np.testing.assert_array_equal(decode(down), np.where(vote(packets) < 0, -2, 2))
    assert Packet.from_bytes(bytes(down)) == down


def test_rule_on_values_that_are_not_finite():
    rows = [np.float32([1, -1]), np.float32([np.nan, -np.inf]), np.float32([-1, 1])]
    with pytest.raises(NonFiniteError, match=r"updates\[1\]: NaN or infinity"):
        MajorityVote()(rows)
    got = MajorityVote(nonfinite="propagate")(rows)
    np.testing.assert_array_equal(got, np.float32([1, -1]))


def test_rule_errors():
    for scale in (0, -1.0, np.nan, 1e39):
        with pytest.raises(InvalidInputError, match="scale: expected"):
            MajorityVote(scale=scale)
    with pytest.raises(InvalidInputError, match="nonfinite: expected one of"):
        MajorityVote(nonfinite="exclude")
    with pytest.raises(InvalidInputError, match=r"packets\[0\]: expected the codec sign"):
        MajorityVote()([sparse_packet(10)])
    with pytest.raises(InvalidInputError, match="updates: expected at least one"):
        MajorityVote()([])
    with pytest.raises(InvalidInputError, match="like: goes with packets"):
        MajorityVote()([np.zeros(3)], like=np.zeros(3))

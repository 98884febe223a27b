"""Mean and Accumulator: the card's worked numbers, merging, policies, errors."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from flcore.aggregation import Accumulator, Mean
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, PacketError
from support import EPS

HAND = [(np.float32([1, -2]), 1), (np.float32([3, 0]), 3), (np.float32([-1, 4]), 4)]
ONE = np.ones(4, np.float32)


def test_running_mean_by_hand():
    total = Accumulator(like=HAND[0][0])
    for (update, weight), want in zip(HAND, ([1, -2], [2.5, -0.5], [0.75, 1.75]), strict=True):
        np.testing.assert_array_equal(total.add(update, weight).result(), np.float32(want))
    assert total.count == 3 and total.total_weight == 8 and total.nbytes == 8
    updates, weights = zip(*HAND, strict=True)
    np.testing.assert_array_equal(Mean()(updates, weights), np.float32([0.75, 1.75]))


def test_a_single_client_comes_out_exactly(rng):
    x = rng.standard_normal(1000).astype(np.float32)
    assert Mean()([x], [3.0]).tobytes() == x.tobytes()
    for dtype in ("float32", "float64"):
        assert Accumulator(x, dtype).add(x, 3.0).result().tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equal_updates_stay_what_they_are(dtype, rng):
    x = rng.standard_normal(1000).astype(np.float32)
    ulp = np.spacing(np.abs(x))
    assert (np.abs(Mean(accumulate=dtype)([x] * 7, np.arange(1, 8)) - x) <= 2 * ulp).all()
    total = Accumulator(x, dtype)
    for q in range(1, 8):
        total.add(x, q)
    assert (np.abs(total.result() - x) <= 2 * ulp).all()


def test_mean_without_weights_is_uniform_and_takes_a_stacked_array(rng):
    x = rng.standard_normal((6, 5, 4))
    np.testing.assert_allclose(Mean()(x), x.mean(axis=0), rtol=1e-14)
    np.testing.assert_array_equal(Mean()(x), Mean()(list(x), weights=[1] * 6))


@pytest.mark.parametrize("dtype", ["float32", "float64", "reproducible"])
def test_merging_any_split_equals_the_batch(dtype, rng):
    x = rng.standard_normal((9, 3000)).astype(np.float32)
    q = rng.integers(1, 1000, 9).astype(float)
    want = Mean(accumulate=dtype)(x, q)
    wide = Mean(accumulate="float64")(x.astype(np.float64), q)
    for cut in (0, 1, 4, 9):
        parts = [Accumulator(x[0], dtype), Accumulator(x[0], dtype)]
        for i in range(9):
            parts[i >= cut].add(x[i], q[i])
        got = parts[0].merge(parts[1]).result()
        if dtype == "reproducible":
            assert got.tobytes() == want.tobytes()
        else:
            tolerance = 20 * EPS["float32"] if dtype == "float32" else EPS["float32"]
            assert np.abs(got - wide).max() <= tolerance * np.abs(x).max()
        assert parts[0].count == 9 and parts[0].total_weight == q.sum()


def test_reproducible_result_ignores_the_order_of_add_and_merge(rng):
    x = (rng.standard_normal((4, 200)) * 10.0 ** rng.integers(-6, 6, (4, 1))).astype(np.float32)
    q = [0.1, 3.7, 1e4, 2.0]
    results = set()
    for order in itertools.permutations(range(4)):
        left, right = Accumulator(x[0], "reproducible"), Accumulator(x[0], "reproducible")
        for i in order[:2]:
            left.add(x[i], q[i])
        for i in order[2:]:
            right.add(x[i], q[i])
        results.add(right.merge(left).result().tobytes())
    assert len(results) == 1


def test_large_example_counts_do_not_overflow_float32():
    x = np.full(3, 1e35, np.float32)
    total = Accumulator(x)
    for _ in range(4):
        total.add(x, 1e6)
    np.testing.assert_allclose(total.result(), x, rtol=1e-6)


def test_half_precision_sums_are_float32():
    ones, big = np.ones(2, np.float16), np.full(2, 1000, np.float16)
    total = Accumulator(ones)
    for _ in range(4096):
        total.add(ones)
    np.testing.assert_array_equal(total.result(divisor=2.0), np.float16([2048, 2048]))
    np.testing.assert_array_equal(Mean()([big] * 300), big)


def test_memory_does_not_grow_with_the_clients(rng):
    x = {"w": rng.standard_normal((50, 20)).astype(np.float16), "n": np.int64(3).reshape(1)}
    total = Accumulator(x)
    before = total.nbytes
    for _ in range(20):
        total.add(x, 2.0)
    assert total.nbytes == before == 4 * 1000


def test_result_leaves_the_accumulator_and_reset_clears_it():
    total = Accumulator(ONE).add(ONE, 2)
    np.testing.assert_array_equal(total.result(divisor=4.0), ONE / 2)
    np.testing.assert_array_equal(total.result(), ONE)
    np.testing.assert_array_equal(total.reset().add(3 * ONE, 5).result(), 3 * ONE)


def test_accumulators_travel_between_processes():
    total = pickle.loads(pickle.dumps(Accumulator({"w": ONE}).add({"w": ONE}, 2)))
    np.testing.assert_array_equal(total.add({"w": 4 * ONE}, 1).result()["w"], 2 * ONE)


# ---- integer layers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "want"), [("mean", [18, 2]), ("max", [20, 4]), ("sum", [30, 5]), ("first", [10, 1])]
)
def test_integer_layers_follow_a_policy(policy, want):
    updates = [
        {"w": ONE, "steps": np.array([10, 1])},
        {"w": 2 * ONE, "steps": np.array([20, 4])},
    ]
    result = Mean(integers=policy)(updates, [1, 3])
    if policy == "mean":  # (10 + 60) / 4 = 17.5 -> 18, (1 + 12) / 4 = 3.25 -> 3
        want = [18, 3]
    assert result["steps"].dtype == np.int64 and list(result["steps"]) == want
    np.testing.assert_array_equal(result["w"], 1.75 * ONE)
    total = Accumulator(updates[0], integers=policy)
    for update, q in zip(updates, (1, 3), strict=True):
        total.merge(Accumulator(updates[0], integers=policy).add(update, q))
    assert list(total.result()["steps"]) == want


def test_boolean_and_small_integer_layers_keep_their_dtype():
    updates = [
        [np.array([True, False]), np.uint8([200, 0])],
        [np.array([True, True]), np.uint8([250, 1])],
    ]
    masks, counts = Mean(integers="max")(updates)
    assert masks.dtype == bool and masks.all()
    assert counts.dtype == np.uint8 and list(counts) == [250, 1]


# ---- policies and errors -----------------------------------------------------------------------


def test_mean_excludes_a_broken_client_and_normalises_again():
    bad = np.float32([1, np.nan, 1, 1])
    rows, q = [ONE, bad, 4 * ONE], [1, 10, 2]
    for accumulate in ("float32", "reproducible"):
        rule = Mean(accumulate=accumulate, nonfinite="exclude")
        np.testing.assert_array_equal(rule(rows, q), 3 * ONE)
    with pytest.raises(NonFiniteError, match=r"updates\[1\]"):
        Mean()(rows, q)
    updates = [{"w": r, "n": np.array([i])} for i, r in enumerate(rows)]
    excluded = Mean(nonfinite="exclude", integers="sum")(updates, q)
    assert list(excluded["n"]) == [2]  # the integers of the excluded client do not count either


@pytest.mark.parametrize("dtype", ["float32", "float64", "reproducible"])
def test_accumulator_policies_for_non_finite_updates(dtype):
    bad = np.float32([1, np.inf, 1, 1])
    total = Accumulator(ONE, dtype).add(ONE)
    with pytest.raises(NonFiniteError, match="update 1"):
        total.add(bad)
    np.testing.assert_array_equal(total.add(3 * ONE).result(), 2 * ONE)
    lenient = Accumulator(ONE, dtype, nonfinite="exclude").add(ONE).add(bad)
    assert lenient.excluded == 1 and lenient.count == 1
    np.testing.assert_array_equal(lenient.result(), ONE)
    through = Accumulator(ONE, dtype, nonfinite="propagate").add(ONE).add(bad).result()
    assert list(np.isfinite(through)) == [True, False, True, True]


def test_reproducible_limits_are_checked_before_anything_is_added():
    total = Accumulator(ONE, "reproducible").add(ONE)
    with pytest.raises(InvalidInputError, match=r"2\^46"):
        total.add(ONE, 1e15)
    np.testing.assert_array_equal(total.result(), ONE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Mean()([ONE, ONE], [0, 0]), InvalidInputError, "positive sum"),
        (lambda: Mean()([ONE, ONE], [1, -1]), InvalidInputError, r"weights\[1\].*>= 0"),
        (lambda: Mean()([ONE, ONE], [1, np.nan]), InvalidInputError, r"weights\[1\].*finite"),
        (lambda: Mean()([ONE, ONE[:3]]), InvalidInputError, "shape"),
        (lambda: Mean()([]), InvalidInputError, "at least one update"),
        (lambda: Mean(accumulate="int8"), InvalidInputError, "accumulate"),
        (lambda: Mean(integers="median"), InvalidInputError, "integers"),
        (lambda: Mean()([ONE.astype("U3")]), DTypeError, "str"),
        (lambda: Accumulator(ONE, "float16"), InvalidInputError, "dtype"),
        (lambda: Accumulator([1.0]), DTypeError, r"like\[0\]"),
        (lambda: Accumulator(ONE).add(ONE, -1), InvalidInputError, ">= 0"),
        (lambda: Accumulator(ONE).add(ONE, np.inf), InvalidInputError, "finite"),
        (lambda: Accumulator(ONE).add(ONE[:3]), InvalidInputError, "shape"),
        (lambda: Accumulator(ONE).add({"w": ONE}), DTypeError, "one array"),
        (lambda: Accumulator(ONE).add(b"not a packet"), PacketError, "bytes|magic"),
        (lambda: Accumulator(ONE).result(), InvalidInputError, "nothing"),
        (lambda: Accumulator(ONE).add(ONE, 0).result(), InvalidInputError, "nothing"),
        (lambda: Accumulator(ONE).add(ONE).result(divisor=0), InvalidInputError, "divisor"),
        (lambda: Accumulator(ONE).merge(Accumulator(ONE[:2])), InvalidInputError, "layout"),
        (lambda: Accumulator(ONE).merge(Accumulator(ONE, "float64")), InvalidInputError, "dtype"),
        (lambda: Accumulator(ONE).merge(ONE), DTypeError, "Accumulator"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mean_leaves_out_untouched_when_it_raises():
    out = {"w": np.full(4, 7, np.float32), "n": np.array([7])}
    updates = [{"w": ONE, "n": np.array([1])}, {"w": ONE * np.nan, "n": np.array([2])}]
    with pytest.raises(NonFiniteError):
        Mean()(updates, out=out)
    assert (out["w"] == 7).all() and out["n"][0] == 7
    assert Mean(nonfinite="exclude")(updates, out=out) is out
    assert (out["w"] == 1).all() and out["n"][0] == 1


# ---- packets -----------------------------------------------------------------------------------


def packet_of(x: np.ndarray) -> bytes:
    from flcore.compression import Encoder, TopK

    return bytes(Encoder(TopK(ratio=0.25), like=x).encode(x))


@pytest.mark.parametrize("dtype", ["float32", "float64", "reproducible"])
def test_packets_and_dense_updates_share_one_sum(dtype, rng):
    from flcore.compression import Packet, decode

    layers = [rng.standard_normal(s).astype(np.float32) for s in (100, 3, 70_000)]
    flat = np.concatenate(layers)
    data = packet_of(flat)
    sparse = np.split(decode(Packet.from_bytes(data)), [100, 103])
    total = Accumulator(layers, dtype).add(layers, 2).add(data, 3).add(Packet.from_bytes(data), 0)
    assert total.count == 3 and total.total_weight == 5
    for got, a, b in zip(total.result(), layers, sparse, strict=True):
        np.testing.assert_allclose(got, (2 * a + 3 * b) / 5, rtol=1e-6, atol=1e-6)


def test_a_broken_packet_changes_nothing(rng):
    x = rng.standard_normal(1000).astype(np.float32)
    data = packet_of(x)
    total = Accumulator(x).add(x)
    huge = bytearray(data)
    huge[16:24] = (2**60).to_bytes(8, "little")  # the header's count of values
    flipped = bytearray(data)
    flipped[-3] ^= 0x10
    other = packet_of(x[:999])
    for bad, message in (
        (data[:-1], "bytes"),
        (data[:40], "bytes"),
        (b"", "bytes"),
        (bytes(flipped), "checksum"),
        (bytes(huge), "1152921504606846976"),
        (other, "expected 1000 values"),
    ):
        with pytest.raises(InvalidInputError, match=message) as caught:
            total.add(bad)
        assert isinstance(caught.value, PacketError) or bad is other
    assert total.count == 1 and total.result().tobytes() == x.tobytes()

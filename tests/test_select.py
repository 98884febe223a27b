"""Order statistics by coordinate: worked examples, networks, variants against the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flcore
from flcore import _variants
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import select
from flcore.ops.select import comparators
from flcore.reference.select import OPS
from flcore.reference.select import comparators as network
from support import DTYPES, EPS, HAS_TORCH, SIZES, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("select", "cpu").items() if not why]
# register networks; two, three and four runs of 32, whole and cut short; the general path
COUNTS = (1, 2, 3, 5, 16, 31, 32, 33, 47, 64, 65, 97, 100, 128, 129, 161)
COLUMN = np.array([1, 2, 3, 10, 4, -50.0])[:, None]


def clients(rng: np.random.Generator, n: int, size: int, dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal((n, size)).astype(np_dtype(dtype))


# ---- by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_column_by_hand(variant, dtype):
    x = COLUMN.astype(dtype)
    for op, options, want in (
        ("median", {}, 2.5),
        ("median", {"median": "lower"}, 2),
        ("median", {"median": "upper"}, 3),
        ("trimmed_mean", {"f": 1}, 2.5),
        ("near_median", {"f": 1}, 4),
        ("near_trimmed", {"f": 1}, 4),
        ("trimmed_mean", {}, -5),
        ("near_median", {}, -5),
    ):
        assert select(x, op, variant=variant, **options)[0] == want, (op, options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_two_values_at_the_same_distance_the_smaller_is_taken(variant):
    x = np.float32([[0], [2], [4]])
    assert select(x, "near_median", keep=2, variant=variant)[0] == 1


def test_trimming_is_no_subtraction_of_extremes():
    x = np.float32([[1], [2], [3], [4], [1e12]])
    assert select(x, "trimmed_mean", f=1)[0] == 3


# ---- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 17))
def test_networks_sort_every_binary_input(n):
    exchanges, order = network(n)
    bits = np.array(list(itertools.product([0, 1], repeat=n)), np.int8).T.copy()
    for low, high in exchanges:
        bits[low], bits[high] = np.minimum(bits[low], bits[high]), np.maximum(bits[low], bits[high])
    assert (np.diff(bits[order], axis=0) >= 0).all()


def test_sizes_of_the_networks():
    full = {9: 26, 10: 31, 16: 63, 20: 97, 25: 138, 32: 191, 64: 543, 100: 1077}
    middle = {7: 14, 9: 22, 15: 49, 16: 53, 20: 81, 25: 113, 32: 157, 64: 445}
    assert {n: comparators(n, "trimmed_mean") for n in full} == full
    assert {n: comparators(n, "median") for n in middle} == middle


@pytest.mark.parametrize("n", COUNTS)
def test_kernels_sort_zeros_and_ones(n, rng):
    """What sorts random zeros and ones sorts everything; the trimmed sums show every rank."""
    x = (rng.random((n, 2048)) < rng.random(2048)).astype(np.float32)
    ones = x.sum(axis=0)
    for f in {0, (n - 1) // 4, (n - 1) // 2}:
        want = np.clip(ones - f, 0, n - 2 * f) / np.float32(n - 2 * f)
        np.testing.assert_array_equal(select(x, "trimmed_mean", f=f), want.astype(np.float32))


# ---- against the reference -----------------------------------------------------------------------


def check(x: np.ndarray, dtype: str, op: str, **options) -> None:
    got = select(x, op, **options).astype(np.float64)
    want = select(x, op, variant="reference", **options).astype(np.float64)
    scale = np.abs(x.astype(np.float64)).max(axis=0, initial=0)
    wide = "float64" if dtype == "float64" else "float32"
    # a mean of n values: half a rounding each, and the one to the dtype of the result
    bound = (len(x) * EPS[wide] + EPS[dtype]) * scale
    assert got.shape == want.shape and (np.abs(got - want) <= bound).all(), (op, options, len(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_cpu_matches_the_reference(op, dtype, rng):
    for n in COUNTS:
        x = clients(rng, n, 83, dtype)
        for f in {0, (n - 1) // 3, (n - 1) // 2}:
            check(x, dtype, op, f=f)
        check(x, dtype, op, keep=1)
        check(x, dtype, op, keep=(n + 1) // 2, median="lower")


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, rng):
    for n in (2, 9, 40):
        for dtype in ("float32", "float16"):
            x = clients(rng, n, size, dtype)
            check(x, dtype, "median")
            check(x, dtype, "near_median", f=n // 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixing_comes_before_the_statistic(dtype, rng):
    for n, m in ((3, 3), (7, 4), (9, 40)):
        x = clients(rng, n, 301, dtype)
        mix = rng.uniform(-1, 1, (m, n)) * (rng.random((m, n)) < 0.7)
        got = select(x, "near_median", f=1, mix=mix).astype(np.float64)
        want = select(x, "near_median", f=1, mix=mix, variant="reference").astype(np.float64)
        wide = "float64" if dtype == "float64" else "float32"
        np.testing.assert_allclose(
            got, want, rtol=EPS[dtype], atol=4 * n * m * EPS[wide] + EPS[dtype]
        )


def test_identity_mix_is_no_mix_and_the_mean_mix_is_the_mean(rng):
    x = clients(rng, 9, 500)
    for op in OPS:
        want = select(x, op, f=2)
        assert select(x, op, f=2, mix=np.eye(9)).tobytes() == want.tobytes()
        mean = select(x, op, f=2, mix=np.full((9, 9), 1 / 9))
        np.testing.assert_allclose(mean, x.mean(axis=0), atol=1e-6)


def test_rows_without_a_coefficient_are_not_read(rng):
    x = clients(rng, 4, 50)
    mix = np.array([[0.5, 0, 0.5, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    want = select(x, mix=mix)
    x[1] = np.nan
    assert select(x, mix=mix).tobytes() == want.tobytes()


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_and_structures(rng):
    import torch

    x = [{"w": torch.randn(3, 4), "b": torch.randn(5).bfloat16()} for _ in range(5)]
    got = select(x, "median")
    for name in ("w", "b"):
        want = torch.stack([u[name].float() for u in x]).median(dim=0).values
        assert got[name].dtype == x[0][name].dtype and torch.equal(got[name].float(), want)


# ---- exactness ---------------------------------------------------------------------------------


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib, numpy as np, flcore
from flcore.ops import select
rng, digest = np.random.default_rng(1), hashlib.sha256()
for n in (2, 3, 8, 32, 33, 64, 90, 128, 140):
    for dtype in (np.float32, np.float64, np.float16):
        x = rng.standard_normal((n, 1234)).astype(dtype)
        for op in ("median", "trimmed_mean", "near_median", "near_trimmed"):
            digest.update(select(x, op, f=(n - 1) // 3).tobytes())
        digest.update(select(x, "near_median", mix=rng.random((5, n))).tobytes())
x = rng.standard_normal((10, 40_001)).astype(np.float32)
for threads in (1, 2, 3):
    flcore.set_num_threads(threads)
    digest.update(select(x, "near_trimmed", f=3).tobytes())
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1


def test_threads_do_not_change_a_bit(rng):
    x = clients(rng, 10, 40_001)
    found = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        found.add(select(x, "near_trimmed", f=3).tobytes())
    assert len(found) == 1


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_order_of_clients_and_split_into_layers_do_not_matter(data):
    n = data.draw(st.sampled_from([2, 3, 6, 11, 34, 70]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.choice([-1.5, -0.0, 0.0, 1e-30, 3e38, -3e38, 7.0], (n, 40)).astype(np.float32)
    x[:, 20:] = clients(rng, n, 20)
    order = rng.permutation(n)
    for op in OPS:
        want = select(x, op, f=(n - 1) // 2, nonfinite="propagate").tobytes()
        assert select(x[order], op, f=(n - 1) // 2, nonfinite="propagate").tobytes() == want
        layers = [[r[:3], r[3:3], r[3:19], r[19:]] for r in x]
        parts = select(layers, op, f=(n - 1) // 2, nonfinite="propagate")
        assert np.concatenate(parts).tobytes() == want


def test_shift_scale_and_sign(rng):
    x = clients(rng, 8, 400, "float64")
    for op in OPS:
        want = select(x, op, f=2)
        np.testing.assert_allclose(select(x + 3, op, f=2), want + 3, rtol=1e-14)
        np.testing.assert_allclose(select(4 * x, op, f=2), 4 * want, rtol=1e-14)
        np.testing.assert_allclose(select(-x, op, f=2), -want, rtol=1e-13, atol=1e-15)


def test_relations_between_the_statistics(rng):
    x = clients(rng, 9, 300, "float64")
    for op in OPS[1:]:
        np.testing.assert_allclose(select(x, op, f=0), x.mean(axis=0), atol=1e-15)
    np.testing.assert_array_equal(select(x, "trimmed_mean", f=4), select(x, "median"))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([-3e38, 3e38, 0.0, 1e-40]))
def test_f_bad_values_cannot_leave_the_range_of_the_others(seed, f, value):
    rng = np.random.default_rng(seed)
    n = 2 * f + 1 + int(rng.integers(4))
    x = clients(rng, n, 20)
    x[rng.choice(n, f, replace=False)] = value
    ordered = np.sort(x, axis=0)
    for op in ("median", "trimmed_mean"):
        result = select(x, op, f=f, nonfinite="propagate")
        slack = 1e-6 * np.abs(result)
        assert (result >= ordered[f] - slack).all() and (result <= ordered[n - 1 - f] + slack).all()


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows_and_guarded_output(dtype, rng):
    for size in (1, 5, 16, 33, 4099):
        for n in (5, 36):
            rows = list(clients(rng, n, size, dtype))
            want = select(rows, "trimmed_mean", f=1)
            out = Guarded(size, np_dtype(dtype), 1)
            shifted = [unaligned(r, 1) for r in rows]
            select(shifted, "trimmed_mean", f=1, out=out.array, nonfinite="propagate")
            out.check()
            assert out.array.tobytes() == want.tobytes()


def test_read_only_and_strided_inputs(rng):
    base = rng.standard_normal((5, 40, 30)).astype(np.float32)
    want = select([b[::2, ::3].copy() for b in base])
    base.flags.writeable = False
    np.testing.assert_array_equal(select([b[::2, ::3] for b in base]), want)
    np.testing.assert_array_equal(select(list(base.astype(">f4")))[::2, ::3], want)


# ---- non-finite values ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 40, 140])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_policies(value, dtype, n, rng):
    x = clients(rng, n, 40, dtype)
    x[2, [3, 39]] = value
    for op in OPS:
        with pytest.raises(NonFiniteError, match=r"updates\[2\]") as caught:
            select(x, op, f=2)
        assert caught.value.clients == (2,)
        left = select(x, op, f=2, nonfinite="exclude")
        want = select(np.delete(x, 2, axis=0), op, f=1, keep=n - 2)
        assert left.tobytes() == want.tobytes()
        through = select(x, op, f=2, nonfinite="propagate").astype(np.float64)
        defined = select(x, op, f=2, nonfinite="propagate", variant="reference").astype(np.float64)
        np.testing.assert_array_equal(np.isnan(through), np.isnan(defined))
        np.testing.assert_array_equal(np.isnan(through[[3, 39]]), np.isnan(value))


def test_values_that_overflow_only_the_check_are_no_error():
    x = np.float32([[3e38], [3e38], [3e38], [-1]])
    assert select(x, "median")[0] == np.float32(3e38)


def test_nobody_left():
    with pytest.raises(NonFiniteError, match="no client is left"):
        select(np.full((3, 4), np.nan, np.float32), nonfinite="exclude")


def test_out_is_untouched_after_an_error(rng):
    x, out = clients(rng, 3, 9000), np.full(9000, 7, np.float32)
    x[1, 8999] = np.nan
    with pytest.raises(NonFiniteError):
        select(x, out=out)
    assert (out == 7).all()


# ---- bad input ---------------------------------------------------------------------------------

X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"op": "mode"}, InvalidInputError, "op: expected one of"),
        ({"op": "trimmed_mean", "f": 2}, InvalidInputError, "2 f < n = 4"),
        ({"op": "trimmed_mean", "f": -1}, InvalidInputError, "f: expected"),
        ({"op": "trimmed_mean", "f": 0.5}, DTypeError, "integers"),
        ({"op": "near_median", "keep": 0}, InvalidInputError, "keep"),
        ({"op": "near_median", "keep": 5}, InvalidInputError, "keep"),
        ({"median": "middle"}, InvalidInputError, "median"),
        ({"nonfinite": "ignore"}, InvalidInputError, "nonfinite"),
        ({"mix": np.ones((2, 3))}, InvalidInputError, r"mix: expected shape \(m, 4\)"),
        ({"mix": np.full((2, 4), np.nan)}, InvalidInputError, "mix: expected finite"),
        ({"mix": "abc"}, InvalidInputError, "mix"),
        ({"out": np.ones(4, np.float32)}, InvalidInputError, "out"),
        ({"variant": "cuda"}, VariantUnavailableError, "select"),
        ({"variant": "triton"}, VariantUnavailableError, "no triton variant"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        select(X, **options)

"""Moments of layers and affine maps: worked examples, accuracy, bits, policies, errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flcore
from flcore import _native, _variants
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import accumulate_moments, affine, moments, moments_each
from flcore.ops.moments import Moments
from flcore.reference import moments as reference
from support import DTYPES, SIZES, np_dtype, outputs_per_level

CPU_VARIANTS = [v for v, why in _variants.available("moments", "cpu").items() if not why]
NUMPY_VARIANTS = [v for v in CPU_VARIANTS if v != "triton"]
TILE = _native.core.MOMENT_TILE


def values(rng: np.random.Generator, size: int, dtype: str, mean: float = 3.0) -> np.ndarray:
    return (rng.standard_normal(size) + mean).astype(np_dtype(dtype))


def to_torch(x: np.ndarray):
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def to_numpy(x) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return x
    import torch

    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np_dtype("bfloat16"))
    return x.numpy()


def seen_by(variant: str, x: np.ndarray):
    """Triton sees torch tensors, the others NumPy arrays."""
    return to_torch(x) if variant == "triton" else x


def accumulator_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def exact(x: np.ndarray) -> tuple[float, float]:
    """Mean and m2 in two passes of 80-bit sums."""
    wide = x.astype(np.float64).astype(np.longdouble)
    mean = wide.sum() / max(1, x.size)
    return float(mean), float(np.square(wide - mean).sum())


def same(a: Moments, b: Moments) -> bool:
    return all(p.tobytes() == q.tobytes() for p, q in zip(a, b, strict=True))


def test_layers_by_hand():
    update = {
        "w": np.float32([[1, 2], [3, 4]]),
        "constant": np.full(40, 7.0),
        "one": np.float16([2.5]),
        "none": np.zeros((0, 3), np.float32),
    }
    for variant in NUMPY_VARIANTS:
        m = moments(update, variant=variant)
        assert m.count.tolist() == [4, 40, 1, 0] and m.count.dtype == np.float64
        np.testing.assert_array_equal(m.mean, [2.5, 7, 2.5, np.nan])
        np.testing.assert_array_equal(m.m2, [5, 0, 0, 0])
        np.testing.assert_array_equal(m.variance(), [1.25, 0, 0, np.nan])
        np.testing.assert_array_equal(m.variance(unbiased=True), [5 / 3, 0, np.nan, np.nan])
        doubled = affine(update, [2, 1, 0, 1], [1, 0, 9, 0], variant=variant)
        np.testing.assert_array_equal(doubled["w"], np.float32([[3, 5], [7, 9]]))
        assert doubled["constant"][0] == 7 and doubled["one"] == 9 and doubled["none"].size == 0


def test_a_row_is_added_and_measured_by_hand():
    for variant in NUMPY_VARIANTS:
        for policy in ("raise", "propagate"):
            acc = np.float32([10, 20, 30, 40])
            m = accumulate_moments(
                acc, np.float32([1, 2, 3, 4]), 0.5, nonfinite=policy, variant=variant
            )
            np.testing.assert_array_equal(acc, np.float32([10.5, 21, 31.5, 42]))
            assert (m.count, m.mean, m.m2) == (4, 2.5, 5)  # of the row, whatever its weight


# ---- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_variant_matches_the_definition(variant, dtype, rng):
    sizes = (1, 17, 300) if variant == "triton" else (*SIZES, 5 * TILE + 3)
    layers = [values(rng, size, dtype) for size in sizes]
    m = moments([seen_by(variant, x) for x in layers], variant=variant)
    want = np.array([exact(x) for x in layers])
    full = np.array(sizes) > 0
    np.testing.assert_allclose(m.mean[full], want[full, 0], rtol=1e-14)
    np.testing.assert_allclose(m.m2, want[:, 1], rtol=1e-12)


@pytest.mark.parametrize(
    ("mean", "spread", "dtype"),
    [
        (1e3, 1e-3, "float32"),  # a few values of float32, most of them equal
        (1e9, 1.0, "float64"),  # sums of squares would keep no digit: (mean / spread)^2 = 1e18
        (-1e5, 1e-6, "float64"),
        (0.0, 1e-20, "float32"),
    ],
)
@pytest.mark.parametrize("variant", NUMPY_VARIANTS)
def test_a_far_mean_costs_no_digits(variant, mean, spread, dtype, rng):
    x = (mean + spread * rng.standard_normal(100_003)).astype(dtype)
    m, (want_mean, want_m2) = moments(x, variant=variant), exact(x)
    assert want_m2 > 0
    np.testing.assert_allclose(m.m2, want_m2, rtol=1e-11)
    assert abs(m.mean[0] - want_mean) <= 1e-12 * abs(mean) + 1e-12 * spread


def test_a_pivot_far_from_the_others_costs_no_digits(rng):
    x = rng.standard_normal(3 * TILE)
    x[::TILE] = 1e8  # the value that each tile is shifted by
    np.testing.assert_allclose(moments(x).m2, exact(x)[1], rtol=1e-12)
    assert moments(np.float64([1e-300, 3e-300])).m2 == 0  # squares below the smallest number


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(0, 3 * 16 + 1),
    mean=st.sampled_from([0.0, 1.0, -1e4, 1e8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_short_layers_match_the_definition(size, mean, seed):
    x = np.random.default_rng(seed).standard_normal(size) + mean
    m, (want_mean, want_m2) = moments(x), exact(x)
    np.testing.assert_allclose(m.m2, want_m2, rtol=1e-12)
    if size:
        np.testing.assert_allclose(m.mean, want_mean, rtol=1e-14, atol=1e-15)


# ---- the same bits -----------------------------------------------------------------------------

BITS = """
import hashlib, numpy as np, flcore
from flcore import _arrays
from flcore.ops import accumulate_moments, affine, moments, moments_each
from flcore.ops.moments import affine_views, moments_views
import ml_dtypes
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
    wide = np.float64 if dtype is np.float64 else np.float32
    x = [(rng.standard_normal(n) * 10 + 100).astype(dtype) for n in (0, 1, 15, 4096, 70003, 150001)]
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        acc = [np.ones(v.size, wide) for v in x]
        found = [*moments(x), *moments_each([x, x])[1:]]
        found += [*accumulate_moments(acc, x, 0.3, nonfinite="propagate"), *acc]
        found += affine(x, 1.1, -3.3)
        views, accs = [_arrays.view(v) for v in x], [_arrays.view(a) for a in acc]
        for weight in (0.7, 0.0):
            out = [_arrays.view(np.empty_like(v)) for v in x]
            found += moments_views([views], blend=(accs, 0.6, weight))
            affine_views(views, [1.1] * 6, [0.1] * 6, out, blend=(accs, 0.6, weight))
            found += [o.array for o in out]
        once = hashlib.sha256(b"".join(f.tobytes() for f in found)).hexdigest()
        digest.update(once.encode())
        print(once)
"""


def test_bits_do_not_depend_on_level_or_threads():
    pytest.importorskip("ml_dtypes")
    printed = outputs_per_level(BITS)
    assert len(set(printed.values())) == 1
    lines = next(iter(printed.values())).split()
    assert len(lines) == 12
    assert all(len(set(lines[i : i + 3])) == 1 for i in (0, 3, 6, 9))  # 1, 2 and 3 threads
    assert len(set(lines)) == 4


def test_layers_do_not_feel_each_other(rng):
    layers = [values(rng, n, d) for n, d in ((3, "float16"), (9000, "float32"), (4096, "float64"))]
    together, alone = moments(layers), [moments(x) for x in layers]
    assert together.mean.tolist() == [m.mean[0] for m in alone]
    assert together.m2.tolist() == [m.m2[0] for m in alone]


@pytest.mark.parametrize("variant", NUMPY_VARIANTS)
def test_many_updates_at_once(variant, rng):
    updates = [
        {"w": values(rng, 5000, "float32"), "b": values(rng, 7, "float32")} for _ in range(5)
    ]
    each = moments_each(updates, variant=variant)
    assert each.count.shape == each.mean.shape == each.m2.shape == (5, 2)
    for i, update in enumerate(updates):
        assert same(Moments(*(v[i] for v in each)), moments(update, variant=variant))
    matrix = np.stack([u["w"] for u in updates])
    np.testing.assert_array_equal(moments_each(matrix, variant=variant).m2[:, 0], each.m2[:, 0])


# ---- non-finite values -------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 5, 4096, 9000 - 1])  # a pivot, a lane, a second pivot, a tail
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", NUMPY_VARIANTS)
def test_non_finite_values_stay_in_their_layer(variant, dtype, at, rng):
    layers = [values(rng, 9000, dtype), values(rng, 5, dtype)]
    clean = moments(layers, variant=variant)
    for value in (np.nan, np.inf, -np.inf):
        layers[0][at] = value
        m = moments(layers, nonfinite="propagate", variant=variant)
        np.testing.assert_array_equal(m.mean[0], value)
        assert np.isnan(m.m2[0]) and m.mean[1] == clean.mean[1] and m.m2[1] == clean.m2[1]
        with pytest.raises(NonFiniteError, match="update: NaN or infinity") as caught:
            moments(layers, variant=variant)
        assert caught.value.clients == (0,)


def test_opposite_infinities_have_no_mean():
    for where in ((0, 1), (0, 5000)):
        x = np.zeros(9000, np.float32)
        x[list(where)] = [np.inf, -np.inf]
        assert np.isnan(moments(x, nonfinite="propagate").mean)


def test_bad_clients_are_named(rng):
    rows = [values(rng, 50, "float32") for _ in range(4)]
    rows[1][3], rows[3][49] = np.nan, np.inf
    with pytest.raises(NonFiniteError, match=r"updates\[1\], updates\[3\]") as caught:
        moments_each(rows)
    assert caught.value.clients == (1, 3)
    m = moments_each(rows, nonfinite="propagate")
    assert np.isfinite(m.m2[:, 0]).tolist() == [True, False, True, False]


def test_overflow_of_finite_values_is_named():
    with pytest.raises(NonFiniteError, match="finite but a sum of squares overflows") as caught:
        moments(np.float64([1e200, -1e200]))
    assert caught.value.clients == ()
    assert not np.isfinite(moments(np.float64([1e200, -1e200]), nonfinite="propagate").m2)
    big = np.full(40, 60_000, np.float16)
    with pytest.raises(NonFiniteError, match="finite but a result overflows"):
        affine(big, 2.0, 0.0)
    assert np.isinf(affine(big, 2.0, 0.0, nonfinite="propagate")).all()
    assert (affine(big, 1.0, 5519.0) == 65504).all()  # 65519 rounds down to the largest number
    with pytest.raises(NonFiniteError, match="acc: the accumulated sum overflows"):
        accumulate_moments(np.full(3, 3e38, np.float32), np.full(3, 3e38, np.float32))


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("float32", 2.0**128 - 2.0**104), ("bfloat16", 2.0**128 - 2.0**120), ("float16", 65504.0)],
)
def test_limits_of_the_types_are_the_first_numbers_that_overflow(dtype, largest):
    x = np.zeros(33, np_dtype(dtype))
    limit = reference.LIMIT[dtype]
    got = affine(x, 1.0, np.nextafter(limit, 0))
    assert (got.astype(np.float64) == largest).all()
    for variant in NUMPY_VARIANTS:
        with pytest.raises(NonFiniteError, match="overflows"):
            affine(x, 1.0, limit, variant=variant)


@pytest.mark.parametrize("variant", NUMPY_VARIANTS)
def test_nothing_is_written_after_an_error(variant):
    x = np.ones(9000, np.float32)
    x[8999] = np.nan
    acc, out = np.full(9000, 7, np.float32), np.full(9000, 7, np.float32)
    with pytest.raises(NonFiniteError, match="it was not added"):
        accumulate_moments(acc, x, variant=variant)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        affine(x, 2.0, 0.0, out=out, variant=variant)
    assert (acc == 7).all() and (out == 7).all()
    m = accumulate_moments(acc, x, nonfinite="propagate", variant=variant)
    assert np.isnan(m.mean) and acc[0] == 8 and np.isnan(acc[8999])


# ---- bad input ---------------------------------------------------------------------------------

ONE = np.ones(4, np.float32)
FROZEN = np.zeros(4, np.float32)
FROZEN.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moments(ONE.astype(int)), DTypeError, "update.*int64"),
        (lambda: moments({"w": 1.0}), DTypeError, r"update\['w'\].*float"),
        (lambda: moments(ONE, nonfinite="exclude"), InvalidInputError, "nonfinite.*propagate"),
        (lambda: moments(ONE, variant="fpga"), InvalidInputError, "variant"),
        (lambda: moments(ONE, variant="cuda"), VariantUnavailableError, "moments has no cuda"),
        (lambda: moments_each([]), InvalidInputError, "at least one update"),
        (lambda: moments_each([ONE, ONE[:2]]), InvalidInputError, r"updates\[1\]"),
        (lambda: affine([ONE], [1, 2], 0.0), InvalidInputError, r"scale.*or 1.*\(2,\)"),
        (lambda: affine(ONE, 1.0, np.inf), InvalidInputError, "shift.*finite"),
        (lambda: affine(ONE, "x", 0.0), InvalidInputError, "scale: expected numbers"),
        (lambda: affine(ONE, 1.0, 0.0, out=ONE[:2].copy()), InvalidInputError, r"out.*\(4,\)"),
        (lambda: affine(ONE, 1.0, 0.0, out=np.ones(4)), DTypeError, "out.*float32"),
        (lambda: affine(ONE, 1.0, 0.0, out=FROZEN), InvalidInputError, "out: .*read-only"),
        (lambda: accumulate_moments(FROZEN, ONE), InvalidInputError, "acc: .*read-only"),
        (lambda: accumulate_moments(np.zeros(4), ONE), DTypeError, "acc: expected float32"),
        (
            lambda: accumulate_moments(np.zeros(4, np.float16), ONE.astype(np.float16)),
            DTypeError,
            "acc: expected float32",
        ),
        (lambda: accumulate_moments(ONE.reshape(2, 2), ONE), InvalidInputError, r"acc.*\(4,\)"),
        (lambda: accumulate_moments([ONE], ONE), InvalidInputError, "structure of update"),
        (
            lambda: accumulate_moments(np.zeros(8, np.float32)[::2], ONE),
            InvalidInputError,
            "acc: expected a contiguous array",
        ),
        (lambda: accumulate_moments(ONE.copy(), ONE, np.nan), InvalidInputError, "weight.*finite"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sizes_are_checked_before_the_kernel():
    core = _native.core
    for call, says in (
        (lambda: core.moments([0], 1, [4], [9], 0, [], 1.0, 1.0, 0, 0, 1), "unknown code 9"),
        (lambda: core.moments([0], 1, [4], [1], 7, [], 1.0, 1.0, 0, 0, 1), "of: unknown code 7"),
        (lambda: core.moments([0], 1, [4], [1], 1, [], 1.0, 1.0, 0, 0, 1), "one accumulator"),
        (lambda: core.moments([0], 1, [-4], [1], 0, [], 1.0, 1.0, 0, 0, 1), "numel"),
        (lambda: core.merge_moments(0, 3, 1, [4], 0, 0), "tiles: expected 1, got 3"),
        (lambda: core.affine([0], [4], [1], [], 0.0, 1.0, [1.0], [], [0], 1), "expected 1 values"),
        (lambda: core.affine([0], [4], [1], [0, 0], 0.0, 1.0, [1.0], [0.0], [0], 1), "acc"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            call()


def test_backend_variable_forces_a_variant(monkeypatch):
    monkeypatch.setenv("FLCORE_BACKEND", "nonsense")
    with pytest.raises(InvalidInputError, match="nonsense"):
        moments(ONE)
    monkeypatch.setenv("FLCORE_BACKEND", "reference")
    assert moments(ONE).mean == 1 and flcore.get_num_threads() >= 1

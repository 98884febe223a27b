"""Weighted sum: worked examples, every variant against the reference, exactness, policies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flcore
from flcore import _variants
from flcore.aggregation import Mean
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import combine
from support import DTYPES, EPS, HAS_TORCH, SIZES, Guarded, np_dtype, outputs_per_level, unaligned

CPU_VARIANTS = [v for v, why in _variants.available("combine", "cpu").items() if not why]
ROWS = (1, 2, 3, 8, 17)  # one, the pairs, an odd tail, one full block of rows, two blocks and one


def clients(rng: np.random.Generator, n: int, size: int, dtype: str) -> list[np.ndarray]:
    return [rng.standard_normal(size).astype(np_dtype(dtype)) for _ in range(n)]


def exact(rows: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    return sum(w * r.astype(np.float64) for w, r in zip(weights, rows, strict=True))


def run(variant: str, rows: list[np.ndarray], weights, **options) -> np.ndarray:
    """Call one variant; Triton sees torch tensors, the others NumPy arrays."""
    if variant != "triton":
        return combine(rows, weights, variant=variant, **options)
    import torch

    def tensor(x: np.ndarray) -> torch.Tensor:
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(x.copy())

    result = combine([tensor(r) for r in rows], weights, variant=variant, **options)
    if result.dtype == torch.bfloat16:
        return result.view(torch.int16).numpy().view(np_dtype("bfloat16"))
    return result.numpy()


def test_three_clients_by_hand():
    rows = [np.float32([1, -2]), np.float32([3, 0]), np.float32([-1, 4])]
    np.testing.assert_array_equal(combine(rows, [1, 3, 4], divisor=8.0), np.float32([0.75, 1.75]))


# ---- every variant against the reference -------------------------------------------------------


@pytest.mark.parametrize("accumulate", ["float32", "float64", "reproducible"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_variant_matches_float64_definition(variant, dtype, accumulate, rng):
    sizes = (1, 17, 300) if variant == "triton" else SIZES  # the interpreter is slow
    for size in sizes:
        for n in (1, 3) if variant == "triton" else ROWS:
            rows = clients(rng, n, size, dtype)
            weights = rng.uniform(-1, 1, n)
            got = run(variant, rows, weights, accumulate=accumulate).astype(np.float64)
            want = exact(rows, weights)
            scale = sum(
                np.abs(w * r.astype(np.float64)) for w, r in zip(weights, rows, strict=True)
            )
            # n roundings of the accumulator and of the weights, one of the result
            sum_eps = EPS[
                "float32" if accumulate == "float32" and dtype != "float64" else "float64"
            ]
            bound = EPS[dtype] / 2 * np.abs(want) + (n + 2) * sum_eps * scale + 2.0**-70
            if dtype == "float16":
                bound = bound + 2.0**-25  # half a step among the subnormal numbers
            assert (np.abs(got - want) <= bound).all(), (size, n)


@pytest.mark.parametrize("accumulate", ["float32", "float64", "reproducible"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif("triton" not in CPU_VARIANTS, reason="triton is not installed")
def test_triton_gives_the_bits_of_the_cpu_kernel(dtype, accumulate, rng):
    rows, weights = clients(rng, 9, 1300, dtype), rng.uniform(-1, 1, 9)
    for divisor in (1.0, 3.0):
        options = {"accumulate": accumulate, "divisor": divisor}
        got = run("triton", rows, weights, **options)
        assert got.tobytes() == run("cpu", rows, weights, **options).tobytes()


def test_float64_inputs_never_lose_precision(rng):
    rows, weights = clients(rng, 5, 1000, "float64"), rng.uniform(0, 1, 5)
    np.testing.assert_allclose(combine(rows, weights), exact(rows, weights), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value_passes_unchanged(dtype):
    values = np.arange(1 << 16, dtype=np.uint16).view(np_dtype(dtype))
    values = values[np.isfinite(values.astype(np.float32))]
    assert combine([values], [1.0]).tobytes() == values.tobytes()


def test_16_bit_types_do_not_accumulate_in_their_own_type():
    ones = np.ones((4096, 3), np.float16)  # float16 sums would stop at 2048
    np.testing.assert_array_equal(combine(ones, np.ones(4096)), np.float16([4096] * 3))
    big = [np.full(2, 1000, np.float16)] * 300  # 3e5 is beyond float16, its mean is not
    np.testing.assert_array_equal(combine(big, np.ones(300), divisor=300.0), np.float16([1000] * 2))


def test_float64_sums_are_rounded_once_to_16_bits():
    # 1 + 2^-11 + 2^-40 lies just above a tie of float16: rounding to float32 first would lose that
    rows = [np.float16([1.0]), np.float16([2.0**-11]), np.float16([2.0**-20])]
    got = combine(rows, [1.0, 1.0, 2.0**-20], accumulate="float64")
    assert got[0] == np.float16(1 + 2.0**-10)


# ---- exactness ---------------------------------------------------------------------------------

LEVELS_SCRIPT = """
import hashlib, numpy as np, ml_dtypes
from flcore import _native
from flcore.ops import combine
rng = np.random.default_rng(3)
for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16):
    rows = [rng.standard_normal(9001).astype(dtype) for _ in range(11)]
    rows[0][:4] = [0.0, -0.0, 6e-8, 65000]
    w = rng.uniform(-1, 1, 11)
    for accumulate in ("float32", "float64", "reproducible"):
        for divisor in (1.0, 7.0):
            out = combine(rows, w, accumulate=accumulate, divisor=divisor)
            print(hashlib.sha256(out.tobytes()).hexdigest())
"""


def test_instruction_sets_give_identical_bits():
    printed = outputs_per_level(LEVELS_SCRIPT)
    assert len(printed) >= 1 and len(set(printed.values())) == 1, printed.keys()


@pytest.mark.parametrize("accumulate", ["float32", "float64", "reproducible"])
def test_thread_counts_give_identical_bits(accumulate, rng):
    rows, weights = clients(rng, 8, 300_001, "float32"), rng.uniform(0, 1, 8)
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.add(combine(rows, weights, accumulate=accumulate).tobytes())
    assert len(results) == 1


def test_one_client_and_one_hot_weights_return_the_row_bit_for_bit(rng):
    rows = clients(rng, 3, 5000, "float32")
    rows[1][:3] = [-0.0, 1e-42, -3e38]
    assert combine([rows[1]], [1.0]).tobytes() == rows[1].tobytes()
    assert combine(rows, [0.0, 1.0, 0.0]).tobytes() == rows[1].tobytes()


def test_list_of_layers_equals_flat_input(rng):
    sizes = (1, 64, 0, 4096, 5000)
    flat = clients(rng, 5, sum(sizes), "float32")
    cuts = np.cumsum(sizes)[:-1]
    weights = rng.uniform(0, 1, 5)
    layers = combine([np.split(x, cuts) for x in flat], weights)
    assert np.concatenate(layers).tobytes() == combine(flat, weights).tobytes()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            hnp.arrays(np.float32, (n, 9), elements=st.floats(-1e6, 1e6, width=32)),
            st.permutations(range(n)),
        )
    )
)
def test_reproducible_sums_ignore_the_order_of_clients(case):
    x, order = case
    weights = np.linspace(0.1, 3.0, len(x))
    first = combine(x, weights, accumulate="reproducible")
    second = combine(x[order], weights[list(order)], accumulate="reproducible")
    assert first.tobytes() == second.tobytes()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(hnp.arrays(np.float64, (4, 5), elements=st.floats(-1e9, 1e9)), st.permutations(range(4)))
def test_float64_mean_moves_little_with_the_order(x, order):
    weights = [1.0, 2.0, 3.0, 4.0]
    first = Mean()(x, weights)
    second = Mean()(x[order], [weights[i] for i in order])
    assert (np.abs(first - second) <= 4 * EPS["float64"] * np.abs(x).max(axis=0)).all()


def test_reproducible_sum_survives_cancellation(rng):
    x = rng.standard_normal((6, 50)).astype(np.float32)
    rows = np.concatenate([x * np.float32(1e6), -x * np.float32(1e6), x[:1]])
    got = combine(rows, np.ones(13), accumulate="reproducible")
    np.testing.assert_array_equal(got, x[0])


# ---- memory: tails, alignment, guards, read-only, strides --------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows_and_guarded_output(dtype, rng):
    for size in (1, 5, 16, 33, 4099):
        rows = clients(rng, 3, size, dtype)
        want = combine(rows, [1, 2, 3])
        for offset in (0, 1, 3):
            out = Guarded(size, np_dtype(dtype), offset)
            shifted = [unaligned(r, 1 + offset) for r in rows]
            combine(shifted, [1, 2, 3], out=out.array, nonfinite="propagate")
            out.check()
            assert out.array.tobytes() == want.tobytes()


def test_read_only_strided_and_swapped_inputs(rng):
    base = rng.standard_normal((40, 30)).astype(np.float32)
    frozen = base.copy()
    frozen.flags.writeable = False
    want = combine([base.copy(), base.copy()], [0.5, 0.25])
    for other in (frozen, np.asfortranarray(base), base.astype(">f4")):
        np.testing.assert_array_equal(combine([base, other], [0.5, 0.25]), want)
    np.testing.assert_array_equal(combine([base[::2, ::3]], [2.0]), 2 * base[::2, ::3])


def test_out_is_returned_and_may_be_an_input_or_strided(rng):
    rows = clients(rng, 3, 5000, "float32")
    want = combine(rows, [1, 2, 3])
    for policy in ("raise", "propagate"):
        copies = [r.copy() for r in rows]
        assert combine(copies, [1, 2, 3], out=copies[1], nonfinite=policy) is copies[1]
        np.testing.assert_array_equal(copies[1], want)
        strided = np.zeros(10_000, np.float32)[::2]
        combine(rows, [1, 2, 3], out=strided, nonfinite=policy)
        np.testing.assert_array_equal(strided, want)


def test_structures_come_back_as_they_went_in(rng):
    make = lambda: {"w": rng.standard_normal((3, 4)).astype(np.float32), "b": np.ones(4)}  # noqa: E731
    result = combine([make(), make()], [1, 1])
    assert list(result) == ["w", "b"] and result["w"].shape == (3, 4)
    assert result["w"].dtype == np.float32 and result["b"].dtype == np.float64
    assert type(combine([(np.ones(2),)], [1])) is tuple and combine([[]], [1]) == []


# ---- non-finite values -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_non_finite_policies(variant, dtype, value, rng):
    rows = clients(rng, 4, 40, dtype)
    rows[2][[3, 39]] = value
    weights = [1.0, 2.0, -1.0, 0.5]
    with pytest.raises(NonFiniteError, match=r"updates\[2\]") as caught:
        run(variant, rows, weights)
    assert caught.value.clients == (2,)
    left = run(variant, rows, weights, nonfinite="exclude")
    np.testing.assert_array_equal(left, run(variant, rows, [1.0, 2.0, 0.0, 0.5]))
    through = run(variant, rows, weights, nonfinite="propagate").astype(np.float64)
    assert (
        not np.isfinite(through[[3, 39]]).any() and np.isfinite(np.delete(through, [3, 39])).all()
    )


@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_rows_of_weight_zero_are_not_read(variant, rng):
    rows = clients(rng, 3, 50, "float32")
    want = run(variant, [rows[0], rows[2]], [0.5, 0.5])
    rows[1][:] = np.nan
    np.testing.assert_array_equal(run(variant, rows, [0.5, 0.0, 0.5]), want)


def test_opposite_infinities_are_found():
    rows = [np.float32([np.inf, 1]), np.float32([-np.inf, 1]), np.float32([0, 1])]
    with pytest.raises(NonFiniteError, match=r"updates\[0\], updates\[1\]"):
        combine(rows, [1, 1, 1])


def test_overflow_of_finite_inputs_is_named():
    rows = [np.float32([3e38]), np.float32([3e38])]
    with pytest.raises(NonFiniteError, match="finite but their sum overflows"):
        combine(rows, [1, 1])
    with pytest.raises(InvalidInputError, match=r"2\^46"):
        combine(rows, [1, 1], accumulate="reproducible")


def test_out_is_untouched_after_an_error():
    rows = [np.ones(9000, np.float32), np.ones(9000, np.float32)]
    rows[1][8999] = np.nan
    out = np.full(9000, 7, np.float32)
    with pytest.raises(NonFiniteError):
        combine(rows, [1, 1], out=out)
    with pytest.raises(NonFiniteError, match="no client is left"):
        combine(rows[1:], [1], out=out, nonfinite="exclude")
    assert (out == 7).all()


# ---- bad input ---------------------------------------------------------------------------------

ONE = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("updates", "weights", "options", "error", "message"),
    [
        ([], [], {}, InvalidInputError, "at least one update"),
        ([ONE, np.ones(5, np.float32)], [1, 1], {}, InvalidInputError, r"updates\[1\].*\(4,\)"),
        ([ONE, np.ones(4)], [1, 1], {}, DTypeError, r"updates\[1\].*float32.*float64"),
        ([ONE, ONE.astype(int)], [1, 1], {}, DTypeError, r"updates\[1\].*float32.*int64"),
        ([ONE.astype(int)], [1], {}, DTypeError, r"updates\[0\].*int64"),
        ([ONE.astype(complex)], [1], {}, DTypeError, "complex"),
        ([[1.0, 2.0]], [1], {}, DTypeError, r"updates\[0\]\[0\].*float"),
        ([[ONE, ONE], [ONE]], [1, 1], {}, InvalidInputError, "expected 2 layers"),
        ([{"a": ONE}, {"b": ONE}], [1, 1], {}, InvalidInputError, r"missing \['a'\]"),
        ([{"a": ONE}, {"a": ONE[:2]}], [1, 1], {}, InvalidInputError, r"updates\[1\]\['a'\]"),
        ([{"a": ONE}, ONE], [1, 1], {}, DTypeError, "expected a dict"),
        ("abc", [1], {}, DTypeError, "expected a list of updates"),
        (ONE, [1] * 4, {}, DTypeError, r"updates\[0\]"),
        ([ONE, ONE], [1], {}, InvalidInputError, "weights: expected 2 values"),
        ([ONE, ONE], [1, np.nan], {}, InvalidInputError, r"weights\[1\].*finite"),
        ([ONE, ONE], [1, np.inf], {}, InvalidInputError, r"weights\[1\].*finite"),
        ([ONE], ["x"], {}, InvalidInputError, "weights: expected 1 number"),
        ([ONE], [1], {"out": np.ones(3, np.float32)}, InvalidInputError, r"out.*\(4,\)"),
        ([ONE], [1], {"out": np.ones(4)}, DTypeError, "out.*float32"),
        ([ONE], [1], {"out": [ONE]}, DTypeError, "out"),
        ([ONE], [1], {"accumulate": "float16"}, InvalidInputError, "accumulate"),
        ([ONE], [1], {"nonfinite": "ignore"}, InvalidInputError, "nonfinite"),
        ([ONE], [1], {"divisor": 0.0}, InvalidInputError, "divisor"),
        ([ONE], [1], {"variant": "fpga"}, InvalidInputError, "variant"),
        ([ONE], [1], {"variant": "cuda"}, VariantUnavailableError, "combine.*cuda.*cpu"),
    ],
)
def test_bad_input_is_named(updates, weights, options, error, message):
    with pytest.raises(error, match=message):
        combine(updates, weights, **options)


def test_read_only_out_is_refused():
    out = np.zeros(4, np.float32)
    out.flags.writeable = False
    for policy in ("raise", "propagate"):
        with pytest.raises(InvalidInputError, match="out: the array is read-only"):
            combine([ONE], [1], out=out, nonfinite=policy)
    assert (out == 0).all()


def test_backend_variable_forces_a_variant(monkeypatch):
    monkeypatch.setenv("FLCORE_BACKEND", "reference")
    np.testing.assert_array_equal(combine([ONE], [2]), 2 * ONE)
    monkeypatch.setenv("FLCORE_BACKEND", "nonsense")
    with pytest.raises(InvalidInputError, match="nonsense"):
        combine([ONE], [1])


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_numpy_and_torch_do_not_mix():
    import torch

    with pytest.raises(DTypeError, match=r"updates\[1\].*kind NumPy array"):
        combine([ONE, torch.ones(4)], [1, 1])

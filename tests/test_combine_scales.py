"""Weighted sums of updates that come with scales: int8 rows, factors by layer, policies."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore import _arrays, _native, _variants
from flcore.compression import Encoder, TopK
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import Step, combine, combine_rows, combine_step
from support import EPS, HAS_TORCH, SIZES, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("combine_scaled", "cpu").items() if not why]
ACCUMULATE = ("float32", "float64", "reproducible")


def int8_rows(rng: np.random.Generator, n: int, size: int) -> list[np.ndarray]:
    return [rng.integers(-128, 128, size).astype(np.int8) for _ in range(n)]


def test_two_clients_by_hand():
    rows = [np.int8([1, -128, 127]), np.int8([4, 0, -2])]
    got = combine(rows, [1, 2], scales=[0.5, 0.25])  # 0.5 x + 2 * 0.25 y
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32([2.5, -64, 62.5]))


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("out_dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_matches_float64_definition(variant, out_dtype, accumulate, rng):
    for size in SIZES:
        for n in (1, 3, 17):
            rows, weights = int8_rows(rng, n, size), rng.uniform(-1, 1, n)
            scales = rng.uniform(1e-3, 1e-2, n)
            out = np.empty(size, np_dtype(out_dtype))
            got = combine(
                rows, weights, scales=scales, out=out, accumulate=accumulate, variant=variant
            )
            assert got is out
            terms = (weights * scales)[:, None] * np.array(rows, dtype=np.float64).reshape(n, size)
            sums = "float32" if accumulate == "float32" and out_dtype != "float64" else "float64"
            bound = (n + 2) * EPS[sums] * np.abs(terms).sum(axis=0)
            bound += EPS[out_dtype] / 2 * np.abs(terms.sum(axis=0)) + 2.0**-25
            assert (np.abs(out.astype(np.float64) - terms.sum(axis=0)) <= bound).all()


def test_every_int8_value_is_read_exactly():
    values = np.arange(-128, 128).astype(np.int8)
    np.testing.assert_array_equal(combine([values], [1.0], scales=[1.0]), values)
    wide = combine([values], [1.0], scales=[1.0], out=np.empty(256))
    np.testing.assert_array_equal(wide, values)


def test_scales_by_layer_and_layers_of_both_kinds(rng):
    updates = [
        {"w": rng.integers(-9, 9, (3, 5)).astype(np.int8), "b": rng.random(4).astype(np.float32)}
        for _ in range(3)
    ]
    scales, weights = rng.uniform(0.5, 2, (3, 2)), [1.0, -2.0, 0.5]
    got = combine(updates, weights, scales=scales, divisor=2.0)
    assert got["w"].dtype == got["b"].dtype == np.float32 and got["w"].shape == (3, 5)
    for j, key in enumerate(("w", "b")):
        rows = [u[key].astype(np.float64) for u in updates]
        want = sum(q * s * x for q, s, x in zip(weights, scales[:, j], rows, strict=True)) / 2
        np.testing.assert_allclose(got[key], want, rtol=1e-5, atol=1e-6)
    out = {"w": np.empty((3, 5), np.float16), "b": np.empty(4, np.float32)}
    assert combine(updates, weights, scales=scales, divisor=2.0, out=out) is out
    np.testing.assert_array_equal(out["w"], got["w"].astype(np.float16))


def test_scales_of_floating_rows_are_factors_of_their_weights(rng):
    rows = [rng.standard_normal(3000).astype(np.float32) for _ in range(5)]
    weights, scales = rng.uniform(-1, 1, 5), rng.uniform(0.1, 1, 5)
    for accumulate in ACCUMULATE:
        got = combine(rows, weights, scales=scales, accumulate=accumulate)
        assert got.tobytes() == combine(rows, weights * scales, accumulate=accumulate).tobytes()


LEVELS_SCRIPT = """
import hashlib, numpy as np
from flcore.ops import combine
rng = np.random.default_rng(3)
rows = [rng.integers(-128, 128, 9001).astype(np.int8) for _ in range(11)]
w, s = rng.uniform(-1, 1, 11), rng.uniform(0, 1e-2, 11)
for accumulate in ("float32", "float64", "reproducible"):
    out = combine(rows, w, scales=s, accumulate=accumulate, divisor=3.0)
    print(hashlib.sha256(out.tobytes()).hexdigest())
"""


def test_instruction_sets_and_threads_give_identical_bits(rng):
    assert len(set(outputs_per_level(LEVELS_SCRIPT).values())) == 1
    rows, weights = int8_rows(rng, 6, 100_001), rng.uniform(0, 1, 6)
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.add(combine(rows, weights, scales=np.full(6, 0.01)).tobytes())
    assert len(results) == 1


def test_unaligned_strided_and_guarded(rng):
    for size in (1, 15, 33, 4099):
        rows = int8_rows(rng, 3, size)
        want = combine(rows, [1, 2, 3], scales=[0.1, 0.2, 0.3])
        out = Guarded(size, np.dtype(np.float32), 3)
        shifted = [unaligned(r, 1) for r in rows]
        combine(shifted, [1, 2, 3], scales=[0.1, 0.2, 0.3], out=out.array, nonfinite="propagate")
        out.check()
        assert out.array.tobytes() == want.tobytes()
    strided = np.repeat(rows[0], 2)[::2]
    one = combine([strided], [1], scales=[0.5])
    np.testing.assert_array_equal(one, rows[0] * np.float32(0.5))


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_int8(rng):
    import torch

    rows = int8_rows(rng, 3, 700)
    want = combine(rows, [1, 2, 3], scales=[0.1, 0.2, 0.3])
    scales = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    got = combine([torch.from_numpy(r) for r in rows], [1, 2, 3], scales=scales)
    assert got.dtype == torch.float32 and got.numpy().tobytes() == want.tobytes()


# ---- non-finite values -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_non_finite_scale_is_a_bad_client(variant, value, rng):
    rows, weights = int8_rows(rng, 3, 50), [1.0, 1.0, 2.0]
    with pytest.raises(NonFiniteError, match=r"updates\[1\]") as caught:
        combine(rows, weights, scales=[0.1, value, 0.2], variant=variant)
    assert caught.value.clients == (1,)
    left = combine(rows, weights, scales=[0.1, value, 0.2], nonfinite="exclude", variant=variant)
    want = combine(rows, [1.0, 0.0, 2.0], scales=[0.1, 0.1, 0.2], variant=variant)
    np.testing.assert_array_equal(left, want)
    through = combine(
        rows, weights, scales=[0.1, value, 0.2], nonfinite="propagate", variant=variant
    )
    assert not np.isfinite(through[rows[1] != 0]).any()
    unread = combine(rows, [1.0, 0.0, 2.0], scales=[0.1, value, 0.2], variant=variant)
    np.testing.assert_array_equal(unread, want)


def test_bad_floating_layers_beside_int8_ones_are_found(rng):
    updates = [[np.ones(3, np.int8), np.ones(4, np.float32)] for _ in range(3)]
    updates[2][1][0] = np.inf
    with pytest.raises(NonFiniteError, match=r"updates\[2\]"):
        combine(updates, [1, 1, 1], scales=[1, 1, 1])
    left = combine(updates, [1, 1, 1], scales=[1, 1, 1], nonfinite="exclude")
    np.testing.assert_array_equal(left[0], np.float32([2, 2, 2]))


def test_overflow_of_the_sum_is_named():
    with pytest.raises(NonFiniteError, match="finite but their sum overflows"):
        combine([np.int8([127])], [1.0], scales=[1e38])


# ---- bad input ---------------------------------------------------------------------------------

Q = np.ones(4, np.int8)


@pytest.mark.parametrize(
    ("updates", "options", "error", "message"),
    [
        ([Q], {}, DTypeError, r"updates\[0\]: expected float64.* got int8"),
        ([Q.astype(np.uint8)], {"scales": [1]}, DTypeError, "bfloat16 or int8, got uint8"),
        ([Q, Q], {"scales": [1]}, InvalidInputError, r"scales: expected shape \(2,\) or \(2, 1\)"),
        ([Q], {"scales": "x"}, InvalidInputError, "scales: expected a number for each client"),
        ([Q], {"scales": [1], "out": Q}, DTypeError, "out: expected float32"),
        ([Q], {"scales": [1], "out": np.ones(3)}, InvalidInputError, r"out.*\(4,\)"),
        ([Q], {"scales": [1], "variant": "triton"}, VariantUnavailableError, "no triton variant"),
        ([Q], {"scales": [1], "variant": "cuda"}, VariantUnavailableError, "no cuda variant"),
    ],
)
def test_bad_input_is_named(updates, options, error, message):
    with pytest.raises(error, match=message):
        combine(updates, [1.0] * len(updates), **options)


def test_other_ops_refuse_int8():
    with pytest.raises(DTypeError, match="int8"):
        combine_rows([Q], [[1]])
    with pytest.raises(DTypeError, match="int8"):
        combine_step([Q], [1], np.zeros(4, np.float32), Step("sgd"))
    with pytest.raises(DTypeError, match="int8"):
        Encoder(TopK(k=1), like=Q)
    table = ([Q.ctypes.data], 1, [4], [_arrays.ROW_CODES["int8"]])
    with pytest.raises(InvalidInputError, match="unknown code 4"):
        _native.core.combine_rows(
            table[0], 1, [0, 1], [0], [1.0], *table[2:], [Q.ctypes.data], 0, 1, True
        )


def test_codes_agree_between_python_and_cpp():
    from flcore.ops._step import KINDS
    from flcore.reference import step

    assert tuple(_arrays.ROW_CODES) == _native.core.ROW_DTYPES
    assert list(_arrays.ROW_CODES.values()) == list(range(5))
    assert list(_arrays.ITEMSIZE) == list(_arrays.ROW_CODES)
    assert KINDS == _native.core.STEP_KINDS
    assert step.STEP_NONFINITE == _native.core.STEP_NONFINITE

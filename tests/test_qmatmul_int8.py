"""Integer products with quantised activations: worked numbers, exact cases, the definition."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flcore
from flcore import _variants
from flcore.errors import DTypeError, InvalidInputError, VariantUnavailableError
from flcore.ops import qmatmul_int8, quantize_activation
from flcore.quantization import QuantizedTensor, Scheme, quantize
from flcore.reference.weight_quant import pack_rows
from support import EPS, HAS_TORCH, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("qmatmul_int8", "cpu").items() if not why]
KINDS = ("symmetric", "integer_zero", "float_zero")
BITS = (2, 3, 4, 8)
BOTH = pytest.mark.parametrize("asymmetric", [False, True])


def weight(q, scales, zeros=None, *, bits, group=-1, kind="symmetric") -> QuantizedTensor:
    """Make a weight of codes (n, k), scales (n, G) and zeros, in float32."""
    scheme = Scheme(bits=bits, group=group, kind=kind, scale_dtype="float32")
    q = np.asarray(q, np.uint8)
    scales = np.asarray(scales, np.float32)
    return QuantizedTensor.from_parts(q.shape, scheme, pack_rows(q, bits), scales, zeros)


def random_weight(rng, n, k, bits, group, kind) -> QuantizedTensor:
    count = 1 if group < 0 else -(-k // group)
    zeros = None
    if kind == "integer_zero":
        zeros = rng.integers(0, 2**bits, (n, count)).astype(np.uint8)
    elif kind == "float_zero":
        zeros = rng.standard_normal((n, count)).astype(np.float32)
    q = rng.integers(0, 2**bits, (n, k))
    scales = rng.uniform(0.5, 2, (n, count))
    return weight(q, scales, zeros, bits=bits, group=group, kind=kind)


def close(got, want, x, w, dtype: str = "float32") -> None:
    """Within a few float32 roundings of the terms, and one of the dtype."""
    terms = np.abs(np.nan_to_num(x.astype(np.float64))) @ np.abs(w.dequantize("float64")).T
    count = w.groups + 4
    bound = count * EPS["float32"] * 1.02 * terms + EPS[dtype] * np.abs(want) + 1e-6
    assert got.shape == want.shape
    assert (np.abs(got.astype(np.float64) - want) <= bound).all()


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_bits_by_hand(variant):
    # two groups of 4 values, each filled up to 16 with what counts as 0
    q, x = np.zeros((1, 32), np.uint8), np.zeros((1, 32), np.float32)
    q[0, :16], q[0, 16:] = 10, 5
    q[0, :4], q[0, 16:20] = [13, 0, 15, 11], [15, 0, 7, 13]
    x[0, :4], x[0, 16:20] = [1, 2, -1, 0.5], [0.25, -0.5, 1, 2]
    w = weight(q, [[0.11 / 3, 0.1]], np.uint8([[10, 5]]), bits=4, group=16, kind="integer_zero")
    codes = quantize_activation(x, 16)
    acc = (codes.codes.astype(int) * q).reshape(2, 16).sum(1)
    assert (acc - np.array([10, 5]) * codes.sums[0]).tolist() == [224 - 1590, 2339 - 875]
    y = qmatmul_int8(x, w, variant=variant)
    assert y[0, 0] == pytest.approx(1.516745, abs=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_bits_by_hand(variant):
    x = np.float32([[1, -2, 0.5, 3]])
    w = weight(np.array([[127, -32, 79, 16]]) + 128, [[0.4 / 127]], bits=8)
    symmetric = qmatmul_int8(x, w, variant=variant)
    assert symmetric[0, 0] == pytest.approx(0.873830, abs=2e-6)
    asymmetric = qmatmul_int8(x, w, asymmetric=True, variant=variant)
    assert asymmetric[0, 0] == pytest.approx(0.879605, abs=2e-6)


# ---- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_whole_numbers_are_exact(bits, rng):
    """Scale 1 and whole numbers that reach 127 in every block: no rounding anywhere."""
    for m in range(1, 66):
        n, k = 1 + 2 * int(rng.integers(0, 35)), 1 + 2 * int(rng.integers(0, 75))
        group = int(rng.choice([-1, 16, 32, 48, 64]))
        count = 1 if group < 0 else -(-k // group)
        q = rng.integers(0, 2**bits, (n, k))
        zeros = rng.integers(0, 2**bits, (n, count)).astype(np.uint8)
        w = weight(q, np.ones((n, count)), zeros, bits=bits, group=group, kind="integer_zero")
        x = rng.integers(-127, 128, (m, k)).astype(np.float32)
        block = 128 if group < 0 and bits < 8 else k if group < 0 else group
        x[:, ::block] = rng.choice([-127, 127], x[:, ::block].shape)
        spread = np.repeat(zeros.astype(int), k if group < 0 else group, 1)[:, :k]
        want = x.astype(int) @ (q - spread).T
        np.testing.assert_array_equal(qmatmul_int8(x, w), want)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("bits", BITS)
def test_one_hot_rows_give_columns(bits, kind, rng):
    w = random_weight(rng, 37, 67, bits, 32, kind)
    y = qmatmul_int8(127 * np.eye(67, dtype=np.float32), w)
    # one product, rounded once
    want = (127 * w.dequantize("float64").T).astype(np.float32)
    assert y.tobytes() == want.tobytes()


@BOTH
def test_long_rows_do_not_overflow(asymmetric):
    k = 70_001
    q = np.full((3, k), 255)
    w = weight(q, np.ones((3, 1)), np.zeros((3, 1), np.uint8), bits=8, kind="integer_zero")
    x = np.ones((2, k), np.float32)
    x[1] = -1
    y = qmatmul_int8(x, w, asymmetric=asymmetric)
    np.testing.assert_allclose(y, [[255.0 * k] * 3, [-255.0 * k] * 3], rtol=1e-6)


# ---- against the definition ----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_cpu_matches_the_reference(bits, kind, asymmetric, rng):
    cases = (
        (1, 1, 1, -1, None),
        (2, 17, 40, 16, 16),
        (3, 16, 95, 32, 16),
        (5, 33, 130, 32, 64),
        (13, 48, 513, -1, 0),
        (25, 31, 300, 128, None),
        (50, 70, 129, 64, 0),
        (66, 5, 2000, -1, None),
    )
    for m, n, k, group, act_block in cases:
        w = random_weight(rng, n, k, bits, group, kind)
        x = (rng.standard_normal((m, k)) + 0.3).astype(np.float32)
        options = {"act_block": act_block, "asymmetric": asymmetric}
        want = qmatmul_int8(x.astype(np.float64), w, variant="reference", **options)
        close(qmatmul_int8(x, w, **options), want, np.abs(x) + np.abs(x).max(), w)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scales", ["float16", "bfloat16"])
def test_narrow_types(dtype, scales, rng):
    for bits in (4, 8):
        for kind in KINDS:
            scheme = Scheme(bits=bits, group=32, kind=kind, scale_dtype=scales)
            w = quantize(rng.standard_normal((35, 75)).astype(np.float32), scheme)
            x = rng.standard_normal((7, 75)).astype(np_dtype(dtype))
            y = qmatmul_int8(x, w)
            assert y.dtype == x.dtype
            want = qmatmul_int8(x.astype(np.float64), w)
            close(y, want, np.abs(x.astype(float)) + 4, w, dtype)


@pytest.mark.parametrize("bits", BITS)
def test_error_of_the_activations_is_bounded(bits, rng):
    w = random_weight(rng, 40, 260, bits, 64, "symmetric")
    x = rng.standard_normal((9, 260)).astype(np.float32)
    exact = x.astype(np.float64) @ w.dequantize("float64").T
    scales = quantize_activation(x, 64).scales.astype(float)
    weights = np.abs(w.dequantize("float64"))
    sums = np.add.reduceat(weights, range(0, 260, 64), axis=1)
    bound = scales / 2 @ sums.T
    off = np.abs(qmatmul_int8(x, w) - exact)
    assert (off <= bound * (1 + 1e-4) + 1e-5).all()
    assert off.max() > bound.max() / 1000  # the bound is about something


def test_float64_takes_the_reference(rng):
    w = random_weight(rng, 5, 40, 4, 16, "symmetric")
    x = rng.standard_normal((3, 40))
    y = qmatmul_int8(x, w)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, qmatmul_int8(x.astype(np.float32), w), rtol=1e-4, atol=1e-4)
    with pytest.raises(DTypeError, match="float64"):
        qmatmul_int8(x, w, variant="cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_bias_and_adapter(variant, rng):
    w = random_weight(rng, 35, 48, 4, 16, "symmetric")
    x = rng.standard_normal((4, 6, 48)).astype(np.float32)
    bias = rng.standard_normal(35).astype(np.float32)
    low = rng.standard_normal((4, 6, 5)).astype(np.float32)
    up = rng.standard_normal((35, 5)).astype(np.float32)
    y = qmatmul_int8(x, w, bias, low=low, up=up, variant=variant)
    want = qmatmul_int8(x, w, variant=variant).astype(np.float64) + bias + low @ up.T
    assert y.shape == (4, 6, 35)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)


# ---- bits ----------------------------------------------------------------------------------------


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib, numpy as np, flcore
from flcore.ops import qmatmul_int8
from flcore.quantization import Scheme, quantize
rng, digest = np.random.default_rng(1), hashlib.sha256()
for bits in (2, 3, 4, 8):
    for kind in ("symmetric", "integer_zero", "float_zero"):
        for n, k, group in ((70, 333, 32), (33, 520, -1)):
            scheme = Scheme(bits=bits, group=group, kind=kind, scale_dtype="float16")
            w = quantize(rng.standard_normal((n, k)).astype(np.float32), scheme)
            for m in (1, 2, 5, 12, 30, 60):
                x = rng.standard_normal((m, k)).astype(np.float32)
                low, up = x[:, :3].copy(), w.dequantize()[:, :3].copy()
                for asymmetric in (False, True):
                    found = set()
                    for threads in (1, 2, 3):
                        flcore.set_num_threads(threads)
                        y = qmatmul_int8(x, w, low=low, up=up, asymmetric=asymmetric)
                        found.add(y.tobytes())
                    assert len(found) == 1
                    digest.update(found.pop())
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1


def test_threads_do_not_change_a_bit(rng):
    w = random_weight(rng, 500, 600, 4, 32, "symmetric")
    x = rng.standard_normal((200, 600)).astype(np.float32)
    found = set()
    for threads in (1, 2, 3, 5):
        flcore.set_num_threads(threads)
        found.add(qmatmul_int8(x, w).tobytes())
    assert len(found) == 1


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_rows_do_not_depend_on_their_company(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    bits, m = data.draw(st.sampled_from(BITS)), data.draw(st.integers(1, 70))
    n, k = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 200))
    w = random_weight(rng, n, k, bits, data.draw(st.sampled_from([-1, 16, 64])), "integer_zero")
    x = rng.standard_normal((m, k)).astype(np.float32)
    asymmetric = data.draw(st.booleans())
    y = qmatmul_int8(x, w, asymmetric=asymmetric)
    row = data.draw(st.integers(0, m - 1))
    assert qmatmul_int8(x[row], w, asymmetric=asymmetric).tobytes() == y[row].tobytes()
    assert qmatmul_int8(x[row:], w, asymmetric=asymmetric).tobytes() == y[row:].tobytes()


def test_more_rows_than_are_quantised_at_once(rng):
    w = random_weight(rng, 19, 40, 4, 16, "symmetric")
    x = rng.standard_normal((2100, 40)).astype(np.float32)
    parts = [qmatmul_int8(x[i : i + 300], w) for i in range(0, 2100, 300)]
    assert qmatmul_int8(x, w).tobytes() == np.concatenate(parts).tobytes()


# ---- values that are not finite, sizes, memory ---------------------------------------------------


@BOTH
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_nan(value, variant, asymmetric, rng):
    for bits, group in ((4, 32), (8, -1)):
        w = random_weight(rng, 20, 70, bits, group, "symmetric")
        x = rng.standard_normal((14, 70)).astype(np.float32)
        clean = qmatmul_int8(x, w, asymmetric=asymmetric, variant=variant)
        x[3, 69] = value
        y = qmatmul_int8(x, w, asymmetric=asymmetric, variant=variant)
        assert np.isnan(y[3]).all()
        others = np.arange(14) != 3
        assert y[others].tobytes() == clean[others].tobytes()


@BOTH
def test_zero_rows_and_tiny_values(asymmetric, rng):
    w = random_weight(rng, 18, 64, 4, 32, "integer_zero")
    x = np.zeros((3, 64), np.float32)
    x[1] = 1e-38 * rng.standard_normal(64)
    x[2] = rng.standard_normal(64)
    y = qmatmul_int8(x, w, asymmetric=asymmetric)
    assert not y[0].any() and np.isfinite(y).all() and np.abs(y[1]).max() < 1e-34
    assert np.abs(y[1]).max() > 0


def test_empty_shapes(rng):
    w = random_weight(rng, 5, 32, 4, 16, "symmetric")
    assert qmatmul_int8(np.zeros((0, 32), np.float32), w).shape == (0, 5)
    assert qmatmul_int8(np.zeros((2, 0, 32), np.float32), w).shape == (2, 0, 5)
    assert qmatmul_int8(np.ones(32, np.float32), w).shape == (5,)


def test_memory(rng):
    w = random_weight(rng, 37, 77, 4, 32, "symmetric")
    x = rng.standard_normal((5, 77)).astype(np.float32)
    want = qmatmul_int8(x, w)
    x.flags.writeable = False
    assert qmatmul_int8(unaligned(x), w).tobytes() == want.tobytes()
    wide = np.concatenate([x, x], 1)
    assert qmatmul_int8(wide[:, :77], w).tobytes() == want.tobytes()
    assert qmatmul_int8(np.asfortranarray(x), w).tobytes() == want.tobytes()
    out = Guarded(5 * 37, np.dtype(np.float32), 1)
    target = out.array.reshape(5, 37)
    assert qmatmul_int8(x, w, out=target) is target
    out.check()
    assert target.tobytes() == want.tobytes()
    strided = np.full((5, 74), 7, np.float32)
    qmatmul_int8(x, w, out=strided[:, ::2])
    assert strided[:, ::2].tobytes() == want.tobytes() and (strided[:, 1::2] == 7).all()


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch(rng):
    import torch

    w = random_weight(rng, 37, 64, 4, 32, "integer_zero")
    x = rng.standard_normal((5, 64)).astype(np.float32)
    for asymmetric in (False, True):
        want = qmatmul_int8(x, w, asymmetric=asymmetric)
        got = qmatmul_int8(torch.from_numpy(x), w.torch(), asymmetric=asymmetric)
        assert got.numpy().tobytes() == want.tobytes()
    narrow = qmatmul_int8(torch.from_numpy(x).bfloat16(), w.torch())
    assert narrow.dtype == torch.bfloat16 and narrow.shape == (5, 37)


def test_sums_of_codes_are_kept_with_the_weight(rng):
    from flcore.ops.qmatmul_int8 import _code_sums

    w = random_weight(rng, 20, 50, 3, 16, "symmetric")
    x = rng.standard_normal((2, 50)).astype(np.float32)
    qmatmul_int8(x, w)
    assert w not in _code_sums
    first = qmatmul_int8(x, w, asymmetric=True)
    kept = _code_sums[w][16]
    assert kept.shape == (2, 4, 16) and qmatmul_int8(x, w, asymmetric=True).tobytes() == (
        first.tobytes()
    )
    assert _code_sums[w][16] is kept
    before = len(_code_sums)
    del w, kept
    gc.collect()
    assert len(_code_sums) == before - 1


# ---- bad input -----------------------------------------------------------------------------------

X = np.ones((2, 64), np.float32)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X[:, :63], {}, InvalidInputError, "x: expected a last dimension of 64"),
        (X.astype(np.int8), {}, DTypeError, "x: expected"),
        (X, {"act_block": 24}, InvalidInputError, "act_block: expected a multiple of 16"),
        (X, {"act_block": -16}, InvalidInputError, "act_block: expected a multiple of 16"),
        (X, {"act_block": 48}, InvalidInputError, "act_block: expected a divisor"),
        (X, {"act_block": 16.0}, DTypeError, "act_block: expected an integer"),
        (X, {"bias": np.ones(4, np.float32)}, InvalidInputError, "bias"),
        (X, {"low": X}, InvalidInputError, "up: expected an array beside low"),
        (X, {"out": np.ones((2, 4), np.float32)}, InvalidInputError, "out"),
        (X, {"variant": "cuda"}, VariantUnavailableError, "qmatmul_int8"),
    ],
)
def test_bad_input_is_named(x, options, error, message):
    w = random_weight(np.random.default_rng(0), 5, 64, 4, 32, "symmetric")
    with pytest.raises(error, match=message):
        qmatmul_int8(x, w, **options)


def test_codes_that_are_no_integers_are_refused():
    w = np.ones((3, 64), np.float32)
    for name in ("nf4", "fp8", "mxfp4"):
        with pytest.raises(DTypeError, match=r"flcore\.ops\.qmatmul"):
            qmatmul_int8(X, quantize(w, name))
    with pytest.raises(DTypeError, match="weight: expected a QuantizedTensor"):
        qmatmul_int8(X, w)

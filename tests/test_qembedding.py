"""Bags over quantised tables: by hand, against the reference and torch, gradients of the rows."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore import _variants
from flcore.errors import DTypeError, InvalidInputError, VariantUnavailableError
from flcore.ops import qembedding, qembedding_grad
from flcore.quantization import QuantizedTensor, Scheme, quantize
from flcore.reference import weight_quant as wq
from support import EPS, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("qembedding", "cpu").items() if not why]
SCHEMES = (
    "int8",
    "int8-asym",
    "int4",
    "int4-asym",
    "int4-float-zero",
    "int3",
    "int3-asym",
    "int2",
    "nf4",
    "mxfp4",
    "mxfp8",
    "fp8-e5m2",
)
WIDTHS = (1, 15, 16, 17, 33, 128, 200, 1030)


def table(rng, scheme: str, n: int, k: int, **changes) -> QuantizedTensor:
    w = rng.standard_normal((n, k)).astype(np.float32)
    return quantize(w, Scheme.of(scheme, **changes))


def by_hand() -> QuantizedTensor:
    """Rows (-1, -0.5, 0, 0.5) and (0, 2, 4, 6) of codes 0 to 3."""
    codes = wq.pack_rows(np.array([[0, 1, 2, 3], [0, 1, 2, 3]], np.uint8), 2)
    scheme = Scheme(bits=2, group=-1, kind="integer_zero", scale_dtype="float32")
    scales, zeros = np.float32([[0.5], [2]]), np.uint8([[2], [0]])
    return QuantizedTensor.from_parts((2, 4), scheme, codes, scales, zeros)


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_bags_by_hand(variant):
    t = by_hand()
    one, two = [-1, -0.5, 0, 0.5], [0, 2, 4, 6]
    rows = qembedding(t, np.array([[1], [0]]), mode="none", variant=variant)
    assert rows.tolist() == [[two], [one]]
    index, offsets = np.array([0, 1, 1]), np.array([0, 0, 1])
    got = qembedding(t, index, offsets, variant=variant)
    assert got.tolist() == [[0, 0, 0, 0], one, [0, 4, 8, 12]]
    got = qembedding(t, index, offsets, mode="mean", variant=variant)
    assert got.tolist() == [[0, 0, 0, 0], one, two]
    factors = np.float32([3, 0.5, -1])
    got = qembedding(t, index[None], per_sample_weights=factors[None], variant=variant)
    assert got.tolist() == [[-3, -2.5, -2, -1.5]]
    got = qembedding(t, index, offsets, mode="mean", padding_idx=0, variant=variant)
    assert got.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], two]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_the_rows_by_hand(variant):
    grad, index, offsets = np.float32([[1, 10], [2, 20]]), np.array([2, 0, 2]), np.array([0, 1])
    got = qembedding_grad(grad, index, offsets, rows=3, variant=variant)
    assert got.tolist() == [[2, 20], [0, 0], [3, 30]]
    got = qembedding_grad(grad, index, offsets, rows=3, mode="mean", variant=variant)
    assert got.tolist() == [[1, 10], [0, 0], [2, 20]]
    total = np.full((3, 2), 100, np.float32)
    factors = np.float32([1, 0, 0.5])
    same = qembedding_grad(
        grad, index, offsets, rows=3, per_sample_weights=factors, out=total, variant=variant
    )
    assert same is total and total.tolist() == [[100, 100], [100, 100], [102, 120]]
    rows, values = qembedding_grad(
        grad, index, offsets, rows=3, padding_idx=0, compact=True, variant=variant
    )
    assert rows.tolist() == [2] and values.tolist() == [[3, 30]]


# ---- against the definition ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_single_rows_are_the_dequantised_ones_to_the_bit(scheme, rng):
    for k in WIDTHS:
        t = table(rng, scheme, 9, k)
        index = rng.integers(0, 9, (3, 5))
        got = qembedding(t, index, mode="none")
        np.testing.assert_array_equal(got, t.dequantize()[index])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_matches_the_reference(scheme, rng):
    for k in WIDTHS:
        t = table(rng, scheme, 40, k)
        index, offsets = rng.integers(0, 40, 60), np.array([0, 0, 1, 7, 30, 30])
        factors = rng.standard_normal(60).astype(np.float32)
        for mode, options in (
            ("sum", {}),
            ("mean", {}),
            ("sum", {"per_sample_weights": factors}),
            ("mean", {"padding_idx": int(index[3])}),
        ):
            got = qembedding(t, index, offsets, mode=mode, **options)
            want = qembedding(t, index, offsets, mode=mode, variant="reference", **options)
            # 30 terms of up to 5 in size times factors of up to 4
            np.testing.assert_allclose(got, want, atol=30 * 20 * 31 * 2.0**-24 / 8)


@pytest.mark.parametrize("group", [16, 48, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups(bits, group, rng):
    t = quantize(
        rng.standard_normal((5, 150)).astype(np.float32),
        Scheme(bits=bits, group=group, kind="integer_zero", scale_dtype="bfloat16"),
    )
    got = qembedding(t, np.arange(5), mode="none")
    np.testing.assert_array_equal(got, t.dequantize())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_result_types(dtype, rng):
    kind = np_dtype(dtype)  # which makes bfloat16 known to NumPy
    t = table(rng, "int4", 20, 77)
    index = rng.integers(0, 20, (6, 4))
    wide = qembedding(t, index, dtype="float32")
    got = qembedding(t, index, dtype=dtype)
    assert got.dtype == kind
    np.testing.assert_array_equal(got, wide.astype(kind))
    guard = Guarded(6 * 77, kind, offset=3)
    out = guard.array.reshape(6, 77)
    assert qembedding(t, index, out=out) is out
    guard.check()
    np.testing.assert_array_equal(out, got)
    strided = np.zeros((77, 6), kind).T
    np.testing.assert_array_equal(qembedding(t, index, out=strided), got)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradient_matches_the_reference(dtype, rng):
    for k in WIDTHS:
        index = rng.integers(0, 11, (30, 3))
        grad = rng.standard_normal((30, k)).astype(np_dtype(dtype))
        factors = rng.standard_normal((30, 3)).astype(np.float32)
        for mode, given in (("sum", None), ("mean", None), ("sum", factors)):
            options = {"rows": 12, "mode": mode, "per_sample_weights": given}
            got = qembedding_grad(grad, index, **options)
            want = qembedding_grad(grad, index, variant="reference", **options)
            np.testing.assert_allclose(got, want, atol=2e-5)
            rows, compact = qembedding_grad(grad, index, compact=True, **options)
            np.testing.assert_array_equal(compact, got[rows])
            assert not got[11].any()


def test_gradient_is_the_adjoint(rng):
    """<bags(W), G> = <W, scatter(G)> for every table W."""
    t = table(rng, "nf4", 50, 96)
    index, offsets = rng.integers(0, 50, 200), np.sort(rng.integers(0, 200, 30))
    offsets[0] = 0
    factors = rng.standard_normal(200).astype(np.float32)
    for mode, given, padding in (("sum", factors, None), ("mean", None, 7), ("mean", None, None)):
        options = {"mode": mode, "per_sample_weights": given, "padding_idx": padding}
        grad = rng.standard_normal((30, 96)).astype(np.float32)
        out = qembedding(t, index, offsets, **options)
        back = qembedding_grad(grad, index, offsets, rows=50, **options)
        left = (out.astype(np.float64) * grad).sum()
        right = (t.dequantize("float64") * back).sum()
        assert abs(left - right) <= 1e-5 * np.abs(out * grad).sum()


def test_reference_gradient_is_the_plain_scatter(rng):
    from flcore.reference import qembedding as reference

    index, starts = rng.integers(0, 6, 20), np.array([0, 4, 4, 20])
    grad, factors = rng.standard_normal((3, 5)), rng.standard_normal(20).astype(np.float32)
    want = reference.scatter(grad.astype(np.float32), index, starts, factors, rows=6)
    got = qembedding_grad(
        grad.astype(np.float32), index, starts[:-1], rows=6, per_sample_weights=factors
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


# ---- bits ----------------------------------------------------------------------------------------


SCRIPT = f"""
import hashlib, numpy as np, flcore
from flcore.ops import qembedding, qembedding_grad
from flcore.quantization import quantize
rng, digest = np.random.default_rng(5), hashlib.sha256()
for scheme in {SCHEMES}:
    for k in (17, 300):
        t = quantize(rng.standard_normal((30, k)).astype(np.float32), scheme)
        index, factors = rng.integers(0, 30, (7, 9)), rng.random((7, 9), np.float32)
        digest.update(qembedding(t, index, per_sample_weights=factors, dtype="float16").tobytes())
        grad = rng.standard_normal((7, k)).astype(np.float16)
        digest.update(qembedding_grad(grad, index, rows=30, mode="mean").tobytes())
print(digest.hexdigest())
"""


def test_same_bits_at_every_level():
    assert len(set(outputs_per_level(SCRIPT).values())) == 1


@pytest.mark.parametrize(("bags", "entries", "k"), [(1, 500, 3000), (2000, 10, 64), (3, 40, 5000)])
def test_same_bits_for_any_number_of_threads(bags, entries, k, rng):
    t = table(rng, "int4", 100, k)
    index = rng.integers(0, 100, (bags, entries))
    grad = rng.standard_normal((bags, k)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        flcore.set_num_threads(threads)
        back = qembedding_grad(grad, index, rows=100)
        results.append(qembedding(t, index, mode="mean").tobytes() + back.tobytes())
    assert results[0] == results[1] == results[2]


def test_order_of_the_entries_is_the_order_of_the_sum(rng):
    """Float32 sums in the order of the entries, one rounding a term."""
    t = table(rng, "int8", 50, 33)
    index = rng.integers(0, 50, 40)
    rows, want = t.dequantize()[index], np.zeros(33, np.float32)
    want = rows[0].copy()
    for row in rows[1:]:
        want += row
    np.testing.assert_array_equal(qembedding(t, index[None])[0], want)


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_to_do(variant, rng):
    t = table(rng, "int4", 5, 20)
    none = np.empty((0,), np.int64)
    assert qembedding(t, none, mode="none", variant=variant).shape == (0, 20)
    assert qembedding(t, none, none, variant=variant).shape == (0, 20)
    assert not qembedding(t, none, np.array([0, 0]), variant=variant).any()
    assert not qembedding(t, np.empty((3, 0), np.int32), variant=variant).any()
    grad = np.ones((3, 20), np.float32)
    assert not qembedding_grad(grad, np.empty((3, 0), np.int32), rows=5, variant=variant).any()


def test_unaligned_and_read_only_and_strided(rng):
    t = table(rng, "int3", 30, 45)
    parts = [unaligned(x) for x in (t.codes, t.scales)]
    for part in parts:
        part.flags.writeable = False
    odd = QuantizedTensor.from_parts(t.shape, t.scheme, *parts)
    index = rng.integers(0, 30, (4, 12))[:, ::3]
    got = qembedding(odd, index.astype(np.int32))
    np.testing.assert_array_equal(got, qembedding(t, np.ascontiguousarray(index)))
    tiled = t.to_layout("tile16")
    np.testing.assert_array_equal(qembedding(tiled, index), got)


def test_infinite_gradients_stay_in_their_rows():
    grad = np.float32([[np.inf, 1], [np.nan, 2], [3, 4]])
    got = qembedding_grad(grad, np.array([[0], [1], [2]]), rows=4)
    assert got[0, 0] == np.inf and np.isnan(got[1, 0])
    assert got[2:].tolist() == [[3, 4], [0, 0]] and got[:2, 1].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([5],), {"mode": "none"}, InvalidInputError, "indices: expected 0 to 4.*got 5 at pos"),
        (([0, -1],), {"mode": "none"}, InvalidInputError, "got -1 at position 1"),
        (([0],), {}, InvalidInputError, "indices: expected one dimension and offsets"),
        (([[0]], [0]), {}, InvalidInputError, "indices: expected one dimension and offsets"),
        (([0, 1], [1]), {}, InvalidInputError, "offsets: expected the first one to be 0"),
        (([0, 1], [0, 3]), {}, InvalidInputError, "offsets: expected them not to fall"),
        (([0, 1], [0, 2, 1]), {}, InvalidInputError, "offsets: expected them not to fall"),
        (([0, 1], []), {}, InvalidInputError, "offsets: expected a bag for 2 indices"),
        (([0],), {"mode": "max"}, InvalidInputError, "mode: expected one of sum, mean, none"),
        (([0], [0]), {"mode": "none"}, InvalidInputError, "offsets: mode 'none' has no bags"),
        (([[0]],), {"padding_idx": 7}, InvalidInputError, "padding_idx"),
        (([[0]],), {"padding_idx": 1.5}, DTypeError, "padding_idx"),
        (([[0]],), {"dtype": "float64"}, DTypeError, "dtype: expected float32"),
        (([[0.5]],), {}, DTypeError, "indices: expected integers, got float64"),
    ],
)
def test_wrong_arguments(arguments, options, error, words, rng):
    t = table(rng, "int8", 5, 20)
    arrays = [np.array(x, None if x else np.int64) for x in arguments]
    with pytest.raises(error, match=words):
        qembedding(t, *arrays, **options)


def test_wrong_weights_factors_and_results(rng):
    t, index = table(rng, "int8", 5, 20), np.array([[0, 1]])
    with pytest.raises(DTypeError, match="weight: expected a QuantizedTensor, got ndarray"):
        qembedding(np.ones((5, 20), np.float32), index)
    factors = np.ones((1, 2), np.float32)
    with pytest.raises(InvalidInputError, match="they need mode 'sum'"):
        qembedding(t, index, mode="mean", per_sample_weights=factors)
    with pytest.raises(InvalidInputError, match="per_sample_weights: expected the shape"):
        qembedding(t, index, per_sample_weights=factors[0])
    with pytest.raises(DTypeError, match="per_sample_weights: expected a floating array"):
        qembedding(t, index, per_sample_weights=index)
    with pytest.raises(InvalidInputError, match="out: expected the shape"):
        qembedding(t, index, out=np.zeros((1, 21), np.float32))
    with pytest.raises(DTypeError, match="out: expected float32"):
        qembedding(t, index, out=np.zeros((1, 20)))
    fixed = np.zeros((1, 20), np.float32)
    fixed.flags.writeable = False
    with pytest.raises(InvalidInputError, match="read-only"):
        qembedding(t, index, out=fixed)
    with pytest.raises(VariantUnavailableError, match="no cuda variant"):
        qembedding(t, index, variant="cuda")
    with pytest.raises(InvalidInputError, match="grad: expected the shape"):
        qembedding_grad(np.ones((2, 20), np.float32), index, rows=5)
    with pytest.raises(DTypeError, match="grad: expected float32"):
        qembedding_grad(np.ones((1, 20)), index, rows=5)
    with pytest.raises(InvalidInputError, match="out: a compact gradient"):
        qembedding_grad(
            np.ones((1, 20), np.float32), index, rows=5, out=np.zeros((5, 20)), compact=True
        )
    with pytest.raises(InvalidInputError, match="rows: expected the number of rows"):
        qembedding_grad(np.ones((1, 20), np.float32), index, rows=-1)


def test_error_bound_of_long_bags(rng):
    """n float32 additions: at most n roundings of a sum of magnitudes."""
    t = table(rng, "int8", 64, 40)
    index = rng.integers(0, 64, (1, 5000))
    got = qembedding(t, index)
    rows = t.dequantize("float64")[index[0]]
    bound = 5000 * EPS["float32"] / 2 * np.abs(rows).sum(axis=0)
    assert (np.abs(got[0] - rows.sum(axis=0)) <= bound).all()

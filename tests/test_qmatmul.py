"""y = x W^T from packed weights: by hand, against the reference, exact cases, memory, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flcore
from flcore import _native, _variants
from flcore.errors import DTypeError, InvalidInputError, VariantUnavailableError
from flcore.ops import qmatmul, qmatmul_dx
from flcore.quantization import QuantizedTensor, Scheme, quantize
from flcore.reference import weight_quant as wq
from packed_weights import HALF, SCHEMES, assert_columns, step, weight, whole_weight
from support import HAS_TORCH, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v in ("cpu", "reference") if not _variants.available("qmatmul", "cpu")[v]]
DTYPES = ("float32", "float16", "bfloat16")
SHAPES = ((1, 1), (15, 31), (37, 129), (64, 300), (70, 1030))


def check(x: np.ndarray, w: QuantizedTensor, variant: str, **options) -> None:
    got = qmatmul(x, w, variant=variant, **options)
    wide, exact = x.astype(np.float64), w.dequantize("float64")
    want = wide @ exact.T
    # float32 sums: what cancels between codes and zeros counts too
    terms = np.abs(wide) @ (np.abs(exact) + 2.0**w.scheme.bits * step(w)).T
    if "bias" in options:
        want = want + options["bias"].astype(np.float64)
        terms = terms + np.abs(options["bias"].astype(np.float64))
    if "low" in options:
        low, up = options["low"].astype(np.float64), options["up"].astype(np.float64)
        want, terms = want + low @ up.T, terms + np.abs(low) @ np.abs(up).T
    tiny = 3.1e-8 if x.dtype == np.float16 else 1e-30
    unit = 24 * 2.0**-24
    if w.scheme.kind == "codebook" and x.dtype.name == "bfloat16":
        unit = 2.0**-8 * 1.01  # AVX512_BF16 takes levels in bfloat16
    limit = unit * terms + 1.01 * HALF[x.dtype.name] * np.abs(want) + tiny
    assert got.dtype == x.dtype and got.shape == want.shape
    assert (np.abs(got.astype(np.float64) - want) <= limit).all()


# ---- by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_worked_numbers(variant, rows):
    """Two groups of four values, each at the head of a group of 16 that is filled up with zeros."""
    scheme = Scheme(bits=4, group=16, kind="integer_zero", scale_dtype="float32")
    q = np.zeros((1, 32), np.uint8)
    q[0, :16], q[0, 16:] = 10, 5
    q[0, :4], q[0, 16:20] = (13, 0, 15, 11), (15, 0, 7, 13)
    scales, zeros = np.float32([[0.55 / 15, 0.1]]), np.uint8([[10, 5]])
    w = QuantizedTensor.from_parts((1, 32), scheme, wq.pack_rows(q, 4), scales, zeros)
    x = np.zeros((rows, 32), np.float32)
    x[:, :4], x[:, 16:20] = (1, 2, -1, 0.5), (0.25, -0.5, 1, 2)
    y = qmatmul(x, w, variant=variant)
    np.testing.assert_allclose(y, np.full((rows, 1), 1.5116667), rtol=1e-6)
    # off the product with the unquantised weight by at most sum S/2 |x|
    assert np.abs(y - 1.475).max() == pytest.approx(0.0366667, rel=1e-4) and 0.0367 < 0.27


def test_kinds_have_the_codes_of_the_kernels():
    kinds = (wq.INT, wq.FLOAT_ZERO, wq.TABLE, wq.E4M3, wq.E5M2)
    assert tuple(_native.core.QWEIGHT_KINDS) == kinds


# ---- against the definition --------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_and_shape(name, rng):
    for n, k in SHAPES:
        w = weight(rng, n, k, SCHEMES[name])
        for dtype in DTYPES:
            for m in (1, 2, 3, 5, 8, 17):
                check(rng.standard_normal((m, k)).astype(np_dtype(dtype)), w, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4", "int4-asym", "float-zero", "nf4", "int8", "int2"])
def test_many_rows(name, dtype, rng):
    w = weight(rng, 83, 700, SCHEMES[name])
    for m in (64, 239, 240, 241, 500):
        check(rng.standard_normal((m, 700)).astype(np_dtype(dtype)), w, "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_low_rank(variant, dtype, rng):
    n, k = 37, 96
    w = weight(rng, n, k, "int4-asym")
    for m in (1, 7, 30):
        for rank in (1, 5, 16):
            x = rng.standard_normal((m, k)).astype(np_dtype(dtype))
            low = rng.standard_normal((m, rank)).astype(np.float32)
            up = rng.standard_normal((n, rank)).astype(np_dtype(dtype))
            bias = rng.standard_normal(n).astype(np.float64).astype(np.float32)
            check(x, w, variant, low=low, up=up, bias=bias)
            check(x, w, variant, low=low[:, ::-1], up=up[:, ::-1])
            check(x, w, variant, bias=bias[::-1])
    check(x, w, variant, low=low[:, :0], up=up[:, :0])


def test_float64_is_computed_by_the_reference(rng):
    w = weight(rng, 20, 50, "nf4")
    x, bias = rng.standard_normal((3, 50)), rng.standard_normal(20)
    np.testing.assert_allclose(
        qmatmul(x, w, bias), x @ w.dequantize("float64").T + bias, rtol=1e-13
    )
    with pytest.raises(DTypeError, match="float64"):
        qmatmul(x, w, variant="cpu")


# ---- exact cases -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_a_single_one_gives_a_column(name, rng):
    n, k = 35, 150
    w = weight(rng, n, k, SCHEMES[name])
    columns = w.dequantize("float32").T
    for dtype in DTYPES:
        want = columns.astype(np_dtype(dtype))
        eye = np.eye(k, dtype=np_dtype(dtype))
        assert_columns(qmatmul(eye, w), want, w)
        for m in (1, 2, 4, 6, 8):
            for first in (0, 17, 77, k - m):
                part = slice(first, first + m)
                assert_columns(qmatmul(eye[part], w), want[part], w)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_are_exact(bits, variant, rng):
    for m, n, k in [*((m, 19, 67) for m in range(1, 66)), (5, 33, 1001), (70, 129, 515)]:
        q = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
        zeros = rng.integers(0, 2**bits, (n, 1), dtype=np.uint8)
        x = rng.integers(-7, 8, (m, k))
        for w, offset in (
            (whole_weight(q, bits), 2 ** (bits - 1)),
            (whole_weight(q, bits, zeros), zeros.astype(np.int64)),
        ):
            want = x @ (q.astype(np.int64) - offset).T
            for dtype in DTYPES if bits < 8 else DTYPES[::2]:  # 65504 is the end of float16
                kind = np_dtype(dtype)
                got = qmatmul(x.astype(kind), w, variant=variant)
                np.testing.assert_array_equal(got, want.astype(np.float32).astype(kind))


def test_table_of_whole_numbers_is_exact(rng):
    levels = tuple(float(v) for v in rng.permutation(np.arange(-8, 8)))
    scheme = Scheme(bits=4, group=32, kind="codebook", codebook=levels, scale_dtype="float32")
    q = rng.integers(0, 16, (21, 64), dtype=np.uint8)
    scales = np.ones((21, 2), np.float32)
    w = QuantizedTensor.from_parts((21, 64), scheme, wq.pack_rows(q, 4), scales)
    for m in (1, 5, 30):
        x = rng.integers(-7, 8, (m, 64))
        for dtype in DTYPES:
            want = (x @ np.array(levels)[q].T).astype(np_dtype(dtype))
            np.testing.assert_array_equal(qmatmul(x.astype(np_dtype(dtype)), w), want)


@pytest.mark.parametrize("name", ["int4", "int8", "float-zero", "int3"])
def test_distance_to_the_product_with_the_unquantised_weight(name, rng):
    """|y - x W^T| <= sum over groups of a step times |x| of the group."""
    w = rng.standard_normal((40, 256)).astype(np.float32)
    x = rng.standard_normal((6, 256)).astype(np.float32)
    q = quantize(w, SCHEMES[name])
    limit = np.abs(x) @ (0.51 * step(q)).T + 1e-4
    assert (np.abs(qmatmul(x, q) - x @ w.T) <= limit).all()


def test_adjoint(rng):
    w = weight(rng, 61, 333, "int4-asym")
    x = rng.standard_normal((5, 333)).astype(np.float32)
    dy = rng.standard_normal((5, 61)).astype(np.float32)
    one = float((dy.astype(np.float64) * qmatmul(x, w)).sum())
    other = float((x.astype(np.float64) * qmatmul_dx(dy, w)).sum())
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("m", [1, 3, 12])
def test_outliers_beside_small_values(m, rng):
    """Values of 1e4 cost those of 1 no more than the rounding of a float32 sum does."""
    w = weight(rng, 32, 256, "int4")
    x = rng.standard_normal((m, 256)).astype(np.float32)
    x[:, ::50] *= 1e4
    check(x, w, "cpu")
    check(np.float32(1e30) * x, w, "cpu")
    check(np.float32(1e-30) * x, w, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(bad, dtype, rng):
    for name in ("int4", "int8-asym", "nf4", "e4m3"):
        w = weight(rng, 20, 100, SCHEMES[name])
        for m in (2, 8, 14):
            x = rng.standard_normal((m, 100)).astype(np_dtype(dtype))
            clean = qmatmul(x, w).astype(np.float32)
            x[1, 40] = bad
            got = qmatmul(x, w).astype(np.float32)
            hit = w.dequantize("float32")[:, 40] != 0  # 0 times an infinity may be lost
            assert not np.isfinite(got[1][hit]).any()
            np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(clean, 1, 0))


# ---- same bits, every level ----------------------------------------------------------------------

LEVEL_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, flcore
import test_qmatmul as t
from flcore.ops import qmatmul
rng = np.random.default_rng(5)
for name in {names!r}:
    n, k = 37, 265
    w = t.weight(rng, n, k, t.SCHEMES[name])
    columns = w.dequantize("float32").T
    for dtype in t.DTYPES:
        for m in (1, 2, 4, 7, 13):
            x = rng.standard_normal((m, k)).astype(t.np_dtype(dtype))
            flcore.set_num_threads(1)
            t.check(x, w, "cpu")
            eye = np.eye(k, dtype=x.dtype)[k - m :]
            t.assert_columns(qmatmul(eye, w), columns[k - m :].astype(x.dtype), w)
            one = qmatmul(x, w)
            flcore.set_num_threads(2 if m < 8 else 3)
            assert m % 3 != 1 or qmatmul(x, w).tobytes() == one.tobytes()
print("fine")
"""


def test_every_level_and_thread_count():
    script = LEVEL_SCRIPT.format(names=list(SCHEMES), tests=str(Path(__file__).parent))
    script = "import flcore._native as n\nn.SERIAL_WORK = 1\n" + script
    assert set(outputs_per_level(script).values()) == {"fine\n"}


def test_repeated_runs_have_the_same_bits(rng):
    w = weight(rng, 300, 1500, "int4-asym")
    for m in (1, 6, 40):
        for dtype in DTYPES:
            x = rng.standard_normal((m, 1500)).astype(np_dtype(dtype))
            results = set()
            for threads in (1, 2, 3, 2, 1):
                flcore.set_num_threads(threads)
                results.add(qmatmul(x, w).tobytes())
            assert len(results) == 1


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(0, 16, 32), (3, 0, 32), (3, 16, 0), (0, 0, 0), (2, 1, 0)])
def test_empty(variant, shape):
    m, n, k = shape
    w = quantize(np.zeros((n, k), np.float32), "int4")
    bias = np.arange(n, dtype=np.float32)
    y = qmatmul(np.ones((m, k), np.float32), w, bias, variant=variant)
    assert y.shape == (m, n)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (m, n)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 6, 20])
def test_any_memory(m, dtype, rng):
    w = weight(rng, 45, 70, "int4-asym")
    x = rng.standard_normal((m, 70)).astype(np_dtype(dtype))
    x.flags.writeable = False
    want = qmatmul(x, w)
    wide = np.zeros((m, 90), x.dtype)
    wide[:, 7:77] = x
    for other in (
        wide[:, 7:77],  # rows with gaps
        np.asfortranarray(x),
        np.repeat(x, 2, 1)[:, ::2],
        unaligned(x),
        x[:, ::-1][:, ::-1],
        x.astype(x.dtype.newbyteorder(">")) if dtype != "bfloat16" else x,
    ):
        np.testing.assert_array_equal(qmatmul(other, w), want)
    np.testing.assert_array_equal(qmatmul(x.reshape(m, 1, 1, 70), w), want.reshape(m, 1, 1, 45))
    np.testing.assert_array_equal(qmatmul(x[0], w), qmatmul(x[:1], w)[0])
    np.testing.assert_array_equal(qmatmul(x, w.to_layout("tile16")), want)
    guarded = Guarded(m * 45, x.dtype, offset=1)
    out = guarded.array.reshape(m, 45)
    assert qmatmul(x, w, out=out) is out
    guarded.check()
    np.testing.assert_array_equal(out, want)
    gaps = np.zeros((m, 2, 45), x.dtype)[:, 0]
    assert qmatmul(x, w, out=gaps) is gaps
    np.testing.assert_array_equal(gaps, want)


def test_out_that_shares_memory_with_x(rng):
    w = weight(rng, 64, 64, "int4")
    x = rng.standard_normal((9, 64)).astype(np.float32)
    want = qmatmul(x, w)
    assert qmatmul(x, w, out=x) is x
    np.testing.assert_array_equal(x, want)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch(dtype, rng):
    import torch

    w = weight(rng, 40, 100, "int4-asym").torch()
    x = torch.from_numpy(rng.standard_normal((2, 3, 100))).to(getattr(torch, dtype))
    y = qmatmul(x, w)
    assert isinstance(y, torch.Tensor) and y.shape == (2, 3, 40) and y.dtype == x.dtype
    want = x.double() @ w.dequantize(torch.float64).T
    torch.testing.assert_close(y.double(), want, rtol=2 * HALF[dtype], atol=1e-4)
    assert torch.equal(qmatmul(x.transpose(0, 1), w), y.transpose(0, 1))
    out = torch.empty_like(y)
    assert qmatmul(x, w, out=out) is out and torch.equal(out, y)
    bias = torch.randn(40, requires_grad=True)
    assert not qmatmul(x, w, bias).requires_grad


# ---- errors --------------------------------------------------------------------------------------


def test_errors(rng):
    w = weight(rng, 20, 50, "int4")
    x = np.ones((3, 50), np.float32)
    low, up = np.ones((3, 4), np.float32), np.ones((20, 4), np.float32)
    cases = [
        (InvalidInputError, "last dimension of 50", (x[:, :49], w), {}),
        (InvalidInputError, "last dimension", (np.ones((), np.float32), w), {}),
        (DTypeError, "weight", (x, x), {}),
        (DTypeError, "x: expected float64", (x.astype(np.int32), w), {}),
        (DTypeError, "x: expected a NumPy", ([1.0], w), {}),
        (InvalidInputError, "bias", (x, w, np.ones(19, np.float32)), {}),
        (DTypeError, "bias", (x, w, np.ones(20, np.int64)), {}),
        (InvalidInputError, "up: expected an array beside low", (x, w), {"low": low}),
        (InvalidInputError, "low: expected an array beside up", (x, w), {"up": up}),
        (InvalidInputError, "low: expected the shape", (x, w), {"low": low[:2], "up": up}),
        (InvalidInputError, "up: expected the shape", (x, w), {"low": low, "up": up[:, :3]}),
        (InvalidInputError, "out: expected the shape", (x, w), {"out": np.ones((3, 19), "f4")}),
        (DTypeError, "out: expected float32", (x, w), {"out": np.ones((3, 20))}),
        (InvalidInputError, "variant", (x, w), {"variant": "gpu"}),
        (VariantUnavailableError, "cuda", (x, w), {"variant": "cuda"}),
    ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=message):
            qmatmul(*args, **options)
    out = np.zeros((3, 20), np.float32)
    out.flags.writeable = False
    with pytest.raises(InvalidInputError, match="read-only"):
        qmatmul(x, w, out=out)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_libraries_are_not_mixed(rng):
    import torch

    w = weight(rng, 20, 50, "int4")
    x = torch.ones(3, 50)
    with pytest.raises(DTypeError, match="bias: expected a torch tensor"):
        qmatmul(x, w, np.ones(20, np.float32))
    with pytest.raises(DTypeError, match="out: expected a torch tensor"):
        qmatmul(x, w, out=np.ones((3, 20), np.float32))
    with pytest.raises(DTypeError, match="cpu or cuda"):
        qmatmul(x.to("meta"), w)


def test_binding_refuses_what_no_kernel_can_run():
    w = quantize(np.ones((16, 32), np.float32), "int4")
    fields = w.kernel_args()
    x, y = np.ones((1, 32), np.float32), np.zeros((1, 16), np.float32)
    call = {
        "m": 1, "x": x.ctypes.data, "x_dtype": 1, "x_stride": 32, "y": y.ctypes.data, "y_dtype": 1,
        "y_stride": 16, "bias": 0, "low": 0, "up": 0, "rank": 0, "act_block": 0, "threads": 1,
    }  # fmt: skip
    for changed in (
        {"bits": 5}, {"kind": 9}, {"group": 24}, {"group": 0}, {"codes": 0}, {"scales": 0},
        {"scale_dtype": 0}, {"n": -1}, {"kind": wq.TABLE}, {"kind": wq.FLOAT_ZERO},
        {"kind": wq.E4M3},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            _native.core.qmatmul({**fields, **changed}, call)
    for changed in ({"x": 0}, {"y": 0}, {"x_dtype": 0}, {"m": -1}, {"rank": 2}, {"act_block": 8}):
        with pytest.raises(InvalidInputError):
            _native.core.qmatmul(fields, {**call, **changed})
    _native.core.qmatmul(fields, call)
    np.testing.assert_allclose(y, qmatmul(x, w))

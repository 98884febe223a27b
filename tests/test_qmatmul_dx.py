"""dX = dY W from packed weights: by hand, against the reference, exact cases, memory, errors."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore import _variants
from flcore.errors import DTypeError, InvalidInputError, VariantUnavailableError
from flcore.ops import qmatmul_dx
from flcore.quantization import QuantizedTensor, Scheme
from flcore.reference import weight_quant as wq
from packed_weights import HALF, SCHEMES, numbers, weight, whole_weight
from support import HAS_TORCH, Guarded, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("qmatmul_dx", "cpu").items() if not why]
SHAPES = ((1, 1), (16, 32), (15, 31), (37, 129), (64, 300), (130, 65), (259, 1030))


def bound(dy: np.ndarray, w: QuantizedTensor, low=None, up=None) -> np.ndarray:
    """Largest error the documentation of the op allows."""
    dy, dtype = dy.astype(np.float64), dy.dtype.name
    n, exact = w.shape[0], w.dequantize("float64")
    size, result = np.abs(dy) @ np.abs(exact), dy @ exact
    if low is not None:
        size += np.abs(low.astype(np.float64)) @ np.abs(up.astype(np.float64))
        result += low.astype(np.float64) @ up.astype(np.float64)
    limit = (128 + n / 128 + 6) * 2.0**-24 * size + HALF[dtype] * np.abs(result) + 2.0**-25
    if dtype != "float32":  # rows of 16 bits are multiplied as whole numbers
        rows = w.to_layout("rows")
        s = np.abs(numbers(rows.scales, w))
        codes = exact - numbers(rows.zeros, w) if w.scheme.kind == "float_zero" else exact
        codes = np.divide(np.abs(codes), s, out=np.zeros_like(exact), where=s > 0)
        for at in range(0, n, 256):
            piece = slice(at, at + 256)
            top = np.abs(dy[:, piece]).max(axis=1, initial=0)[:, None]
            limit += 2.0**-15 * top * (s[piece].max(axis=0) * codes[piece].sum(axis=0))
    return limit


def check(dy: np.ndarray, w: QuantizedTensor, **options) -> None:
    got = qmatmul_dx(dy, w, **options).astype(np.float64)
    want = dy.astype(np.float64) @ w.dequantize("float64")
    if "low" in options:
        want += options["low"].astype(np.float64) @ options["up"].astype(np.float64)
    limit = bound(dy, w, options.get("low"), options.get("up"))
    assert got.shape == want.shape
    assert (np.abs(got - want) <= limit).all(), (np.abs(got - want) / limit).max()


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_worked_example(variant):
    """Two groups of 4 weights with zeros, in groups of 16 whose other codes are the zeros."""
    q = np.full((1, 32), 10, np.uint8)
    q[0, :4], q[0, 16:] = [13, 0, 15, 11], 5
    q[0, 16:20] = [15, 0, 7, 13]
    scheme = Scheme(bits=4, group=16, kind="integer_zero", scale_dtype="float32")
    w = QuantizedTensor.from_parts(
        (1, 32), scheme, wq.pack_rows(q, 4), np.float32([[0.55 / 15, 0.1]]), np.uint8([[10, 5]])
    )
    dx = qmatmul_dx(np.float32([[2.0]]), w, variant=variant)[0]
    want = [0.22, -0.733333, 0.366667, 0.073333, 2, -1, 0.4, 1.6]
    np.testing.assert_allclose(dx[[0, 1, 2, 3, 16, 17, 18, 19]], want, atol=1e-6)
    assert not dx[4:16].any() and not dx[20:].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_with_a_single_one_gives_a_row_of_the_weight(scheme, rng):
    n, k = 301, 77
    w = weight(rng, n, k, SCHEMES[scheme])
    chosen = np.array([0, 1, 17, 127, 128, 255, 256, 300])
    for dtype in ("float32", "float16", "bfloat16"):
        dy = np.zeros((len(chosen), n), np_dtype(dtype))
        dy[np.arange(len(chosen)), chosen] = 1
        want = w.dequantize("float32")[chosen].astype(dy.dtype)
        np.testing.assert_array_equal(qmatmul_dx(dy, w), want)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_whole_numbers_are_exact(dtype, bits, rng):
    for m in (*range(1, 15), 24, 25, 64, 65):
        n, k = int(rng.integers(1, 70)), int(rng.integers(1, 140))
        q = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
        zeros = None if m % 2 else rng.integers(0, 2**bits, (n, 1)).astype(np.uint8)
        w = whole_weight(q, bits, zeros)
        dy = rng.integers(-8, 9, (m, n)).astype(np_dtype(dtype))
        offset = 2 ** (bits - 1) if zeros is None else zeros.astype(np.int64)
        want = dy.astype(np.int64) @ (q.astype(np.int64) - offset)
        got = qmatmul_dx(dy, w)
        np.testing.assert_array_equal(got, want.astype(np.float32).astype(dy.dtype))


def test_adjoint_of_the_product(rng):
    for scheme in ("int4-asym", "nf4", "int3"):
        w = weight(rng, 300, 170, SCHEMES[scheme])
        x, dy = rng.standard_normal((5, 170)), rng.standard_normal((5, 300)).astype(np.float32)
        forward = (dy * (x @ w.dequantize("float64").T)).sum()
        backward = (qmatmul_dx(dy, w).astype(np.float64) * x).sum()
        assert abs(forward - backward) <= (bound(dy, w) * np.abs(x)).sum()


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_adapters_against_autograd(rng):
    import torch

    w = weight(rng, 90, 140, SCHEMES["int4"])
    a, b = torch.randn(8, 140), torch.randn(90, 8)
    x = torch.randn(2, 7, 140, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 7, 90)
    y = x @ torch.from_numpy(w.dequantize("float64")).T + 2.0 * (x @ a.double().T) @ b.double().T
    y.backward(dy.double())
    got = qmatmul_dx(dy, w.torch(), low=2.0 * dy @ b, up=a)
    assert got.dtype == torch.float32 and got.shape == x.shape
    torch.testing.assert_close(got.double(), x.grad, rtol=0, atol=2e-4)


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cpu_matches_the_reference(scheme, rng):
    for n, k in SHAPES:
        w = weight(rng, n, k, SCHEMES[scheme])
        for m, dtype in ((1, "float32"), (5, "bfloat16"), (6, "float16"), (13, "float32")):
            dy = rng.standard_normal((m, n)).astype(np_dtype(dtype))
            check(dy, w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_rows_and_adapters(dtype, rng):
    w = weight(rng, 300, 290, SCHEMES["int4-asym"])
    for m, rank in ((25, 1), (257, 16), (30, 130)):
        dy = rng.standard_normal((m, 300)).astype(np_dtype(dtype))
        low = rng.standard_normal((m, rank)).astype(np.float32)
        up = rng.standard_normal((rank, 290)).astype(np.float32)
        check(dy, w, low=low, up=up)


def test_float64_is_computed_in_float64(rng):
    w = weight(rng, 40, 50, SCHEMES["int4"])
    dy = rng.standard_normal((3, 40))
    np.testing.assert_allclose(qmatmul_dx(dy, w), dy @ w.dequantize("float64"), rtol=1e-12)
    with pytest.raises(DTypeError, match="dy: expected float32"):
        qmatmul_dx(dy, w, variant="cpu")


def test_bfloat16_is_as_good_as_float32_rounded(rng):
    """Root of the mean squared error, beside that of rounding the exact result."""
    w = weight(rng, 1000, 200, SCHEMES["int4-asym"])
    for dtype in ("bfloat16", "float16"):
        dy = rng.standard_normal((64, 1000)).astype(np_dtype(dtype))
        exact = dy.astype(np.float64) @ w.dequantize("float64")
        ours = qmatmul_dx(dy, w).astype(np.float64) - exact
        rounding = exact.astype(dy.dtype).astype(np.float64) - exact
        ratio = np.sqrt((ours**2).mean() / (rounding**2).mean())
        assert ratio < (1.01 if dtype == "bfloat16" else 1.4), (dtype, ratio)


def test_large_values_do_not_hide_small_ones(rng):
    """Where the code of the large value is its zero, only the small ones count."""
    n, k = 512, 64
    q = rng.integers(0, 16, (n, k)).astype(np.uint8)
    q[3] = 8
    w = whole_weight(q, 4)
    dy = rng.standard_normal((4, n)).astype(np_dtype("bfloat16"))
    dy[:, 3] = [100, 1e4, 1e30, -1e38]
    small = dy.astype(np.float64)
    small[:, 3] = 0
    want = small @ w.dequantize("float64")
    np.testing.assert_allclose(qmatmul_dx(dy, w).astype(np.float64), want, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_does_not_depend_on_the_others(dtype, rng):
    w = weight(rng, 300, 170, SCHEMES["int4"])
    dy = rng.standard_normal((29, 300)).astype(np_dtype(dtype))
    dy[4, 7] = 3000  # computed another way than its neighbours
    together = qmatmul_dx(dy, w)
    for i in (0, 4, 5, 28):
        assert qmatmul_dx(dy[i : i + 1], w).tobytes() == together[i].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_stay_in_their_row(dtype, value, rng):
    w = weight(rng, 290, 64, SCHEMES["int4"])
    dy = rng.standard_normal((9, 290)).astype(np_dtype(dtype))
    clean = qmatmul_dx(dy, w)
    dy[2, 280] = value
    got = qmatmul_dx(dy, w)
    with np.errstate(invalid="ignore"):
        want = qmatmul_dx(dy, w, variant="reference")
    others = np.arange(9) != 2
    assert got[others].tobytes() == clean[others].tobytes()
    np.testing.assert_array_equal(got[2].astype(np.float32), want[2].astype(np.float32))
    assert not np.isfinite(got[2].astype(np.float32)).any()


def test_results_beyond_float16_are_infinite(rng):
    w = whole_weight(np.full((4, 3), 15, np.uint8), 4)
    assert np.isinf(qmatmul_dx(np.full((1, 4), 6e4, np.float16), w)).all()


# ---- levels and threads --------------------------------------------------------------------------

LEVELS = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, flcore
from flcore.ops import qmatmul_dx
from support import np_dtype
from test_qmatmul_dx import SCHEMES, check, weight
rng = np.random.default_rng(5)
for scheme in SCHEMES.values():
    w = weight(rng, 147, 161, scheme)
    for m, dtype in ((7, "float32"), (14, "bfloat16"), (3, "float16")):
        dy = rng.standard_normal((m, 147)).astype(np_dtype(dtype))
        low, up = rng.standard_normal((m, 3)), rng.standard_normal((3, 161))
        check(dy, w, low=low.astype(np.float32), up=up.astype(np.float32))
w = weight(rng, 700, 1200, SCHEMES["int4-asym"])
for dtype in ("float32", "bfloat16"):
    dy = rng.standard_normal((9, 700)).astype(np_dtype(dtype))
    dy[3, 5] = 1000
    results = set()
    for threads in (1, 2, 3, 5):
        flcore.set_num_threads(threads)
        results.add(qmatmul_dx(dy, w).tobytes())
    assert len(results) == 1
print("done")
"""


def test_every_level_and_thread_count():
    from support import ROOT

    printed = outputs_per_level(LEVELS.format(tests=str(ROOT / "tests")))
    assert set(printed.values()) == {"done\n"}


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_any_kind(dtype, rng):
    n, k = 45, 70
    w = weight(rng, n, k, SCHEMES["int4"])
    dy = rng.standard_normal((6, n)).astype(np_dtype(dtype))
    want = qmatmul_dx(dy, w)
    wide = np.zeros((6, 2 * n), dy.dtype)
    wide[:, :n] = dy
    apart = np.zeros((6, 2 * n), dy.dtype)
    apart[:, ::2] = dy
    fixed = dy.copy()
    fixed.flags.writeable = False
    forms = [wide[:, :n], apart[:, ::2], fixed, np.asfortranarray(dy), unaligned(dy), dy[::-1]]
    for form in forms[:-1]:
        assert qmatmul_dx(form, w).tobytes() == want.tobytes()
    assert qmatmul_dx(forms[-1], w).tobytes() == want[::-1].tobytes()
    out = Guarded(6 * k, dy.dtype, offset=1)
    result = qmatmul_dx(dy, w, out=out.array.reshape(6, k))
    out.check()
    assert result.tobytes() == want.tobytes()
    gaps = np.full((6, 2 * k), 7, dy.dtype)
    assert qmatmul_dx(dy, w, out=gaps[:, ::2]).tobytes() == want.tobytes()
    assert (gaps[:, 1::2] == 7).all()
    parts = dy.reshape(2, 3, n)
    assert qmatmul_dx(parts, w).shape == (2, 3, k)
    assert qmatmul_dx(dy[0], w).tobytes() == want[0].tobytes()


def test_nothing_to_compute(rng):
    w = weight(rng, 5, 7, SCHEMES["int4"])
    assert qmatmul_dx(np.zeros((0, 5), np.float32), w).shape == (0, 7)
    none = QuantizedTensor.from_parts(
        (0, 7), Scheme.of("int8"), np.zeros((0, 7), np.uint8), np.zeros((0, 1), np.float32)
    )
    assert not qmatmul_dx(np.zeros((3, 0), np.float32), none).any()
    low, up = np.ones((3, 1), np.float32), np.arange(7, dtype=np.float32)[None]
    got = qmatmul_dx(np.zeros((3, 0), np.float32), none, low=low, up=up)
    np.testing.assert_array_equal(got, np.repeat(up, 3, axis=0))


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_torch_and_numpy_agree(rng):
    import torch

    w = weight(rng, 45, 70, SCHEMES["int4-asym"])
    dy = torch.randn(6, 45)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = qmatmul_dx(dy.to(dtype), w.torch())
        assert got.dtype == dtype
        same = dy.to(dtype).float().numpy().astype(np_dtype(str(dtype).removeprefix("torch.")))
        want = qmatmul_dx(same, w).astype(np.float32)
        np.testing.assert_array_equal(got.float().numpy(), want)


# ---- bad input -----------------------------------------------------------------------------------

DY = np.ones((2, 5), np.float32)


@pytest.mark.parametrize(
    ("dy", "options", "error", "message"),
    [
        (DY[:, :4], {}, InvalidInputError, "dy: expected a last dimension of 5"),
        (DY.astype(np.int32), {}, DTypeError, "dy: expected"),
        ([1.0] * 5, {}, DTypeError, "dy: expected"),
        (DY, {"weight": DY}, DTypeError, "weight: expected a QuantizedTensor"),
        (DY, {"low": DY[:, :1]}, InvalidInputError, "up: expected"),
        (DY, {"up": DY[:1]}, InvalidInputError, "low: expected"),
        (DY, {"low": DY[:, :1], "up": DY[:1]}, InvalidInputError, "up: expected the shape"),
        (DY, {"out": np.ones((2, 6), np.float32)}, InvalidInputError, "out"),
        (DY, {"out": np.ones((2, 7), np.float16)}, DTypeError, "out"),
        (DY, {"variant": "gpu"}, InvalidInputError, "variant"),
        (DY, {"variant": "cuda"}, VariantUnavailableError, "qmatmul_dx"),
    ],
)
def test_bad_input_is_named(dy, options, error, message, rng):
    w = options.pop("weight", None)
    with pytest.raises(error, match=message):
        qmatmul_dx(dy, weight(rng, 5, 7, SCHEMES["int4"]) if w is None else w, **options)


def test_a_read_only_result_is_refused(rng):
    out = np.zeros((2, 7), np.float32)
    out.flags.writeable = False
    with pytest.raises(InvalidInputError, match="read-only"):
        qmatmul_dx(DY, weight(rng, 5, 7, SCHEMES["int4"]), out=out)


def test_threads_are_taken_from_the_setting(rng):
    flcore.set_num_threads(2)
    check(rng.standard_normal((3, 600)).astype(np.float32), weight(rng, 600, 900, SCHEMES["nf4"]))

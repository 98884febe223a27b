"""Products with quantized weights in Triton on a GPU: the reference, exact cases, equal runs."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore.ops.act_quant import quantize_activation
from flcore.ops.qmatmul import qmatmul
from flcore.ops.qmatmul_dx import qmatmul_dx
from flcore.ops.qmatmul_int8 import qmatmul_int8
from flcore.quantization import QuantizedTensor, Scheme, quantize
from flcore.reference import weight_quant as wq
from support import EPS

pytestmark = pytest.mark.gpu

SCHEMES = (
    *("int8", "int8-asym", "int4", "int4-asym", "int4-float-zero", "int3", "int3-asym", "int2"),
    *("nf4", "fp4", "mxfp4", "mxfp8", "fp8", "fp8-e5m2", "q4_0"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 4, 5, 16, 17, 33, 64, 65, 200)  # around the tiles of every plan


def weight(scheme, n, k, **changes) -> QuantizedTensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    return quantize(w, Scheme.of(scheme, **changes))


def assert_near(got, x, dense, extra=0.0, size=0.0, *, sums=4e-6):
    """Within float32 sums of the exact result, and one rounding to the dtype of x."""
    want = x.double() @ dense + extra
    size = x.double().abs() @ dense.abs() + size
    eps = EPS[str(x.dtype).removeprefix("torch.")]
    allowed = 0.51 * eps * want.abs() + sums * size
    assert bool(((got.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_agrees_with_the_reference(scheme):
    """Few calls a kind: every one of them compiles a kernel."""
    dtype, (n, k) = DTYPES[SCHEMES.index(scheme) % 3], (1000, 1111)
    w = weight(scheme, n, k)
    dense, there = w.dequantize(torch.float64).cuda(), w.to("cuda")
    for m in (1, 100):
        x = torch.randn(m, k, device="cuda").to(dtype)
        # many rows: levels of a codebook in 16 bits
        sums = 2.0**-16 if m > 64 and scheme in ("nf4", "fp4") else 4e-6
        assert_near(qmatmul(x, there, variant="triton"), x, dense.T, sums=sums)
    dy = torch.randn(100, n, device="cuda").to(dtype)
    assert_near(qmatmul_dx(dy, there, variant="triton"), dy, dense, sums=2.5e-5)


def test_numbers_of_rows():
    w = weight("int4", 250, 2048)
    dense, there = w.dequantize(torch.float64).cuda(), w.to("cuda")
    for m in ROWS:
        x, dy = torch.randn(m, 2048, device="cuda"), torch.randn(m, 250, device="cuda")
        x, dy = x.bfloat16(), dy.bfloat16()
        assert_near(qmatmul(x, there, variant="triton"), x, dense.T, sums=8e-6)
        assert_near(qmatmul_dx(dy, there, variant="triton"), dy, dense, sums=2.5e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_low_rank_and_given_outputs(dtype):
    w = weight("int4-asym", 300, 700)
    dense, there = w.dequantize(torch.float64).cuda(), w.to("cuda")
    bias, up = torch.randn(300, device="cuda"), torch.randn(300, 8, device="cuda")
    for m in (1, 4, 30, 150):
        x = torch.randn(m, 900, device="cuda").to(dtype)[:, 100:800]
        low = torch.randn(m, 8, device="cuda")
        buffer = torch.full((m + 2, 300), 7.0, device="cuda", dtype=dtype)
        out = buffer[1:-1]
        assert qmatmul(x, there, bias, low=low, up=up, out=out, variant="triton") is out
        assert bool((buffer[0] == 7).all() and (buffer[-1] == 7).all())
        extra, size = low.double() @ up.double().T, low.double().abs() @ up.double().abs().T
        assert_near(out, x, dense.T, extra + bias, size + bias.abs())
        dy, up_dx = torch.randn(m, 300, device="cuda").to(dtype), torch.randn(8, 700, device="cuda")
        got = qmatmul_dx(dy, there, low=low, up=up_dx, variant="triton")
        extra, size = low.double() @ up_dx.double(), low.double().abs() @ up_dx.double().abs()
        assert_near(got, dy, dense, extra, size, sums=2.5e-5)


@pytest.mark.parametrize("scheme", ["int4", "int3-asym", "int4-float-zero", "int8", "nf4", "fp8"])
def test_single_ones_give_columns_and_rows_exactly(scheme):
    w = weight(scheme, 100, 300)
    dense, there = w.dequantize(torch.float32).cuda(), w.to("cuda")
    eye = torch.eye(300, device="cuda")
    for m in (4, 64):
        assert torch.equal(qmatmul(eye[:m], there, variant="triton"), dense.T[:m]), m
    got, dense = qmatmul_dx(torch.eye(100).cuda()[:64], there, variant="triton"), dense[:64]
    if w.scheme.scale_dtype == "float32":  # tensor cores cut where they add, and do not round
        torch.testing.assert_close(got, dense, rtol=2.0**-21, atol=0)
    else:
        assert torch.equal(got, dense)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_are_exact(bits):
    rng = np.random.default_rng(bits)
    for m, n, k, group in ((4, 1, 1, 16), (5, 33, 97, 48), (65, 130, 1025, 128)):
        g = wq.groups(k, group)
        q = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
        zeros = rng.integers(0, 2**bits, (n, g)).astype(np.uint8)
        scheme = Scheme(bits=bits, group=group, kind="integer_zero", scale_dtype="float32")
        ones = np.ones((n, g), np.float32)
        w = QuantizedTensor.from_parts((n, k), scheme, wq.pack_rows(q, bits), ones, zeros)
        dense, there = torch.from_numpy(w.dequantize("float64")).cuda(), w.to("cuda")
        for dtype in DTYPES[bits % 3 :][:1]:
            x = torch.from_numpy(rng.integers(-3, 4, (m, k))).cuda().to(dtype)
            want = (x.double() @ dense.T).float().to(dtype)
            assert torch.equal(qmatmul(x, there, variant="triton"), want)
            dy = torch.from_numpy(rng.integers(-3, 4, (m, n))).cuda().to(dtype)
            want = (dy.double() @ dense).float().to(dtype)
            assert torch.equal(qmatmul_dx(dy, there, variant="triton"), want)
        x = torch.from_numpy(rng.integers(-127, 128, (m, k))).cuda().float()
        x[:, 0] = 127  # scale 1
        if k <= group:
            got = qmatmul_int8(x, there, act_block=0, variant="triton")
            assert torch.equal(got, (x.double() @ dense.T).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_of_activations_have_the_bits_of_the_cpu(asymmetric, dtype):
    x = torch.randn(70, 3001)
    x[1, :400] = 0
    x[2, 3], x[3, 900], x[4, 7] = float("nan"), float("inf"), float("-inf")
    x[5] *= 1e-30
    x = x.to(dtype)
    for block in (0, 16, 100, 1024):
        found = quantize_activation(x.cuda(), block, asymmetric=asymmetric, variant="triton")
        want = quantize_activation(x, block, asymmetric=asymmetric, variant="cpu")
        for a, b in zip(found, want, strict=True):
            if b is None:
                assert a is None
            else:
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scheme", ["int8-asym", "int4-float-zero", "int3", "int2"])
def test_integer_products_are_those_of_the_cpu(scheme, asymmetric):
    w = weight(scheme, 500, 2100)
    there = w.to("cuda")
    for m in (1, 70):
        x, options = torch.randn(m, 2100), {"act_block": 0 if m == 1 else None}
        options["asymmetric"] = asymmetric
        got = qmatmul_int8(x.cuda(), there, variant="triton", **options).cpu()
        want = qmatmul_int8(x, w, variant="cpu", **options)
        assert bool(((got - want).abs() <= 2e-6 * want.abs().max()).all())


def test_runs_repeat_their_bits_and_rows_do_not_depend_on_their_neighbours():
    w = weight("int4", 512, 8192).to("cuda")
    for m in (1, 3, 20, 100):
        x = torch.randn(m, 8192, device="cuda").bfloat16()
        runs = [qmatmul(x, w, variant="triton") for _ in range(5)]
        assert all(torch.equal(run, runs[0]) for run in runs)
        x[-1] = float("nan")
        y = qmatmul(x, w, variant="triton")
        assert torch.equal(y[:-1], runs[0][:-1]) and bool(y[-1].isnan().all())
        dy = torch.randn(m, 512, device="cuda").bfloat16()
        runs = [qmatmul_dx(dy, w, variant="triton") for _ in range(5)]
        assert all(torch.equal(run, runs[0]) for run in runs)


def test_small_calls():
    """Every kernel once; what compute-sanitizer runs."""
    for scheme in ("int4-asym", "int3", "nf4", "fp8", "int4-float-zero", "int8"):
        w = weight(scheme, 40, 90).to("cuda")
        dense = w.dequantize(torch.float64)
        for m in (2, 20):
            x, dy = torch.randn(m, 90, device="cuda"), torch.randn(m, 40, device="cuda")
            assert_near(qmatmul(x, w, variant="triton"), x, dense.T)
            assert_near(qmatmul_dx(dy, w, variant="triton"), dy, dense)
            if scheme.startswith("int"):
                y = qmatmul_int8(x, w, asymmetric=m == 2, variant="triton")
                assert bool(((y - x @ dense.T.float()).abs() < 0.5).all())


def test_no_wait_for_the_device_and_graphs():
    w = weight("nf4", 256, 512).to("cuda")
    x = torch.randn(3, 512, device="cuda").half()
    out = torch.empty(3, 256, device="cuda", dtype=torch.float16)
    w8 = weight("int8", 256, 512).to("cuda")
    want, want8 = qmatmul(x, w, variant="triton"), qmatmul_int8(x, w8, variant="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        qmatmul(x, w, variant="triton")
        qmatmul_dx(want, w, variant="triton")
        qmatmul_int8(x, w8, variant="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qmatmul(x, w, out=out, variant="triton")
        y8 = qmatmul_int8(x, w8, variant="triton")
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want) and torch.equal(y8, want8)

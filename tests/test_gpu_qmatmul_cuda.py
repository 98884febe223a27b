"""Products with quantized weights by the CUDA kernels, on a GPU, against float64.

What of them can run without a GPU is in test_qmatmul_cuda_on_host.py.
"""

from __future__ import annotations

import pytest

from flcore.ops import qmatmul, qmatmul_int8
from flcore.quantization import Scheme, quantize
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)
import torch

pytestmark = pytest.mark.gpu
SCHEMES = ("int2", "int3", "int4", "int4-asym", "int4-float-zero", "int8", "nf4", "mxfp4", "fp8")
HALVES = (torch.float16, torch.bfloat16)
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SHAPES = (
    (1, 1, 1),
    (3, 37, 200),
    (16, 128, 128),
    (17, 300, 333),
    (65, 257, 1000),
    (130, 512, 4096),
)


def random_case(m, n, k, scheme, dtype, **fields):
    """A weight on the device, rows of x on the device, and both in float64 on the CPU."""
    generator = torch.Generator().manual_seed(m + 3 * n + 7 * k)
    weight = quantize(torch.randn(n, k, generator=generator), Scheme.of(scheme, **fields))
    x = (torch.randn(m, k, generator=generator) + 0.25).to(dtype)
    dense = torch.as_tensor(weight.dequantize("float64"))
    return weight.to("cuda"), x.cuda(), dense, x.double()


def assert_close(y, x, dense, extra=0.0, terms=2.0**-17):
    want = x @ dense.T + extra
    bound = EPS[y.dtype] * want.abs() + terms * (x.abs() @ dense.abs().T) + 1e-6
    difference = (y.cpu().double() - want).abs()
    assert (difference <= bound).all(), difference.max()


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_near_the_definition(scheme, dtype):
    for m, n, k in SHAPES:
        weight, x, dense, wide = random_case(m, n, k, scheme, dtype)
        assert_close(qmatmul(x, weight, variant="cuda"), wide, dense)


@pytest.mark.parametrize("dtype", HALVES)
def test_small_calls(dtype):
    """Every path once, for the sanitizer: types of codes, zeros and groups, both sizes of tiles."""
    for scheme, fields in (
        ("int4-asym", {"group": 16}),
        ("int4-float-zero", {"group": 48}),
        ("int8", {"group": -1}),
        ("nf4", {}),
        ("fp8", {}),
    ):
        for m in (3, 20):
            weight, x, dense, wide = random_case(m, 40, 200, scheme, dtype, **fields)
            bias, low, up = torch.ones(40), torch.ones(m, 2), torch.ones(40, 2)
            given = {"low": low.cuda(), "up": up.cuda(), "variant": "cuda"}
            y = qmatmul(x, weight, bias.cuda(), **given)
            assert_close(y, wide, dense, 3.0)
            if scheme.startswith("int"):
                asymmetric = scheme == "int4-asym"
                y = qmatmul_int8(x, weight, act_block=16, asymmetric=asymmetric, variant="cuda")
                assert_close(y, wide, dense, terms=0.02)


@pytest.mark.parametrize("dtype", HALVES)
def test_one_hot_rows_give_columns(dtype):
    for scheme in ("int2", "int3", "int4-asym", "int4-float-zero", "int8", "mxfp4", "fp8"):
        weight = quantize(torch.randn(200, 333), scheme)
        y = qmatmul(torch.eye(333).to(dtype).cuda(), weight.to("cuda"), variant="cuda")
        want = torch.as_tensor(weight.dequantize("float32")).to(dtype).T
        assert torch.equal(y.cpu(), want), scheme


def test_runs_repeat_their_bits():
    for scheme in ("int4", "nf4"):
        weight, x, _, _ = random_case(64, 1000, 4096, scheme, torch.bfloat16)
        found = [qmatmul(x, weight, variant="cuda") for _ in range(5)]
        assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scheme", ["int2", "int4-asym", "int4-float-zero", "int8", "int8-asym"])
def test_int8_products_are_those_of_the_cpu(scheme, asymmetric):
    for m, n, k in SHAPES:
        for group, block in ((128, 128), (-1, 0), (32, 64), (48, 16)):
            weight, x, _, _ = random_case(m, n, k, scheme, torch.float32, group=group)
            options = {"act_block": block, "asymmetric": asymmetric}
            y = qmatmul_int8(x, weight, variant="cuda", **options).cpu()
            want = qmatmul_int8(x.cpu(), weight.to("cpu"), variant="cpu", **options)
            assert torch.allclose(y, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_int8_activations_have_the_codes_of_the_cpu():
    """One-hot weights show the codes: y = scale (code - zero), to the bit."""
    weight = quantize(torch.eye(64), Scheme.of("int8", group=-1, scale_dtype="float32"))
    x = torch.randn(20, 64)
    for asymmetric in (False, True):
        y = qmatmul_int8(
            x.cuda(), weight.to("cuda"), act_block=0, asymmetric=asymmetric, variant="cuda"
        )
        want = qmatmul_int8(x, weight, act_block=0, asymmetric=asymmetric, variant="cpu")
        assert torch.equal(y.cpu(), want)


def test_calls_go_to_the_stream_and_into_a_graph():
    weight, x, dense, wide = random_case(4, 300, 1024, "int4", torch.float16)
    out = torch.empty(4, 300, dtype=torch.float16, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        qmatmul(x, weight, out=out, variant="cuda")
    side.synchronize()
    assert_close(out, wide, dense)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qmatmul(x, weight, out=out, variant="cuda")
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(out, 2 * wide, dense)

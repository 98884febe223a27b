"""Products of quantised activations with quantized weights in qmatmul.cu, compiled as C++.

As in test_qmatmul_cuda_on_host.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from flcore.ops import qmatmul_int8
from flcore.quantization import QuantizedTensor, Scheme
from qmatmul_on_host import (
    EPS,
    HALVES,
    bound_device,
    dense,
    product_int8,
    random_weight,
    random_x,
)
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)
import torch

pytestmark = pytest.mark.slow


@pytest.fixture
def device(monkeypatch):
    """A function that sets multiprocessors, shared memory and the order of threads."""
    yield from bound_device(monkeypatch)


def quantised(x, block, asymmetric):
    """float64 values of the codes that rows of float32 get, one scale for `block` of them."""
    f, found = np.float32, np.zeros(x.shape)
    for row, out in zip(x, found, strict=True):
        for first in range(0, len(row), block):
            v = row[first : first + block]
            if not v.any():
                continue
            if asymmetric:
                low, high = min(v.min(), f(0)), max(v.max(), f(0))
                half = high * f(0.5) - low * f(0.5)
                zero = np.clip(np.rint(-low * (f(127.5) / half)) - 128, -128, 127)
                q = np.clip(np.rint(v * (f(127.5) / half)) + zero, -128, 127) - zero
                scale = half / f(127.5)
            else:
                top = np.abs(v).max()
                q, scale = np.rint(v * (f(127) / top)), top / f(127)
            out[first : first + block] = q.astype(np.float64) * np.float64(scale)
    return found


def assert_close_int8(y, x, weight, block, asymmetric, extra=0.0):
    w = dense(weight)
    seen = torch.from_numpy(quantised(x.float().numpy(), block or x.shape[1], asymmetric))
    want = seen @ w.T + extra
    bound = EPS[y.dtype] * want.abs() + 2.0**-19 * (seen.abs() @ w.abs().T) + 1e-6
    assert ((y.double() - want).abs() <= bound).all(), (y.double() - want).abs().max()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    "scheme", ["int2", "int3-asym", "int4", "int4-asym", "int4-float-zero", "int8", "int8-asym"]
)
def test_int8_products_are_near_the_definition(device, scheme, asymmetric, rng):
    for i, (multiprocessors, m, n, k, group, block) in enumerate((
        (1, 3, 37, 200, 128, 128),
        (3, 3, 37, 200, -1, 0),
        (5, 20, 300, 333, 32, 64),
        (5, 5, 40, 333, 48, 16),
        (7, 5, 40, 1333, 48, 96),
        (4, 70, 50, 1100, 128, 0),
        (6, 4, 50, 1100, -1, 80),
    )):  # fmt: skip
        device(multiprocessors)
        weight = random_weight(rng, n, k, scheme, group=group)
        x = random_x(rng, m, k, (torch.float32, *HALVES)[i % 3])
        x[0, : k // 3] = 0
        bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
        y = product_int8(x, weight, bias, act_block=block, asymmetric=asymmetric)
        assert_close_int8(y, x, weight, block, asymmetric, bias.double())


def test_int8_integers_are_exact_beyond_a_block_of_2_to_the_15(device, rng):
    """One scale a row and K of 40,000: integer sums in parts, every one exact."""
    device(3)
    n, k = 5, 40_000
    q = rng.integers(0, 256, (n, k)).astype(np.uint8)
    scheme = Scheme.of("int8-asym", group=-1, scale_dtype="float32")
    zeros = rng.integers(0, 256, (n, 1)).astype(np.uint8)
    parts = (q, np.ones((n, 1), np.float32), zeros)
    weight = QuantizedTensor.from_parts((n, k), scheme, *(torch.from_numpy(p) for p in parts))
    x = torch.zeros((2, k))
    places = rng.integers(0, k, 200)
    x[:, places] = torch.from_numpy(rng.integers(-127, 128, (2, 200)).astype(np.float32))
    x[:, 7] = 127
    want = x.double() @ torch.from_numpy(q.astype(np.float64) - zeros).T
    assert torch.equal(product_int8(x, weight), want.float())


def test_int8_tiny_and_huge_blocks(device, rng):
    weight = random_weight(rng, 20, 64, "int8")
    x = random_x(rng, 4, 64, torch.float32)
    x *= torch.tensor([1e-42, 1e-30, 1e30, 0.0])[:, None]
    y = product_int8(x, weight)
    assert (y[3] == 0).all()
    want = x.double() @ dense(weight).T
    scale = x.double().abs().amax(1, keepdim=True) * 2
    assert ((y.double() - want)[1:3].abs() <= 0.1 * scale[1:3]).all()
    assert y[0].isfinite().all()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scheme", ["int3-asym", "int4", "int4-float-zero", "int8-asym"])
def test_int8_has_the_bits_of_the_cpu_kernel_where_k_is_not_cut(device, scheme, asymmetric, rng):
    """One block of threads: the same codes and scales of x, the same order of sums."""
    device(1)
    for m, k, group, block in ((20, 500, 32, 32), (18, 333, -1, 0), (3, 100, 48, 16)):
        weight = random_weight(rng, 50, k, scheme, group=group)
        x = random_x(rng, m, k, torch.float32)
        x[:2] *= torch.tensor([1e-30, 1e30])[:, None]
        x[2, :60] = 0
        options = {"act_block": block, "asymmetric": asymmetric}
        want = qmatmul_int8(x, weight, variant="cpu", **options)
        assert torch.equal(product_int8(x, weight, **options), want), (m, k)

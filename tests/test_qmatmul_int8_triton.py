"""Quantised activations and their products in Triton, in the interpreter: bits of the CPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from flcore import _variants
from flcore.ops.act_quant import quantize_activation
from flcore.ops.qmatmul_int8 import qmatmul_int8
from flcore.quantization import Scheme, quantize
from support import np_dtype

pytestmark = [
    pytest.mark.skipif(
        bool(_variants.available("qmatmul_int8", "cpu")["triton"]), reason="there is a GPU"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

SCHEMES = (
    *("int8", "int8-asym", "int4", "int4-asym", "int4-float-zero", "int3", "int3-asym", "int2"),
    *("q4_0", "q8_0"),
)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_codes_scales_and_sums_have_the_bits_of_the_reference(dtype, asymmetric, rng):
    x = rng.standard_normal((7, 1100)).astype(np.float32)
    x[1, :200] = 0
    x[2, 3], x[3, 900], x[4, 7] = np.nan, np.inf, -np.inf
    x[5] = np.abs(x[5]) * 1e-30 if dtype != "float16" else x[5] * 1e-7
    x[6] *= 3e38 / np.abs(x[6]).max() if dtype != "float16" else 60000 / np.abs(x[6]).max()
    x[0, :64] = np.arange(64) - 31.5  # halves
    x = x.astype(np_dtype(dtype))
    for block in (0, 16, 100, 512) if dtype == "float32" else (128,):
        found, want = (
            quantize_activation(x, block, asymmetric=asymmetric, variant=v)
            for v in ("triton", "reference")
        )
        for name, a, b in zip(want._fields, found, want, strict=True):
            same = a is b if b is None else a.tobytes() == b.tobytes()
            assert same or (name == "scales" and np.array_equal(a, b, equal_nan=True)), (
                block,
                name,
            )
    tensor = torch.from_numpy(np.float32([[1, -2, 0.5, 3]]))
    q = quantize_activation(tensor, asymmetric=True, variant="triton")
    assert q.codes.tolist() == [[153, 0, 128, 255]] and q.zeros.tolist() == [[102]]
    assert quantize_activation(tensor[:0], variant="triton").scales.shape == (0, 1)


@pytest.fixture
def undivided(monkeypatch):
    """A device so small that no contraction is split: the order of the CPU's sums."""
    from flcore.pykernels import qmatmul_plan as plans

    monkeypatch.setattr(plans, "device_of", lambda name: plans.Device((8, 0), 1))


def bits_agree(rng, scheme, m, n, k, dtype="float32", **options):
    w = quantize(rng.standard_normal((n, k)).astype(np.float32), scheme)
    x = rng.standard_normal((m, k)).astype(np_dtype(dtype))
    found, want = (qmatmul_int8(x, w, variant=v, **options) for v in ("triton", "cpu"))
    assert found.tobytes() == want.tobytes(), (scheme, m, n, k, options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_have_the_bits_of_the_cpu(scheme, rng, undivided):
    bits_agree(rng, scheme, 3, 17, 100)
    bits_agree(rng, scheme, 18, 20, 70, "bfloat16", asymmetric=True)
    bits_agree(rng, scheme, 1, 33, 300, "float16", act_block=0)


def test_blocks_of_both_sides(rng, undivided):
    for group, block in ((48, 96), (48, 16), (128, 64), (-1, 112), (-1, 0), (256, 256)):
        for asymmetric in (False, True):
            scheme = Scheme.of("int4-asym", group=group)
            bits_agree(rng, scheme, 2, 9, 280, act_block=block, asymmetric=asymmetric)


def test_bias_low_rank_and_a_split_contraction(rng, monkeypatch):
    from flcore.pykernels import qmatmul_plan as plans

    w = quantize(rng.standard_normal((20, 260)).astype(np.float32), "q8_0")
    x, bias = rng.standard_normal((5, 260)), rng.standard_normal(20).astype(np.float32)
    low = rng.standard_normal((5, 3)).astype(np.float32)
    up = rng.standard_normal((20, 3)).astype(np.float32)
    x = x.astype(np.float32)
    want = qmatmul_int8(x, w, bias, low=low, up=up, variant="reference")
    for multiprocessors in (2, 4):
        device = plans.Device((9, 0), multiprocessors)
        monkeypatch.setattr(plans, "device_of", lambda name, device=device: device)
        assert plans.plan_int8(device, 5, 20, 9, 32).splits > 1
        got = qmatmul_int8(x, w, bias, low=low, up=up, variant="triton")
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


def test_rows_that_are_not_finite(rng):
    w = quantize(rng.standard_normal((5, 64)).astype(np.float32), "int4")
    x = rng.standard_normal((4, 64)).astype(np.float32)
    x[1, 3], x[2, 5] = np.nan, np.inf
    y = qmatmul_int8(x, w, variant="triton")
    assert np.isnan(y[1:3]).all() and np.isfinite(y[[0, 3]]).all()


def test_units_hold_sums_of_32_bits():
    from flcore.ops._qmatmul_int8_triton import LONGEST, unit_of

    for base, k in ((128, 4096), (4096, 4096), (100_000, 100_000), (65_536, 262_144), (5, 5)):
        unit = unit_of(base, k)
        assert 0 < unit <= LONGEST and (base % unit == 0 or base >= k)
        assert unit * 255 * 255 < 2**31

"""Products with quantized weights in Triton, in the interpreter, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from flcore import _variants
from flcore.errors import DTypeError
from flcore.ops.qmatmul import qmatmul
from flcore.ops.qmatmul_dx import qmatmul_dx
from flcore.quantization import QuantizedTensor, Scheme, quantize
from flcore.reference import weight_quant as wq
from support import EPS

pytestmark = [
    pytest.mark.skipif(
        bool(_variants.available("qmatmul", "cpu")["triton"]), reason="there is a GPU"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

SCHEMES = (
    *("int8", "int8-asym", "int4", "int4-asym", "int4-float-zero", "int3", "int3-asym", "int2"),
    *("nf4", "fp4", "mxfp4", "mxfp8", "fp8", "fp8-e5m2", "q4_0"),
)
DTYPES = ("float32", "bfloat16", "float16")
ROWS = (1, 3, 17)  # gemv of one and of some rows, tensor cores


def weight(rng, scheme, n=20, k=100, **changes) -> QuantizedTensor:
    scheme = Scheme.of(scheme, **changes)
    return quantize(rng.standard_normal((n, k)).astype(np.float32), scheme).torch()


def tensor(rng, *shape, dtype="float32"):
    return torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, dtype))


def integer_weight(rng, n, k, bits, group=32) -> QuantizedTensor:
    """A weight of whole numbers: S = 1, Z of its own."""
    g = wq.groups(k, group)
    q = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    zeros = rng.integers(0, 2**bits, (n, g)).astype(np.uint8)
    scheme = Scheme(bits=bits, group=group, kind="integer_zero", scale_dtype="float32")
    codes = wq.pack_rows(q, bits)
    return QuantizedTensor.from_parts((n, k), scheme, codes, np.ones((n, g), np.float32), zeros)


def assert_near(got, x, dense, extra=0.0, size=0.0, *, gradient=False):
    """Within float32 sums of the exact result, and one rounding to the dtype of x."""
    want = x.double() @ dense + extra
    size = x.double().abs() @ dense.abs() + size
    eps = EPS[str(x.dtype).removeprefix("torch.")]
    sums = 1e-5 if gradient and eps > 1e-6 else 5e-7  # 16 bits of a 16-bit value times a scale
    assert ((got.double() - want).abs() <= 0.51 * eps * want.abs() + sums * size).all()


def test_the_example_by_hand():
    q = np.zeros((1, 32), np.uint8)
    q[0, :4], q[0, 16:20] = (13, 0, 15, 11), (15, 0, 7, 13)
    scheme = Scheme(bits=4, group=16, kind="integer_zero", scale_dtype="float32")
    scales, zeros = np.float32([[0.55 / 15, 0.1]]), np.uint8([[10, 5]])
    w = QuantizedTensor.from_parts((1, 32), scheme, wq.pack_rows(q, 4), scales, zeros)
    x = np.zeros((1, 32), np.float32)
    x[0, :4], x[0, 16:20] = (1, 2, -1, 0.5), (0.25, -0.5, 1, 2)
    for rows in (1, 5):
        y = qmatmul(np.repeat(x, rows, axis=0), w, variant="triton")
        np.testing.assert_allclose(y, np.full((rows, 1), 1.5116667), rtol=1e-6)
        dx = qmatmul_dx(np.full((rows, 1), 2, np.float32), w, variant="triton")
        want = [0.22, -0.733333, 0.366667, 0.073333, 2, -1, 0.4, 1.6]
        np.testing.assert_allclose(dx[-1, [0, 1, 2, 3, 16, 17, 18, 19]], want, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_agrees_with_the_reference(scheme, rng):
    w = weight(rng, scheme)
    dense = w.dequantize(torch.float64)
    for i, m in enumerate(ROWS):
        x = tensor(rng, m, 100, dtype=DTYPES[(i + len(scheme)) % 3])
        assert_near(qmatmul(x, w, variant="triton"), x, dense.T)
    dy = tensor(rng, 5, 20, dtype=DTYPES[len(scheme) % 3])
    assert_near(qmatmul_dx(dy, w, variant="triton"), dy, dense, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_bias_and_low_rank(dtype, rng):
    for scheme in ("int4-asym", "nf4"):
        w = weight(rng, scheme)
        dense = w.dequantize(torch.float64)
        bias, up, up_dx = tensor(rng, 20), tensor(rng, 20, 3), tensor(rng, 3, 100)
        for m in (2, 9):
            x, low = tensor(rng, m, 100, dtype=dtype), tensor(rng, m, 3)
            got = qmatmul(x, w, bias, low=low, up=up, variant="triton")
            extra, size = low.double() @ up.double().T, low.double().abs() @ up.double().abs().T
            assert_near(got, x, dense.T, extra + bias, size + bias.abs())
            dy = tensor(rng, m, 20, dtype=dtype)
            got = qmatmul_dx(dy, w, low=low, up=up_dx, variant="triton")
            extra, size = low.double() @ up_dx.double(), low.double().abs() @ up_dx.double().abs()
            assert_near(got, dy, dense, extra, size, gradient=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_single_ones_give_columns_and_rows_exactly(scheme, rng):
    w = weight(rng, scheme, 20, 40)
    dense = w.dequantize("float32")
    eye = torch.eye(40)
    assert torch.equal(qmatmul(eye, w, variant="triton"), dense.T)
    assert torch.equal(qmatmul(eye[:3], w, variant="triton"), dense.T[:3])
    got = qmatmul_dx(torch.eye(20), w, variant="triton")
    if scheme in ("nf4", "fp4"):  # 24 bits of a scale by 24 of a level, less what is below 2^-24
        torch.testing.assert_close(got, dense, rtol=3e-7, atol=0)
    else:
        assert torch.equal(got, dense)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_are_exact(bits, rng):
    for m, n, k, group in ((2, 17, 37, 32), (4, 1, 1, 16), (5, 20, 97, 48), (65, 19, 70, 80)):
        w = integer_weight(rng, n, k, bits, group)
        dense = w.dequantize("float64")
        for dtype in ("float32", "bfloat16") if m == 5 else ("float32",):
            x = torch.from_numpy(rng.integers(-3, 4, (m, k))).to(getattr(torch, dtype))
            y = qmatmul(x, w.torch(), variant="triton")
            want = torch.from_numpy(x.double().numpy() @ dense.T)
            assert torch.equal(y, want.to(y.dtype)), (m, dtype)
            dy = torch.from_numpy(rng.integers(-3, 4, (m, n))).to(getattr(torch, dtype))
            dx = qmatmul_dx(dy, w.torch(), variant="triton")
            assert torch.equal(dx, torch.from_numpy(dy.double().numpy() @ dense).to(dx.dtype))


def test_a_split_contraction(rng, monkeypatch):
    """Parts are joined in order: exact for whole numbers, the same bits each time, bias once."""
    from flcore.pykernels import qmatmul_plan as plans

    device = plans.Device((9, 0), 4)
    monkeypatch.setattr(plans, "device_of", lambda name: device)
    w = integer_weight(rng, 9, 700, 8, 128).torch()
    dense, bias = w.dequantize(torch.float64), torch.ones(9)
    assert plans.plan_gemv(device, 2, 9, 175).splits == 2
    assert plans.plan(device, "wide", 20, 9, 700, 128).splits == 4
    for m in (2, 20):
        x = torch.from_numpy(rng.integers(-3, 4, (m, 700))).float()
        y = qmatmul(x, w, bias, variant="triton")
        assert torch.equal(y.double(), x.double() @ dense.T + 1)
        x = tensor(rng, m, 700)
        first, again = (qmatmul(x, w, variant="triton") for _ in range(2))
        assert torch.equal(first, again)
    w = integer_weight(rng, 300, 20, 4, 32).torch()
    assert plans.plan(device, "dx", 3, 20, 300, 32).splits == 2
    dy = torch.from_numpy(rng.integers(-3, 4, (3, 300))).float()
    got = qmatmul_dx(dy, w, variant="triton")
    assert torch.equal(got.double(), dy.double() @ w.dequantize(torch.float64))


def test_adjoint_identity(rng):
    for scheme in ("int4", "int3-asym", "int4-float-zero", "nf4", "fp8"):
        w = weight(rng, scheme, 40, 70)
        x, dy = tensor(rng, 6, 70), tensor(rng, 6, 40)
        one = (dy.double() * qmatmul(x, w, variant="triton")).sum()
        other = (qmatmul_dx(dy, w, variant="triton").double() * x).sum()
        scale = (dy.abs() @ w.dequantize("float32").abs() * x.abs()).sum()
        assert abs(one - other) < 1e-6 * scale, scheme


def test_rows_that_lie_apart_guarded_out_and_no_rows(rng):
    w = weight(rng, "int4", 20, 48)
    wide = tensor(rng, 6, 100)
    buffer = torch.full((8, 20), 7.0)
    for m in (2, 6):
        x = wide[:m, 30:78]
        out = buffer[1 : 1 + m]
        assert qmatmul(x, w, out=out, variant="triton") is out
        assert_near(out, x, w.dequantize(torch.float64).T)
        assert (buffer[0] == 7).all() and (buffer[1 + m :] == 7).all()
    assert qmatmul(wide[:0, :48], w, variant="triton").shape == (0, 20)
    fixed = wide[:, :48].numpy().copy()
    fixed.flags.writeable = False
    got = qmatmul(fixed[::-1], w.numpy(), variant="triton")
    assert (got[::-1] == qmatmul(wide[:, :48], w, variant="triton").numpy()).all()
    empty = quantize(np.zeros((5, 0), np.float32), "int4", layout="tile16").torch()
    assert torch.equal(qmatmul(wide[:2, :0], empty, variant="triton"), torch.zeros(2, 5))
    with pytest.raises(DTypeError, match="float64"):
        qmatmul(wide[:, :48].double(), w, variant="triton")


def test_values_that_are_not_finite_stay_in_their_row(rng):
    for scheme in ("int4", "nf4"):
        w = weight(rng, scheme, 20, 64)
        x = tensor(rng, 9, 64)
        x[3, 5], x[4, 6] = float("nan"), float("inf")
        x[5] = 3e38
        y = qmatmul(x, w, variant="triton")
        bad = ~torch.isfinite(y)
        assert bad[3].all() and bad[4].all()
        assert not bad[[0, 1, 2, 6, 7, 8]].any()


def test_levels_of_a_codebook(rng):
    """In few rows all their bits, in many 16; a codebook of bfloat16 numbers is one part."""
    from flcore.ops import _qmatmul_triton as launchers

    w = weight(rng, "nf4", 8, 64)
    wide = launchers.as_weight(w)
    for m, parts, most in ((5, 3, 2.0**-25), (100, 2, 2.0**-16)):
        f = launchers.factors(torch.zeros(m, 64), wide)
        assert (f.x_parts, f.parts, f.half) == (3, parts, False)
        levels = f.levels.double().sum(0).numpy()
        assert (abs(levels - wide.levels) <= most * abs(wide.levels)).all()
    x = tensor(rng, 70, 64)
    got, dense = qmatmul(x, w, variant="triton"), w.dequantize(torch.float64)
    assert (
        (got - x.double() @ dense.T).abs() <= 2.0**-16 * (x.double().abs() @ dense.abs().T)
    ).all()
    exact = launchers.as_weight(weight(rng, "mxfp4", 8, 64))
    assert launchers.factors(torch.zeros(5, 64).half(), exact)[:3] == (1, 1, True)
    assert launchers.factors(torch.zeros(5, 64).bfloat16(), exact)[:3] == (1, 1, False)
    assert launchers.factors(torch.zeros(5, 64).bfloat16(), exact, scaled=True)[:2] == (2, 1)


def test_plans_keep_tiles_within_groups_and_fill_the_device():
    from flcore.pykernels import qmatmul_plan as plans

    assert all(table.keys() == plans.PLANS[8, 0].keys() for table in plans.PLANS.values())
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0)):
        device = plans.Device(capability, 132)
        for m in (1, 5, 16, 17, 64, 65, 5000):
            for group in (0, 16, 48, 96, 128):
                for name in ("gemm", "wide", "dx"):
                    p = plans.plan(device, name, m, 4096, 4000, group)
                    along_k = p.bn if name == "dx" else p.bk
                    assert along_k >= 16 and (group == 0 or group % along_k == 0)
                    assert p.splits * p.steps * p.bk >= 4000 > (p.splits - 1) * p.steps * p.bk
                    tiles = -(-m // p.bm) * -(-4096 // p.bn)
                    assert p.splits == 1 or p.splits * tiles <= 132
    assert plans.plan_gemv(plans.Device((9, 0), 132), 1, 4096, 512).splits == 1
    assert plans.plan_gemv(plans.Device((9, 0), 132), 1, 512, 2048).splits > 1
    assert plans.plan_int8(plans.Device((9, 0), 132), 1, 64, 1, 100).bk == 128


def test_cases_of_the_gpu_benchmark_are_right():
    """In small, in the interpreter: what the benchmark on a GPU compares is the same product."""
    from flcore.bench import cases, qmatmul_gpu

    setup, seen = cases.Setup(tiny=True), set()
    for case in qmatmul_gpu.CASES:
        kind = (case.build, case.sizes.get("scheme"))
        if case.sizes["m"] == 1 or kind in seen:
            continue
        seen.add(kind)
        workload = case.workload(setup)
        for contestant in workload.contestants:
            if contestant.name.startswith("torch quantise"):
                continue  # it takes more rows than the small case has
            result = contestant.to_numpy(contestant.call(0))
            assert workload.matches(0, result) is None, (case.name, contestant.name)
    assert len(seen) == 4

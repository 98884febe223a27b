"""StableMax for torch: softmax's place taken, gradients, compilation, transforms, collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore import nn
from flcore.errors import DTypeError, InvalidInputError, LabelError
from flcore.losses import (
    log_stablemax,
    softmax_collapse_metrics,
    stablemax,
    stablemax_cross_entropy,
)
from flcore.ops.stablemax import collapse_counts

BOTH = (stablemax, log_stablemax)
SHAPES = [((7,), 0), ((5, 7), 1), ((5, 7), 0), ((2, 7, 3), 1), ((0, 7), -1), ((2, 3, 4, 5), -2)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20240229)


def composed(f, x, dim):
    """Softmax of the logits' signed logarithms, in torch's own functions."""
    g = x.sign() * x.abs().log1p()
    return torch.softmax(g, dim) if f is stablemax else torch.log_softmax(g, dim)


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("f", BOTH)
def test_the_softmax_of_signed_logarithms(f, shape, dim, dtype):
    x = (3 * torch.randn(shape, dtype=dtype)).requires_grad_()
    got, want = f(x, dim), composed(f, x, dim)
    assert got.dtype == dtype and got.stride() == want.stride()
    torch.testing.assert_close(got, want)
    v = torch.randn(shape, dtype=dtype)
    grads = [torch.autograd.grad(y, x, v)[0] for y in (got, want)]
    torch.testing.assert_close(*grads)
    assert not f(x.detach(), dim).requires_grad
    with torch.no_grad():
        assert not f(x, dim).requires_grad


@pytest.mark.parametrize("f", BOTH)
def test_gradcheck(f):
    for shape, dim in (((5, 6), -1), ((2, 6, 3), 1)):
        x = (2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(lambda t, dim=dim: f(t, dim), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("f", BOTH)
def test_half_types_are_rounded_once(f, dtype):
    x = (3 * torch.randn(9, 40)).to(dtype).requires_grad_()
    x.data[0] = 1  # eager code in this type has NaN gradients here
    wide = x.detach().double().requires_grad_()
    v = torch.randn(9, 40).to(dtype)
    got, want = f(x), f(wide)
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), want, rtol=unit + 1e-6, atol=2.0**-25)
    grads = [torch.autograd.grad(y, t, v.to(y.dtype))[0] for y, t in ((got, x), (want, wide))]
    assert grads[0].dtype == dtype
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=unit + 1e-4, atol=1e-6)


def test_masks_have_no_gradient_and_others_a_finite_one():
    x = torch.randn(4, 9)
    x[:, 2::3] = -torch.inf
    x.requires_grad_()
    for f in BOTH:
        y = f(x)
        (grad,) = torch.autograd.grad(torch.where(y > -torch.inf, y, 0).square().sum(), x)
        assert torch.isfinite(grad).all() and (grad[:, 2::3] == 0).all()


def test_logarithms_make_the_loss():
    x, y = 5 * torch.randn(20, 11), torch.randint(0, 11, (20,))
    x[:5] *= 1e5
    got = torch.nn.functional.nll_loss(log_stablemax(x), y, reduction="none")
    want = stablemax_cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    leaf = x.requires_grad_()
    grads = []
    for loss in (torch.nn.functional.nll_loss(log_stablemax(x), y), stablemax_cross_entropy(x, y)):
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*grads, rtol=2e-6, atol=1e-12)


def test_no_second_derivative():
    x = torch.randn(3, 4, requires_grad=True)
    for f in BOTH:
        for call in (f, torch.compile(f, backend="aot_eager")):
            y = call(x)[0, 0] if call is f else f(x)[0, 0]
            (once,) = torch.autograd.grad(y, x, create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative"):
                once.sum().backward()


def test_modules_and_functions():
    x = torch.randn(3, 4, 5)
    for dim in (0, -1):
        assert torch.equal(nn.StableMax(dim)(x), stablemax(x, dim))
        assert torch.equal(nn.LogStableMax(dim)(x), log_stablemax(x, dim))
        assert torch.equal(nn.functional.stablemax(x, dim), stablemax(x, dim))
        assert torch.equal(nn.functional.log_stablemax(x, dim), log_stablemax(x, dim))


def test_errors():
    with pytest.raises(DTypeError, match="x: expected a torch tensor"):
        stablemax(np.zeros(3))
    with pytest.raises(InvalidInputError, match="dim: expected a dimension of 2, got 2"):
        log_stablemax(torch.zeros(2, 3), 2)
    with pytest.raises(DTypeError, match="x: expected float64, float32"):
        stablemax(torch.zeros(3, dtype=torch.int64))


# ---- operators, compilation, transforms ----------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
def test_opcheck(log):
    from flcore import _torch_stablemax

    for shape, dim, dtype in (
        ((5, 7), -1, torch.float64),
        ((2, 7, 3), 1, torch.float32),
        ((4, 6), 0, torch.bfloat16),
    ):
        x = torch.randn(shape, dtype=dtype)
        for value in (x, x.transpose(0, 1), x[..., ::2]):
            value = value.detach().requires_grad_()
            torch.library.opcheck(_torch_stablemax.stablemax, (value, dim, log))
            args = (torch.randn_like(value), value.detach(), dim, log)
            torch.library.opcheck(_torch_stablemax.stablemax_backward, args)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("f", BOTH)
def test_compiles_without_a_graph_break(f, backend):
    x = torch.randn(6, 5, 4, requires_grad=True)

    def run(t):
        return (f(2 * t, 1) * torch.arange(4.0)).square().sum() + f(t).sum()

    values = [torch.compile(run, fullgraph=True, backend=backend)(x), run(x)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in values))


@pytest.mark.parametrize("f", BOTH)
def test_transforms(f):
    x, w = torch.randn(4, 5, 6), torch.randn(5, 6)
    torch.testing.assert_close(torch.vmap(lambda t: f(t, 0))(x), f(x, 1))
    torch.testing.assert_close(torch.vmap(lambda t: f(t, -1), in_dims=2)(x), f(x, 1).movedim(2, 0))

    def loss(t):
        return (f(t, 0) * w).sum()

    want = torch.stack([torch.func.grad(loss)(t) for t in x])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), want)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((f(leaf, 1) * w).sum(), leaf)
    torch.testing.assert_close(want, grad)


# ---- collapse ------------------------------------------------------------------------------------

GAPS = {torch.float16: 11 * math.log(2), torch.float32: 24 * math.log(2)}
GAPS |= {torch.float64: 53 * math.log(2), torch.bfloat16: 8 * math.log(2)}


def test_thresholds_by_hand():
    assert [round(GAPS[d], 2) for d in (torch.float16, torch.float32, torch.float64)] == [
        7.62,
        16.64,
        36.74,
    ]


@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", GAPS)
@pytest.mark.parametrize("classes", [2, 12, 113, 5000])
def test_collapse_begins_at_the_threshold(classes, dtype, stored):
    gap = math.log(classes - 1) + GAPS[dtype]
    x = torch.zeros(4, classes, dtype=stored) - 3
    for row, (y, sign) in enumerate(((0, -1), (0, 1), (classes - 1, -1), (classes - 1, 1))):
        x[row, y] += gap + sign * 1e-4
    y = torch.tensor([0, 0, classes - 1, classes - 1])
    found = softmax_collapse_metrics(x, y, dtype=dtype)
    assert found.softmax_collapse == 0.5 and found.zero_loss == 0.5
    assert found.largest_logit == x.abs().max().double() and found.stablemax_collapse == 0
    found = softmax_collapse_metrics(x, (y + 1) % classes, dtype=dtype)
    assert found.softmax_collapse == 0.5 and found.zero_loss == 0


def test_collapse_is_what_the_dtype_does():
    """One logit against one other: the sum that torch forms, and the loss it finds."""
    gaps = torch.linspace(10, 45, 351, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        x = torch.stack([gaps, torch.zeros_like(gaps)], 1).to(dtype)
        y = torch.zeros(len(x), dtype=torch.long)
        found = softmax_collapse_metrics(x, y)
        sums = (x - x.amax(1, keepdim=True)).exp().sum(1)
        assert found.softmax_collapse == (sums == 1).double().mean()
        losses = torch.nn.functional.cross_entropy(x, y, reduction="none")
        assert found.zero_loss == (losses == 0).double().mean()
        assert found.largest_logit == 45


def test_stablemax_collapses_only_where_logits_are_astronomic():
    y = torch.zeros(2, dtype=torch.long)
    # R / s_y = 1 / ((1 + z) (1 + z)) of two classes z and -z: 2^-24 from z = 4095 on
    x = torch.tensor([[4094.0, -4094.0], [4095.0, -4095.0]])
    found = softmax_collapse_metrics(x, y)
    assert found.stablemax_collapse == 0.5 and found.softmax_collapse == 1
    assert softmax_collapse_metrics(x.double(), y).stablemax_collapse == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 17, 1023, 1025, 3000])
def test_variants_and_devices_agree(classes, dtype):
    from flcore.losses import _collapse

    x = torch.randn(60, classes) * torch.logspace(-1, 3, 60)[:, None]
    x[torch.rand(60) < 0.3, 0] += 300
    x[::7, classes // 2] = -torch.inf
    x = x.to(dtype)
    y = torch.randint(0, classes, (60,))
    y[::3] = 0
    y[5] = -100
    unit = torch.finfo(dtype).eps / 2
    counts = collapse_counts(x, y.numpy(), unit)
    wide = x.double().numpy()
    assert counts == collapse_counts(wide, y.numpy(), unit, variant="reference")
    found = softmax_collapse_metrics(x, y)
    on_device = _collapse._on_device(x, y, -100, unit)
    torch.testing.assert_close(found, on_device, rtol=1e-14, atol=0, equal_nan=True)
    by_column = softmax_collapse_metrics(x.T[None], y[None])
    assert all(torch.equal(a, b) for a, b in zip(found, by_column, strict=True))


def test_what_is_not_finite_and_ignored_rows():
    x = torch.tensor([[50.0, 0, 0], [torch.nan, 0, 0], [torch.inf, 0, 0], [-torch.inf] * 3])
    x = torch.cat([x, torch.tensor([[0.0, -torch.inf, -torch.inf]])])
    y = torch.zeros(5, dtype=torch.long)
    found = softmax_collapse_metrics(x, y)
    assert found.softmax_collapse == 0.4 and found.zero_loss == 0.4
    assert torch.isnan(found.largest_logit) and found.stablemax_collapse == 0.2
    found = softmax_collapse_metrics(x, torch.tensor([0, -100, -100, -100, -100]))
    assert found.softmax_collapse == 1 and found.largest_logit == 50
    assert all(torch.isnan(v) for v in softmax_collapse_metrics(x, y - 100))
    single = softmax_collapse_metrics(x[0], torch.tensor(0))
    assert single.softmax_collapse == 1 and single.largest_logit == 50


def test_collapse_refuses_what_it_cannot_measure():
    x, y = torch.zeros(3, 4), torch.tensor([0, 1, 4])
    with pytest.raises(LabelError, match="row 2 has 4"):
        softmax_collapse_metrics(x, y)
    with pytest.raises(DTypeError, match="target: expected integer labels"):
        softmax_collapse_metrics(x, torch.rand(3, 4))
    with pytest.raises(DTypeError, match="dtype: expected one of"):
        softmax_collapse_metrics(x, y, dtype=torch.int8)
    with pytest.raises(InvalidInputError, match="at least one class"):
        softmax_collapse_metrics(torch.zeros(3, 0), torch.full((3,), -100))

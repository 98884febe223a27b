"""Losses of a linear layer under autograd, autocast, torch.compile and torch.func."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from flcore.errors import DTypeError
from flcore.losses import (
    linear_cross_entropy,
    stablemax_cross_entropy,
    stablemax_linear_cross_entropy,
)
from linear_problem import CLASSES, PAIRS, WIDTH, close, problem, whole


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20240229)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are tiny: threads would wait for each other
    yield
    torch.set_num_threads(threads)


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("loss", "reference"), PAIRS)
def test_gradcheck(loss, reference, reduction):
    h, w, b = (torch.randn(s, dtype=torch.float64) for s in ((6, 3), (5, 3), (5,)))
    y, weight = torch.tensor([0, 4, -100, 2, 2, 1]), torch.rand(5, dtype=torch.float64)
    for t in (h, w, b):
        t.requires_grad_()
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "weight": weight}):
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: loss(
                h, w, y, linear_bias=b, reduction=reduction, chunk_rows=2, **o
            ),
            (h, w, b),
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_and_no_second_derivative(reduction):
    h, w, b, y = problem(rows=(50,))
    total = stablemax_linear_cross_entropy(h, w, y, linear_bias=b, reduction=reduction).sum()
    first = torch.autograd.grad(total, (h, w, b), retain_graph=True)
    for factor in (1, -3, 0.3):
        again = torch.autograd.grad(factor * total, (h, w, b), retain_graph=True)
        for a, c in zip(again, first, strict=True):
            torch.testing.assert_close(a, factor * c)
    once = torch.autograd.grad(total, (h, w, b), create_graph=True)
    for a, c in zip(once, first, strict=True):
        assert torch.equal(a, c)
        with pytest.raises(RuntimeError, match="no second derivative"):
            a.sum().backward(retain_graph=True)
    last = torch.autograd.grad(2 * total, (h, w, b))
    for a, c in zip(last, first, strict=True):
        torch.testing.assert_close(a, 2 * c)


def test_gradients_accumulate_and_become_those_of_the_leaves():
    h, w, _, y = problem(rows=(50,), bias=False)
    for _ in range(2):
        (0.5 * stablemax_linear_cross_entropy(h, w, y)).backward()
    want = torch.autograd.grad(stablemax_linear_cross_entropy(h, w, y), (h, w))
    torch.testing.assert_close(h.grad, want[0])
    torch.testing.assert_close(w.grad, want[1])


def test_a_loss_scale_saves_float16_gradients():
    h, w = torch.randn(4096, 8).half(), (torch.randn(500, 8) / 4).half()
    h.requires_grad_()
    y = torch.randint(0, 500, (4096,))
    loss = linear_cross_entropy(h, w, y)
    (scaled,) = torch.autograd.grad(loss * 4096, h)
    wide = h.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.cross_entropy(wide @ w.double().T, y) * 4096, wide)
    close(scaled, want, 2.0**-11)


def test_matrices_changed_before_the_backward_pass_are_noticed():
    h, w, _, y = problem(rows=(9,), bias=False)
    loss = stablemax_linear_cross_entropy(h, w, y, reduction="none")
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_strided_and_shared_matrices():
    h, w, _, y = problem(rows=(50,), bias=False)
    store = torch.randn(WIDTH, CLASSES)
    narrow = torch.randn(50, 2 * WIDTH)[:, ::2]
    for a, c in ((h, store.T), (narrow, w)):
        a, c = a.detach().requires_grad_(), c.detach().requires_grad_()
        got = stablemax_linear_cross_entropy(a, c, y, chunk_rows=16)
        want, slopes = whole(stablemax_cross_entropy, (a, c, None), y)
        close(got, want, 1e-6)
        for grad, slope in zip(torch.autograd.grad(got, (a, c)), slopes, strict=True):
            close(grad, slope, 2e-6)
    tied = torch.randn(CLASSES, WIDTH, requires_grad=True)  # an embedding that classifies, too
    tokens = torch.randint(0, CLASSES, (50,))
    got = linear_cross_entropy(tied[tokens], tied, y)
    want = F.cross_entropy(tied[tokens] @ tied.T, y)
    torch.testing.assert_close(*(torch.autograd.grad(v, tied)[0] for v in (got, want)))


def test_autocast():
    layer, classifier = torch.nn.Linear(8, WIDTH), torch.randn(CLASSES, WIDTH, requires_grad=True)
    y = torch.randint(0, CLASSES, (50,))
    inputs = torch.randn(50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = layer(inputs)
        assert h.dtype == torch.bfloat16
        loss = stablemax_linear_cross_entropy(h, classifier, y)
        compiled = torch.compile(
            stablemax_linear_cross_entropy, fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(h, classifier, y), loss)
    # nothing is rounded to bfloat16 on the way
    want = stablemax_cross_entropy(h.float() @ classifier.T, y)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, (layer.weight, classifier), retain_graph=True)
    slopes = torch.autograd.grad(want, (layer.weight, classifier))
    close(got[0], slopes[0], 2e-2)
    close(got[1], slopes[1], 2e-6)
    with pytest.raises(DTypeError, match=r"linear_weight: expected torch.bfloat16 like input"):
        stablemax_linear_cross_entropy(h, classifier, y)


# ---- operators, compilation, transforms ----------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "stablemax"])
def test_opcheck(name):
    from flcore import _torch_linear as ops

    numbers = (name, -100, 0.1, 0.9, 0.0, 0.01, 1.0, 4, None)
    for dtype in (torch.float64, torch.bfloat16):
        h, w, b, y = problem(rows=(2, 7), dtype=dtype)
        arrays = (torch.rand(CLASSES), torch.randn(CLASSES), torch.rand(2, 7) < 0.8)
        for tensors in ((h, w, y.clamp(0), b, *arrays), (h, w.detach(), y, None, None, None, None)):
            needs = [
                t is not None and t.requires_grad for t in (tensors[0], tensors[1], tensors[3])
            ]
            torch.library.opcheck(ops.linear_rowloss_gradient, (*tensors, *numbers, True, *needs))
            torch.library.opcheck(ops.linear_rowloss_forward, (*tensors, *numbers))
            plain = [None if t is None else t.detach() for t in tensors]
            _, *stats = ops.linear_rowloss_forward(*plain, *numbers)
            args = (torch.rand(2, 7), *plain, *stats, *numbers, *needs)
            torch.library.opcheck(ops.linear_rowloss_backward, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction):
    layer, w, b = torch.nn.Linear(8, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)
    w.requires_grad_(), b.requires_grad_()
    inputs, y = torch.randn(50, 8), torch.randint(0, CLASSES, (50,))
    y[::3] = -100

    def run(loss, bias):
        options = {"label_smoothing": 0.1, "reduction": reduction, "linear_bias": bias}
        return loss(layer(inputs), w, y, **options).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for loss in (stablemax_linear_cross_entropy, linear_cross_entropy):
        for bias in (b, None):
            got, want = compiled(loss, bias), run(loss, bias)
            torch.testing.assert_close(got, want)
            leaves = (layer.weight, w) if bias is None else (layer.weight, w, b)
            slopes = zip(*(torch.autograd.grad(2 * v, leaves) for v in (got, want)), strict=True)
            for a, c in slopes:
                torch.testing.assert_close(a, c)


def test_transforms_and_fake_tensors():
    from torch._subclasses import FakeTensorMode

    h, w, _, y = problem(rows=(4, 10), ignored=False)
    per_sample = torch.vmap(torch.func.grad(linear_cross_entropy, argnums=1), in_dims=(0, None, 0))
    got = per_sample(h, w, y)
    want = torch.stack(
        [
            torch.autograd.grad(linear_cross_entropy(a, w, c), w)[0]
            for a, c in zip(h, y, strict=True)
        ]
    )
    torch.testing.assert_close(got, want)
    with FakeTensorMode():
        h = torch.empty(4, 7, 3, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(11, 3, dtype=torch.bfloat16, requires_grad=True)
        for reduction in ("mean", "none"):
            h.grad = w.grad = None
            loss = stablemax_linear_cross_entropy(
                h, w, torch.empty(4, 7).long(), reduction=reduction
            )
            loss.sum().backward()
            assert loss.dtype == torch.float32
            assert h.grad.shape == h.shape and w.grad.dtype == torch.bfloat16

"""Losses as operators: opcheck, torch.compile, autocast, torch.func, fake tensors."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from flcore.losses import cross_entropy, stablemax_cross_entropy, taylor_cross_entropy

LOSSES = (stablemax_cross_entropy, cross_entropy, taylor_cross_entropy)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20240229)


def some_labels(rows: int, classes: int):
    """Labels, about a third of them left out."""
    y = torch.randint(0, classes, (rows,))
    return torch.where(torch.rand(rows) < 0.3, -100, y)


@pytest.mark.parametrize("name", ["softmax", "stablemax", "taylor"])
def test_opcheck(name):
    from flcore import _torch_losses

    numbers = (-100, 0.1, 0.9, 0.0, 0.01, 1.0, 0)
    w, prior = torch.rand(7), torch.randn(7)
    for shape, dim, dtype in (
        ((5, 7), -1, torch.float64),
        ((2, 7, 3), 1, torch.float32),
        ((2, 3, 7), 2, torch.bfloat16),
    ):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        rows = [n for i, n in enumerate(shape) if i != dim % len(shape)]
        y = torch.randint(0, 7, rows)
        arrays = (w, prior, torch.rand(rows), torch.rand(rows) < 0.8)
        for given in (arrays, (None,) * 4):
            args = (x, y, *given, name, *numbers, dim)
            torch.library.opcheck(_torch_losses.rowloss_forward, args)
        _, *stats = _torch_losses.rowloss_forward(x.detach(), y, *arrays, name, *numbers, dim)
        args = (torch.rand(rows), x.detach(), y, *stats, *arrays, name, *numbers, dim)
        torch.library.opcheck(_torch_losses.rowloss_backward, args)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_a_graph_break(loss, backend):
    layer, w = torch.nn.Linear(8, 6), torch.rand(6)
    inputs, y = torch.randn(10, 8), some_labels(10, 6)
    if backend == "inductor" and loss is not stablemax_cross_entropy:
        pytest.skip("one loss is enough for the slow backend")

    def run(reduction):
        logits = layer(inputs)
        options = {"weight": w, "label_smoothing": 0.1, "reduction": reduction}
        return loss(logits, y, **options).sum() + loss(logits, torch.softmax(inputs[:, :6], 1))

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for reduction in ("mean", "none") if backend == "aot_eager" else ("mean",):
        got, want = compiled(reduction), run(reduction)
        torch.testing.assert_close(got, want)
        slopes = [torch.autograd.grad(v, layer.weight)[0] for v in (got, want)]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_single_samples(reduction):
    x, y, w = torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5)), torch.rand(7)

    def total(loss):
        return lambda x, y: loss(x, y, weight=w, reduction=reduction).sum()

    for transform in (torch.func.grad, lambda f: f):
        got = torch.vmap(transform(total(cross_entropy)))(x, y)
        torch.testing.assert_close(got, torch.vmap(transform(total(F.cross_entropy)))(x, y))
    one_target = torch.vmap(total(stablemax_cross_entropy), in_dims=(0, None))(x, y[0])
    want = torch.stack([total(stablemax_cross_entropy)(v, y[0]) for v in x])
    torch.testing.assert_close(one_target, want)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope = torch.func.grad(lambda x: stablemax_cross_entropy(x, y[0]))
        torch.func.jacrev(slope)(x[0])


def test_fake_and_meta_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 7, 3, dtype=torch.bfloat16, requires_grad=True)
        loss = cross_entropy(x, torch.empty(4, 3, dtype=torch.long))
        loss.backward()
        assert loss.dtype == torch.float32 and x.grad.shape == x.shape


def test_autocast_reads_half_logits_as_they_are():
    layer, y = torch.nn.Linear(8, 6), torch.randint(0, 6, (5,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(torch.randn(5, 8))
        assert logits.dtype == torch.bfloat16
        loss = stablemax_cross_entropy(logits, y)
        compiled = torch.compile(stablemax_cross_entropy, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, y), loss)
    torch.testing.assert_close(loss, stablemax_cross_entropy(logits.float(), y))
    loss.backward()
    assert torch.isfinite(layer.weight.grad).all()

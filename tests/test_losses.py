"""Losses for torch: drop-ins for F.cross_entropy, gradients, compilation, transforms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

import flcore
from flcore.errors import DTypeError, InvalidInputError, LabelError
from flcore.losses import cross_entropy, stablemax_cross_entropy, taylor_cross_entropy

LOSSES = (stablemax_cross_entropy, cross_entropy, taylor_cross_entropy)
SHAPES = [(7,), (6, 7), (1, 7), (3, 7, 4), (2, 7, 3, 5), (0, 7), (4, 1)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20240229)


def eager(x, y, name="stablemax", reduction="mean"):
    """What users run: logarithms of the float64 probabilities, gathered."""
    x = x.double()
    s = {
        "stablemax": lambda: torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1),
        "softmax": lambda: x.exp(),
        "taylor": lambda: 1 + x + x * x / 2,
    }[name]()
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    keep = y != -100
    rows = -log_p.gather(-1, torch.where(keep, y, 0).unsqueeze(-1)).squeeze(-1) * keep
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / keep.sum()}[reduction]


def labels_for(shape: tuple[int, ...], ignored: bool = True):
    dim = 1 if len(shape) > 1 else 0
    y = torch.randint(0, shape[dim], shape[:dim] + shape[dim + 1 :])
    return torch.where(torch.rand(y.shape) < 0.3, -100, y) if ignored and y.ndim else y


def same(ours, theirs, x, **tolerance) -> None:
    """Equal values, and equal gradients for a random upstream gradient."""
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
    upstream = torch.rand_like(theirs)
    got, want = (torch.autograd.grad(v, x, upstream)[0] for v in (ours, theirs))
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, equal_nan=True, **tolerance)


# ---- F.cross_entropy -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_is_the_cross_entropy_of_torch(shape, reduction, dtype):
    x = (3 * torch.randn(shape, dtype=dtype)).requires_grad_()
    classes = shape[1 if len(shape) > 1 else 0]
    weight = torch.rand(classes, dtype=dtype) + 0.1
    targets = [labels_for(shape), labels_for(shape, ignored=False)]
    targets.append(torch.rand(shape, dtype=dtype))
    for y, w, smoothing in itertools.product(targets, (None, weight), (0.0, 0.3)):
        for ignore in (-100, 1) if not y.is_floating_point() else (-100,):
            if ignore == 1:
                y = torch.where(y == -100, 1, y)
            if classes == 1 and (y == 1).any():
                continue
            options = {"reduction": reduction, "label_smoothing": smoothing, "weight": w}
            ours = cross_entropy(x, y, ignore_index=ignore, **options)
            theirs = F.cross_entropy(x, y, ignore_index=ignore, **options)
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            if reduction == "mean" and not torch.isfinite(theirs):
                assert torch.isnan(ours)
            else:
                same(ours, theirs, x)


def test_positional_arguments_are_those_of_torch():
    x, y, w = torch.randn(5, 4), torch.tensor([0, 3, 2, 2, 1]), torch.rand(4)
    with pytest.warns(FutureWarning, match="use reduction"):
        ours = cross_entropy(x, y, w, None, 2, False, "mean", 0.1)
    want = F.cross_entropy(x, y, w, None, 2, None, "none", 0.1)
    torch.testing.assert_close(ours, want)
    with pytest.warns(FutureWarning):
        torch.testing.assert_close(cross_entropy(x, y, None, False), cross_entropy(x, y) * 5)
    with pytest.warns(FutureWarning):
        torch.testing.assert_close(cross_entropy(x, y, None, True), cross_entropy(x, y))


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_average_is_nan_and_its_gradient_zero(loss):
    x = torch.randn(4, 3, requires_grad=True)
    value = loss(x, torch.full((4,), -100))
    assert torch.isnan(value)
    value.backward()
    assert (x.grad == 0).all()
    empty = torch.randn(0, 3, requires_grad=True)
    value = loss(empty, torch.zeros(0, dtype=torch.long))
    assert torch.isnan(value) and loss(empty, torch.zeros(0).long(), reduction="sum") == 0
    value.backward()
    assert empty.grad.shape == (0, 3)


# ---- StableMax -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("loss", "name"), zip(LOSSES, ("stablemax", "softmax", "taylor"), strict=True)
)
def test_the_eager_float64_code(loss, name, reduction):
    x = (3 * torch.randn(9, 11)).requires_grad_()
    y = labels_for((9, 11))
    ours = loss(x, y, reduction=reduction)
    theirs = eager(x, y, name, reduction).to(torch.float32)
    same(ours, theirs, x, rtol=2e-6, atol=1e-7)
    wide = x.detach().double().requires_grad_()
    same(loss(wide, y, reduction=reduction), eager(wide, y, name, reduction), wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_types_give_float32_losses_and_gradients_rounded_once(dtype):
    x = (3 * torch.randn(50, 12)).to(dtype).requires_grad_()
    x.data[0] = 1  # where eager code in this type has NaN gradients
    y = labels_for((50, 12))
    for reduction in ("mean", "none"):
        ours = stablemax_cross_entropy(x, y, reduction=reduction)
        assert ours.dtype == torch.float32
        wide = x.detach().double().requires_grad_()
        theirs = eager(wide, y, reduction=reduction)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
        got = torch.autograd.grad(ours.sum(), x)[0]
        want = torch.autograd.grad(theirs.sum(), wide)[0]
        assert got.dtype == dtype
        tiny = {torch.float16: 2.0**-25}.get(dtype, 0)
        unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(got.double(), want, rtol=unit + 1e-6, atol=tiny)


def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded():
    x, y = torch.randn(1, 9).half().expand(9000, 9).contiguous(), torch.zeros(9000).long()
    for scale in (1.0, 2.0**14):
        grads = []
        for t in (x.clone().requires_grad_(), x.double().requires_grad_()):
            (stablemax_cross_entropy(t, y) * scale).backward()
            grads.append(t.grad.double())
        error = (grads[0] - grads[1]).abs()
        assert (error <= grads[1].abs() * 2.0**-10 + 2.0**-25).all()
    assert (grads[0] != 0).all()


def test_out_dtype_stats_and_prior():
    x, y = torch.randn(6, 5, requires_grad=True), labels_for((6, 5))
    loss, stats = stablemax_cross_entropy(
        x, y, reduction="none", out_dtype=torch.float64, return_stats=True
    )
    assert loss.dtype == torch.float64 and not stats.rest.requires_grad
    want = torch.where(y == -100, 0, torch.log1p(stats.rest / stats.own))
    torch.testing.assert_close(loss.float(), want)
    for reduction in ("mean", "sum"):
        reduced, again = stablemax_cross_entropy(x, y, reduction=reduction, return_stats=True)
        assert torch.equal(again.rest, stats.rest) and reduced.requires_grad
    prior = torch.tensor([0.5, 2, 1, 1, 0.25])
    got = stablemax_cross_entropy(x, y, prior=prior)
    s = torch.where(x < 0, 1 / (1 - x), x + 1) * prior
    p = s / s.sum(1, keepdim=True)
    want = F.nll_loss(p.log(), y)
    same(got, want, x.requires_grad_(), rtol=2e-6, atol=1e-7)
    prior[4] = 0
    with pytest.raises(LabelError, match="prior 0"):
        stablemax_cross_entropy(x, torch.full((6,), 4), prior=prior)


@pytest.mark.parametrize("loss", LOSSES)
def test_scale_z_loss_and_class_dim(loss):
    x, y = torch.randn(4, 3, 8), torch.randint(0, 8, (4, 3))
    want = loss(x.transpose(1, 2), y, logit_scale=0.5, z_loss=0.1, reduction="none")
    got = loss(x, y, class_dim=-1, logit_scale=0.5, z_loss=0.1, reduction="none")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got, loss(x * 0.5, y, class_dim=2, z_loss=0.1, reduction="none"))
    mask = torch.rand(4, 3) < 0.5
    masked = loss(x, y, class_dim=2, valid_mask=mask)
    torch.testing.assert_close(masked, loss(x, torch.where(mask, y, -100), class_dim=2))


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, reduction):
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    w, q = torch.rand(6, dtype=torch.float64), torch.rand(5, 6, dtype=torch.float64)
    for y in (labels_for((5, 6)), q):
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "logit_scale": 0.7}):
            assert torch.autograd.gradcheck(
                lambda t, y=y, o=options: loss(t, y, weight=w, reduction=reduction, **o), (x,)
            )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_and_no_second_derivative(reduction):
    x, y = torch.randn(5, 6, requires_grad=True), labels_for((5, 6))
    value = stablemax_cross_entropy(x, y, reduction=reduction)
    total = value.sum()
    first = torch.autograd.grad(total, x, retain_graph=True)[0]
    second = torch.autograd.grad(total, x, retain_graph=True)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(torch.autograd.grad(-3 * total, x, retain_graph=True)[0], -3 * first)
    (once,) = torch.autograd.grad(total, x, create_graph=True)
    assert torch.equal(once, first) and once.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        once.sum().backward()


def test_gradients_accumulate_and_unused_ones_cost_nothing(monkeypatch):
    x, y = torch.randn(5, 6, requires_grad=True), labels_for((5, 6))
    for _ in range(2):
        stablemax_cross_entropy(x, y).backward()
    (want,) = torch.autograd.grad(stablemax_cross_entropy(x, y), x)
    torch.testing.assert_close(x.grad, 2 * want)
    from flcore.ops import rowloss

    monkeypatch.setattr(rowloss, "both", None)
    monkeypatch.setattr(rowloss, "backward", None)
    assert not stablemax_cross_entropy(x.detach(), y).requires_grad
    with torch.no_grad():
        assert not stablemax_cross_entropy(x, y).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_in_place(reduction):
    x, y = torch.randn(5, 6, requires_grad=True), labels_for((5, 6))
    want = torch.autograd.grad(stablemax_cross_entropy(x, y, reduction=reduction).sum(), x)[0]
    logits = x * 1
    value = stablemax_cross_entropy(logits, y, reduction=reduction, inplace_backward=True)
    other = logits.exp().sum()  # exp keeps its result, so it does not mind
    squares = logits.square().sum()  # square keeps the logits
    before = logits.detach().clone()
    assert torch.equal(before, logits)
    (got,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    torch.testing.assert_close(got, want)
    assert torch.equal(logits.detach(), got)
    other.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_other_tensors_have_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    q = torch.rand(3, 4, requires_grad=True)
    with pytest.raises(InvalidInputError, match="target: this loss has a gradient in its input"):
        cross_entropy(x, q)
    with pytest.raises(InvalidInputError, match="weight: this loss"):
        cross_entropy(x, torch.zeros(3).long(), weight=torch.rand(4, requires_grad=True))


# ---- modules and errors --------------------------------------------------------------------------


def test_modules():
    from flcore import nn

    x, y, w = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, -100]), torch.rand(4)
    for module, function in (
        (nn.StableMaxCrossEntropyLoss, stablemax_cross_entropy),
        (nn.CrossEntropyLoss, cross_entropy),
    ):
        loss = module(w, reduction="sum", label_smoothing=0.1, z_loss=0.01)
        want = function(x, y, w, reduction="sum", label_smoothing=0.1, z_loss=0.01)
        assert torch.equal(loss(x, y), want) and "weight" in loss.state_dict()
        assert "label_smoothing=0.1" in repr(loss)
        masked = loss(x, y.clamp(0), valid_mask=y != -100)
        torch.testing.assert_close(masked, want)
    torch.testing.assert_close(nn.CrossEntropyLoss()(x, y), torch.nn.CrossEntropyLoss()(x, y))


def test_probabilities_as_modules():
    from flcore import nn

    x = torch.randn(5, 4)
    p = nn.StableMax(dim=0)(x)
    torch.testing.assert_close(p.sum(0), torch.ones(4))
    torch.testing.assert_close(nn.LogStableMax(dim=0)(x), p.log())
    assert set(nn.functional.__all__) >= {"stablemax", "log_stablemax", "cross_entropy"}


def test_bad_input_is_named():
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    for error, message, call in (
        (InvalidInputError, "reduction: expected", lambda: cross_entropy(x, y, reduction="avg")),
        (InvalidInputError, "labels of shape", lambda: cross_entropy(x, y[:2])),
        (IndexError, "row 3 has 9", lambda: cross_entropy(x, torch.tensor([0, 1, 2, 9]))),
        (DTypeError, "target: expected a tensor", lambda: cross_entropy(x, np.zeros(4, int))),
        (DTypeError, "input: expected a torch", lambda: cross_entropy(x.numpy(), y)),
        (DTypeError, "x: expected float64", lambda: cross_entropy(x.long(), y)),
        (DTypeError, "prior: expected", lambda: stablemax_cross_entropy(x, y, prior=[1, 1, 1])),
        (InvalidInputError, "class_dim", lambda: cross_entropy(x, y, class_dim=5)),
        (InvalidInputError, "label_smoothing", lambda: cross_entropy(x, y, label_smoothing=2)),
    ):
        with pytest.raises(error, match=message):
            call()


def test_threads_do_not_change_a_bit():
    x, y = torch.randn(3000, 100, requires_grad=True), torch.randint(0, 100, (3000,))
    found = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        (grad,) = torch.autograd.grad(stablemax_cross_entropy(x, y), x)
        found.add(grad.numpy().tobytes())
    assert len(found) == 1

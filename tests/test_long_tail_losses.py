"""Losses for skewed labels: worked numbers, reductions to plain cross-entropy, masked classes."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F

from flcore.errors import DTypeError, InvalidInputError, LabelError
from flcore.losses import (
    adjust_logits,
    balanced_softmax_cross_entropy,
    balanced_stablemax_cross_entropy,
    calibrated_cross_entropy,
    logit_adjusted_cross_entropy,
    restricted_softmax_cross_entropy,
    stablemax_cross_entropy,
)

X = torch.tensor([[1.0, 2.0, 0.0]])
COUNTED = (
    balanced_softmax_cross_entropy,
    logit_adjusted_cross_entropy,
    calibrated_cross_entropy,
    restricted_softmax_cross_entropy,
    balanced_stablemax_cross_entropy,
)


def random(rows=40, classes=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, classes), generator=draw, dtype=torch.float64)
    return x, torch.randint(0, classes, (rows,), generator=draw)


def test_worked_numbers():
    x = X.clone().requires_grad_()
    loss = balanced_softmax_cross_entropy(x, torch.tensor([2]), [90, 9, 1])
    assert float(loss) == pytest.approx(5.743473812470, rel=1e-6)
    loss.backward()
    p = [0.7837508189, 0.2130455609, 0.0032036201 - 1]
    torch.testing.assert_close(x.grad[0], torch.tensor(p), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", COUNTED)
def test_equal_counts_are_plain(loss):
    x, y = random()
    plain = stablemax_cross_entropy if loss is balanced_stablemax_cross_entropy else F.cross_entropy
    torch.testing.assert_close(loss(x, y, [7] * 6), plain(x, y), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        balanced_softmax_cross_entropy,
        logit_adjusted_cross_entropy,
        balanced_stablemax_cross_entropy,
    ],
)
def test_counts_need_no_scale(loss):
    x, y = random()
    counts = torch.tensor([5.0, 1, 8, 2, 9, 30])
    torch.testing.assert_close(loss(x, y, counts), loss(x, y, 13 * counts), rtol=1e-12, atol=0)


def test_the_prior_multiplies():
    x, y = random()
    counts = torch.tensor([5.0, 1, 8, 2, 9, 30], dtype=torch.float64)
    for tau in (0.5, 1.0, 2.0):
        s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), 1 + x) * (counts / counts.sum()) ** tau
        expected = -(s / s.sum(1, keepdim=True)).gather(1, y[:, None]).log().mean()
        ours = balanced_stablemax_cross_entropy(x, y, counts, tau=tau)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        moved = x + tau * counts.log()
        theirs = logit_adjusted_cross_entropy(x, y, counts, tau=tau)
        torch.testing.assert_close(theirs, F.cross_entropy(moved, y), rtol=1e-12, atol=0)
    moved = x - 0.5 * counts**-0.25
    ours = calibrated_cross_entropy(x, y, counts, tau=0.5)
    torch.testing.assert_close(ours, F.cross_entropy(moved, y), rtol=1e-12, atol=0)


def test_strength():
    x, y = random()
    counts = [5, 1, 8, 0, 9, 30]
    torch.testing.assert_close(
        logit_adjusted_cross_entropy(x, y, counts, tau=0.0), F.cross_entropy(x, y)
    )
    y = torch.where(y == 3, 0, y)
    torch.testing.assert_close(
        logit_adjusted_cross_entropy(x, y, counts),
        balanced_softmax_cross_entropy(x, y, counts),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("loss", [balanced_softmax_cross_entropy, balanced_stablemax_cross_entropy,
                                  calibrated_cross_entropy])  # fmt: skip
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_class_without_examples_is_left_alone(loss, smoothing):
    x = X.clone().requires_grad_()
    value = loss(x, torch.tensor([1]), [4, 5, 0], label_smoothing=smoothing)
    value.backward()
    assert torch.isfinite(value) and float(x.grad[0, 2]) == 0.0 and float(x.grad[0, 0]) != 0.0
    with pytest.raises(LabelError):
        loss(X, torch.tensor([2]), [4, 5, 0])


def test_restricted_softmax():
    x = X.clone().requires_grad_()
    y = torch.tensor([0])
    loss = restricted_softmax_cross_entropy(x, y, [3, 0, 2], alpha=0.25)
    scaled = X * torch.tensor([1.0, 0.25, 1.0])
    assert float(loss) == pytest.approx(float(F.cross_entropy(scaled, y)), rel=1e-6)
    loss.backward()
    p = torch.softmax(scaled, 1)[0]
    torch.testing.assert_close(
        x.grad[0], (p - torch.tensor([1.0, 0, 0])) * torch.tensor([1.0, 0.25, 1.0])
    )
    zero = X.clone().requires_grad_()
    restricted_softmax_cross_entropy(zero, y, [3, 0, 2], alpha=0.0).backward()
    assert float(zero.grad[0, 1]) == 0.0


def test_after_training():
    counts = [90, 9, 1]
    moved = adjust_logits(X, counts)
    shares = torch.tensor(counts) / 100
    torch.testing.assert_close(moved, X - shares.log())
    across = adjust_logits(X.T[None], counts, class_dim=1)
    torch.testing.assert_close(across[0].T, moved)
    with pytest.raises(InvalidInputError):
        adjust_logits(X, [1, 0, 2])


def test_the_threshold_of_imbalanced_gaussians_is_the_midpoint():
    """Ninety-nine of a hundred in one class: balanced softmax finds the balanced-error optimum."""
    draw = torch.Generator().manual_seed(0)
    y = (torch.rand(40_000, generator=draw) < 0.01).long()
    x = torch.randn(40_000, generator=draw, dtype=torch.float64) + 2.0 * y - 1.0

    def threshold(loss):
        w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = torch.stack([torch.zeros_like(x), w[0] * x + w[1]], 1)
            value = loss(logits)
            value.backward()
            return value

        optimizer.step(closure)
        return float(-w[1] / w[0])

    counts = torch.bincount(y, minlength=2)
    assert abs(threshold(lambda z: balanced_softmax_cross_entropy(z, y, counts))) < 0.1
    assert threshold(lambda z: F.cross_entropy(z, y)) > 1.5


@pytest.mark.parametrize(
    "counts", [[1, 2], [[1, 2, 3]], [-1, 2, 3], [0, 0, 0], [1, float("nan"), 2]]
)
@pytest.mark.parametrize("loss", COUNTED)
def test_counts_that_do_not_fit(loss, counts):
    with pytest.raises(InvalidInputError):
        loss(X, torch.tensor([0]), counts)


def test_errors():
    with pytest.raises(DTypeError):
        balanced_softmax_cross_entropy(X, torch.tensor([0]), "many")
    with pytest.raises(InvalidInputError):
        restricted_softmax_cross_entropy(X, torch.tensor([0]), [1, 1, 1], alpha=1.5)

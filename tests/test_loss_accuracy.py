"""Accuracy of cross-entropies of logits up to 1e7 and of 10 to 262,144 classes, by the numbers.

What is right comes from sums in extended precision; eager code in float32 and float64 is measured
beside flcore's float32. ``pytest tests/test_loss_accuracy.py -s -k table`` prints the tables.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from flcore.losses import cross_entropy, log_stablemax, stablemax_cross_entropy

CLASSES = (10, 12, 113, 1000, 32_000, 131_072, 262_144)
LOGITS = (1e2, 1e4, 1e6, 1e7)
LONG = np.longdouble


def right_stablemax(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradients of float32 logits, target y, in extended precision."""
    rows, x = np.arange(len(x)), x.astype(LONG)
    a = 1 + np.abs(x)
    s = np.where(x >= 0, a, 1 / a)
    own = s[rows, y].copy()
    s[rows, y] = 0
    rest = s.sum(1)
    grad = s / (rest + own)[:, None] / a
    grad[rows, y] = -(rest / (rest + own)) / a[rows, y]
    return np.log1p(rest / own), grad


def right_softmax(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    rows = np.arange(len(x))
    gaps = x.astype(LONG) - x.astype(LONG)[rows, y][:, None]
    terms = np.exp(gaps)
    terms[rows, y] = 0
    return np.log1p(terms.sum(1))


def eager_stablemax(x, y):
    """What users run, in the dtype of x."""
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    return -torch.log(s / s.sum(1, keepdim=True)).gather(1, y[:, None])[:, 0]


def worst(got, want: np.ndarray) -> float:
    error = np.abs(np.asarray(got.detach().double()).astype(LONG) - want) / np.abs(want)
    return float(np.max(error))


def saturated(classes: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose target stands at `size`, all others around -size / 2."""
    rng = np.random.default_rng([classes, int(size)])
    x = (-size / 2 * (1 + 0.1 * rng.standard_normal((4, classes)))).astype(np.float32)
    y = rng.integers(0, classes, 4)
    x[np.arange(4), y] = size
    return x, y


def errors_of_stablemax(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Largest relative error of the losses and of the gradients of flcore, then of eager losses."""
    logits, labels = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)
    want, slopes = right_stablemax(x, y)
    loss = stablemax_cross_entropy(logits, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    plain = logits.detach()
    return (
        worst(loss, want),
        worst(grad, slopes),
        worst(eager_stablemax(plain, labels), want),
        worst(eager_stablemax(plain.double(), labels), want),
    )


def test_extended_precision_is_enough():
    """Against 60 digits, from log S - log s_y without any care."""
    for size in LOGITS:
        x, y = saturated(12, size)
        with localcontext() as context:
            context.prec = 60
            for row, label, found in zip(x, y, right_stablemax(x, y)[0], strict=True):
                z = [Decimal(float(v)) for v in row]
                s = [1 + v if v >= 0 else 1 / (1 - v) for v in z]
                want = sum(s).ln() - s[label].ln()
                assert abs(Decimal(repr(float(found))) / want - 1) < Decimal("1e-15")


def test_table_of_saturated_rows():
    """flcore's float32 below 1e-6 everywhere; eager float32 and float64 as bad as they are."""
    print("\n| V | logit | flcore float32 | its gradient | eager float32 | eager float64 |")
    print("|---|---|---|---|---|---|")
    for classes in CLASSES:
        for size in LOGITS:
            ours, slope, single, double = errors_of_stablemax(*saturated(classes, size))
            print(
                f"| {classes:,} | {size:.0e} | {ours:.1e} | {slope:.1e} "
                f"| {single:.1e} | {double:.1e} |"
            )
            assert ours <= 5e-7 and slope <= 1e-6, (classes, size)
            if size >= 1e6 and classes <= 113:  # log(S) - log(s_y) of a sum that rounds to s_y
                assert single > 0.1 and double > 1e-8
            if size <= 1e2:
                assert single < 1e-2 and double < 1e-11


def test_the_published_errors_come_back():
    """V = 12: float32 2.9e-5, 0.46, 1.0 and float64 5e-15, 1.6e-10, 5.9e-6, 1.8e-3."""
    float32 = dict(zip(LOGITS, (2.9e-5, 0.46, 1.0, 1.0), strict=True))
    float64 = dict(zip(LOGITS, (5e-15, 1.6e-10, 5.9e-6, 1.8e-3), strict=True))
    for size in LOGITS:
        _, _, single, double = errors_of_stablemax(*saturated(12, size))
        assert float32[size] / 20 < single < float32[size] * 20
        assert float64[size] / 20 < double < float64[size] * 20


def test_table_of_ordinary_rows():
    """Normal logits and random targets: the error is that of the sum over the classes."""
    print("\n| V | flcore float32 | its gradient | eager float32 | softmax | F.cross_entropy |")
    print("|---|---|---|---|---|---|")
    for classes in CLASSES:
        rng = np.random.default_rng(classes)
        x = (3 * rng.standard_normal((4, classes))).astype(np.float32)
        y = rng.integers(0, classes, 4)
        ours, slope, single, _ = errors_of_stablemax(x, y)
        logits, labels = torch.from_numpy(x), torch.from_numpy(y)
        want = right_softmax(x, y)
        softmax = worst(cross_entropy(logits, labels, reduction="none"), want)
        torch_softmax = worst(F.cross_entropy(logits, labels, reduction="none"), want)
        print(
            f"| {classes:,} | {ours:.1e} | {slope:.1e} | {single:.1e} "
            f"| {softmax:.1e} | {torch_softmax:.1e} |"
        )
        assert max(ours, softmax) <= 5e-7 and slope <= 1e-6


def test_table_of_softmax_gaps():
    """The rest of the sum is kept apart until exp itself underflows."""
    print("\n| gap | flcore float32 | F.cross_entropy float32 | float64 |")
    print("|---|---|---|---|")
    for gap in (5, 10, 20, 40, 60, 80):
        rng = np.random.default_rng(gap)
        x = (0.5 * rng.standard_normal((8, 32))).astype(np.float32)
        y = rng.integers(0, 32, 8)
        x[np.arange(8), y] = gap
        logits, labels = torch.from_numpy(x), torch.from_numpy(y)
        want = right_softmax(x, y)
        ours = worst(cross_entropy(logits, labels, reduction="none"), want)
        single = worst(F.cross_entropy(logits, labels, reduction="none"), want)
        double = worst(F.cross_entropy(logits.double(), labels, reduction="none"), want)
        print(f"| {gap} | {ours:.1e} | {single:.1e} | {double:.1e} |")
        assert ours <= 5e-7
        assert single == 1 if gap >= 40 else single < 1.5
        assert double == 1 if gap >= 60 else True


def test_logits_of_exactly_one():
    """Where the eager float32 gradient is NaN: the branch not taken divides 1 by 1e-30, squared."""
    x = torch.ones(5, 12, requires_grad=True)
    y = torch.arange(5)
    loss = stablemax_cross_entropy(x, y, reduction="none")
    assert torch.equal(loss, torch.full((5,), float(np.float32(np.log1p(11.0)))))
    (grad,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(grad, (torch.full((5, 12), 1 / 12) - torch.eye(5, 12)) / 2)
    (eager,) = torch.autograd.grad(eager_stablemax(x, y).sum(), x)
    assert torch.isnan(eager).any()


def test_masked_classes_and_ignored_rows_are_exact():
    rng = np.random.default_rng(0)
    x, y = saturated(113, 1e6)
    masked = np.full((4, 150), -np.inf, np.float32)
    masked[:, :113] = x
    order = rng.permutation(150)
    masked = masked[:, order]
    labels = np.argsort(order)[y]
    rows = np.full((7, 150), np.nan, np.float32)
    rows[[0, 2, 3, 6]] = masked
    rows[4] = np.inf
    targets = np.full(7, -100)
    targets[[0, 2, 3, 6]] = labels
    logits = torch.from_numpy(rows).requires_grad_()
    for reduction in ("none", "sum", "mean"):
        loss = stablemax_cross_entropy(logits, torch.from_numpy(targets), reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        want, slopes = right_stablemax(x, y)
        scale = 4 if reduction == "mean" else 1
        if reduction == "none":
            assert (loss[[1, 4, 5]] == 0).all()
            assert worst(loss[[0, 2, 3, 6]], want) <= 5e-7
        else:
            assert worst(loss, want.sum() / scale) <= 5e-7
        assert torch.isfinite(grad).all() and (grad[[1, 4, 5]] == 0).all()
        assert (grad[[0, 2, 3, 6]][torch.from_numpy(np.isneginf(masked))] == 0).all()
        kept = grad[[0, 2, 3, 6]][:, torch.from_numpy(np.argsort(order)[:113])]
        assert worst(kept * scale, slopes) <= 1e-6


def test_log_stablemax_has_the_same_digits():
    for classes in (12, 32_000):
        for size in LOGITS:
            x, y = saturated(classes, size)
            got = log_stablemax(torch.from_numpy(x))[torch.arange(4), torch.from_numpy(y)]
            assert worst(-got, right_stablemax(x, y)[0]) <= 5e-7

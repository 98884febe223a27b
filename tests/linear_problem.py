"""A linear layer with its labels, and its losses from whole float64 logits."""

from __future__ import annotations

import pytest
import torch

from flcore.losses import (
    cross_entropy,
    linear_cross_entropy,
    stablemax_cross_entropy,
    stablemax_linear_cross_entropy,
)

F = torch.nn.functional
PAIRS = [
    pytest.param(stablemax_linear_cross_entropy, stablemax_cross_entropy, id="stablemax"),
    pytest.param(linear_cross_entropy, cross_entropy, id="softmax"),
]
WIDTH, CLASSES = 16, 37
# half a unit in the last place; accumulated products in float32
ROUNDING = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def problem(rows=(3, 50), dtype=torch.float32, bias=True, ignored=True):
    """Hidden states, classifier, bias, labels."""
    h, w, b = torch.randn(*rows, WIDTH), torch.randn(CLASSES, WIDTH) / 2, torch.randn(CLASSES)
    y = torch.randint(0, CLASSES, rows)
    if ignored:
        y = torch.where(torch.rand(rows) < 0.3, -100, y)
    tensors = [t.to(dtype).requires_grad_() for t in (h, w, b)]
    return *(tensors if bias else [*tensors[:2], None]), y


def whole(loss, tensors, y, upstream=None, **options):
    """Loss of float64 logits and its gradients."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    value = loss(F.linear(*wide), y, class_dim=-1, **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.double()
    return value, torch.autograd.grad(value, [t for t in wide if t is not None], upstream)


def close(got, want, tolerance):
    """Errors as a share of the largest entry."""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max() / want.abs().max()
    assert error <= tolerance, float(error)

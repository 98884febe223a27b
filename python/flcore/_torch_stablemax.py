"""torch.library operators of StableMax along a dimension: what torch.compile sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore import _torch_ops
from flcore.ops import log_stablemax as _log_stablemax
from flcore.ops import log_stablemax_backward as _log_stablemax_backward
from flcore.ops import stablemax as _stablemax
from flcore.ops import stablemax_backward as _stablemax_backward

__all__ = ["stablemax", "stablemax_backward"]


def _forward(x: Tensor, dim: int, log: bool) -> Tensor:
    with torch.no_grad():
        return (_log_stablemax if log else _stablemax)(x, dim)  # type: ignore[no-any-return]


def _forward_fake(x: Tensor, dim: int, log: bool) -> Tensor:
    return torch.empty_like(x)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, ctx.log = inputs
    ctx.save_for_backward(x)


def _forward_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return stablemax_backward(v, x, ctx.dim, ctx.log), None, None


def _backward(v: Tensor, x: Tensor, dim: int, log: bool) -> Tensor:
    function = _log_stablemax_backward if log else _stablemax_backward
    with torch.no_grad():
        return function(v, x, dim)  # type: ignore[no-any-return]


def _backward_fake(v: Tensor, x: Tensor, dim: int, log: bool) -> Tensor:
    return torch.empty_like(x)


stablemax_backward = _torch_ops.declare(
    "stablemax_backward(Tensor v, Tensor x, int dim, bool log) -> Tensor",
    kernel=_backward,
    fake=_backward_fake,
    is_gradient=True,
)
stablemax = _torch_ops.declare(
    "stablemax(Tensor x, int dim, bool log) -> Tensor",
    kernel=_forward,
    fake=_forward_fake,
    backward=_forward_backward,
    setup=_forward_setup,
)

"""What every differentiable op asks of torch: is a tensor plain, and is it the first derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["TWICE", "is_plain", "no_context", "once", "refuse"]

TWICE = (
    "there is no second derivative: this gradient cannot be differentiated again "
    "(create_graph=True). Use a composition of torch functions where one is needed"
)


def is_plain(*tensors: Any) -> bool:
    """Whether addresses are all that the tensors are about: eager, no subclass, no transform.

    What is no tensor at all counts as plain: the checks behind the fast path name it.
    """
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            if isinstance(x, Tensor):
                return False
        elif x.device.type not in ("cpu", "cuda"):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _Refusal(torch.autograd.Function):
    """Hands a gradient on; whoever differentiates it is told that there is no second derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        refuse(ctx)


def once(grad: Tensor) -> Tensor:
    """Return `grad` for a graph that may be differentiated again, where it then refuses."""
    if not torch.is_grad_enabled():
        return grad
    return _Refusal.apply(grad.detach().requires_grad_())  # type: ignore[no-any-return]


def refuse(ctx: Any, *_: Any) -> Any:
    """Stand in for the backward of a gradient: raises RuntimeError."""
    raise RuntimeError(TWICE)


def no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep nothing for a backward that refuses."""

"""Row losses under torch.func: `grad`, `vmap` and the two together, gradients of single samples.

The operators of `flcore._torch_losses` do the work; a batch of `vmap` is one more dimension of
rows, so nothing is computed sample by sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore import _torch_losses
from flcore._torch_calls import no_context, refuse
from flcore.errors import InvalidInputError

__all__ = ["transformed_rows"]

NAMES = ("weight", "log_prior", "row_scale", "valid_mask")


class _Rows(torch.autograd.Function):
    """`rowloss_forward` with a derivative that transforms can see."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _torch_losses.rowloss_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, target, *arguments = inputs
        _, rest, own, shift = output
        ctx.mark_non_differentiable(rest, own, shift)
        ctx.save_for_backward(x, target, rest, own, shift, *arguments[: len(NAMES)])
        ctx.numbers = arguments[len(NAMES) :]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        grad = _Gradient.apply(upstream, *ctx.saved_tensors, *ctx.numbers)
        return grad, *[None] * (1 + len(NAMES) + len(ctx.numbers))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        size = info.batch_size
        x, target, *arrays = _lead(inputs, in_dims, 2 + len(NAMES), size, (0, 1), 2)
        numbers = inputs[2 + len(NAMES) :]
        result = _Rows.apply(x, target, *arrays, *_shifted(numbers))
        shift_dim = 0 if numbers[0] == "softmax" else None
        return result, (0, 0, 0, shift_dim)


class _Gradient(torch.autograd.Function):
    """`rowloss_backward`; differentiated again it says that it has no derivative."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _torch_losses.rowloss_backward(*inputs)

    setup_context = staticmethod(no_context)
    backward = staticmethod(refuse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        numbers = inputs[6 + len(NAMES) :]
        always = (0, 1, 2, 3, 4, 5) if numbers[0] == "softmax" else (0, 1, 2, 3, 4)
        tensors = _lead(inputs, in_dims, 6 + len(NAMES), info.batch_size, always, 6)
        return _Gradient.apply(*tensors, *_shifted(numbers)), 0


def _lead(
    inputs: tuple[Any, ...],
    in_dims: tuple[Any, ...],
    count: int,
    size: int,
    always: tuple[int, ...],
    optional: int,
) -> list[Any]:
    """Put the batch first in every tensor of rows; tensors of classes must have none."""
    tensors = []
    for i in range(count):
        value, dim = inputs[i], in_dims[i]
        name = NAMES[i - optional] if i >= optional else ""
        if isinstance(value, Tensor) and name in ("weight", "log_prior"):
            if dim is not None:
                raise InvalidInputError(f"{name}: cannot differ between the samples of a vmap")
        elif isinstance(value, Tensor) and dim is not None:
            value = value.movedim(dim, 0)
        elif isinstance(value, Tensor) and (i in always or name):
            value = value.expand(size, *value.shape)
        tensors.append(value)
    return tensors


def _shifted(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers of a form for tensors with one more dimension in front."""
    *others, class_dim = numbers
    return (*others, class_dim + 1 if class_dim >= 0 else class_dim)


def transformed_rows(*inputs: Any) -> Any:
    """Call `flcore._torch_losses.rowloss_forward` under a transform of torch.func."""
    return _Rows.apply(*inputs)

"""torch.library operators of the row losses: what torch.compile and tensor subclasses see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore import _torch_ops
from flcore.ops.rowloss import RowLossForm, RowStats, row_loss, row_loss_backward

__all__ = ["FORM", "form_numbers", "forward", "rowloss_backward", "rowloss_forward"]

FORM = (
    "str map, int ignore_index, float label_smoothing, float logit_scale, float margin, "
    "float z_loss, float tau"
)
"""Numbers of a form in a schema, in the order of `form_numbers`."""

# the arrays and numbers of a call, in the order of every schema below
_TENSORS = "Tensor? weight, Tensor? log_prior, Tensor? row_scale, Tensor? valid_mask"
_NUMBERS = f"{FORM}, int label_offset, int class_dim"
N_TENSORS, N_NUMBERS = 4, 9


def _options(arguments: tuple[Any, ...]) -> dict[str, Any]:
    weight, log_prior, row_scale, valid_mask, *numbers, class_dim = arguments
    return {
        "form": RowLossForm(*numbers),
        "class_dim": class_dim,
        "weight": weight,
        "log_prior": log_prior,
        "row_scale": row_scale,
        "valid_mask": valid_mask,
    }


def _forward(x: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        loss, stats = row_loss(x, target, **_options(arguments))
    return loss, stats.rest, stats.own, loss.new_empty(0) if stats.shift is None else stats.shift


def _forward_fake(x: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    shape = list(x.shape)
    del shape[arguments[-1]]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = [x.new_empty(shape, dtype=kind) for _ in range(3)]
    has_shift = arguments[N_TENSORS] == "softmax"
    return (*rows, x.new_empty(shape if has_shift else 0, dtype=kind))


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, target, *arguments = inputs
    _, rest, own, shift = output
    ctx.mark_non_differentiable(rest, own, shift)
    ctx.save_for_backward(x, target, rest, own, shift, *arguments[:N_TENSORS])
    ctx.numbers = arguments[N_TENSORS:]


def _forward_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    grad = rowloss_backward(upstream, *ctx.saved_tensors, *ctx.numbers)
    return grad, *[None] * (1 + N_TENSORS + N_NUMBERS)


def _backward(
    upstream: Tensor,
    x: Tensor,
    target: Tensor,
    rest: Tensor,
    own: Tensor,
    shift: Tensor,
    *arguments: Any,
) -> Tensor:
    with torch.no_grad():
        return row_loss_backward(
            x, target, RowStats(rest, own, shift), upstream=upstream, **_options(arguments)
        )


def _backward_fake(upstream: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


rowloss_backward = _torch_ops.declare(
    "rowloss_backward(Tensor upstream, Tensor x, Tensor target, Tensor rest, Tensor own, "
    f"Tensor shift, {_TENSORS}, {_NUMBERS}) -> Tensor",
    kernel=_backward,
    fake=_backward_fake,
    is_gradient=True,
)
rowloss_forward = _torch_ops.declare(
    f"rowloss_forward(Tensor x, Tensor target, {_TENSORS}, {_NUMBERS})"
    " -> (Tensor loss, Tensor rest, Tensor own, Tensor shift)",
    kernel=_forward,
    fake=_forward_fake,
    backward=_forward_backward,
    setup=_forward_setup,
)


def form_numbers(form: RowLossForm) -> tuple[Any, ...]:
    """Numbers of `form` in the order of `FORM`."""
    return (
        form.map,
        form.ignore_index,
        form.label_smoothing,
        form.logit_scale,
        form.margin,
        form.z_loss,
        form.tau,
    )


def forward(
    x: Tensor, target: Tensor, form: RowLossForm, arrays: Any, class_dim: int
) -> tuple[Tensor, RowStats]:
    """Loss of every row and stats through the operator; differentiable in `x`."""
    numbers = (*form_numbers(form), form.label_offset, class_dim)
    call = rowloss_forward
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack():
        from flcore.losses._row_transforms import transformed_rows as call
    loss, rest, own, shift = call(x, target, *arrays, *numbers)
    return loss, RowStats(rest, own, shift if form.map == "softmax" else None)

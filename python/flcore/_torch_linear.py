"""torch.library operators of the row losses of a linear layer: what torch.compile sees of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore import _torch_ops
from flcore._torch_calls import once
from flcore._torch_losses import FORM, form_numbers
from flcore.losses import _linear_engine as _engine
from flcore.losses._linear_chunks import LinearRows
from flcore.losses._linear_inputs import Inputs
from flcore.ops.rowloss import RowLossForm, RowStats

__all__ = [
    "linear_rowloss_backward",
    "linear_rowloss_forward",
    "linear_rowloss_gradient",
    "loss",
]

# tensors of `Inputs`, numbers of a form and options, in the order of every schema below
_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
    "Tensor? log_prior, Tensor? valid_mask"
)
_NUMBERS = f"{FORM}, int? chunk_rows, ScalarType? product"
N_TENSORS, N_FORM, N_OPTIONS = 7, 7, 2
N_NUMBERS = N_FORM + N_OPTIONS


def _job(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> LinearRows:
    form, (chunk_rows, product) = RowLossForm(*numbers[:N_FORM]), numbers[N_FORM:]
    return LinearRows(Inputs(*tensors), form, chunk_rows, product)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _compute(tensors: tuple[Any, ...]) -> torch.dtype:
    wide = torch.float64 in (tensors[0].dtype, tensors[1].dtype)
    return torch.float64 if wide else torch.float32


def _matrices(
    tensors: tuple[Any, ...], needs: tuple[bool, ...], kind: torch.dtype | None
) -> list[Tensor]:
    """Uninitialised gradients of input, classifier and bias; of no element where not wanted."""
    places = (tensors[0], tensors[1], tensors[3])
    result = []
    for x, need in zip(places, needs, strict=True):
        if not need or x is None:
            result.append(tensors[0].new_empty(0))
        else:
            result.append(x.new_empty(x.shape, dtype=x.dtype if kind is None else kind))
    return result


# ---- sum or mean, with gradients -----------------------------------------------------------------


def _gradient(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, rest = arguments[:N_TENSORS], arguments[N_TENSORS:]
    numbers, (mean, *needs) = rest[:N_NUMBERS], rest[N_NUMBERS:]
    with torch.no_grad():
        job = _job(tensors, numbers)
        with _engine.plain_products(job.device):
            value, grads = job.reduced(mean, tuple(needs))
        return value, *[_or_empty(grad, tensors[0]) for grad in grads]


def _gradient_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, needs = arguments[:N_TENSORS], arguments[-3:]
    return tensors[0].new_empty((), dtype=torch.float64), *_matrices(
        tensors, needs, _compute(tensors)
    )


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.needs = inputs[-3:]
    places = (inputs[0], inputs[1], inputs[3])
    ctx.dtypes = [None if x is None else x.dtype for x in places]


def _gradient_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    given = zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    with torch.no_grad():
        grads = [(grad * upstream).to(kind) if need else None for grad, need, kind in given]
    grads = [None if grad is None else once(grad) for grad in grads]
    others = [None] * (N_TENSORS - 4 + N_NUMBERS + 4)
    return grads[0], grads[1], None, grads[2], *others


# ---- every row, and the gradients for given factors of the rows ----------------------------------


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, numbers = arguments[:N_TENSORS], arguments[N_TENSORS:]
    with torch.no_grad():
        job = _job(tensors, numbers)
        with _engine.plain_products(job.device):
            losses, stats = job.losses(stats=True)
    assert stats is not None
    return losses, stats.rest, stats.own, _or_empty(stats.shift, losses)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors = arguments[:N_TENSORS]
    shape = tensors[0].shape[:-1]
    rows = [tensors[0].new_empty(shape, dtype=_compute(tensors)) for _ in range(3)]
    has_shift = arguments[N_TENSORS] == "softmax"
    return *rows, rows[0].new_empty(shape if has_shift else 0)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:N_TENSORS], *output[1:])
    ctx.numbers = inputs[N_TENSORS:]


def _forward_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    given = linear_rowloss_backward(upstream, *ctx.saved_tensors, *ctx.numbers, *needs)
    grads = [grad if need else None for grad, need in zip(given, needs, strict=True)]
    others = [None] * (N_TENSORS - 4 + N_NUMBERS)
    return grads[0], grads[1], None, grads[2], *others


def _backward(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, (rest, own, shift) = arguments[:N_TENSORS], arguments[N_TENSORS : N_TENSORS + 3]
    numbers, needs = arguments[N_TENSORS + 3 : -3], arguments[-3:]
    stats = RowStats(rest, own, shift if numbers[0] == "softmax" else None)
    with torch.no_grad():
        job = _job(tensors, numbers)
        with _engine.plain_products(job.device):
            _, grads = job.gradients(tuple(needs), upstream=upstream, stats=stats)
        results = [
            None if grad is None else grad.to(kind)
            for grad, kind in zip(grads, job.dtypes, strict=True)
        ]
        return tuple(_or_empty(grad, tensors[0]) for grad in results)


def _backward_fake(upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_matrices(arguments[:N_TENSORS], arguments[-3:], None))


linear_rowloss_gradient = _torch_ops.declare(
    f"linear_rowloss_gradient({_TENSORS}, {_NUMBERS}, bool mean, bool needs_input, "
    "bool needs_weight, bool needs_bias)"
    " -> (Tensor loss, Tensor input_grad, Tensor weight_grad, Tensor bias_grad)",
    kernel=_gradient,
    fake=_gradient_fake,
    backward=_gradient_backward,
    setup=_gradient_setup,
)
linear_rowloss_backward = _torch_ops.declare(
    f"linear_rowloss_backward(Tensor upstream, {_TENSORS}, Tensor rest, Tensor own, Tensor shift, "
    f"{_NUMBERS}, bool needs_input, bool needs_weight, bool needs_bias)"
    " -> (Tensor input_grad, Tensor weight_grad, Tensor bias_grad)",
    kernel=_backward,
    fake=_backward_fake,
    is_gradient=True,
)
linear_rowloss_forward = _torch_ops.declare(
    f"linear_rowloss_forward({_TENSORS}, {_NUMBERS})"
    " -> (Tensor loss, Tensor rest, Tensor own, Tensor shift)",
    kernel=_forward,
    fake=_forward_fake,
    backward=_forward_backward,
    setup=_forward_setup,
)


def loss(
    inputs: Inputs,
    form: RowLossForm,
    reduction: str,
    chunk_rows: int | None,
    product: torch.dtype | None,
) -> Tensor:
    """Loss through the operators, as `flcore.losses._linear_engine.eager` returns it."""
    numbers = (*form_numbers(form), chunk_rows, product)
    if reduction == "none":
        return linear_rowloss_forward(*inputs, *numbers)[0]  # type: ignore[no-any-return]
    matrices = (inputs.input, inputs.linear_weight, inputs.linear_bias)
    enabled = torch.is_grad_enabled()
    needs = [enabled and x is not None and x.requires_grad for x in matrices]
    return linear_rowloss_gradient(*inputs, *numbers, reduction == "mean", *needs)[0]  # type: ignore[no-any-return]

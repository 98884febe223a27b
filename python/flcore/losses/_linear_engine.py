"""Row losses of a linear layer with autograd: reductions, and when the gradients are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore._torch_calls import once
from flcore.losses._linear_chunks import LinearRows
from flcore.losses._linear_inputs import Inputs
from flcore.ops.rowloss import RowLossForm, RowStats

__all__ = ["eager", "plain_products"]


def eager(
    inputs: Inputs,
    form: RowLossForm,
    reduction: str,
    chunk_rows: int | None,
    product: torch.dtype | None,
    parts: Any = None,
) -> Tensor:
    """Loss of plain tensors: of no dimension in float64, or of the rows in the compute type."""
    job = LinearRows(inputs, form, chunk_rows, product, parts)
    matrices = (inputs.input, inputs.linear_weight, inputs.linear_bias)
    needed = [isinstance(x, Tensor) and x.requires_grad for x in matrices]
    if torch.is_grad_enabled() and any(needed):
        if reduction == "none":
            return _Every.apply(*matrices, job, inputs)  # type: ignore[no-any-return]
        return _Reduced.apply(*matrices, job, reduction == "mean")  # type: ignore[no-any-return]
    with torch.no_grad(), plain_products(job.device):
        if reduction == "none":
            return job.losses()[0]
        return job.reduced(reduction == "mean", (False, False, False))[0]


def plain_products(device: str) -> Any:
    """Autocast switched off: the products have the types that `LinearRows` chose."""
    return torch.autocast(device, enabled=False)


class _Reduced(torch.autograd.Function):
    """Sum or mean over the rows; the gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, matrix: Tensor, bias: Any, job: LinearRows, mean: bool
    ) -> Tensor:
        with plain_products(job.device):
            loss, grads = job.reduced(mean, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        ctx.dtypes = job.dtypes
        ctx.handed_out = False
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        with torch.no_grad():
            grads = _times(ctx, upstream)
            grads = [
                None if grad is None else grad.to(kind)
                for grad, kind in zip(grads, ctx.dtypes, strict=True)
            ]
        return *[None if grad is None else once(grad) for grad in grads], None, None


def _times(ctx: Any, upstream: Tensor) -> Any:
    """Gradients times `upstream`, in place where neither caller nor graph need them any more."""
    factor: Any = upstream
    if upstream.device.type == "cpu":
        factor = upstream.item()  # nothing to wait for
        if factor == 1:
            ctx.handed_out = True
            return ctx.saved_tensors
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    last = torch._C._current_graph_task_id() != -1 and not asked()
    times = Tensor.mul_ if last and not ctx.handed_out else Tensor.mul
    return [None if grad is None else times(grad, factor) for grad in ctx.saved_tensors]


class _Every(torch.autograd.Function):
    """Loss of every row; the backward pass forms the logits again."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, matrix: Tensor, bias: Any, job: LinearRows, inputs: Inputs
    ) -> Tensor:
        with plain_products(job.device):
            losses, stats = job.losses(stats=True)
        assert stats is not None
        saved = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*saved, *stats)
        ctx.options = job.form, job.step, job.product, job.parts
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        *saved, rest, own, shift = ctx.saved_tensors
        inputs = Inputs(*[b if a is None else a for a, b in zip(saved, ctx.others, strict=True)])
        with torch.no_grad():
            job = LinearRows(inputs, *ctx.options)
            with plain_products(job.device):
                _, grads = job.gradients(
                    ctx.needs_input_grad[:3], upstream=upstream, stats=RowStats(rest, own, shift)
                )
            grads = [
                None if grad is None else grad.to(kind)
                for grad, kind in zip(grads, job.dtypes, strict=True)
            ]
        return *[None if grad is None else once(grad) for grad in grads], None, None

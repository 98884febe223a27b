"""The engine of every loss over rows of logits: reductions, gradients, eager or compiled.

Eager tensors go straight to `flcore.ops.rowloss`. With a reduction to one number the gradient is
computed in the visit that computes the loss, on a CPU; a GPU, float16, ``reduction="none"`` and
``inplace_backward`` keep two numbers a row and visit the logits again in the backward pass, when
the upstream gradient is known. Compiled, fake and wrapped tensors
go through the operators of `flcore._torch_losses`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flcore import _output_pool
from flcore._torch_calls import is_plain, once
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import _rowloss_prepare as _prepare
from flcore.ops import rowloss as _ops
from flcore.ops.rowloss import RowLossForm, RowStats

__all__ = ["check_reduction", "log_of_prior", "row_cross_entropy"]

_REDUCTIONS = ("none", "mean", "sum")


class Arrays(NamedTuple):
    """Optional tensors of a loss, in the order of `flcore.ops.rowloss`."""

    weight: Any = None
    log_prior: Any = None
    row_scale: Any = None
    valid_mask: Any = None


def row_cross_entropy(
    input: Tensor,
    target: Tensor,
    form: RowLossForm,
    *,
    weight: Tensor | None = None,
    log_prior: Tensor | None = None,
    row_scale: Tensor | None = None,
    valid_mask: Tensor | None = None,
    reduction: str = "mean",
    class_dim: int | None = None,
    out_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Any:
    """Row loss with autograd; see `flcore.losses.stablemax_cross_entropy` for the arguments.

    Parameters
    ----------
    input, target : Tensor
        Logits; labels or probabilities.
    form : RowLossForm
        The loss of a row.
    weight, log_prior : (classes,) Tensor, optional
        Weights and logarithm of the prior of the classes.
    row_scale, valid_mask : Tensor of the shape of the labels, optional
        Factors of the logits; rows that count.
    reduction : {"none", "mean", "sum"}
        'mean' divides by the sum of the weights of the labels that count.
    class_dim : int, optional
        Dimension of the classes; by default 1, or 0 of a single row.
    out_dtype : torch.dtype, optional
        Type of the result; by default float32, for float64 logits float64.
    inplace_backward : bool
        The backward pass writes the gradient over the logits.
    return_stats : bool
        Return `RowStats` too.

    Returns
    -------
    Tensor, or (Tensor, RowStats)
        The loss, of no dimension or of the shape of the labels.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError
        As `flcore.ops.rowloss.row_loss`; a tensor other than `input` requires a gradient.
    """
    check_reduction(reduction)
    if not isinstance(input, Tensor):
        raise DTypeError(f"input: expected a torch tensor, got {type(input).__name__}")
    if form.shard:
        raise InvalidInputError("shard: one part of the classes has no loss of its own")
    if class_dim is None:
        class_dim = 1 if input.ndim > 1 else 0
    arrays = Arrays(weight, log_prior, row_scale, valid_mask)
    if not is_plain(input, target):
        rows, stats = _registered(input, target, form, arrays, class_dim)
        total = None if reduction != "mean" else _denominator(input, target, form, arrays, rows)
        loss = _reduce(rows, reduction, total, out_dtype)
        return (loss, stats) if return_stats else loss
    needs_grad = torch.is_grad_enabled()
    if needs_grad:
        _refuse_other_gradients(target, arrays)
        needs_grad = input.requires_grad
    call = _prepare.prepare(input, target, form, class_dim, *arrays)
    count = _prepare.check_targets(call)[1]
    job = _Job(call, form, arrays, class_dim, inplace_backward, return_stats)
    if needs_grad and reduction != "none" and _at_once(input, inplace_backward):
        job.total, job.mean = count, reduction == "mean"
        loss = _Reduced.apply(input, job, out_dtype)
    elif needs_grad:
        rows = _Rows.apply(input, target, *arrays, job)
        loss = _reduce(rows, reduction, count, out_dtype)
    else:
        rows = job.forward()
        loss = _reduce_now(rows, reduction, count, out_dtype)
    return (loss, job.stats) if return_stats else loss


def check_reduction(reduction: str) -> None:
    """Raise InvalidInputError for a reduction that torch does not have."""
    if reduction not in _REDUCTIONS:
        raise InvalidInputError(f"reduction: expected one of {_REDUCTIONS}, got {reduction!r}")


def log_of_prior(prior: Any) -> Tensor | None:
    """Logarithm in float64, from which the prior is formed again without a loss."""
    if prior is None:
        return None
    if not isinstance(prior, Tensor):
        raise DTypeError(f"prior: expected a torch tensor, got {type(prior).__name__}")
    return prior.to(torch.float64).log()


def _at_once(input: Tensor, inplace_backward: bool) -> bool:
    """Whether the gradient can be computed before its upstream factor is known.

    Not on a GPU, where looking at the factor would wait for the device; and not in float16, whose
    range is too short for a gradient that a loss scale has yet to multiply.
    """
    return not (inplace_backward or input.is_cuda or input.dtype == torch.float16)


class _Job:
    """A prepared call and the choices that the autograd functions need; not kept by a graph."""

    __slots__ = (
        "arrays",
        "call",
        "class_dim",
        "form",
        "inplace",
        "mean",
        "stats",
        "total",
        "wants",
    )

    def __init__(
        self,
        call: _ops.RowCall,
        form: RowLossForm,
        arrays: Arrays,
        class_dim: int,
        inplace: bool,
        wants: bool,
    ) -> None:
        self.call, self.form, self.arrays, self.class_dim = call, form, arrays, class_dim
        self.inplace, self.wants = inplace, wants
        self.stats: RowStats | None = None
        self.total: Any = 0
        self.mean = False

    def forward(self, keep: bool = False) -> Tensor:
        """Loss of every row; stats when they are wanted, or kept for the backward pass."""
        self.call.loss = loss = _prepare.empty_rows(self.call)
        if keep or self.wants:
            self.stats = _ops.new_stats(self.call)
        _ops.run(self.call, _ops.FORWARD)
        return loss


class _Reduced(torch.autograd.Function):
    """Sum or mean over the rows; the gradient is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, job: _Job, out_dtype: torch.dtype | None) -> Tensor:
        scale = 1.0
        if job.mean:
            scale = 1 / job.total if job.total else float("nan")
        if job.wants:
            job.stats = _ops.new_stats(job.call)
        rows, grad = _ops.both(job.call, x, None, scale)
        ctx.save_for_backward(grad)
        return _reduce_now(rows, "mean" if job.mean else "sum", job.total, out_dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        factor = upstream.item()  # on a CPU: nothing to wait for
        if factor != 1:
            grad = torch.mul(grad, factor, out=_output_pool.empty_like(grad))
        return once(grad), None, None


class _Rows(torch.autograd.Function):
    """Loss of every row; the backward pass visits the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        weight: Any,
        log_prior: Any,
        row_scale: Any,
        valid_mask: Any,
        job: _Job,
    ) -> Tensor:
        rows = job.forward(keep=True)
        assert job.stats is not None
        arrays = [a if isinstance(a, Tensor) else None for a in job.arrays]
        ctx.others = [None if isinstance(a, Tensor) else a for a in job.arrays]
        ctx.save_for_backward(x, target, *job.stats, *arrays)
        ctx.form, ctx.class_dim, ctx.inplace = job.form, job.class_dim, job.inplace
        return rows

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, target, rest, own, shift, *saved = ctx.saved_tensors
        arrays = [b if a is None else a for a, b in zip(saved, ctx.others, strict=True)]
        with torch.no_grad():
            call = _prepare.prepare(x, target, ctx.form, ctx.class_dim, *arrays)
            grad = _ops.backward(
                call,
                x,
                RowStats(rest, own, shift),
                upstream,
                1.0,
                x.detach() if ctx.inplace else None,
            )
            if ctx.inplace:
                torch.autograd.graph.increment_version(x)
        return once(grad), None, None, None, None, None, None


def _reduce(rows: Tensor, reduction: str, total: Any, out_dtype: torch.dtype | None) -> Tensor:
    kind = rows.dtype if out_dtype is None else out_dtype
    if reduction == "none":
        return rows.to(kind)
    loss = rows.sum(dtype=torch.float64)
    return (loss / total if reduction == "mean" else loss).to(kind)


def _reduce_now(rows: Tensor, reduction: str, total: Any, out_dtype: torch.dtype | None) -> Tensor:
    """Reduce what has no gradient and lies in CPU memory: Python divides faster than torch."""
    if reduction == "none" or isinstance(total, Tensor):
        return _reduce(rows, reduction, total, out_dtype)
    value = rows.sum(dtype=torch.float64).item()
    if reduction == "mean":
        value = value / total if total else float("nan")
    return torch.scalar_tensor(value, dtype=rows.dtype if out_dtype is None else out_dtype)


def _refuse_other_gradients(target: Tensor, arrays: Arrays) -> None:
    for name, value in (("target", target), *arrays._asdict().items()):
        if isinstance(value, Tensor) and value.requires_grad:
            raise InvalidInputError(
                f"{name}: this loss has a gradient in its input alone; detach {name}"
            )


# ---- compiled ----------------------------------------------------------------------------------


def _registered(
    input: Tensor, target: Tensor, form: RowLossForm, arrays: Arrays, class_dim: int
) -> tuple[Tensor, RowStats]:
    from flcore import _torch_losses

    return _torch_losses.forward(input, target, form, arrays, class_dim)


def _denominator(
    input: Tensor, target: Tensor, form: RowLossForm, arrays: Arrays, rows: Tensor
) -> Any:
    """What 'mean' divides by, in torch's own operators."""
    if target.is_floating_point():
        return rows.numel() if arrays.valid_mask is None else arrays.valid_mask.sum()
    keep = target != form.ignore_index if arrays.valid_mask is None else arrays.valid_mask
    if arrays.weight is None:
        return keep.sum()
    own = torch.where(keep, target - form.label_offset, 0).long()
    weight = torch.as_tensor(arrays.weight, device=input.device)
    return (weight.detach().to(torch.float64)[own] * keep).sum()

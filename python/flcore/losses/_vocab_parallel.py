"""Row losses whose classes are divided among processes: a part of the vocabulary in each.

Every process visits its own logits and gets the sums R (over the classes but the target) and e_y
(of the target) of its part; those of all parts are added, which for StableMax is the whole merge,
and for softmax follows an exchange of the maximum. Loss and gradient then come from the merged
sums. The numbers travel as float64, with a count of the parts that have the target and, for
softmax, its logit, for rows whose e_y is too small for a number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flcore._torch_calls import once
from flcore.errors import DTypeError, InvalidInputError, LabelError
from flcore.losses import _row_cross_entropy as _rows
from flcore.losses._linear_inputs import Inputs
from flcore.ops import _rowloss_prepare as _prepare
from flcore.ops import rowloss as _ops
from flcore.ops.rowloss import RowLossForm, RowStats

__all__ = ["ClassParts", "vocab_parallel_cross_entropy", "vocab_parallel_stablemax_cross_entropy"]


class ClassParts:
    """The parts of the classes in the processes of a group.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        The processes.
    classes : int
        Classes of this part.
    label_offset : int, optional
        Label of the first of them; by default rank times `classes`.

    Raises
    ------
    InvalidInputError
        torch.distributed is not there, or this process is not in the group.
    """

    def __init__(self, group: Any, classes: int, label_offset: int | None) -> None:
        if torch.compiler.is_compiling():
            raise InvalidInputError("process_group: cannot be compiled; call it uncompiled")
        if not torch.distributed.is_available():
            raise InvalidInputError("process_group: this torch has no torch.distributed")
        rank = torch.distributed.get_rank(group)
        if rank < 0:
            raise InvalidInputError("process_group: this process is not in the group")
        self.group = group
        self.label_offset = rank * classes if label_offset is None else label_offset

    def form(self, form: RowLossForm, weight: Any, target: Any) -> RowLossForm:
        """Form of this part of the loss `form`."""
        for name, given in (
            ("weight", weight is not None),
            ("label_smoothing", form.label_smoothing),
        ):
            if given:
                raise InvalidInputError(f"{name}: not with a process_group")
        if isinstance(target, Tensor) and target.dtype.is_floating_point:
            raise InvalidInputError("target: expected labels with a process_group")
        return replace(form, shard=True, label_offset=self.label_offset)

    def add(self, x: Tensor) -> None:
        """Sum `x` over the processes, in place."""
        torch.distributed.all_reduce(x, group=self.group)

    def merge(self, call: Any, rows: Any) -> tuple[Tensor, RowStats]:
        """Losses, and sums over all classes from those of this part.

        Parameters
        ----------
        call : RowCall
            A forward visit that has run, of logits (n, V) with labels.
        rows : (n,) sequence of int
            Numbers of its rows, for a message.

        Returns
        -------
        losses : (n,) Tensor
            In the compute type; the same in all processes.
        stats : RowStats
            Merged sums, for the gradient.

        Raises
        ------
        LabelError
            On a CPU, in all processes: a label that counts is no class of exactly one part. (On a
            GPU the loss of the row is NaN.)
        """
        form, labels = call.form, call.labels
        keep = labels != form.ignore_index if call.valid is None else call.valid
        place = labels.long() - form.label_offset
        here = keep & (place >= 0) & (place < call.classes)
        place = torch.where(here, place, 0)
        softmax = form.map == "softmax"
        if call.prior is not None:
            here = here & (call.prior[place] != (-torch.inf if softmax else 0))
        sums = [call.rest.double(), call.own.double(), here.double()]
        top = torch.zeros((), dtype=torch.float64, device=labels.device)
        if softmax:
            local = torch.where(keep, call.shift, 0).double()
            top = local.clone()
            torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=self.group)
            factor = torch.exp(local - top)
            for i in range(2):  # a part of masked classes alone has no maximum and adds nothing
                sums[i] = torch.where(torch.isneginf(local), 0, sums[i] * factor)
            own = call.x.gather(1, place[:, None]).squeeze(1).double() * form.logit_scale
            if call.prior is not None:
                own = own + call.prior[place]
            sums.append(torch.where(here, own, 0))
        merged = torch.stack(sums)
        self.add(merged)
        lost = keep & (merged[2] != 1)
        if labels.device.type == "cpu":
            self._check(lost, labels, rows)
        rest, own = torch.where(lost, torch.nan, merged[0]), merged[1]
        losses = _losses(form, rest, own, top, merged[3] if softmax else None)
        kind = call.rest.dtype
        shift = torch.where(keep, top, 0).to(kind) if softmax else None
        return torch.where(keep, losses, 0).to(kind), RowStats(rest.to(kind), own.to(kind), shift)

    def _check(self, lost: Tensor, labels: Tensor, rows: Any) -> None:
        if not bool(lost.any()):
            return
        i = int(lost.nonzero()[0])
        row = int(rows[i])
        raise LabelError(
            f"target: row {row} has label {int(labels[i])}, expected a class of one part, with a "
            f"prior that is not 0; this part begins with {self.label_offset}",
            row,
        )


def _losses(
    form: RowLossForm, rest: Tensor, own: Tensor, top: Tensor, logit: Tensor | None
) -> Tensor:
    """Losses of all rows from merged sums, in float64."""
    total = rest + own
    log_sum = top + total.log()
    ratio = rest / own
    loss = torch.log1p(ratio)
    if logit is not None:
        loss = torch.where(torch.isfinite(ratio), loss, (top - logit) + total.log())
    if form.tau != 1:
        loss = torch.expm1((1 - form.tau) * loss) / (1 - form.tau)
    if form.z_loss:
        loss = loss + form.z_loss * log_sum.square()
    return torch.where(torch.isfinite(total) & (total > 0), loss, torch.nan)


def linear_rows(
    inputs: Inputs,
    form: RowLossForm,
    reduction: str,
    chunk_rows: int | None,
    product: torch.dtype | None,
    group: Any,
    label_offset: int | None,
) -> Tensor:
    """`flcore.losses._linear_engine.eager` with a part of the classes in each process."""
    from flcore.losses._linear_engine import eager

    parts = ClassParts(group, len(inputs.linear_weight), label_offset)
    form = parts.form(form, inputs.weight, inputs.target)
    return eager(inputs, form, reduction, chunk_rows, product, parts)


# ---- of logits -----------------------------------------------------------------------------------


def vocab_parallel_stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    process_group: Any,
    label_offset: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    valid_mask: Tensor | None = None,
    prior: Tensor | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """StableMax cross-entropy of logits whose classes are divided among processes.

    Reads the logits once to sum and once, in the backward pass, for the gradient; two sums a row
    are exchanged, and no maximum.

    Parameters
    ----------
    logits : (..., V) Tensor, float64, float32, float16 or bfloat16
        Logits of the classes of this process, which come last.
    target : (...) Tensor of an integer type
        Labels among the classes of all processes; the same everywhere.
    process_group : torch.distributed.ProcessGroup
        The processes.
    label_offset : int, optional
        Label of the first class of this process; by default rank times V, for parts of equal size.
    ignore_index, reduction, valid_mask, logit_scale, z_loss, out_dtype
        As in `flcore.losses.stablemax_cross_entropy`.
    prior : (V,) Tensor, optional
        Factors of the element map of the classes of this process.

    Returns
    -------
    Tensor
        The loss, the same in every process; its gradient is that of the logits here.

    Raises
    ------
    LabelError
        On a CPU, in every process: a label that counts is no class of exactly one part. (On a GPU
        its loss is NaN.)
    InvalidInputError, DTypeError
        Shapes, types or devices that do not fit.
    RuntimeError
        In a second derivative: there is none.
    """
    return _parallel(
        logits,
        target,
        RowLossForm("stablemax", ignore_index, 0.0, logit_scale, z_loss=z_loss),
        process_group,
        label_offset,
        reduction,
        valid_mask,
        _rows.log_of_prior(prior),
        out_dtype,
    )


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    process_group: Any,
    label_offset: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    valid_mask: Tensor | None = None,
    log_prior: Tensor | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax cross-entropy of logits whose classes are divided among processes.

    Parameters
    ----------
    logits, target, process_group, label_offset, ignore_index, reduction, valid_mask
        As in `vocab_parallel_stablemax_cross_entropy`.
    logit_scale, z_loss, out_dtype
        As in `vocab_parallel_stablemax_cross_entropy`.
    log_prior : (V,) Tensor, optional
        Added to the logits of this process.

    Returns
    -------
    Tensor
        As in `vocab_parallel_stablemax_cross_entropy`; the maximum of a row is exchanged too.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError, RuntimeError
        As in `vocab_parallel_stablemax_cross_entropy`.
    """
    return _parallel(
        logits,
        target,
        RowLossForm("softmax", ignore_index, 0.0, logit_scale, z_loss=z_loss),
        process_group,
        label_offset,
        reduction,
        valid_mask,
        log_prior,
        out_dtype,
    )


def _parallel(
    logits: Tensor,
    target: Tensor,
    form: RowLossForm,
    group: Any,
    label_offset: int | None,
    reduction: str,
    valid_mask: Tensor | None,
    log_prior: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    for name, x in (("logits", logits), ("target", target)):
        if not isinstance(x, Tensor):
            raise DTypeError(f"{name}: expected a torch tensor, got {type(x).__name__}")
    if not logits.ndim:
        raise InvalidInputError("logits: expected a dimension of classes, got none")
    if isinstance(log_prior, Tensor) and log_prior.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError("prior: this loss has a gradient in its logits alone; detach it")
    _rows.check_reduction(reduction)
    parts = ClassParts(group, logits.shape[-1], label_offset)
    form = parts.form(form, None, target)
    if tuple(target.shape) != tuple(logits.shape[:-1]):
        raise InvalidInputError(
            f"target: expected labels of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    losses = _Part.apply(logits, target, valid_mask, log_prior, form, parts)
    kind = losses.dtype if out_dtype is None else out_dtype
    if reduction == "none":
        return losses.to(kind)  # type: ignore[no-any-return]
    loss = losses.sum(dtype=torch.float64)
    if reduction == "mean":
        keep = target != form.ignore_index if valid_mask is None else valid_mask
        loss = loss / keep.sum()
    return loss.to(kind)  # type: ignore[no-any-return]


class _Part(torch.autograd.Function):
    """Losses of all rows from the logits of one part."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        valid: Any,
        log_prior: Any,
        form: RowLossForm,
        parts: ClassParts,
    ) -> Tensor:
        call = _call(logits, target, valid, log_prior, form)
        _ops.new_stats(call)
        _ops.run(call, _ops.FORWARD)
        losses, stats = parts.merge(call, range(call.rows))
        ctx.save_for_backward(logits, target, valid, log_prior, *stats)
        ctx.form = form
        return losses.reshape(target.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        logits, target, valid, log_prior, *stats = ctx.saved_tensors
        with torch.no_grad():
            call = _call(logits, target, valid, log_prior, ctx.form)
            grad = _ops.backward(call, call.x, RowStats(*stats), upstream=upstream.reshape(-1))
            grad = grad.reshape(logits.shape)
        return once(grad), None, None, None, None, None


def _call(logits: Tensor, target: Tensor, valid: Any, log_prior: Any, form: RowLossForm) -> Any:
    """Visit of the rows of logits as (n, V)."""
    x = logits.detach().reshape(target.numel(), logits.shape[-1])
    valid = valid if valid is None else valid.reshape(-1)
    return _prepare.prepare(x, target.reshape(-1), form, -1, None, log_prior, None, valid)

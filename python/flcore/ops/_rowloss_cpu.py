"""The CPU variant of the row losses: addresses and numbers for csrc/cpu/rowloss.isa.cpp."""

from __future__ import annotations

from typing import Any

from flcore import _arrays, _native
from flcore.ops._rowloss_call import MAPS, RowCall

__all__ = ["rowloss"]


def _at(x: Any) -> int:
    return 0 if x is None else _arrays.address(x)


def rowloss(call: RowCall, mode: int) -> None:
    """Run one call; see `flcore.ops._rowloss_call.RowCall`."""
    form, labels = call.form, call.labels
    label_bytes = 0 if labels is None else 4 if _arrays.dtype_name(labels) == "int32" else 8
    _native.core.rowloss(
        mode,
        rows=call.rows,
        classes=call.classes,
        map=MAPS.index(form.map),
        dtype=_arrays.DTYPE_CODES[_arrays.dtype_name(call.x)],
        x=_at(call.x),
        inner=call.inner,
        outer_stride=call.outer_stride,
        row_stride=call.row_stride,
        class_stride=call.class_stride,
        grad=_at(call.grad),
        grad_outer_stride=call.grad_outer_stride,
        grad_row_stride=call.grad_row_stride,
        grad_class_stride=call.grad_class_stride,
        labels=_at(labels),
        label_bytes=label_bytes,
        soft=_at(call.soft),
        valid=_at(call.valid),
        ignore_index=form.ignore_index,
        label_offset=form.label_offset,
        shard=form.shard,
        weight=_at(call.weight),
        prior=_at(call.prior),
        row_scale=_at(call.row_scale),
        weight_sum=call.weight_sum,
        classes_present=call.classes_present,
        smoothing=form.label_smoothing,
        logit_scale=form.logit_scale,
        margin=form.margin,
        z_loss=form.z_loss,
        tau=form.tau,
        upstream=_at(call.upstream),
        grad_scale=call.grad_scale,
        loss=_at(call.loss),
        rest=_at(call.rest),
        own=_at(call.own),
        shift=_at(call.shift),
        threads=_native.threads_for(call.rows * call.classes),
    )

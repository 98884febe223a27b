"""The CPU variant of the row losses: addresses and numbers for csrc/cpu/rowloss.isa.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flcore import _arrays, _native
from flcore.ops._rowloss_call import MAPS, RowCall

__all__ = ["prepared", "rowloss"]


_OUTPUTS = ("grad", "loss", "rest", "own", "shift")
_NUMBERS = (
    ("ignore_index", -100),
    ("label_offset", 0),
    ("shard", False),
    ("logit_scale", 1.0),
    ("margin", 0.0),
    ("z_loss", 0.0),
    ("tau", 1.0),
)  # and the defaults of the binding
_MAPS = {name: i for i, name in enumerate(MAPS)}


def rowloss(call: RowCall, mode: int) -> None:
    """Run one call; see `flcore.ops._rowloss_call.RowCall`."""
    prepared(call, mode)()


def prepared(call: RowCall, mode: int) -> Callable[[], None]:
    """Give the call of the kernel, to be run again and again while its arrays stay."""
    form, labels = call.form, call.labels
    options: dict[
        str, Any
    ] = {}  # what has no default; passing it all takes longer than a small call
    for name in ("soft", "valid", "weight", "prior", "row_scale", "upstream", *_OUTPUTS):
        array = getattr(call, name)
        if array is not None:
            options[name] = _arrays.address(array)
    if labels is not None:
        options["labels"] = _arrays.address(labels)
        options["label_bytes"] = 4 if _arrays.dtype_name(labels) == "int32" else 8
    if call.grad is not None:
        options["grad_outer_stride"] = call.grad_outer_stride
        options["grad_row_stride"] = call.grad_row_stride
        options["grad_class_stride"] = call.grad_class_stride
        options["grad_scale"] = call.grad_scale
    if form.label_smoothing:
        options["smoothing"] = form.label_smoothing
        options["weight_sum"], options["classes_present"] = call.weight_sum, call.classes_present
    for name, default in _NUMBERS:
        value = getattr(form, name)
        if value != default:
            options[name] = value
    return partial(
        _native.core.rowloss,
        mode,
        rows=call.rows,
        classes=call.classes,
        map=_MAPS[form.map],
        dtype=_arrays.DTYPE_CODES[_arrays.dtype_name(call.x)],
        x=_arrays.address(call.x),
        inner=call.inner,
        outer_stride=call.outer_stride,
        row_stride=call.row_stride,
        class_stride=call.class_stride,
        threads=_native.threads_for(call.rows * call.classes),
        **options,
    )

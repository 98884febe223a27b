"""From the arrays of a caller to a `RowCall`: checks, layouts, copies only where none fits."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

import numpy as np

from flcore import _arrays, _native
from flcore.errors import DTypeError, InvalidInputError, LabelError
from flcore.ops._rowloss_call import Layout, RowCall, RowLossForm, layout, strides_of

__all__ = ["attach_gradient", "check_targets", "class_axis", "empty_rows", "prepare"]


def prepare(
    x: Any,
    target: Any,
    form: RowLossForm,
    class_dim: int,
    weight: Any = None,
    log_prior: Any = None,
    row_scale: Any = None,
    valid_mask: Any = None,
) -> RowCall:
    """Check the arguments of a row loss and describe them to a kernel; nothing is read on a GPU."""
    if not isinstance(form, RowLossForm):
        raise DTypeError(f"form: expected a RowLossForm, got {type(form).__name__}")
    axis = class_axis(x, class_dim)
    shape = tuple(x.shape)
    classes = shape[axis]
    outer = shape[:axis] + shape[axis + 1 :]
    labels, soft = _target(x, target, axis, outer)
    if form.shard and (soft is not None or weight is not None):
        raise InvalidInputError(
            "shard: a shard takes labels and no weight; put weights of rows into upstream"
        )
    if soft is not None and (form.tau != 1 or form.margin != 0):
        raise InvalidInputError("tau, margin: need class labels, got probabilities as target")
    if soft is not None and soft.dtype != x.dtype:
        x = _astype(x, soft.dtype)
    call = _locate(x, axis, math.prod(outer), form)
    call.labels, call.axis, call.shape = labels, axis, outer
    if soft is not None:
        call.soft = _contiguous(_class_last(soft, axis)).reshape((call.rows, classes))
    if valid_mask is not None:
        call.valid = _mask(x, valid_mask, outer)
    if weight is not None:
        call.weight = vector(weight, "weight", (classes,), x, call.compute)
    if log_prior is not None:
        call.prior = _prior(log_prior, classes, x, call)
    if row_scale is not None:
        call.row_scale = vector(row_scale, "row_scale", outer, x, call.compute)
    if form.label_smoothing:
        _sum_classes(call)
    return call


def class_axis(x: Any, class_dim: int, name: str = "class_dim") -> int:
    """Check `x` and return the position of its class dimension, the argument `name`."""
    if not _arrays.is_array(x):
        raise DTypeError(f"x: expected a NumPy array or a torch tensor, got {type(x).__name__}")
    if _arrays.dtype_name(x) not in _arrays.DTYPE_CODES:
        raise DTypeError(f"x: expected {_arrays.FLOATS}, got {_arrays.dtype_name(x)}")
    if not isinstance(x, np.ndarray) and (
        x.device.type not in ("cpu", "cuda") or x.layout is not sys.modules["torch"].strided
    ):
        raise DTypeError(f"x: expected a dense tensor on cpu or cuda, got {x.layout} on {x.device}")
    try:
        axis = operator.index(class_dim)
    except TypeError:
        raise DTypeError(f"{name}: expected an integer, got {class_dim!r}") from None
    if not -x.ndim <= axis < x.ndim:
        raise InvalidInputError(f"{name}: expected a dimension of {x.ndim}, got {class_dim}")
    return axis + x.ndim if axis < 0 else axis


def empty_rows(call: RowCall) -> Any:
    """Return an uninitialised number a row in the compute type, beside the logits."""
    if isinstance(call.x, np.ndarray):
        return np.empty(call.shape, call.compute)
    torch = sys.modules["torch"]
    kind = torch.float64 if call.compute == "float64" else torch.float32
    return torch.empty(call.shape, dtype=kind, device=call.x.device)


# ---- logits and gradient -----------------------------------------------------------------------


def _locate(x: Any, axis: int, rows: int, form: RowLossForm) -> RowCall:
    shape, device, is_numpy = tuple(x.shape), _arrays.device_of(x), isinstance(x, np.ndarray)
    compute = "float64" if _arrays.dtype_name(x) == "float64" else "float32"
    classes = shape[axis]
    contiguous = x.flags.c_contiguous if is_numpy else x.is_contiguous()
    native = not is_numpy or x.dtype.isnative
    if contiguous and native and axis == len(shape) - 1:  # what most calls bring
        return RowCall(rows, classes, x, rows, 0, classes, 1, form, compute, device=device)
    place = layout(shape, strides_of(x), axis) if native else None
    if place is None or not (device != "cpu" or 1 in place[2:] or not rows):
        x = _contiguous(_class_last(x, axis))
        place = Layout(rows, 0, classes, 1)
    return RowCall(rows, classes, x, *place, form, compute, device=device)


def attach_gradient(call: RowCall, grad: Any) -> Any:
    """Let `call` write its gradient to `grad`, or to an array that is to be copied there.

    Returns
    -------
    array or None
        A view of the shape of `grad` with the values to copy, None when they are written in place.
    """
    axis = call.axis
    split = call.inner != call.rows
    place = None
    strides = strides_of(grad)
    if grad.dtype == call.x.dtype and 0 not in strides:
        place = layout(tuple(grad.shape), strides, axis, call.inner if split else None)
    if place is not None and _fits(call, place.class_stride, place.row_stride):
        if place.inner != call.inner:  # rows of x at one distance: split as the gradient's are
            call.inner, call.outer_stride = place.inner, place.inner * call.row_stride
        call.grad, call.grad_outer_stride = grad, place.outer_stride
        call.grad_row_stride, call.grad_class_stride = place.row_stride, place.class_stride
        return None
    call.grad_outer_stride = call.classes * call.inner
    if _fits(call, 1, call.classes):
        call.grad = back = _empty((*call.shape, call.classes), call.x)
        call.grad_row_stride, call.grad_class_stride = call.classes, 1
    else:  # the classes outside of the rows, as in the logits
        call.grad = _empty((call.rows // call.inner, call.classes, call.inner), call.x)
        call.grad_row_stride, call.grad_class_stride = 1, call.inner
        back = _move(call.grad, 1, -1).reshape((*call.shape, call.classes))
    return _move(back, -1, axis)


def _fits(call: RowCall, class_stride: int, row_stride: int) -> bool:
    """Whether the CPU kernels can write such a gradient of these logits: same kind of layout."""
    if call.device != "cpu" or not call.rows or call.classes == 1:
        return True
    if call.class_stride == 1:
        return class_stride == 1
    return row_stride == 1


def _empty(shape: tuple[int, ...], like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype.newbyteorder("="))
    return sys.modules["torch"].empty(shape, dtype=like.dtype, device=like.device)


def _class_last(x: Any, axis: int) -> Any:
    return _move(x, axis, -1)


def _move(x: Any, source: int, target: int) -> Any:
    if isinstance(x, np.ndarray):
        return np.moveaxis(x, source, target)
    return x.detach().movedim(source, target)


def _contiguous(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    return x.detach().contiguous()


def _astype(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if isinstance(x, np.ndarray) else x.detach().to(dtype)


# ---- everything else ---------------------------------------------------------------------------


def _target(x: Any, target: Any, axis: int, outer: tuple[int, ...]) -> tuple[Any, Any]:
    """Return labels (rows,), None or None, probabilities in the wider dtype of the two."""
    if isinstance(x, np.ndarray):
        if not isinstance(target, (np.ndarray, np.generic)):
            raise DTypeError(f"target: expected a NumPy array like x, got {type(target).__name__}")
        target = np.asarray(target)
        is_float, is_integer = _arrays.is_float(target), target.dtype.kind in "iu"
    elif not _arrays.is_torch(target) or target.device != x.device:
        got = f"a tensor on {target.device}" if _arrays.is_torch(target) else type(target).__name__
        raise DTypeError(f"target: expected a tensor on {x.device} like x, got {got}")
    else:
        is_float, torch = target.dtype.is_floating_point, sys.modules["torch"]
        is_integer = not (is_float or target.dtype == torch.bool or target.dtype.is_complex)
    shape = tuple(target.shape)
    if is_float:
        if shape != tuple(x.shape):
            raise InvalidInputError(
                f"target: expected probabilities of the shape of x, {tuple(x.shape)}, got {shape}"
            )
        if target.dtype == x.dtype:
            return None, target
        if isinstance(x, np.ndarray):
            wide = np.promote_types(x.dtype, target.dtype)
        else:
            wide = sys.modules["torch"].promote_types(x.dtype, target.dtype)
        return None, _astype(target, wide)
    if not is_integer:
        raise DTypeError(
            "target: expected integer labels, or probabilities of a floating dtype, "
            f"got {_arrays.dtype_name(target)}"
        )
    if shape != outer:
        raise InvalidInputError(
            f"target: expected labels of shape {outer}, x {tuple(x.shape)} without its classes "
            f"(dimension {axis}), got {shape}"
        )
    name = _arrays.dtype_name(target)
    if isinstance(target, np.ndarray):
        kind = np.int32 if name == "int32" else np.int64
        return np.ascontiguousarray(target, kind).reshape(-1), None
    if name not in ("int32", "int64"):
        target = target.long()
    return target.reshape(-1).contiguous(), None


def _mask(x: Any, mask: Any, outer: tuple[int, ...]) -> Any:
    if not _arrays.is_array(mask) or _arrays.dtype_name(mask) != "bool":
        got = _arrays.dtype_name(mask) if _arrays.is_array(mask) else type(mask).__name__
        raise DTypeError(f"valid_mask: expected an array of bool, got {got}")
    if tuple(mask.shape) != outer:
        raise InvalidInputError(
            f"valid_mask: expected the shape of the labels, {outer}, got {tuple(mask.shape)}"
        )
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(mask).reshape(-1)
    mask = sys.modules["torch"].as_tensor(mask)
    if mask.device != x.device:
        raise DTypeError(f"valid_mask: expected a tensor on {x.device}, got one on {mask.device}")
    return mask.reshape(-1).contiguous()


def vector(value: Any, name: str, shape: tuple[int, ...], x: Any, compute: str) -> Any:
    """Return (n,) numbers of the compute type beside `x`, one for each place of `shape`."""
    try:
        if isinstance(x, np.ndarray):
            if _arrays.is_torch(value):
                value = value.detach().cpu().double().numpy()
            array = np.asarray(value, dtype=compute)
        else:
            torch = sys.modules["torch"]
            kind = torch.float64 if compute == "float64" else torch.float32
            array = torch.as_tensor(value, dtype=kind, device=x.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise DTypeError(f"{name}: expected numbers, got {type(value).__name__}") from None
    if tuple(array.shape) not in (shape, (math.prod(shape),)):
        raise InvalidInputError(f"{name}: expected shape {shape}, got {tuple(array.shape)}")
    return (
        np.ascontiguousarray(array).reshape(-1)
        if isinstance(array, np.ndarray)
        else (array.contiguous().reshape(-1))
    )


def _prior(log_prior: Any, classes: int, x: Any, call: RowCall) -> Any:
    if call.form.map == "softmax":
        return vector(log_prior, "log_prior", (classes,), x, call.compute)
    wide = vector(log_prior, "log_prior", (classes,), x, "float64")  # exp rounds only once
    if isinstance(wide, np.ndarray):
        return np.exp(wide).astype(call.compute)
    return wide.exp().to(getattr(sys.modules["torch"], call.compute))


def _sum_classes(call: RowCall) -> None:
    """Fill in W and V': on a GPU they stay there."""
    if call.weight is None and call.prior is None:
        call.weight_sum = call.classes_present = float(call.classes)
        return
    masked = -math.inf if call.form.map == "softmax" else 0.0
    present = None if call.prior is None else call.prior != masked
    if call.device == "cpu":
        weight = None if call.weight is None else np.asarray(call.weight, np.float64)
        inside = np.ones(call.classes, bool) if present is None else np.asarray(present)
        call.classes_present = float(inside.sum())
        call.weight_sum = call.classes_present if weight is None else float(weight[inside].sum())
        return
    torch = sys.modules["torch"]
    if present is None:
        total = call.weight.sum()
        call.totals = torch.stack([total, torch.full_like(total, call.classes)])
    else:
        count = present.sum(dtype=call.prior.dtype)
        total = count if call.weight is None else (call.weight * present).sum()
        call.totals = torch.stack([total, count])
    call.weight_sum = call.classes_present = math.nan


def check_targets(call: RowCall) -> tuple[Any, Any]:
    """Return the number of rows that count and the sum of their w_y.

    Numbers on a CPU, where every label is checked too; tensors of no dimension on a GPU, which is
    not waited for.

    Raises
    ------
    LabelError
        A label that counts is no class, or a class whose prior is 0.
    """
    if call.device != "cpu":
        return _count_on_device(call)
    if call.labels is None:
        count = call.rows if call.valid is None else int(call.valid.sum())
        return count, float(count)
    form = call.form
    if form.shard:
        raise InvalidInputError("shard: one part of the classes cannot check or weigh the labels")
    labels = call.labels
    count, total, bad = _native.core.rowloss_targets(
        _arrays.address(labels),
        4 if _arrays.dtype_name(labels) == "int32" else 8,
        call.rows,
        0 if call.valid is None else _arrays.address(call.valid),
        form.ignore_index,
        call.classes,
        0 if call.weight is None else _arrays.address(call.weight),
        call.compute == "float64",
        0 if call.prior is None else _arrays.address(call.prior),
        form.map == "softmax",
        form.label_offset,
    )
    if bad >= 0:
        label, first = int(call.labels[bad]), form.label_offset
        if first <= label < first + call.classes:
            raise LabelError(f"target: row {bad} has label {label}, a class with prior 0", bad)
        raise LabelError(
            f"target: expected labels {first} .. {first + call.classes - 1}, or {form.ignore_index}"
            f" for rows to leave out; row {bad} has {label}",
            bad,
        )
    return count, total


def _count_on_device(call: RowCall) -> tuple[Any, Any]:
    torch = sys.modules["torch"]
    kind = torch.float64 if call.compute == "float64" else torch.float32
    if call.labels is None:
        keep = call.valid
    else:
        keep = call.labels != call.form.ignore_index if call.valid is None else call.valid
    if keep is None:
        count = torch.full((), call.rows, dtype=torch.int64, device=call.x.device)
    else:
        count = keep.sum()
    if call.labels is None or call.weight is None:
        return count, count.to(kind)
    own = (call.labels - call.form.label_offset).clamp(0, call.classes - 1)
    return count, (call.weight[own] * keep).sum()

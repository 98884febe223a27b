"""Row losses and their gradients: softmax, StableMax and Taylor cross-entropy in one visit."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from flcore import _arrays, _output_pool, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import _rowloss_prepare as _prepare
from flcore.ops._rowloss_call import MAPS, RowCall, RowLossForm, RowStats

__all__ = [
    "MAPS",
    "RowLossForm",
    "RowStats",
    "row_loss",
    "row_loss_backward",
    "row_loss_gradient",
    "row_targets",
]

FORWARD, BOTH, BACKWARD = range(3)
DEFAULT = RowLossForm()


def row_loss(
    x: Any,
    target: Any,
    form: RowLossForm = DEFAULT,
    *,
    class_dim: int = -1,
    weight: Any = None,
    log_prior: Any = None,
    row_scale: Any = None,
    valid_mask: Any = None,
    out: Any = None,
    variant: str | None = None,
) -> tuple[Any, RowStats]:
    r"""Loss of every row of logits; reads each logit once.

    Parameters
    ----------
    x : array, float64, float32, float16 or bfloat16
        Logits of any shape, NumPy or torch, on a CPU or a GPU; a row is what lies along
        `class_dim`. Strided views are read where they lie as long as either the classes or the
        rows are contiguous and the rows lie at two distances at most; anything else is copied.
    target : array
        Integer labels of the shape of `x` without `class_dim`, or probabilities of the shape of
        `x` in a floating dtype.
    form : RowLossForm
        The loss, apart from its arrays.
    class_dim : int
        Dimension of the classes.
    weight : (classes,) numbers, optional
        Weights of the classes.
    log_prior : (classes,) numbers, optional
        Logarithm of the prior of each class; -inf masks a class.
    row_scale : numbers of the shape of the labels, optional
        A factor for the logits of each row, on top of ``form.logit_scale``.
    valid_mask : array of bool of the shape of the labels, optional
        Rows that count; takes the place of ``form.ignore_index``.
    out : array, optional
        Where the losses go: shape of the labels, compute type, contiguous.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    loss : array of the shape of the labels, float32 (float64 for float64 logits)
        0 for rows that do not count. None with ``form.shard``.
    stats : RowStats
        For `row_loss_backward`.

    Raises
    ------
    LabelError
        On a CPU: a row that counts has a label that is no class. (On a GPU its loss is NaN.)
    InvalidInputError, DTypeError, VariantUnavailableError
        Shapes, types or devices that do not fit.

    Notes
    -----
    Relative error of a loss at most 1e-6 in float32, for logits of any size: with e_k the terms of
    the sum, ``R = sum_{k != y} e_k`` and e_y are kept apart and the loss is ``log1p(R / e_y)``.
    The same bits on every instruction set and number of threads. Formulas:
    `flcore.reference.rowloss`.

    References
    ----------
    Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops.rowloss import row_loss
    >>> loss, stats = row_loss(np.float32([[2, 0, -1, -3]]), np.array([0]))
    >>> loss
    array([0.45953232], dtype=float32)
    """
    call = _prepare.prepare(x, target, form, class_dim, weight, log_prior, row_scale, valid_mask)
    if not form.shard:
        _prepare.check_targets(call)
    if not form.shard:
        call.loss = _prepare.empty_rows(call) if out is None else _loss_out(call, out)
    stats = new_stats(call)
    run(call, FORWARD, variant)
    return call.loss, stats


def row_loss_backward(
    x: Any,
    target: Any,
    stats: RowStats,
    form: RowLossForm = DEFAULT,
    *,
    upstream: Any = None,
    scale: Any = 1.0,
    class_dim: int = -1,
    weight: Any = None,
    log_prior: Any = None,
    row_scale: Any = None,
    valid_mask: Any = None,
    out: Any = None,
    variant: str | None = None,
) -> Any:
    """Gradient in the logits from logits and stats; reads each logit once, writes it once.

    Parameters
    ----------
    x, target, form, class_dim, weight, log_prior, row_scale, valid_mask, variant
        As in `row_loss`.
    stats : RowStats
        What `row_loss` returned; of a sharded vocabulary, the stats of all shards merged.
    upstream : numbers of the shape of the labels, optional
        Factor of the gradient of each row.
    scale : number, or on a GPU a tensor of one element
        Factor of the whole gradient.
    out : array of the shape and dtype of `x`, optional
        Where the gradient goes; may be `x`.

    Returns
    -------
    array
        Shape and dtype of `x`, rounded once; exactly 0 in rows that do not count.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError, VariantUnavailableError
        As in `row_loss`.
    """
    call = _prepare.prepare(x, target, form, class_dim, weight, log_prior, row_scale, valid_mask)
    if not form.shard:
        _prepare.check_targets(call)
    return backward(call, x, stats, upstream, scale, out, variant)


def row_loss_gradient(
    x: Any,
    target: Any,
    form: RowLossForm = DEFAULT,
    *,
    upstream: Any = None,
    scale: Any = 1.0,
    class_dim: int = -1,
    weight: Any = None,
    log_prior: Any = None,
    row_scale: Any = None,
    valid_mask: Any = None,
    out: Any = None,
    variant: str | None = None,
) -> tuple[Any, Any]:
    """Loss and gradient in one visit: each logit is read once and its gradient written once.

    Parameters
    ----------
    x, target, form, class_dim, weight, log_prior, row_scale, valid_mask, variant
        As in `row_loss`.
    upstream, scale, out
        As in `row_loss_backward`; `out` may be `x`.

    Returns
    -------
    loss : array
        As in `row_loss`; not multiplied by `upstream` or `scale`.
    gradient : array
        As in `row_loss_backward`.

    Raises
    ------
    LabelError, InvalidInputError, DTypeError, VariantUnavailableError
        As in `row_loss`.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops.rowloss import row_loss_gradient
    >>> row_loss_gradient(np.float32([[1, 0, -1]]), np.array([1]))[1]
    array([[ 0.2857143 , -0.71428573,  0.07142857]], dtype=float32)
    """
    call = _prepare.prepare(x, target, form, class_dim, weight, log_prior, row_scale, valid_mask)
    if form.shard:
        raise InvalidInputError("shard: gradients need the merged stats of all shards")
    _prepare.check_targets(call)
    return both(call, x, upstream, scale, out, variant)


def row_targets(
    target: Any,
    classes: int,
    form: RowLossForm = DEFAULT,
    *,
    weight: Any = None,
    log_prior: Any = None,
    valid_mask: Any = None,
) -> tuple[Any, Any]:
    """Count the rows that count and add up the weights of their labels: what 'mean' divides by.

    Parameters
    ----------
    target : array of int
        Labels of any shape.
    classes : int
        Number of classes.
    form, weight, log_prior, valid_mask
        As in `row_loss`.

    Returns
    -------
    count : int
        Rows that count; on a GPU a tensor of no dimension.
    weight_total : float
        Sum of the weights of their labels; on a GPU a tensor of no dimension.

    Raises
    ------
    LabelError
        On a CPU: a label is no class, or a class whose prior is 0; the first such row is named.
    InvalidInputError, DTypeError
        As in `row_loss`.
    """
    if not _arrays.is_array(target):
        raise DTypeError(f"target: expected an array of labels, got {type(target).__name__}")
    shape = (*target.shape, classes)
    if isinstance(target, np.ndarray):
        like: Any = np.broadcast_to(np.zeros(classes, np.float32), shape)
    else:
        torch = sys.modules["torch"]
        like = torch.zeros(classes, dtype=torch.float32, device=target.device).expand(shape)
    if form.label_smoothing:  # sums over the classes are not needed here
        form = RowLossForm(form.map, form.ignore_index, label_offset=form.label_offset)
    call = _prepare.prepare(like, target, form, -1, weight, log_prior, None, valid_mask)
    return _prepare.check_targets(call)


# ---- on a prepared call, for the layers above --------------------------------------------------


def new_stats(call: RowCall) -> RowStats:
    """Give the call arrays for its stats and return them."""
    call.rest, call.own = _prepare.empty_rows(call), _prepare.empty_rows(call)
    if call.form.map == "softmax":
        call.shift = _prepare.empty_rows(call)
    return RowStats(call.rest, call.own, call.shift)


def both(
    call: RowCall,
    x: Any,
    upstream: Any = None,
    scale: Any = 1.0,
    out: Any = None,
    variant: str | None = None,
) -> tuple[Any, Any]:
    """Loss and gradient of a prepared call; see `row_loss_gradient`."""
    call.loss = _prepare.empty_rows(call)
    return call.loss, _differentiate(call, BOTH, x, upstream, scale, out, variant)


def backward(
    call: RowCall,
    x: Any,
    stats: RowStats,
    upstream: Any = None,
    scale: Any = 1.0,
    out: Any = None,
    variant: str | None = None,
) -> Any:
    """Gradient of a prepared call; see `row_loss_backward`."""
    for name in ("rest", "own", "shift")[: 3 if call.form.map == "softmax" else 2]:
        value = getattr(stats, name)
        value = _prepare.vector(value, f"stats.{name}", call.shape, call.x, call.compute)
        setattr(call, name, value)
    return _differentiate(call, BACKWARD, x, upstream, scale, out, variant)


def _differentiate(
    call: RowCall, mode: int, x: Any, upstream: Any, scale: Any, out: Any, variant: str | None
) -> Any:
    if upstream is not None:
        call.upstream = _prepare.vector(upstream, "upstream", call.shape, call.x, call.compute)
    if isinstance(scale, (int, float)) or call.device == "cpu":
        call.grad_scale = float(scale)
    else:
        call.scale_tensor = _prepare.vector(scale, "scale", (1,), call.x, call.compute)
    grad = _output_pool.empty_like(x) if out is None else _gradient_out(x, out)
    copied = _prepare.attach_gradient(call, grad) if call.rows else None
    run(call, mode, variant)
    if copied is not None:
        _arrays.assign(grad, copied)
    return grad


def run(call: RowCall, mode: int, variant: str | None = None) -> None:
    """Run the best variant, or the named one, on a prepared call."""
    function = _variants.choose("rowloss", call.device, variant)
    if call.rows and call.classes:
        function(call, mode)
    elif call.rows:
        raise InvalidInputError("x: expected at least one class")


def _loss_out(call: RowCall, out: Any) -> Any:
    like = _arrays.View(0, call.rows, call.compute, call.device, None)
    if _arrays.writable_view(out, "out", like) is None or tuple(out.shape) != call.shape:
        raise InvalidInputError(
            f"out: expected a contiguous array of shape {call.shape}, got {tuple(out.shape)}"
        )
    return out


def _gradient_out(x: Any, out: Any) -> Any:
    like = _arrays.View(0, _arrays.numel(x), _arrays.dtype_name(x), _arrays.device_of(x), None)
    _arrays.writable_view(out, "out", like)
    if tuple(out.shape) != tuple(x.shape):
        raise InvalidInputError(
            f"out: expected the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}"
        )
    return out if isinstance(out, np.ndarray) else out.detach()


# ---- variants ----------------------------------------------------------------------------------


_variants.add(
    "rowloss", "cpu", _variants.lazy("flcore.ops._rowloss_cpu", "rowloss"), _variants.cpu_only
)
_variants.add("rowloss", "reference", _variants.lazy("flcore.reference.rowloss", "rowloss"))
_variants.add(
    "rowloss",
    "triton",
    _variants.lazy("flcore.ops._rowloss_triton", "rowloss"),
    _variants.needs_triton,
)

"""StableMax probabilities and their logarithms along any dimension, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays, _native, _output_pool, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._rowloss_call import Layout, layout, strides_of
from flcore.ops._rowloss_prepare import class_axis
from flcore.ops._stablemax_call import STEPS, CollapseCall, StableMaxCall

__all__ = [
    "collapse_counts",
    "log_stablemax",
    "log_stablemax_backward",
    "stablemax",
    "stablemax_backward",
]


def stablemax(x: Any, dim: int = -1, *, variant: str | None = None) -> Any:
    r"""Return ``s(x) / sum s(x)`` along a dimension, s(x) = x + 1 from 0 on and 1 / (1 - x) below.

    It is the softmax of ``sign(x) log1p(|x|)``, without exponentials: a probability falls with
    1 / |x| in the place of exp(-|x|).

    Parameters
    ----------
    x : array, float64, float32, float16 or bfloat16
        Any shape, NumPy or torch, on a CPU or a GPU. Where the dimension or what follows it is
        contiguous, strided views are read where they lie; anything else is copied.
    dim : int
        Dimension whose results sum to 1.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    array
        Shape and dtype of `x`; computed in float32 (float64 for float64) and rounded once.

    Raises
    ------
    DTypeError, InvalidInputError
        Arrays that cannot be read; no such dimension.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    -inf masks an entry: probability 0. A row with +inf or NaN, with nothing but -inf, or whose sum
    is beyond the range of float32 is NaN. Sums are kept in float32 lanes of at most 64 terms and
    added in float64. The same bits on every instruction set and number of threads.

    References
    ----------
    Prieto, Barsbey, Mediano & Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025,
    arXiv 2501.04697.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops.stablemax import stablemax
    >>> stablemax(np.array([2.0, 0.0, -1.0, -3.0])).round(4)
    array([0.6316, 0.2105, 0.1053, 0.0526])
    """
    return _run("stablemax", x, None, dim, variant)


def log_stablemax(x: Any, dim: int = -1, *, variant: str | None = None) -> Any:
    """Return the logarithms of `stablemax` along a dimension, -inf where it is masked.

    Parameters
    ----------
    x, dim, variant
        As in `stablemax`.

    Returns
    -------
    array
        Shape and dtype of `x`.

    Raises
    ------
    DTypeError, InvalidInputError, VariantUnavailableError
        As in `stablemax`.

    Notes
    -----
    The largest entry m has ``-log1p(R / s_m)``, R the sum of the others: a float32 result as small
    as 1e-30 has all its digits. Relative error at most 1e-6 everywhere.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops.stablemax import log_stablemax
    >>> log_stablemax(np.float32([1e6, -1e3, -1e9]))
    array([-9.9900099e-10, -2.0724266e+01, -3.4538776e+01], dtype=float32)
    """
    return _run("log_stablemax", x, None, dim, variant)


def stablemax_backward(v: Any, x: Any, dim: int = -1, *, variant: str | None = None) -> Any:
    """Return the gradient of `x` from that of its probabilities: ``p (v - sum v p) / (1 + |x|)``.

    Parameters
    ----------
    v : array
        Upstream gradient: shape, dtype and device of `x`. Finite, or its row is NaN.
    x, dim, variant
        As in `stablemax`. Nothing else is kept from the forward pass.

    Returns
    -------
    array
        Shape and dtype of `x`; 0 where it is -inf.

    Raises
    ------
    DTypeError, InvalidInputError, VariantUnavailableError
        As in `stablemax`; arrays that differ in shape, dtype or device.
    """
    return _run("stablemax_backward", x, v, dim, variant)


def log_stablemax_backward(v: Any, x: Any, dim: int = -1, *, variant: str | None = None) -> Any:
    """Return the gradient of `x` from that of its logarithms: ``(v - p sum v) / (1 + |x|)``.

    Parameters
    ----------
    v, x, dim, variant
        As in `stablemax_backward`.

    Returns
    -------
    array
        Shape and dtype of `x`; 0 where it is -inf.

    Raises
    ------
    DTypeError, InvalidInputError, VariantUnavailableError
        As in `stablemax_backward`.
    """
    return _run("log_stablemax_backward", x, v, dim, variant)


# ---- from arrays to a call -----------------------------------------------------------------------


def _run(name: str, x: Any, v: Any, dim: int, variant: str | None) -> Any:
    axis = class_axis(x, dim, "dim")
    if v is not None or name.endswith("backward"):
        _check_upstream(v, x)
    device = _arrays.device_of(x)
    function = _variants.choose("stablemax", device, variant)
    if not isinstance(x, np.ndarray):
        x, v = x.detach(), None if v is None else v.detach()
    result = out = _output_pool.empty_like(x)
    if _arrays.numel(x) == 0:
        return result
    places = _places(x, out, axis, device)
    if places is None:
        x = _contiguous(x)
        out = _output_pool.empty_like(x)
        places = _places(x, out, axis, device)
        assert places is not None
    of_x, of_out = places
    of_v = None if v is None else _beside(v, of_x, axis, device)
    if v is not None and of_v is None:
        v, of_v = _copy_like(x, v), of_out  # strides of another array like x: those of out
    classes = x.shape[axis]
    function(
        StableMaxCall(
            STEPS.index(name),
            _arrays.numel(x) // classes,
            classes,
            of_x.inner,
            x,
            of_x[1:],
            out,
            of_out[1:],
            v,
            (0, 0, 0) if of_v is None else of_v[1:],
        )
    )
    if out is not result:
        _arrays.assign(result, out)
    return result


def _check_upstream(v: Any, x: Any) -> None:
    if not _arrays.is_array(v) or isinstance(v, np.ndarray) != isinstance(x, np.ndarray):
        raise DTypeError(f"v: expected an array like x, got {type(v).__name__}")
    for name in ("dtype_name", "device_of"):
        got, expected = getattr(_arrays, name)(v), getattr(_arrays, name)(x)
        if got != expected:
            raise DTypeError(f"v: expected {expected} as x has, got {got}")
    if tuple(v.shape) != tuple(x.shape):
        raise InvalidInputError(
            f"v: expected the shape of x, {tuple(x.shape)}, got {tuple(v.shape)}"
        )


def _places(x: Any, out: Any, axis: int, device: str) -> tuple[Layout, Layout] | None:
    """Where the rows of x and out lie, when a kernel can take both."""
    of_x = layout(tuple(x.shape), strides_of(x), axis)
    if of_x is None or not _is_native(x) or (device == "cpu" and 1 not in of_x[2:]):
        return None
    of_out = _beside(out, of_x, axis, device)
    return None if of_out is None else (of_x, of_out)


def _beside(y: Any, of_x: Layout, axis: int, device: str) -> Layout | None:
    """Where the rows of y lie, when a kernel can visit them beside those of x."""
    place = layout(tuple(y.shape), strides_of(y), axis, of_x.inner)
    if place is None or not _is_native(y):
        return None
    if device == "cpu":
        fits = place.class_stride == 1 if of_x.class_stride == 1 else place.row_stride == 1
        return place if fits else None
    return place


def _is_native(x: Any) -> bool:
    return not isinstance(x, np.ndarray) or bool(x.dtype.isnative)


def _contiguous(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    return x.contiguous()


def _copy_like(x: Any, v: Any) -> Any:
    """Copy v into memory that is ordered as x is."""
    copy = _output_pool.empty_like(x)
    _arrays.assign(copy, v)
    return copy


def collapse_counts(
    x: Any, labels: np.ndarray, unit: float, ignore_index: int = -100, variant: str | None = None
) -> tuple[int, int, int, int, float, bool]:
    r"""Count rows of logits whose losses rounding has taken; one read of the logits.

    Parameters
    ----------
    x : (rows, classes) array
        Logits, on a CPU; classes side by side, or they are copied.
    labels : (rows,) int64 array
        Targets, checked.
    unit : float
        Unit roundoff of the type in which losses are computed.
    ignore_index : int
        Label of rows that are not read.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    rows, collapsed, zero_loss, stablemax : int
        Rows that count; rows with ``sum_{j != m} exp(x_j - x_m) <= unit``, m the largest; those
        among them whose target has the largest logit; rows with
        ``sum_{j != y} s(x_j) <= unit s(x_y)``.
    largest : float
        Largest \|x\| of what is not -inf in these rows.
    has_nan : bool
        Whether any of them is NaN.
    """
    function = _variants.choose("collapse", "cpu", variant)
    if not (x.shape[1] == 1 or strides_of(x)[1] == 1) or not _is_native(x):
        x = _contiguous(x)
    result: tuple[int, int, int, int, float, bool] = function(
        CollapseCall(x, np.ascontiguousarray(labels, np.int64), ignore_index, unit)
    )
    return result


# ---- variants ----------------------------------------------------------------------------------


def _stablemax_cpu(call: StableMaxCall) -> None:
    """csrc/cpu/stablemax.isa.cpp."""
    _native.core.stablemax(
        call.step,
        _arrays.DTYPE_CODES[_arrays.dtype_name(call.x)],
        call.rows,
        call.classes,
        call.inner,
        _arrays.address(call.x),
        call.x_strides,
        0 if call.v is None else _arrays.address(call.v),
        call.v_strides,
        _arrays.address(call.out),
        call.out_strides,
        _native.threads_for(call.rows * call.classes),
    )


def _collapse_cpu(call: CollapseCall) -> tuple[int, int, int, int, float, bool]:
    """csrc/cpu/collapse.h."""
    rows, classes = call.x.shape
    result: tuple[int, int, int, int, float, bool] = _native.core.collapse(
        _arrays.DTYPE_CODES[_arrays.dtype_name(call.x)],
        rows,
        classes,
        _arrays.address(call.x) if rows else 0,
        strides_of(call.x)[0],
        _arrays.address(call.labels),
        call.ignore_index,
        call.unit,
        _native.threads_for(rows * classes),
    )
    return result


_variants.add("stablemax", "cpu", _variants.lazy(__name__, "_stablemax_cpu"), _variants.cpu_only)
_variants.add("stablemax", "reference", _variants.lazy("flcore.reference.stablemax", "stablemax"))
_variants.add(
    "stablemax",
    "triton",
    _variants.lazy("flcore.pykernels.stablemax", "stablemax"),
    _variants.needs_triton,
)
_variants.add("collapse", "cpu", _variants.lazy(__name__, "_collapse_cpu"), _variants.cpu_only)
_variants.add(
    "collapse",
    "reference",
    _variants.lazy("flcore.reference.stablemax", "collapse"),
    _variants.cpu_only,
)

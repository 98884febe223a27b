"""Embedding tables in few bits: gather, dequantise and sum in one pass; gradients of the rows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._qembedding_bags import Bags, parse_bags
from flcore.reference import qembedding as reference

if TYPE_CHECKING:
    from flcore.quantization import QuantizedTensor

__all__ = ["qembedding", "qembedding_grad"]

DTYPES = ("float32", "float16", "bfloat16")


def qembedding(
    weight: QuantizedTensor,
    indices: Any,
    offsets: Any = None,
    *,
    mode: str = "sum",
    per_sample_weights: Any = None,
    padding_idx: int | None = None,
    dtype: Any = "float32",
    out: Any = None,
    variant: str | None = None,
) -> Any:
    """Rows of a quantised table, one by one or summed in bags.

    Reads the rows of the entries once, ``k b / 8`` bytes and their scales, and writes each bag
    once: no row is stored in floats on the way.

    Parameters
    ----------
    weight : QuantizedTensor
        Table of n rows and k columns. Rows are read in the layout "rows"; of a weight in another
        layout the whole table is repacked at each call.
    indices : array of integers
        "none": of any shape. Otherwise of one dimension with `offsets`, or (bags, entries).
    offsets : (bags,) integers, optional
        First entry of each bag, from 0; the last bag goes to the end.
    mode : {"sum", "mean", "none"}
        Sum or mean of each bag, or every row by itself.
    per_sample_weights : floating array of the shape of `indices`, optional
        Factors of the entries, for the sum.
    padding_idx : int, optional
        Row whose entries do not count, in bags.
    dtype : {"float32", "float16", "bfloat16"} or a dtype
        Of the result; sums are float32 in the order of the entries and are rounded once.
    out : array, optional
        Where the result goes; its dtype is that of the result.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    array
        (*indices.shape, k) or (bags, k), of the kind and on the device of `indices`. A bag without
        entries is 0.

    Raises
    ------
    InvalidInputError
        Shapes, offsets, options or an index that do not fit.
    DTypeError
        A weight that is not quantised, indices that are no integers, a dtype of no kernel.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.quantization import quantize
    >>> table = quantize(np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), "int8")
    >>> qembedding(table, np.array([[0, 2]]), mode="mean").round(1)
    array([[4., 5., 6.]], dtype=float32)
    """
    table = _table(weight, indices)
    bags = parse_bags(indices, offsets, mode, per_sample_weights, padding_idx, weight.shape[0])
    shape = (*bags.lead, weight.shape[1])
    given, target = _result(indices, shape, _name(dtype) if out is None else None, out)
    function = _variants.choose("qembedding", _arrays.device_of(target), variant)
    if _arrays.numel(target):
        function(table, bags, target)
    return _deliver(given, target, shape)


def qembedding_grad(
    grad: Any,
    indices: Any,
    offsets: Any = None,
    *,
    rows: int,
    mode: str = "sum",
    per_sample_weights: Any = None,
    padding_idx: int | None = None,
    out: Any = None,
    compact: bool = False,
    variant: str | None = None,
) -> Any:
    """Gradient of the rows of a table: the scatter-add that belongs to `qembedding`.

    Entries are put in the order of their rows; a row is then one float32 sum over its entries in
    the order in which they came, so that neither threads nor duplicates change a bit.

    Parameters
    ----------
    grad : (*indices.shape, k) or (bags, k) float32, float16 or bfloat16
        Gradient of what `qembedding` returned.
    indices, offsets, mode, per_sample_weights, padding_idx
        As they were given to `qembedding`.
    rows : int
        n, of the table.
    out : (n, k) float32, optional
        What the gradient is added to.
    compact : bool
        Return the rows that were met, increasing, and their gradients, instead of all n.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (n, k) float32, or (m,) int64 and (m, k) float32
        Of the kind and on the device of `grad`; `out` itself if it was given.

    Raises
    ------
    InvalidInputError, DTypeError
        As `qembedding`; `out` together with `compact`.

    Examples
    --------
    >>> import numpy as np
    >>> qembedding_grad(np.float32([[1, 2], [3, 4]]), np.array([[0, 2], [2, 2]]), rows=3)
    array([[ 1.,  2.],
           [ 0.,  0.],
           [ 7., 10.]], dtype=float32)
    """
    if not _arrays.is_array(grad) or _arrays.dtype_name(grad) not in DTYPES:
        got = _arrays.dtype_name(grad) if _arrays.is_array(grad) else type(grad).__name__
        raise DTypeError(f"grad: expected {', '.join(DTYPES)}, got {got}")
    if isinstance(rows, bool) or not isinstance(rows, int | np.integer) or rows < 0:
        raise InvalidInputError(f"rows: expected the number of rows of the table, got {rows!r}")
    bags = parse_bags(indices, offsets, mode, per_sample_weights, padding_idx, int(rows))
    if len(grad.shape) < 1 or tuple(grad.shape[:-1]) != bags.lead:
        raise InvalidInputError(
            f"grad: expected the shape {(*bags.lead, 'k')}, got {tuple(grad.shape)}"
        )
    if compact and out is not None:
        raise InvalidInputError("out: a compact gradient is made anew; leave it out")
    k = int(grad.shape[-1])
    sorted_bags, met = _by_row(bags)
    if compact:
        given, target = _result(grad, (len(met), k), "float32", None)
    else:
        given, target = _result(grad, (int(rows), k), "float32", out, zero=True)
        if _arrays.dtype_name(target) != "float32":
            raise DTypeError(f"out: expected float32, got {_arrays.dtype_name(target)}")
    values = _contiguous(grad, k)
    function = _variants.choose("qembedding_grad", _arrays.device_of(target), variant)
    if _arrays.numel(target) and len(met):
        function(values, sorted_bags, None if compact else met, target)
    if compact:
        ids = met if isinstance(grad, np.ndarray) else _torch().from_numpy(met).to(grad.device)
        return ids, target
    return _deliver(given, target, (int(rows), k))


def _by_row(bags: Bags) -> tuple[Bags, np.ndarray]:
    """Bags of the gradient: one for each row that was met, whose entries are bags of the sum."""
    keep = bags.index != bags.padding
    bag_of = np.repeat(np.arange(bags.count), np.diff(bags.starts))[keep]
    index = bags.index[keep]
    order = np.argsort(index, kind="stable")
    met, starts = np.unique(index[order], return_index=True)
    coefficients = None
    if bags.mean:
        counts = bags.counts()[bag_of]
        coefficients = (np.float32(1) / counts.astype(np.float32))[order]
    elif bags.coefficients is not None:
        coefficients = np.ascontiguousarray(bags.coefficients[keep][order])
    starts = np.append(starts, len(index)).astype(np.int64)
    return Bags(bag_of[order], starts, coefficients, False, -1, (len(met),)), met


# ---- arrays --------------------------------------------------------------------------------------


def _torch() -> Any:
    return sys.modules["torch"]


def _name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = str(dtype)
    if name not in DTYPES:
        raise DTypeError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    return name


def _table(weight: Any, indices: Any) -> QuantizedTensor:
    from flcore.quantization import QuantizedTensor

    if not isinstance(weight, QuantizedTensor):
        raise DTypeError(f"weight: expected a QuantizedTensor, got {type(weight).__name__}")
    if _arrays.is_array(indices) and _arrays.device_of(indices) != weight.device:
        raise DTypeError(
            f"indices: expected them on {weight.device} as the weight is, got "
            f"{_arrays.device_of(indices)}"
        )
    return weight.to_layout("rows")


def _result(
    like: Any, shape: tuple[int, ...], dtype: str | None, out: Any, zero: bool = False
) -> tuple[Any, Any]:
    """Return the caller's `out`, if any, and the contiguous array that a kernel writes."""
    numpy = isinstance(like, np.ndarray)
    if out is None:
        if numpy:
            empty = _arrays.empty_like(np.empty(0, np.float32), dtype)  # names a missing bfloat16
            make = np.zeros if zero else np.empty
            return None, make(shape, empty.dtype)
        torch = _torch()
        make = torch.zeros if zero else torch.empty
        return None, make(shape, dtype=getattr(torch, str(dtype)), device=like.device)
    if not _arrays.is_array(out) or isinstance(out, np.ndarray) != numpy:
        kind = "a NumPy array" if numpy else "a torch tensor"
        raise DTypeError(f"out: expected {kind}, got {type(out).__name__}")
    if _arrays.dtype_name(out) not in DTYPES or _arrays.device_of(out) != _arrays.device_of(like):
        raise DTypeError(
            f"out: expected {', '.join(DTYPES)} on {_arrays.device_of(like)}, got "
            f"{_arrays.dtype_name(out)} on {_arrays.device_of(out)}"
        )
    if tuple(out.shape) != shape:
        raise InvalidInputError(f"out: expected the shape {shape}, got {tuple(out.shape)}")
    if numpy:
        if not out.flags.writeable:
            raise InvalidInputError("out: the array is read-only; pass one that can be written")
        whole = out.flags.c_contiguous and out.dtype.isnative
        return out, out if whole else np.ascontiguousarray(out, out.dtype.newbyteorder("="))
    return out, out.detach() if out.is_contiguous() else out.detach().clone().contiguous()


def _deliver(given: Any, target: Any, shape: tuple[int, ...]) -> Any:
    if given is None:
        return target.reshape(shape)
    if _arrays.numel(given) and _arrays.address(given) != _arrays.address(target):
        _arrays.assign(given, target)
    return given


def _contiguous(grad: Any, k: int) -> Any:
    rows = _arrays.numel(grad) // k if k else 0
    if isinstance(grad, np.ndarray):
        return np.ascontiguousarray(grad, grad.dtype.newbyteorder("=")).reshape(rows, k)
    return grad.detach().contiguous().reshape(rows, k)


# ---- variants ------------------------------------------------------------------------------------


def _native_bags(bags: Bags, rows: np.ndarray | None, add: bool, out: Any) -> dict[str, Any]:
    k = int(out.shape[-1])
    return {
        "k": k,
        "bags": bags.count,
        "index": _arrays.address(bags.index),
        "starts": _arrays.address(bags.starts),
        "coefficients": 0 if bags.coefficients is None else _arrays.address(bags.coefficients),
        "mean": bags.mean,
        "padding": bags.padding,
        "out": _arrays.address(out),
        "out_dtype": _arrays.DTYPE_CODES[_arrays.dtype_name(out)],
        "out_stride": k,
        "rows": 0 if rows is None else _arrays.address(rows),
        "add": add,
        "threads": _native.threads_for((len(bags.index) + bags.count) * k),
    }


def _cpu(table: QuantizedTensor, bags: Bags, out: Any) -> None:
    """csrc/cpu/qembedding.isa.cpp."""
    scheme = table.scheme
    if not len(bags.index):
        out[...] = 0
        return
    _native.core.qembedding(
        bits=scheme.bits,
        kind=scheme.kind_code,
        group=table.group,
        codes=_arrays.address(table.codes),
        code_stride=int(table.codes.shape[1]),
        scales=_arrays.address(table.scales),
        value_dtype=_arrays.DTYPE_CODES[scheme.scale_dtype],
        zeros=0 if table.zeros is None else _arrays.address(table.zeros),
        table=0 if table.table is None else _arrays.address(table.table),
        **_native_bags(bags, None, False, out),
    )


def _cpu_grad(grad: Any, bags: Bags, rows: np.ndarray | None, out: Any) -> None:
    """csrc/cpu/qembedding.isa.cpp, over rows of floats."""
    _native.core.qembedding(
        bits=0,
        kind=_native.core.QE_FLOAT,
        group=0,
        codes=_arrays.address(grad),
        code_stride=int(grad.shape[1]) * _arrays.ITEMSIZE[_arrays.dtype_name(grad)],
        scales=0,
        value_dtype=_arrays.DTYPE_CODES[_arrays.dtype_name(grad)],
        zeros=0,
        table=0,
        **_native_bags(bags, rows, rows is not None, out),
    )


def _reference(table: QuantizedTensor, bags: Bags, out: Any) -> None:
    used, index = np.unique(bags.index, return_inverse=True)
    rows = np.asarray(table.numpy().rows(used).dequantize("float64"))
    padding = np.flatnonzero(used == bags.padding)
    values = reference.bags(
        rows,
        index.reshape(-1),
        bags.starts,
        bags.coefficients,
        mean=bags.mean,
        padding=int(padding[0]) if padding.size else -1,
    )
    _arrays.assign(out, values)


def _reference_grad(grad: Any, bags: Bags, rows: np.ndarray | None, out: Any) -> None:
    values = _arrays.to_float64(grad).reshape(tuple(grad.shape))
    sums = reference.bags(values, bags.index, bags.starts, bags.coefficients)
    if rows is not None:
        total = _arrays.to_float64(out).reshape(tuple(out.shape))
        total[rows] += sums
        sums = total
    _arrays.assign(out, sums)


_variants.add("qembedding", "cpu", lambda: _cpu, _variants.cpu_only)
_variants.add("qembedding", "reference", lambda: _reference)
_variants.add("qembedding_grad", "cpu", lambda: _cpu_grad, _variants.cpu_only)
_variants.add("qembedding_grad", "reference", lambda: _reference_grad)

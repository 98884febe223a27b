"""Low-bit weights: quantise and pack, unpack and dequantise, change the layout.

What codes, scales and zeros are is told in `flcore.reference.weight_quant`, how they are found in
`flcore.reference.weight_rules`. `flcore.quantization` has the classes on top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore import _weight_arrays as parts
from flcore._arrays import View
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.reference import weight_quant as wq
from flcore.reference import weight_rules as rules

if TYPE_CHECKING:
    from flcore.quantization import QuantizedTensor, Scheme

__all__ = ["LAYOUTS", "dequantize_weight", "part_shapes", "quantize_weight", "repack_weight"]

LAYOUTS = ("rows", "tile16")  # enum WeightLayout in csrc/api.h

Parts = tuple[np.ndarray, np.ndarray, "np.ndarray | None"]  # codes, scales, zeros


def part_shapes(
    n: int, k: int, scheme: Scheme, layout: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of the codes and that of scales and zeros."""
    count = wq.groups(k, scheme.group_size(k))
    if layout == "rows":
        return (n, wq.row_bytes(k, scheme.bits)), (n, count)
    blocks = -(-n // wq.ROWS)
    return (blocks, -(-k // wq.CHUNK), 64 * scheme.bits), (blocks, count, wq.ROWS)


def check_layout(layout: str) -> None:
    """Raise InvalidInputError unless `layout` names one."""
    if layout not in LAYOUTS:
        raise InvalidInputError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def quantize_weight(
    w: Any, scheme: Scheme, *, layout: str = "rows", variant: str | None = None
) -> tuple[Any, Any, Any]:
    """Quantise a weight and pack its codes in one pass.

    Reads every value of `w` once and writes ``bits / 8`` bytes for it, whatever the scheme; with
    ``search="mse"`` a group is tried 31 times while it is in cache.

    Parameters
    ----------
    w : array (n, k)
        NumPy or torch; float64 (rounded to float32 first), float32, float16 or bfloat16; finite.
    scheme : Scheme
        Which numbers, and how they are found.
    layout : {"rows", "tile16"}
        Order of the codes.
    variant : {"cpu", "reference"}, optional
        Which implementation runs. A weight on a GPU is quantised on the CPU and moved back.

    Returns
    -------
    codes : array of uint8
    scales : array of the scheme's `scale_dtype`; bfloat16 as uint16 bits in NumPy
    zeros : array or None
        Of the kind and on the device of `w`, in the shapes of `part_shapes`.

    Raises
    ------
    NonFiniteError
        `w` holds a NaN or an infinity, or a float64 beyond float32.
    InvalidInputError, DTypeError
        `w` is not a matrix of floats, or a scale is too large for its storage type.
    """
    check_layout(layout)
    if _arrays.is_array(w) and w.ndim != 2:
        raise InvalidInputError(f"w: expected a matrix (n, k), got shape {tuple(w.shape)}")
    source = _arrays.view(w, "w")
    if source.device != "cpu":
        source = _arrays.view(w.detach().cpu(), "w")
    n, k = (int(s) for s in w.shape)
    function = _variants.choose("quantize_weight", "cpu", variant)
    out, flags = function(source, n, k, scheme, layout)
    if flags & NONFINITE:
        raise NonFiniteError("w: expected finite values of float32 size, got a NaN or an infinity")
    if flags & OVERFLOW:
        raise InvalidInputError(
            f"w: a scale or a zero is too large for scale_dtype {scheme.scale_dtype}; "
            "float32 and bfloat16 reach 3e38"
        )
    codes, scales, zeros = (None if x is None else parts.like(x, w) for x in out)
    return codes, scales, zeros


def dequantize_weight(
    weight: QuantizedTensor,
    dtype: Any = "float32",
    *,
    out: Any = None,
    variant: str | None = None,
) -> Any:
    """Return the numbers that a weight stands for.

    Parameters
    ----------
    weight : QuantizedTensor
        In either layout.
    dtype : str or dtype
        float32, or float32 rounded once more to float16 or bfloat16; float64 has the products
        unrounded. NumPy knows bfloat16 when ml_dtypes is imported.
    out : array (n, k), optional
        Where they go, instead of `dtype`: contiguous, of the kind and device of the weight's parts.
    variant : {"cpu", "reference"}, optional
        Which implementation runs.

    Returns
    -------
    array (n, k)
        `out` itself if it was given.

    Raises
    ------
    DTypeError, InvalidInputError
        A `dtype` that is not floating, an `out` that does not fit.
    """
    n, k = weight.shape
    if out is None:
        name = parts.output_dtype(dtype)
        result = parts.empty((n, k), name, weight.codes)
    else:
        if not _arrays.is_array(out) or _arrays.dtype_name(out) not in _arrays.DTYPE_CODES:
            raise DTypeError(f"out: expected an array of {_arrays.FLOATS}")
        if tuple(out.shape) != (n, k):
            raise InvalidInputError(f"out: expected shape {(n, k)}, got {tuple(out.shape)}")
        result = out
    on_cpu = _arrays.device_of(result) == "cpu"
    target = result if on_cpu else result.cpu()
    view = _arrays.writable_view(target, "out", _arrays.view(target, "out"))
    if view is None:
        raise InvalidInputError("out: expected contiguous memory")
    if _arrays.is_torch(result) != _arrays.is_torch(weight.codes):
        raise DTypeError("out: expected an array of the kind that the weight's parts are")
    _variants.choose("dequantize_weight", "cpu", variant)(weight, view)
    if not on_cpu:
        _arrays.assign(result, target)
    return result


def repack_weight(
    weight: QuantizedTensor, layout: str, *, variant: str | None = None
) -> tuple[Any, Any, Any]:
    """Return codes, scales and zeros of a weight in another layout; a permutation, exact.

    Parameters
    ----------
    weight : QuantizedTensor
        In either layout.
    layout : {"rows", "tile16"}
        The layout of the result.
    variant : {"cpu", "reference"}, optional
        Which implementation runs.

    Returns
    -------
    tuple
        As `quantize_weight`.

    Raises
    ------
    InvalidInputError
        An unknown layout.
    """
    check_layout(layout)
    out = _variants.choose("repack_weight", "cpu", variant)(weight, layout)
    codes, scales, zeros = (None if x is None else parts.like(x, weight.codes) for x in out)
    return codes, scales, zeros


# ---- variants: compiled ------------------------------------------------------------------------

NONFINITE, OVERFLOW = 1, 2  # WeightFlags in csrc/api.h


def _form(n: int, k: int, scheme: Scheme) -> list[int]:
    code = _arrays.DTYPE_CODES[scheme.scale_dtype]
    return [n, k, scheme.bits, scheme.kind_code, scheme.group_size(k), code]


def _empty_parts(n: int, k: int, scheme: Scheme, layout: str) -> Parts:
    codes, numbers = part_shapes(n, k, scheme, layout)
    zero = scheme.zero_dtype()
    return (
        parts.aligned(codes, np.uint8),
        parts.aligned(numbers, parts.STORED[scheme.scale_dtype]),
        None if zero is None else parts.aligned(numbers, parts.STORED[zero]),
    )


def _addresses(layout: str, codes: Any, scales: Any, zeros: Any) -> list[int]:
    zero = 0 if zeros is None else _arrays.address(zeros)
    return [LAYOUTS.index(layout), _arrays.address(codes), _arrays.address(scales), zero]


def _on_cpu(weight: QuantizedTensor) -> tuple[list[int], Any]:
    """Return the addresses of a weight's parts, and what keeps them alive."""
    arrays = [weight.codes, weight.scales, weight.zeros]
    if _arrays.device_of(weight.codes) != "cpu":
        arrays = [None if x is None else parts.to_numpy(x) for x in arrays]
    codes, scales, zeros = arrays
    return _addresses(weight.layout, codes, scales, zeros), arrays


def _quantize_cpu(source: View, n: int, k: int, scheme: Scheme, layout: str) -> tuple[Parts, int]:
    """csrc/cpu/weight_quant.isa.cpp."""
    rule = scheme.quantizer(k)
    table = scheme.table
    order, limits, levels = [np.zeros(0, np.float32)] * 3
    if table is not None:
        codes, limits = rules.thresholds(table)
        order, levels = codes.astype(np.float32), table[codes]
        limits = np.append(limits, np.float32(np.inf))
    out = _empty_parts(n, k, scheme, layout)
    flags = _native.core.quantize_weight(
        _form(n, k, scheme),
        0 if table is None else _arrays.address(table),
        _addresses(layout, *out),
        source.ptr,
        source.code,
        rules.RULES.index(rule.rule),
        rule.force_zero,
        rule.tensor,
        rule.range_floor,
        rule.largest,
        rule.factors,
        limits.tolist(),
        levels.tolist(),
        order.tolist(),
        _native.threads_for(n * k),
    )
    return out, flags


def _dequantize_cpu(weight: QuantizedTensor, out: View) -> None:
    addresses, _alive = _on_cpu(weight)
    n, k = weight.shape
    table = weight.scheme.table
    _native.core.dequantize_weight(
        _form(n, k, weight.scheme),
        0 if table is None else _arrays.address(table),
        addresses,
        out.ptr,
        out.code,
        _native.threads_for(n * k),
    )


def _repack_cpu(weight: QuantizedTensor, layout: str) -> Parts:
    addresses, _alive = _on_cpu(weight)
    n, k = weight.shape
    table = weight.scheme.table
    out = _empty_parts(n, k, weight.scheme, layout)
    _native.core.repack_weight(
        _form(n, k, weight.scheme),
        0 if table is None else _arrays.address(table),
        addresses,
        _addresses(layout, *out),
        _native.threads_for(n * k),
    )
    return out


# ---- variants: NumPy ---------------------------------------------------------------------------


def _packed(
    q: np.ndarray, s: np.ndarray, z: np.ndarray | None, scheme: Scheme, layout: str
) -> Parts:
    if layout == "rows":
        return wq.pack_rows(q, scheme.bits), s, z
    pad = 0 if scheme.kind == "fp8" else 2 ** (scheme.bits - 1)
    codes = wq.pack_tile16(q, scheme.bits, pad)
    return codes, wq.tile_groups(s), None if z is None else wq.tile_groups(z)


def _plain(weight: QuantizedTensor) -> Parts:
    """Return codes (n, k), scales and zeros (n, G)."""
    n, k = weight.shape
    codes, scales = parts.to_numpy(weight.codes), parts.to_numpy(weight.scales)
    zeros = None if weight.zeros is None else parts.to_numpy(weight.zeros)
    if weight.layout == "rows":
        return wq.unpack_rows(codes, k, weight.scheme.bits), scales, zeros
    return (
        wq.unpack_tile16(codes, n, k, weight.scheme.bits),
        wq.untile_groups(scales, n),
        None if zeros is None else wq.untile_groups(zeros, n),
    )


def _quantize_reference(
    source: View, n: int, k: int, scheme: Scheme, layout: str
) -> tuple[Parts, int]:
    with np.errstate(over="ignore"):
        w = _arrays.to_float64(source.array).reshape(n, k).astype(np.float32)
    if not np.isfinite(w).all():
        return _empty_parts(n, k, scheme, layout), NONFINITE
    q, s, z = rules.quantize(w, scheme.quantizer(k))
    if not (np.isfinite(s).all() and (z is None or np.isfinite(z).all())):
        return _empty_parts(n, k, scheme, layout), OVERFLOW
    s = rules.scale_bits(s, scheme.scale_dtype)
    if z is not None and scheme.kind == "float_zero":
        z = rules.scale_bits(z, scheme.scale_dtype)
    return _packed(q, s, z, scheme, layout), 0


def _dequantize_reference(weight: QuantizedTensor, out: View) -> None:
    scheme = weight.scheme
    q, s, z = _plain(weight)
    s = rules.scale_values(s, scheme.scale_dtype)
    if z is not None and scheme.kind == "float_zero":
        z = rules.scale_values(z, scheme.scale_dtype)
    wide = out.dtype == "float64"
    values = wq.dequantize(
        q,
        s,
        z,
        bits=scheme.bits,
        kind=scheme.kind_code,
        group=weight.group,
        table=scheme.table,
        to_odd=not wide,
    )
    _arrays.assign(out.array, values if wide else values.astype(np.float32))


def _repack_reference(weight: QuantizedTensor, layout: str) -> Parts:
    q, s, z = _plain(weight)
    return _packed(q, s, z, weight.scheme, layout)


for _op in ("quantize", "dequantize", "repack"):
    for _name in ("cpu", "reference"):
        _variants.add(
            f"{_op}_weight",
            _name,
            _variants.lazy(__name__, f"_{_op}_{_name}"),
            _variants.cpu_only,
        )

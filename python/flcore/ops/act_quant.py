"""Dynamic quantisation of activations to 8 bits, with the sums of the codes."""

from __future__ import annotations

import operator
import sys
from typing import Any, NamedTuple

import numpy as np

from flcore import _arrays, _native, _variants
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["QuantizedActivation", "quantize_activation"]


class QuantizedActivation(NamedTuple):
    """Activations x (.., k) in 8 bits: ``x ~ scales (codes - zeros)``, G blocks a row.

    Attributes
    ----------
    codes : (.., k) array
        int8 in -127 .. 127, or uint8 where there are zero points.
    scales : (.., G) array of float32
        0 for a block of zeros, NaN for one with a value that is not finite.
    sums : (.., G) array of int32
        Sums of the codes of each block.
    zeros : (.., G) array of uint8, or None
        Zero points of asymmetric codes.
    """

    codes: Any
    scales: Any
    sums: Any
    zeros: Any = None


def quantize_activation(
    x: Any, block: int = 0, *, asymmetric: bool = False, variant: str | None = None
) -> QuantizedActivation:
    r"""Quantise activations to 8 bits by the largest values they have.

    Reads x once (a block a second time from cache), ``s + 1`` bytes a value of s bytes.

    Parameters
    ----------
    x : array (.., k), any floating dtype
        NumPy or torch. float64 is rounded to float32 first.
    block : int
        Values of a row that share a scale; 0, or more than k: the whole row. The last block of a
        row may be short. At most 2^23 where all values of a row share one.
    asymmetric : bool
        uint8 codes with a zero point, for values that lie mostly on one side of 0.
    variant : {"reference", "cpu", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    QuantizedActivation
        Arrays of the kind of `x`.

    Raises
    ------
    InvalidInputError
        A `block` that is negative or beyond 2^23, an `x` without a dimension.
    DTypeError
        `x` is no floating array; a `block` that is no integer.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    Symmetric: ``scale = max|x| / 127``, ``q = rint(x (127 / max|x|))``. Asymmetric: the range is
    from ``min(x, 0)`` to ``max(x, 0)``, in 255 steps, so that 0 has a code of its own. A value is
    off by half a scale at most (with a zero point that is rounded, by a whole one at the ends of
    the range). The same bits at every instruction set and number of threads, and as `reference`.

    References
    ----------
    Dynamic quantisation by row is that of Dettmers et al., "LLM.int8()", NeurIPS 2022, arXiv
    2208.07339 (absmax and zero-point quantisation), here also by blocks of a row.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import quantize_activation
    >>> q = quantize_activation(np.float32([[1, -2, 0.5, 3]]), asymmetric=True)
    >>> q.codes, q.zeros
    (array([[153,   0, 128, 255]], dtype=uint8), array([[102]], dtype=uint8))
    """
    try:
        block = operator.index(block)
    except TypeError:
        raise DTypeError(f"block: expected an integer, got {block!r}") from None
    source = _arrays.view(x, "x")
    if len(x.shape) < 1:
        raise InvalidInputError("x: expected at least one dimension, got a number")
    lead, k = tuple(int(size) for size in x.shape[:-1]), int(x.shape[-1])
    rows = int(np.prod(lead))
    block = block if 0 < block < k or block < 0 else max(k, 1)
    if not 1 <= block <= 1 << 23:  # 255 block is an int32
        raise InvalidInputError(f"block: expected 0 or 1 to {1 << 23}, got {block}")
    if source.dtype == "float64":
        source = _arrays.view(_float32(source.array), "x")
    function = _variants.choose("act_quant", source.device, variant)
    count = -(-k // block) if k else 0
    out = QuantizedActivation(
        _empty(x, (rows, k), "uint8" if asymmetric else "int8"),
        _empty(x, (rows, count), "float32"),
        _empty(x, (rows, count), "int32"),
        _empty(x, (rows, count), "uint8") if asymmetric else None,
    )
    if rows and k:
        function(source, rows, k, block, out)
    shapes = [(*lead, k)] + [(*lead, count)] * 3
    return QuantizedActivation(
        *(None if part is None else part.reshape(s) for part, s in zip(out, shapes, strict=True))
    )


def _float32(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):
            return x.astype(np.float32)
    return x.to(sys.modules["torch"].float32)


def _empty(x: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return an array of the kind and on the device of x."""
    if isinstance(x, np.ndarray):
        return np.empty(shape, dtype)
    torch = sys.modules["torch"]
    return torch.empty(shape, dtype=getattr(torch, dtype), device=x.device)


# ---- variants ------------------------------------------------------------------------------------


def _cpu(x: _arrays.View, rows: int, k: int, block: int, out: QuantizedActivation) -> None:
    """csrc/cpu/act_quant.isa.cpp."""
    _native.core.quantize_activation(
        x.ptr,
        x.code,
        rows,
        k,
        k,
        block,
        out.zeros is not None,
        _arrays.address(out.codes),
        _arrays.address(out.scales),
        _arrays.address(out.sums),
        0 if out.zeros is None else _arrays.address(out.zeros),
        _native.threads_for(rows * k),
    )


def _reference(x: _arrays.View, rows: int, k: int, block: int, out: QuantizedActivation) -> None:
    from flcore.reference.act_quant import quantize_activation as define

    values = _arrays.to_float64(x.array).astype(np.float32).reshape(rows, k)
    found = define(values, block, out.zeros is not None)
    for target, part in zip(out, found, strict=True):
        if target is not None:
            _arrays.assign(target, part)


_variants.add("act_quant", "cpu", _variants.lazy(__name__, "_cpu"), _variants.cpu_only)
_variants.add("act_quant", "reference", _variants.lazy(__name__, "_reference"))
_variants.add(
    "act_quant",
    "triton",
    _variants.lazy("flcore.ops._qmatmul_int8_triton", "quantize_activation"),
    _variants.needs_triton,
)

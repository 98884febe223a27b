"""What a product with a quantized weight gets: arrays that were checked, as matrices of rows.

`prepare` is the door of `qmatmul`, `qmatmul_int8` and `qmatmul_dx`; a variant takes the
`QMatmulCall` it returns and writes `out`; `finish` hands the result to the caller.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["QMatmulCall", "finish", "native", "plain", "prepare", "run"]

FLOATS = "float64, float32, float16 or bfloat16"


@dataclass(frozen=True, slots=True)
class QMatmulCall:
    """One product over matrices whose rows are contiguous, all on one device.

    Attributes
    ----------
    x : array (m, inputs)
        float64, float32, float16 or bfloat16; a row has its elements side by side.
    weight : flcore.quantization.QuantizedTensor
        W (n, k): k inputs and n outputs, or the other way round for a gradient.
    out : array (m, outputs)
        Where the result goes: the dtype of `x`, contiguous.
    bias : array (outputs,) or None
        float32 (float64 beside a float64 `x`), contiguous; so are `low` and `up`.
    low : array (m, rank) or None
        Left factor of a product of low rank that is added.
    up : array or None
        Right factor, (outputs, rank), for a gradient (rank, outputs).
    act_block : int
        Values of a row of `x` that share a scale, where activations are quantized; 0: all.
    asymmetric : bool
        Whether quantized activations have a zero point.
    given : array or None
        The caller's `out` where it cannot be written as it is; `finish` copies into it.
    shape : tuple of int
        Shape of the result.
    """

    x: Any
    weight: Any
    out: Any
    bias: Any = None
    low: Any = None
    up: Any = None
    act_block: int = 0
    asymmetric: bool = False
    given: Any = None
    shape: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Rank of the product that is added."""
        return 0 if self.low is None else int(self.low.shape[1])


def prepare(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    low: Any = None,
    up: Any = None,
    out: Any = None,
    gradient: bool = False,
    act_block: int = 0,
    asymmetric: bool = False,
    name: str = "x",
) -> QMatmulCall:
    """Check the arguments of one product and return them as a call.

    Parameters
    ----------
    x, weight, bias, low, up, out
        As `flcore.ops.qmatmul` takes them.
    gradient : bool
        ``x W`` in the place of ``x W^T``: x has n columns, the result k.
    act_block, asymmetric
        Handed on.
    name : str
        What the caller calls `x`, for errors.

    Raises
    ------
    DTypeError
        An argument that is no array of a floating dtype, of another library or device than `x`,
        or a weight that is not quantized.
    InvalidInputError
        Shapes that do not fit, one of `low` and `up` alone, an `out` that cannot be written.
    """
    from flcore.quantization import QuantizedTensor

    if not isinstance(weight, QuantizedTensor):
        raise DTypeError(f"weight: expected a QuantizedTensor, got {type(weight).__name__}")
    n, k = (int(size) for size in weight.shape)
    inputs, outputs = (n, k) if gradient else (k, n)
    _check_float(x, name)
    if len(x.shape) < 1 or x.shape[-1] != inputs:
        axis = "rows" if gradient else "columns"
        raise InvalidInputError(
            f"{name}: expected a last dimension of {inputs}, the {axis} of the weight ({n} x {k}), "
            f"got the shape {tuple(x.shape)}"
        )
    device = _arrays.device_of(x)
    held = _arrays.device_of(weight.codes)
    if held != device:
        raise DTypeError(f"weight: expected it on {device} as {name} is, got {held}")
    lead = tuple(int(size) for size in x.shape[:-1])
    rows = _rows(x, inputs)
    m = int(rows.shape[0])
    bias = _constant(bias, "bias", x, name, (outputs,))
    if (low is None) != (up is None):
        there, absent = ("low", "up") if up is None else ("up", "low")
        raise InvalidInputError(f"{absent}: expected an array beside {there}, got None")
    if low is not None:
        _check_like(low, "low", x, name)
        if len(low.shape) < 1 or tuple(low.shape[:-1]) not in (lead, (m,)):
            raise InvalidInputError(
                f"low: expected the shape {(*lead, 'rank')}, got {tuple(low.shape)}"
            )
        rank = int(low.shape[-1])
        low = _constant(low.reshape((m, rank)), "low", x, name, (m, rank))
        up = _constant(up, "up", x, name, (rank, outputs) if gradient else (outputs, rank))
    shape = (*lead, outputs)
    given = target = None
    if out is not None:
        given, target = _target(out, x, name, shape, (x, bias, low, up))
    if target is None:
        target = _empty(x, (m, outputs))
    return QMatmulCall(rows, weight, target, bias, low, up, act_block, asymmetric, given, shape)


def plain(
    kernel: Callable[..., None],
    x: Any,
    weight: Any,
    act_block: Callable[[Any], int] | int = 0,
    gradient: bool = False,
) -> Any:
    """Return the result where nothing has to be prepared, None where `prepare` must look.

    Between two products of one row most of what Python touches has left the caches.

    Parameters
    ----------
    kernel : function
        ``*_plain`` of the core.
    x, weight, gradient
        As for `prepare`.
    act_block : int or function of the weight
        As for `prepare`.
    """
    kind = type(x)
    if kind is np.ndarray:
        code = _CODES.get(x.dtype)
        if code is None or not x.flags.c_contiguous:
            return None
    else:
        torch: Any = sys.modules.get("torch")
        if torch is None or kind is not torch.Tensor or x.device.type != "cpu":
            return None
        code = _torch_code(x.dtype)
        if code is None or not x.is_contiguous():
            return None
    get = getattr(weight, "kernel_handle", None)
    handle = None if get is None or os.environ.get("FLCORE_BACKEND") else get()
    shape = x.shape
    if handle is None or not shape:
        return None
    n, k = weight.shape
    inputs, outputs = (n, k) if gradient else (k, n)
    m = math.prod(shape[:-1])
    if shape[-1] != inputs or not (m and inputs and outputs):
        return None
    threads = _native.threads_for(n * k // 4 * max(1, m // 2))
    block = act_block if isinstance(act_block, int) else act_block(weight)
    if kind is np.ndarray:
        out = np.empty((*shape[:-1], outputs), x.dtype)
        kernel(handle, m, _arrays.address(x), _arrays.address(out), code, block, threads)
    else:
        out = torch.empty((*shape[:-1], outputs), dtype=x.dtype)
        kernel(handle, m, x.data_ptr(), out.data_ptr(), code, block, threads)
    return out


# dtypes of kernels, as NumPy and, once met, torch name them
_CODES: dict[Any, int] = {
    np.dtype(name): _arrays.DTYPE_CODES[name] for name in ("float32", "float16")
}


def _torch_code(dtype: Any) -> int | None:
    code = _CODES.get(dtype)
    if code is None and str(dtype) in ("torch.float32", "torch.float16", "torch.bfloat16"):
        code = _CODES[dtype] = _arrays.DTYPE_CODES[str(dtype).removeprefix("torch.")]
    return code


def run(op: str, call: QMatmulCall, variant: str | None, name: str = "x") -> Any:
    """Run a call by a variant of `op` and return the result in the caller's shape.

    float64 is computed by the reference unless a variant was named.

    Raises
    ------
    DTypeError
        A float64 `x` beside a variant that computes in float32.
    VariantUnavailableError
        The variant cannot run here.
    """
    wide = _arrays.dtype_name(call.x) == "float64"
    if wide and variant is None:
        variant = "reference"
    function = _variants.choose(op, _arrays.device_of(call.x), variant)
    if wide and variant != "reference":
        raise DTypeError(
            f"{name}: expected float32, float16 or bfloat16 for the variant {variant}, got float64"
        )
    if _arrays.numel(call.out):
        function(call)
    return finish(call)


def finish(call: QMatmulCall) -> Any:
    """Return what a variant has written as the caller wants it."""
    if call.given is not None:
        if not _same_memory(call.given, call.out):
            _arrays.assign(call.given, call.out)
        return call.given
    return call.out.reshape(call.shape)


def native(call: QMatmulCall, threads: int | None = None) -> dict[str, int]:
    """Arguments of a call for csrc/bindings/qmatmul_call.h; `call` must outlive their use.

    `threads` is that of `flcore.get_num_threads` for large products, unless given.
    """
    if threads is None:
        n, k = call.weight.shape
        threads = _native.threads_for(n * k // 4 * max(1, call.x.shape[0] // 2))
    code = _arrays.DTYPE_CODES[_arrays.dtype_name(call.x)]
    return {
        "m": int(call.x.shape[0]),
        "x": _arrays.address(call.x) if _arrays.numel(call.x) else 0,
        "x_dtype": code,
        "x_stride": _row_stride(call.x),
        "y": _arrays.address(call.out),
        "y_dtype": code,
        "y_stride": _row_stride(call.out),
        "bias": 0 if call.bias is None else _arrays.address(call.bias),
        "low": 0 if not call.rank else _arrays.address(call.low),
        "up": 0 if not call.rank else _arrays.address(call.up),
        "rank": call.rank,
        "act_block": call.act_block,
        "threads": threads,
    }


# ---- checks --------------------------------------------------------------------------------------


def _check_float(x: Any, name: str) -> None:
    if not _arrays.is_array(x):
        raise DTypeError(
            f"{name}: expected a NumPy array or a torch tensor, got {type(x).__name__}"
        )
    if not _arrays.is_float(x):
        raise DTypeError(f"{name}: expected {FLOATS}, got {_arrays.dtype_name(x)}")
    if _arrays.is_torch(x):
        strided = x.layout == sys.modules["torch"].strided
        if not strided or x.device.type not in ("cpu", "cuda"):
            raise DTypeError(
                f"{name}: expected a dense tensor on cpu or cuda, got {x.layout} on {x.device}"
            )


def _check_like(y: Any, name: str, x: Any, x_name: str) -> None:
    """Check that y is a floating array of the library and device of x."""
    _check_float(y, name)
    if isinstance(y, np.ndarray) != isinstance(x, np.ndarray):
        kind = "a NumPy array" if isinstance(x, np.ndarray) else "a torch tensor"
        raise DTypeError(f"{name}: expected {kind} as {x_name} is, got {type(y).__name__}")
    if _arrays.device_of(y) != _arrays.device_of(x):
        raise DTypeError(
            f"{name}: expected it on {_arrays.device_of(x)} as {x_name} is, "
            f"got {_arrays.device_of(y)}"
        )


def _constant(y: Any, name: str, x: Any, x_name: str, shape: tuple[int, ...]) -> Any:
    """Contiguous float32 (float64 beside a float64 x) of a bias or a factor of low rank."""
    if y is None:
        return None
    _check_like(y, name, x, x_name)
    if tuple(y.shape) != shape:
        raise InvalidInputError(f"{name}: expected the shape {shape}, got {tuple(y.shape)}")
    dtype = "float64" if _arrays.dtype_name(x) == "float64" else "float32"
    if isinstance(y, np.ndarray):
        return np.ascontiguousarray(y, dtype=dtype).reshape(shape)
    return y.detach().to(getattr(sys.modules["torch"], dtype)).contiguous()


# ---- rows ----------------------------------------------------------------------------------------


def _rows(x: Any, width: int) -> Any:
    """Return x as a matrix of contiguous rows, copied only where it must be."""
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="))
        if x.ndim != 2 or not _row_contiguous(x.shape, x.strides, x.itemsize):
            x = np.ascontiguousarray(x).reshape((-1, width) if width else (_count(x), 0))
        return x
    x = x.detach()
    if x.dim() != 2 or not _row_contiguous(x.shape, x.stride(), 1):
        x = x.contiguous().reshape((_count(x), width))
    return x


def _count(x: Any) -> int:
    """Rows of x: the product of all its dimensions but the last."""
    count = 1
    for size in x.shape[:-1]:
        count *= int(size)
    return count


def _row_contiguous(shape: Any, strides: Any, unit: int) -> bool:
    """Whether a kernel can step through a matrix; rows may lie apart, but in whole elements."""
    return bool((shape[1] <= 1 or strides[1] == unit) and (shape[0] <= 1 or strides[0] % unit == 0))


def _row_stride(x: Any) -> int:
    if x.shape[0] <= 1:
        return int(x.shape[1])
    return int(x.strides[0] // x.itemsize if isinstance(x, np.ndarray) else x.stride(0))


def _empty(x: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(x, np.ndarray):
        return np.empty(shape, x.dtype.newbyteorder("="))
    return sys.modules["torch"].empty(shape, dtype=x.dtype, device=x.device)


def _target(
    out: Any, x: Any, name: str, shape: tuple[int, ...], read: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Return the caller's `out` and a matrix on its memory, or None where it has gaps."""
    _check_like(out, "out", x, name)
    if _arrays.dtype_name(out) != _arrays.dtype_name(x):
        raise DTypeError(
            f"out: expected {_arrays.dtype_name(x)} as {name} is, got {_arrays.dtype_name(out)}"
        )
    if tuple(out.shape) != shape:
        raise InvalidInputError(f"out: expected the shape {shape}, got {tuple(out.shape)}")
    numpy = isinstance(out, np.ndarray)
    if numpy and not out.flags.writeable:
        raise InvalidInputError("out: the array is read-only; pass one that can be written")
    contiguous = out.flags.c_contiguous and out.dtype.isnative if numpy else out.is_contiguous()
    if not contiguous:
        return out, None
    if any(_share(out, y) for y in read if y is not None):
        return out, None  # written when all arguments have been read
    flat = out if numpy else out.detach()
    return out, flat.reshape((_count(out), shape[-1]))


def _share(out: Any, y: Any) -> bool:
    first, last = _span(out)
    begin, end = _span(y)
    return first < end and begin < last


def _span(x: Any) -> tuple[int, int]:
    """Addresses of the first byte of an array and of what follows its last one."""
    if not _arrays.numel(x):
        return 0, 0
    strides = x.strides if isinstance(x, np.ndarray) else [x.element_size() * t for t in x.stride()]
    reach = [(size - 1) * step for size, step in zip(x.shape, strides, strict=True)]
    item = x.itemsize if isinstance(x, np.ndarray) else x.element_size()
    first = _arrays.address(x)
    return first + sum(min(r, 0) for r in reach), first + sum(max(r, 0) for r in reach) + item


def _same_memory(given: Any, out: Any) -> bool:
    return not _arrays.numel(given) or _arrays.address(given) == _arrays.address(out)

"""Views of NumPy and torch arrays without copies.

A kernel needs an address, a length, a dtype and a device. Only here are they taken from an array,
and only here and in `_updates` are errors about arrays worded. torch is never imported here: a
tensor can only come from an imported torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from flcore._native import core
from flcore.errors import DTypeError, InvalidInputError

__all__ = [
    "DTYPE_CODES",
    "ROW_CODES",
    "View",
    "address",
    "is_array",
    "overlap",
    "queue",
    "to_float64",
    "view",
    "writable_view",
]

DTYPE_CODES = {"float64": 0, "float32": 1, "float16": 2, "bfloat16": 3}  # DType in csrc/api.h
ROW_CODES = {**DTYPE_CODES, "int8": 4}  # what `combine` reads when the rows come with scales
FLOATS = "float64, float32, float16 or bfloat16"


def is_torch(x: Any) -> bool:
    """Whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_array(x: Any) -> bool:
    """Whether `x` is a NumPy array or a torch tensor."""
    return isinstance(x, np.ndarray) or is_torch(x)


_dtype_names: dict[Any, str] = {}  # asking NumPy for the name takes 3 us, this 0.05


def dtype_name(x: Any) -> str:
    """Name of an array's dtype, the same for NumPy and torch ("float32", "int64", "bool")."""
    name = _dtype_names.get(x.dtype)
    if name is None:
        name = x.dtype.name if isinstance(x, np.ndarray) else str(x.dtype).removeprefix("torch.")
        _dtype_names[x.dtype] = name
    return name


def device_of(x: Any) -> str:
    """Return "cpu", "cuda:0", ... ."""
    return "cpu" if isinstance(x, np.ndarray) else str(x.device)


def is_float(x: Any) -> bool:
    """Whether kernels can read the dtype of `x`."""
    return dtype_name(x) in DTYPE_CODES


def numel(x: Any) -> int:
    """Return the number of elements."""
    return int(x.size if isinstance(x, np.ndarray) else x.numel())


def address(x: Any) -> int:
    """Return the address of the first element (0.1 us; asking NumPy itself takes 2)."""
    return int(core.address(x) if isinstance(x, np.ndarray) else x.data_ptr())


# ---- one array ---------------------------------------------------------------------------------


class View(NamedTuple):
    """One contiguous array as a kernel sees it.

    Attributes
    ----------
    ptr : int
        Address of the first element (0 when there is none).
    numel : int
        Number of elements.
    dtype : str
        Key of `ROW_CODES`.
    device : str
        "cpu" or "cuda:<index>".
    array : array
        Owner of the memory; kept alive for as long as the view is.
    """

    ptr: int
    numel: int
    dtype: str
    device: str
    array: Any

    @property
    def code(self) -> int:
        """The dtype's code in csrc/api.h."""
        return ROW_CODES[self.dtype]


def view(x: Any, name: str = "array", codes: dict[str, int] = DTYPE_CODES) -> View:
    """View `x` for reading; data that is not contiguous and native is copied once.

    Raises
    ------
    DTypeError
        `x` is not an array of a dtype among `codes`.
    """
    if isinstance(x, np.ndarray):
        dtype = dtype_name(x)
        if dtype not in codes:
            raise DTypeError(f"{name}: expected {_either(codes)}, got {dtype}")
        if not (x.flags.c_contiguous and x.dtype.isnative):
            x = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
        return View(address(x) if x.size else 0, x.size, dtype, "cpu", x)
    if not is_torch(x):
        raise DTypeError(
            f"{name}: expected a NumPy array or a torch tensor, got {type(x).__name__}"
        )
    dtype = dtype_name(x)
    if dtype not in codes:
        raise DTypeError(f"{name}: expected {_either(codes)}, got {dtype}")
    torch = sys.modules["torch"]
    if x.layout != torch.strided or x.device.type not in ("cpu", "cuda"):
        raise DTypeError(
            f"{name}: expected a dense tensor on cpu or cuda, got {x.layout} on {x.device}"
        )
    x = x.detach().contiguous()
    return View(address(x), x.numel(), dtype, str(x.device), x)


def _either(codes: dict[str, int]) -> str:
    *others, last = codes
    return f"{', '.join(others)} or {last}"


def writable_view(x: Any, name: str, like: View) -> View | None:
    """View `x` for writing what has the size, dtype and device of `like`.

    Returns None when `x` can be written but is not contiguous: the caller then copies into it.

    Raises
    ------
    InvalidInputError
        `x` is read-only or has another number of elements.
    DTypeError
        `x` has another dtype, kind or device.
    """
    if not is_array(x) or dtype_name(x) != like.dtype or device_of(x) != like.device:
        got = f"{dtype_name(x)} on {device_of(x)}" if is_array(x) else type(x).__name__
        raise DTypeError(f"{name}: expected {like.dtype} on {like.device}, got {got}")
    if numel(x) != like.numel:
        raise InvalidInputError(f"{name}: expected {like.numel} values, got {numel(x)}")
    if isinstance(x, np.ndarray):
        if not x.flags.writeable:
            raise InvalidInputError(f"{name}: the array is read-only; pass one that can be written")
        return view(x, name) if x.flags.c_contiguous and x.dtype.isnative else None
    return view(x, name) if x.is_contiguous() else None


ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def overlap(one: Iterable[View], other: Iterable[View]) -> bool:
    """Whether any array of `one` shares a byte with any array of `other`."""

    def spans(views: Iterable[View]) -> np.ndarray:
        ends = [(v.ptr, v.ptr + v.numel * ITEMSIZE[v.dtype]) for v in views if v.numel]
        return np.array(ends, dtype=np.uint64).reshape(-1, 2)

    a, b = spans(one), spans(other)
    # spans that begin before the end of x, less those that end before it begins, meet x
    begun = np.searchsorted(np.sort(b[:, 0]), a[:, 1], side="left")
    ended = np.searchsorted(np.sort(b[:, 1]), a[:, 0], side="right")
    return bool((begun > ended).any())


def to_float64(x: Any) -> np.ndarray:
    """Copy any array into a flat float64 NumPy array (for `reference/`)."""
    if not isinstance(x, np.ndarray):
        x = x.detach().cpu().to(sys.modules["torch"].float64).numpy()
    return np.array(x, dtype=np.float64).reshape(-1)


def assign(target: Any, values: Any) -> None:
    """Write `values` (same number of elements, NumPy or the same library) into `target`."""
    if isinstance(target, np.ndarray):
        np.copyto(target, np.asarray(values).reshape(target.shape), casting="unsafe")
    else:
        torch = sys.modules["torch"]
        source = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        target.detach().copy_(source.reshape(target.shape))


def empty_like(x: Any, dtype: str | None = None) -> Any:
    """Return an uninitialised contiguous array of the shape, dtype (or `dtype`) and device of `x`.

    Raises
    ------
    DTypeError
        NumPy does not know the dtype: bfloat16, unless ml_dtypes is imported.
    """
    if isinstance(x, np.ndarray):
        if dtype is None:
            return np.empty(x.shape, dtype=x.dtype.newbyteorder("="))
        try:
            return np.empty(x.shape, dtype=dtype)
        except TypeError:
            raise DTypeError(
                f"NumPy has no {dtype} of its own: import ml_dtypes first, or use torch tensors"
            ) from None
    torch = sys.modules["torch"]
    kind = x.dtype if dtype is None else getattr(torch, dtype)
    return torch.empty(x.shape, dtype=kind, device=x.device)


def queue(device: str) -> tuple[int, int]:
    """Return the index of a CUDA device and the address of torch's current stream on it."""
    stream = sys.modules["torch"].cuda.current_stream(device)
    return stream.device.index, stream.cuda_stream

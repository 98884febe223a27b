"""Small differences between NumPy arrays and torch tensors as parts of a quantised weight.

bfloat16 parts are uint16 arrays of their bits in NumPy and bfloat16 tensors in torch.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from flcore import _arrays
from flcore.errors import DTypeError

__all__ = [
    "STORED",
    "aligned",
    "contiguous",
    "empty",
    "like",
    "nbytes",
    "output_dtype",
    "part_dtype",
    "to_numpy",
    "to_torch",
]

# NumPy's dtypes of the storage types
STORED = {"uint8": "uint8", "float16": "float16", "bfloat16": "uint16", "float32": "float32"}


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array that starts at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -_arrays.address(raw) % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def part_dtype(x: Any, wanted: str) -> bool:
    """Whether an array has the storage type `wanted`, uint16 being bfloat16 in NumPy."""
    name = _arrays.dtype_name(x)
    return name == wanted or (wanted == "bfloat16" and name == "uint16" and not _arrays.is_torch(x))


def to_numpy(x: Any) -> np.ndarray:
    """Return the part as a NumPy array, without a copy where torch holds it on the CPU."""
    if isinstance(x, np.ndarray):
        return x.view(np.uint16) if x.dtype.name == "bfloat16" else x
    torch = sys.modules["torch"]
    x = x.detach().cpu().contiguous()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def to_torch(x: Any, device: Any = None) -> Any:
    """Return the part as a torch tensor."""
    from flcore._extras import require

    torch = require("torch", "torch")
    if isinstance(x, np.ndarray):
        x = to_numpy(x)
        if not x.flags.writeable:
            x = x.copy()
        if x.dtype == np.uint16:
            x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        else:
            x = torch.from_numpy(x)
    return x if device is None else x.to(device)


def nbytes(x: Any) -> int:
    """Return the bytes of an array's elements."""
    return _arrays.numel(x) * int(x.itemsize if isinstance(x, np.ndarray) else x.element_size())


def like(x: np.ndarray, other: Any) -> Any:
    """Return a NumPy part as what `other` is: NumPy, or torch on its device."""
    return x if isinstance(other, np.ndarray) else to_torch(x, other.device)


def contiguous(x: Any) -> Any:
    """Return the array itself, or a contiguous copy."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()


def empty(shape: tuple[int, ...], dtype: str, other: Any) -> Any:
    """Return an uninitialised array of the kind and on the device of `other`.

    Raises
    ------
    DTypeError
        NumPy does not know the dtype: bfloat16, unless ml_dtypes is imported.
    """
    if isinstance(other, np.ndarray):
        return _arrays.empty_like(np.broadcast_to(np.float32(0), shape), dtype)
    torch = sys.modules["torch"]
    return torch.empty(shape, dtype=getattr(torch, dtype), device=other.device)


def output_dtype(dtype: Any) -> str:
    """Return the name of a floating dtype given as a name, a NumPy or a torch dtype."""
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in _arrays.DTYPE_CODES:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            pass
    if name not in _arrays.DTYPE_CODES:
        raise DTypeError(f"dtype: expected {_arrays.FLOATS}, got {dtype!r}")
    return name

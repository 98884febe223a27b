"""Buffers for large outputs that are handed out again once nobody refers to them.

The first write to a fresh page costs more than a kernel that streams over it: the operating system
clears it first. A gradient of the size of the logits is such an output in every step of a training.
Outputs of `SMALLEST` bytes and more in CPU memory therefore come from a small pool of buffers of
huge pages; a buffer is free again when no array or tensor on it is left, which its reference count
tells.

At most `BUFFERS` buffers are kept, none is used for less than four fifths of its size, and
`clear_cache` drops those that are free. ``FLCORE_OUTPUT_POOL=0`` turns the pool off.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from typing import Any

import numpy as np

__all__ = ["BUFFERS", "SMALLEST", "clear_cache", "empty_like"]

SMALLEST = 4 << 20  # bytes; malloc gives memory of this size back to the system when it is freed
BUFFERS = 4
HUGE_PAGE = 2 << 20

_lock = threading.Lock()
# Arrays of bytes that own their memory: every view of a view of theirs refers to them directly.
# The last one was handed out last.
_buffers: list[np.ndarray] = []


def empty_like(x: Any) -> Any:
    """Return an uninitialised array of shape, dtype, device and order of dimensions of `x`.

    A CPU array of `SMALLEST` bytes or more may be memory that was handed out before.
    """
    if isinstance(x, np.ndarray):
        dtype = x.dtype.newbyteorder("=")
        if x.nbytes < SMALLEST or not _enabled():
            return np.empty_like(x, dtype=dtype, subok=False)
        # strides of a dense array whose dimensions are in the order of those of x
        order = sorted(range(x.ndim), key=lambda d: (-abs(x.strides[d]), d))
        base = _take(x.nbytes).view(dtype)
        dense = base.reshape([x.shape[d] for d in order])
        return dense.transpose(np.argsort(order))
    torch = sys.modules["torch"]
    if x.device.type != "cpu" or x.numel() * x.element_size() < SMALLEST or not _enabled():
        return torch.empty_like(x)
    size = x.numel() * x.element_size()
    strides = torch.empty_like(x, device="meta").stride()
    base = torch.from_numpy(_take(size)).view(x.dtype)
    return base.as_strided(x.shape, strides)


def clear_cache() -> None:
    """Give the memory of all buffers that nobody uses back to the operating system."""
    with _lock:
        for i in reversed(range(len(_buffers))):
            if _is_free(i):
                del _buffers[i]


def _enabled() -> bool:
    return os.environ.get("FLCORE_OUTPUT_POOL", "1") != "0"


def _is_free(i: int) -> bool:
    # references: the list, and the argument of getrefcount
    return sys.getrefcount(_buffers[i]) <= 2


def _take(size: int) -> np.ndarray:
    """Return `size` bytes that begin with a huge page."""
    with _lock:
        for i in range(len(_buffers)):
            room = _buffers[i].nbytes - HUGE_PAGE
            if size <= room <= _whole_pages(size + size // 4) and _is_free(i):
                _buffers.append(_buffers.pop(i))
                return _aligned(_buffers[-1], size)
        buffer = _allocate(size)
        if len(_buffers) >= BUFFERS:
            for i in range(len(_buffers)):
                if _is_free(i):
                    del _buffers[i]
                    break
            else:
                return _aligned(buffer, size)  # all are in use: this one is not kept
        _buffers.append(buffer)
        return _aligned(buffer, size)


def _whole_pages(size: int) -> int:
    return -(-size // HUGE_PAGE) * HUGE_PAGE


def _allocate(size: int) -> np.ndarray:
    """Memory that the system may serve with huge pages, and one page more to begin with one."""
    memory = mmap.mmap(-1, _whole_pages(size) + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages
    return np.frombuffer(memory, np.uint8)


def _aligned(buffer: np.ndarray, size: int) -> np.ndarray:
    skip = -buffer.ctypes.data % HUGE_PAGE
    return buffer[skip : skip + size]


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

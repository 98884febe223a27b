"""What the weighted sums in Triton share: loads by address, the sum over rows, the host's table.

Exactness: the operations of ``csrc/cpu/combine.isa.cpp`` in the same order. Launches switch off
the fusion of multiply and add (``OPTIONS``), rounding to bfloat16 is integer arithmetic, so the
bits are those of the CPU kernel, in the interpreter too.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

__all__ = [
    "add_rows",
    "bfloat16_bits",
    "divided",
    "find_layer",
    "load_some",
    "pointer",
    "store_some",
    "store_typed",
    "sum_flags",
    "sum_type",
    "to_device",
    "widen",
]

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # a product is rounded before it is added
ROWS = tl.constexpr(4)  # rows whose loads are in flight together

F64, F32, F16, BF16 = (tl.constexpr(code) for code in range(4))  # DType in csrc/api.h
ACCUMULATE = {"float32": 0, "float64": 1, "reproducible": 2}  # Accumulate in csrc/api.h
BINS = tl.constexpr(2)
NONFINITE, OUT_OF_RANGE = tl.constexpr(1), tl.constexpr(2)  # CombineFlags in csrc/api.h

INFINITY = tl.constexpr(float("inf"))
BIN_LIMIT = tl.constexpr(2.0**46)
CUT_0, CUT_1, CUT_2 = (tl.constexpr(1.5 * 2.0**52 * 2.0**e) for e in (7, -33, -73))  # BIN_UNIT


# ---- loads and stores --------------------------------------------------------------------------


@triton.jit
def pointer(address_ptr, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Load an address from the table; bfloat16 travels as its bits."""
    address = tl.load(address_ptr)
    if D == F64:
        at = address.to(tl.pointer_type(tl.float64))
    elif D == F32:
        at = address.to(tl.pointer_type(tl.float32))
    elif D == F16:
        at = address.to(tl.pointer_type(tl.float16))
    else:
        at = address.to(tl.pointer_type(tl.uint16))
    return tl.multiple_of(at, 16) if ALIGNED else at


@triton.jit
def widen(x, D: tl.constexpr, A: tl.constexpr):
    """Convert stored values to the type of the sums (A: a code of ACCUMULATE), exactly."""
    if D == BF16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if A == 0:
        return x.to(tl.float32)
    else:
        return x.to(tl.float64)


@triton.jit
def bfloat16_bits(x):
    """Round to nearest even; float64 goes through a float32 rounded to odd, so it rounds once."""
    if x.dtype == tl.float64:
        near = x.to(tl.float32)
        back = near.to(tl.float64)
        u = near.to(tl.uint32, bitcast=True)
        toward_zero = tl.where(tl.abs(back) > tl.abs(x), u - 1, u)
        u = tl.where((back == x) | (x != x), u, toward_zero | 1)
    else:
        u = x.to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    is_nan = (u & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, (u >> 16) | 0x40, rounded).to(tl.uint16)


@triton.jit
def find_layer(entries_ptr, stride, layers, tile):
    """Return the last layer whose first tile is at or before `tile`."""
    low = layers * 0
    high = layers - 1
    while low < high:
        middle = (low + high + 1) // 2
        starts_before = tl.load(entries_ptr + middle * stride) <= tile
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle - 1)
    return low


@triton.jit
def load_some(pointers, keep, FULL: tl.constexpr):
    """Load without a mask where the block is full: a masked load is not vectorised."""
    if FULL:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=keep)


@triton.jit
def store_some(pointers, values, keep, FULL: tl.constexpr):
    """Store, as `load_some` loads."""
    if FULL:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=keep)


@triton.jit
def store_typed(pointers, values, keep, D: tl.constexpr, FULL: tl.constexpr):
    """Round float32 or float64 values to the dtype D and store them."""
    if D == BF16:
        store_some(pointers, bfloat16_bits(values), keep, FULL)
    else:
        store_some(pointers, values.to(pointers.dtype.element_ty), keep, FULL)


# ---- the sum over rows -------------------------------------------------------------------------


@triton.jit
def add_rows(
    acc,
    acc1,
    acc2,
    weights_ptr,
    addresses_ptr,
    index_ptr,
    rows,
    base,
    at,
    inside,
    D: tl.constexpr,
    A: tl.constexpr,
    INDEXED: tl.constexpr,
    MODELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add weight[i] * row[i] to the sums for all rows; returns them, and where terms were too wide.

    acc1, acc2: the other bins of reproducible sums, else anything. INDEXED: row i is the one that
    index_ptr[i] names. MODELS: the rows are models, of which the sum takes x - base.
    """
    beyond = (at * 0).to(tl.int32)
    for first in range(0, rows, ROWS):
        for r in tl.static_range(ROWS):
            i = tl.minimum(first + r, rows - 1)
            here = first + r < rows
            row = tl.load(index_ptr + i) if INDEXED else i
            x_ptr = pointer(addresses_ptr + row, D, ALIGNED) + at
            x = widen(load_some(x_ptr, inside, FULL), D, A)
            if MODELS:
                x = x - base
            w = tl.load(weights_ptr + i).to(tl.float64, bitcast=True)
            if A == BINS:
                p = w * x
                q0 = (p + CUT_0) - CUT_0
                p1 = p - q0
                q1 = (p1 + CUT_1) - CUT_1
                q2 = ((p1 - q1) + CUT_2) - CUT_2
                acc = tl.where(here, acc + q0, acc)
                acc1 = tl.where(here, acc1 + q1, acc1)
                acc2 = tl.where(here, acc2 + q2, acc2)
                wide = ~((p < BIN_LIMIT) & (p > -BIN_LIMIT))  # true for NaN too
                beyond = beyond | (wide & inside & here).to(tl.int32)
            elif A == 0:
                acc = tl.where(here, acc + w.to(tl.float32) * x, acc)
            else:
                acc = tl.where(here, acc + w * x, acc)
    return acc, acc1, acc2, beyond


@triton.jit
def sum_flags(total, beyond, inside, A: tl.constexpr):
    """CombineFlags of finished sums."""
    finite = (total < INFINITY) & (total > -INFINITY)  # false for NaN
    flags = tl.max(tl.where(finite | ~inside, 0, NONFINITE), axis=0)
    if A == BINS:
        flags = flags | (tl.max(beyond, axis=0) * OUT_OF_RANGE)
    return flags


@triton.jit
def divided(total, divisor):
    """Divide the sums, float32 ones in float64 with one rounding."""
    return (total.to(tl.float64) / divisor).to(total.dtype)


# ---- host side ---------------------------------------------------------------------------------


def sum_type(accumulate: str, code: int) -> int:
    """Return the code A of the sums for rows of a dtype: float64 rows need float64 at least."""
    return 1 if accumulate == "float32" and code == F64.value else ACCUMULATE[accumulate]


def to_device(words: np.ndarray, device: str) -> torch.Tensor:
    """Copy the table to the device, in the order of the current stream.

    A CUDA graph may not copy from memory that is gone when it replays: while one is captured the
    words are written by fill kernels, which carry their value.
    """
    if device == "cpu":
        return torch.from_numpy(words)
    if torch.cuda.is_current_stream_capturing():
        table = torch.empty(len(words), dtype=torch.int64, device=device)
        for slot, word in zip(table, words.tolist(), strict=True):
            slot.fill_(word)
        return table
    return torch.from_numpy(words).to(device, non_blocking=True)  # staged at once: pageable memory

"""Weighted sum of n client rows in Triton, each row a list of layers.

    acc[j] = start[j] + w_0 x_0[j] + w_1 x_1[j] + ...      in client order, multiply then add

Reads every value once and writes one row: ``n*s + s`` bytes a coordinate (s = bytes of the dtype);
sums stay in registers. One launch for all layers of a dtype, through a table of addresses.

Exactness: the operations of ``csrc/cpu/combine.isa.cpp`` in the same order. Launches switch off
the fusion of multiply and add (``enable_fp_fusion=False``), rounding to bfloat16 is integer
arithmetic, so the bits are those of the CPU kernel, in the interpreter too. The reproducible bins
are explained in the CPU file. Payloads of NaNs are not promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from flcore import _arrays

__all__ = ["combine", "nonfinite"]

BLOCK = 2048  # coordinates a program
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # a product is rounded before it is added
ROWS = tl.constexpr(4)  # rows whose loads are in flight together
HEAD = tl.constexpr(4)  # words of a layer in the table before its row addresses

F64, F32, F16, BF16 = (tl.constexpr(code) for code in range(4))  # DType in csrc/api.h
ACCUMULATE = {"float32": 0, "float64": 1, "reproducible": 2}  # Accumulate in csrc/api.h
BINS = tl.constexpr(2)
NONFINITE, OUT_OF_RANGE = tl.constexpr(1), tl.constexpr(2)  # CombineFlags in csrc/api.h

INFINITY = tl.constexpr(float("inf"))
BIN_LIMIT = tl.constexpr(2.0**46)
CUT_0, CUT_1, CUT_2 = (tl.constexpr(1.5 * 2.0**52 * 2.0**e) for e in (7, -33, -73))  # BIN_UNIT


# ---- kernels -----------------------------------------------------------------------------------


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
def sum_block(
    table_ptr,
    entry_ptr,
    flags_ptr,
    rows,
    begin,
    numel,
    D: tl.constexpr,
    A: tl.constexpr,
    EMPTY: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_OUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one block of one layer over all rows, and write it."""
    at = begin + tl.arange(0, BLOCK)
    inside = at < numel
    state_ptr = pointer(entry_ptr + 3, F32 if A == 0 else F64, ALIGNED) + at
    # -0 + p is p for every p, a zero of either sign included: a sum that starts from its first term
    zero = tl.full([BLOCK], 0 if EMPTY else 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
    if A == 0:
        acc = load_some(state_ptr, inside, FULL) if HAS_STATE else zero
    else:
        if A == BINS:
            zero = tl.zeros([BLOCK], tl.float32)
            acc1 = load_some(state_ptr + numel, inside, FULL) if HAS_STATE else zero.to(tl.float64)
            acc2 = (
                load_some(state_ptr + 2 * numel, inside, FULL) if HAS_STATE else zero.to(tl.float64)
            )
            beyond = tl.zeros([BLOCK], tl.int32)
        acc = load_some(state_ptr, inside, FULL) if HAS_STATE else zero.to(tl.float64)

    for first in range(0, rows, ROWS):
        for r in tl.static_range(ROWS):
            i = tl.minimum(first + r, rows - 1)
            here = first + r < rows
            x_ptr = pointer(entry_ptr + HEAD + i, D, ALIGNED) + at
            x = widen(load_some(x_ptr, inside, FULL), D, A)
            w = tl.load(table_ptr + 1 + i).to(tl.float64, bitcast=True)
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

    total = (acc + acc1) + acc2 if A == BINS else acc
    finite = (total < INFINITY) & (total > -INFINITY)  # false for NaN
    found = tl.where(finite | ~inside, 0, NONFINITE)
    flags = tl.max(found, axis=0)
    if A == BINS:
        flags = flags | (tl.max(beyond, axis=0) * OUT_OF_RANGE)
    tl.atomic_or(flags_ptr, flags, mask=flags != 0)

    if HAS_OUT:
        out_ptr = pointer(entry_ptr + 2, D, ALIGNED) + at
        if DIVIDE:  # float32 sums: one rounding to float32, so that casting twice changes nothing
            divisor = tl.load(table_ptr).to(tl.float64, bitcast=True)
            total = (total.to(tl.float64) / divisor).to(total.dtype)
        if D == BF16:
            store_some(out_ptr, bfloat16_bits(total), inside, FULL)
        else:
            store_some(out_ptr, total.to(out_ptr.dtype.element_ty), inside, FULL)
    else:
        store_some(state_ptr, acc, inside, FULL)
        if A == BINS:
            store_some(state_ptr + numel, acc1, inside, FULL)
            store_some(state_ptr + 2 * numel, acc2, inside, FULL)


@triton.jit(do_not_specialize=["rows", "layers"])
def combine_kernel(
    table_ptr,
    flags_ptr,
    rows,
    layers,
    D: tl.constexpr,
    A: tl.constexpr,
    EMPTY: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_OUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of BLOCK coordinates of one layer.

    table_ptr: int64 words { divisor, weight[rows], then for each layer: first tile, length, out,
    state, row[rows] }, doubles and addresses as their bits; flags_ptr: int32, or-ed with flags.
    """
    tile = tl.program_id(0)
    entries_ptr = table_ptr + 1 + rows
    layer = find_layer(entries_ptr, HEAD + rows, layers, tile)
    entry_ptr = entries_ptr + layer * (HEAD + rows)
    begin = (tile - tl.load(entry_ptr)) * BLOCK
    numel = tl.load(entry_ptr + 1)
    # fmt: off
    if begin + BLOCK <= numel:
        sum_block(table_ptr, entry_ptr, flags_ptr, rows, begin, numel, D, A, EMPTY, HAS_STATE,
                  HAS_OUT, DIVIDE, ALIGNED, True, BLOCK)
    else:
        sum_block(table_ptr, entry_ptr, flags_ptr, rows, begin, numel, D, A, EMPTY, HAS_STATE,
                  HAS_OUT, DIVIDE, ALIGNED, False, BLOCK)
    # fmt: on


@triton.jit(do_not_specialize=["rows", "layers"])
def nonfinite_kernel(table_ptr, flags_ptr, rows, layers, D: tl.constexpr, BLOCK: tl.constexpr):
    """flags[i] = 1 when row i holds a NaN or an infinity; the table is that of `combine_kernel`."""
    tile = tl.program_id(0)
    entries_ptr = table_ptr + 1 + rows
    layer = find_layer(entries_ptr, HEAD + rows, layers, tile)
    entry_ptr = entries_ptr + layer * (HEAD + rows)
    at = (tile - tl.load(entry_ptr)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(entry_ptr + 1)
    for i in range(rows):
        x = tl.load(pointer(entry_ptr + HEAD + i, D, False) + at, mask=inside, other=0)
        x = widen(x, D, 1)
        bad = tl.max(tl.where((x < INFINITY) & (x > -INFINITY), 0, 1), axis=0)
        tl.atomic_or(flags_ptr + i, bad, mask=bad != 0)


# ---- launchers ---------------------------------------------------------------------------------


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


def make_table(
    addresses: np.ndarray,
    weights: Sequence[float],
    numel: np.ndarray,
    out: np.ndarray,
    state: np.ndarray,
    divisor: float,
) -> tuple[np.ndarray, int]:
    """Return the words of `combine_kernel` for some layers, and the number of tiles.

    addresses: (rows, layers) int64; numel, out, state: (layers,) int64.
    """
    rows, layers = addresses.shape
    tiles = -(-numel // BLOCK)
    head = np.array([divisor, *weights], dtype=np.float64).view(np.int64)
    entries = np.empty((layers, HEAD.value + rows), dtype=np.int64)
    entries[:, 0] = np.cumsum(tiles) - tiles
    entries[:, 1], entries[:, 2], entries[:, 3] = numel, out, state
    entries[:, HEAD.value :] = addresses.T
    return np.concatenate([head, entries.reshape(-1)]), int(tiles.sum())


def combine(
    rows: Sequence[Sequence[Any]],
    weights: Sequence[float],
    *,
    layers: Sequence[Any],
    state: Sequence[Any] | None,
    out: Sequence[Any] | None,
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """Variant `triton` of the op; arguments as in ``flcore.ops.combine``.

    Waits for the device only when `check` asks for the flags.
    """
    device = layers[0].device if layers else "cpu"
    flags = torch.zeros(1, dtype=torch.int32, device=device)
    numel = np.array([v.numel for v in layers], dtype=np.int64)
    codes = np.array([v.code for v in layers], dtype=np.int64)
    addresses = np.array([[v.ptr for v in row] for row in rows], dtype=np.int64)
    addresses = addresses.reshape(len(rows), len(layers))
    outs = np.array([v.ptr for v in out] if out is not None else 0 * numel, dtype=np.int64)
    states = np.array([_arrays.address(s) for s in state] if state else 0 * numel, dtype=np.int64)
    joined = np.bitwise_or.reduce(addresses, axis=0, initial=0) | outs | states
    if accumulate == "reproducible":  # bins lie one after the other: each must start on 16 bytes
        joined |= 8 * numel * (states != 0)
    aligned = joined % 16 == 0
    for code in range(4):
        for is_aligned in (True, False):
            chosen = np.flatnonzero((codes == code) & (aligned == is_aligned) & (numel > 0))
            if not len(chosen):
                continue
            words, tiles = make_table(
                addresses[:, chosen], weights, numel[chosen], outs[chosen], states[chosen], divisor
            )
            table = to_device(words, device)
            wide = accumulate == "float32" and code == F64.value
            with torch.cuda.device_of(flags):
                combine_kernel[(tiles,)](
                    table,
                    flags,
                    len(rows),
                    len(chosen),
                    D=code,
                    A=1 if wide else ACCUMULATE[accumulate],
                    EMPTY=not rows,
                    HAS_STATE=state is not None,
                    HAS_OUT=out is not None,
                    DIVIDE=divisor != 1.0,
                    ALIGNED=is_aligned,
                    BLOCK=BLOCK,
                    **OPTIONS,
                )
    return int(flags.item()) if check else 0


def nonfinite(rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Variant `triton`: whether each row holds a NaN or an infinity."""
    if not rows or not rows[0]:
        return [False] * len(rows)
    device = rows[0][0].device
    flags = torch.zeros(len(rows), dtype=torch.int32, device=device)
    numel = np.array([v.numel for v in rows[0]], dtype=np.int64)
    codes = np.array([v.code for v in rows[0]], dtype=np.int64)
    addresses = np.array([[v.ptr for v in row] for row in rows], dtype=np.int64)
    for code in range(4):
        chosen = np.flatnonzero((codes == code) & (numel > 0))
        if not len(chosen):
            continue
        none = np.zeros(len(chosen), dtype=np.int64)
        words, tiles = make_table(
            addresses[:, chosen], [1.0] * len(rows), numel[chosen], none, none, 1.0
        )
        table = to_device(words, device)
        with torch.cuda.device_of(flags):
            nonfinite_kernel[(tiles,)](
                table, flags, len(rows), len(chosen), D=code, BLOCK=BLOCK, **OPTIONS
            )
    return [bool(f) for f in flags.tolist()]

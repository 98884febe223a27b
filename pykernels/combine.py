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
from flcore.pykernels.sums import (
    BINS,
    F32,
    F64,
    INFINITY,
    OPTIONS,
    add_rows,
    divided,
    find_layer,
    load_some,
    pointer,
    store_some,
    store_typed,
    sum_flags,
    sum_type,
    to_device,
    widen,
)

from flcore import _arrays

__all__ = ["combine", "nonfinite"]

BLOCK = 2048  # coordinates a program
HEAD = tl.constexpr(4)  # words of a layer in the table before its row addresses


# ---- kernels -----------------------------------------------------------------------------------


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
        acc = load_some(state_ptr, inside, FULL) if HAS_STATE else zero.to(tl.float64)
    if A != BINS:
        acc1 = acc
        acc2 = acc

    acc, acc1, acc2, beyond = add_rows(
        acc,
        acc1,
        acc2,
        table_ptr + 1,
        entry_ptr + HEAD,
        table_ptr,
        rows,
        acc,
        at,
        inside,
        D,
        A,
        False,
        False,
        ALIGNED,
        FULL,
    )
    total = (acc + acc1) + acc2 if A == BINS else acc
    flags = sum_flags(total, beyond, inside, A)
    tl.atomic_or(flags_ptr, flags, mask=flags != 0)

    if HAS_OUT:
        if DIVIDE:  # float32 sums: one rounding to float32, so that casting twice changes nothing
            total = divided(total, tl.load(table_ptr).to(tl.float64, bitcast=True))
        store_typed(pointer(entry_ptr + 2, D, ALIGNED) + at, total, inside, D, FULL)
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
            with torch.cuda.device_of(flags):
                combine_kernel[(tiles,)](
                    table,
                    flags,
                    len(rows),
                    len(chosen),
                    D=code,
                    A=sum_type(accumulate, code),
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

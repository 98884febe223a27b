"""Many weighted sums of the same client rows in Triton, one for each line of a sparse matrix.

    out[k][j] = sum_i A[k][i] x_i[j]      in client order, each bit for bit that of `combine`

The m programs of one block of coordinates run side by side, so the rows of a block come from memory
once and from the L2 cache after that: ``n*s + m*s`` bytes a coordinate.
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
    OPTIONS,
    add_rows,
    find_layer,
    pointer,
    store_typed,
    sum_flags,
    sum_type,
    to_device,
)

__all__ = ["combine_rows"]

BLOCK = 2048  # coordinates a program
HEAD = tl.constexpr(2)  # words of a layer in the table before its addresses


@triton.jit
def line_block(
    matrix_ptr,
    entry_ptr,
    flags_ptr,
    line,
    lines,
    entries,
    rows,
    begin,
    numel,
    D: tl.constexpr,
    A: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Form one block of one sum."""
    at = begin + tl.arange(0, BLOCK)
    inside = at < numel
    start = tl.load(matrix_ptr + line)
    count = (tl.load(matrix_ptr + line + 1) - start).to(tl.int32)
    if A == BINS:
        acc = tl.zeros([BLOCK], tl.float64)
    else:  # -0 + p is p for every p, a zero of either sign included
        sign = tl.where(count == 0, 0, 1).to(tl.uint32) << 31
        acc = (tl.zeros([BLOCK], tl.uint32) + sign).to(tl.float32, bitcast=True)
        if A != 0:
            acc = acc.to(tl.float64)
    index_ptr = matrix_ptr + lines + 1 + start
    # fmt: off
    acc, acc1, acc2, beyond = add_rows(
        acc, acc, acc, index_ptr + entries, entry_ptr + HEAD, index_ptr, count, acc, at, inside,
        D, A, True, False, ALIGNED, FULL
    )
    # fmt: on
    total = (acc + acc1) + acc2 if A == BINS else acc
    flags = sum_flags(total, beyond, inside, A)
    tl.atomic_or(flags_ptr, flags, mask=flags != 0)
    out_ptr = pointer(entry_ptr + HEAD + rows + line, D, ALIGNED) + at
    store_typed(out_ptr, total, inside, D, FULL)


@triton.jit(do_not_specialize=["lines", "entries", "rows", "layers"])
def rows_kernel(
    matrix_ptr,
    table_ptr,
    flags_ptr,
    lines,
    entries,
    rows,
    layers,
    D: tl.constexpr,
    A: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of one layer and a line of the matrix; lines change fastest.

    matrix_ptr: int64 words { start[lines + 1], row[entries], coefficient[entries] };
    table_ptr: for each layer { first tile, length, row[rows], out[lines] }; doubles and addresses
    as their bits; flags_ptr: int32, or-ed with flags.
    """
    line = tl.program_id(0) % lines
    tile = tl.program_id(0) // lines
    stride = HEAD + rows + lines
    layer = find_layer(table_ptr, stride, layers, tile)
    entry_ptr = table_ptr + layer * stride
    begin = (tile - tl.load(entry_ptr)) * BLOCK
    numel = tl.load(entry_ptr + 1)
    # fmt: off
    if begin + BLOCK <= numel:
        line_block(matrix_ptr, entry_ptr, flags_ptr, line, lines, entries, rows, begin, numel, D, A,
                   ALIGNED, True, BLOCK)
    else:
        line_block(matrix_ptr, entry_ptr, flags_ptr, line, lines, entries, rows, begin, numel, D, A,
                   ALIGNED, False, BLOCK)
    # fmt: on


def combine_rows(
    rows: Sequence[Sequence[Any]],
    matrix: np.ndarray,
    *,
    layers: Sequence[Any],
    out: Sequence[Sequence[Any]],
    accumulate: str,
    check: bool,
) -> int:
    """Variant `triton` of the op; arguments as in ``flcore.ops.combine_rows``.

    Waits for the device only when `check` asks for the flags.
    """
    device = layers[0].device if layers else "cpu"
    flags = torch.zeros(1, dtype=torch.int32, device=device)
    lines, index = np.nonzero(matrix)
    starts = np.searchsorted(lines, np.arange(len(matrix) + 1))
    words = [starts, index, matrix[lines, index].view(np.int64)]
    sparse = to_device(np.concatenate(words).astype(np.int64, copy=False), device)
    numel = np.array([v.numel for v in layers], dtype=np.int64)
    codes = np.array([v.code for v in layers], dtype=np.int64)
    addresses = np.array([[v.ptr for v in line] for line in (*rows, *out)], dtype=np.int64)
    addresses = addresses.reshape(len(rows) + len(out), len(layers))
    aligned = np.bitwise_or.reduce(addresses, axis=0, initial=0) % 16 == 0
    for code in range(4):
        for is_aligned in (True, False):
            chosen = np.flatnonzero((codes == code) & (aligned == is_aligned) & (numel > 0))
            if not len(chosen):
                continue
            tiles = -(-numel[chosen] // BLOCK)
            table = np.empty((len(chosen), HEAD.value + len(addresses)), dtype=np.int64)
            table[:, 0], table[:, 1] = np.cumsum(tiles) - tiles, numel[chosen]
            table[:, HEAD.value :] = addresses[:, chosen].T
            words_on_device = to_device(table.reshape(-1), device)
            with torch.cuda.device_of(flags):
                rows_kernel[(int(tiles.sum()) * len(matrix),)](
                    sparse,
                    words_on_device,
                    flags,
                    len(matrix),
                    len(index),
                    len(rows),
                    len(chosen),
                    D=code,
                    A=sum_type(accumulate, code),
                    ALIGNED=is_aligned,
                    BLOCK=BLOCK,
                    **OPTIONS,
                )
    return int(flags.item()) if check else 0

"""y = x W^T + bias + low up^T in Triton, from packed weights: for few rows, and for many.

    rows of x     kernel         reads of W    arithmetic
    few           gemv_kernel    once          float32 products and sums, one word and k at a time
    more          gemm_kernel    M / BM times  tensor cores, float32 sums; see ``qweight``

Both may split K over programs; then each writes its float32 sums, and ``join_kernel`` adds them in
the order of the parts: no atomics, the same bits in every run. Where the scale changes along K, a
sum over one word (gemv) or one tile (gemm) is multiplied by it; one scale for the whole row is
applied at the end. Bytes: the codes and scales once (gemm: once a block of rows, mostly from the
L2 cache), x once a column of programs, 8 bytes an output and part where K is split.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flcore.pykernels.qweight import (
    FLOAT_ZERO,
    add_products,
    code_values,
    codes_at,
    finish,
    group_offset,
    load_words,
    row_offset,
    unfold,
)

__all__ = ["gemm_kernel", "gemv_kernel", "join_kernel"]


@triton.jit
def zero_of(zeros_ptr, at, keep, BITS: tl.constexpr, KIND: tl.constexpr):
    """Zeros of INT as float32; without them, and for FLOAT_ZERO, the middle of the codes."""
    if zeros_ptr is None or KIND == FLOAT_ZERO:
        return 1 << (BITS - 1)
    else:
        return tl.load(zeros_ptr + at, mask=keep, other=0).to(tl.float32)


@triton.jit
def load_x(x_ptr, row: tl.constexpr, at, k, x_stride):
    """Values of one row of x as a column."""
    offset = row * x_stride.to(tl.int64)
    return tl.load(x_ptr + offset + at, mask=at < k, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["x_stride", "steps"])
def gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, table_ptr, out_ptr, bias_ptr, low_ptr, up_ptr,
    m, n, k, words, groups, group, steps, x_stride, out_stride, rank, up_col, up_rank,
    BITS: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """BM = 1 .. 4 rows by BN columns, over `steps` tiles of BJ words of each column.

    Every row has a sum of its own with the layout of the words: a third axis for the rows would
    send the words through shared memory.
    """
    S: tl.constexpr = 4 if BITS == 8 else (8 if BITS == 4 else 16)  # codes of a word
    col, part = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    codes_ptr += row_offset(col, words)[None, :]
    scale_at = group_offset(col, groups)[None, :]
    inside = (col < n)[None, :]
    y0 = tl.zeros([BJ, BN], tl.float32)
    y1, y2, y3 = y0, y0, y0
    for step in range(part * steps, part * steps + steps):
        j = step * BJ + tl.arange(0, BJ)
        keep = inside & (j < (k + S - 1) // S)[:, None]
        low, high = load_words(codes_ptr, j[:, None], keep, BITS)
        at = scale_at + (j * S // group)[:, None] * 16
        scale = tl.load(scales_ptr + at, mask=keep, other=0.0).to(tl.float32)
        zero = zero_of(zeros_ptr, at, keep, BITS, KIND)
        if KIND == FLOAT_ZERO:
            offset = tl.load(zeros_ptr + at, mask=keep, other=0.0).to(tl.float32)
        a0 = tl.zeros([BJ, BN], tl.float32)
        a1, a2, a3 = a0, a0, a0
        for s in tl.static_range(S):
            w = code_values(codes_at(low, high, j[:, None], s, BITS), zero, table_ptr, KIND)
            if KIND == FLOAT_ZERO:
                w = w * scale + offset
            a0 += load_x(x_ptr, 0, j * S + s, k, x_stride) * w
            if BM > 1:
                a1 += load_x(x_ptr, 1, j * S + s, k, x_stride) * w
            if BM > 2:
                a2 += load_x(x_ptr, 2, j * S + s, k, x_stride) * w
            if BM > 3:
                a3 += load_x(x_ptr, 3, j * S + s, k, x_stride) * w
        if KIND == FLOAT_ZERO:  # it is in w
            scale = tl.full([BJ, BN], 1.0, tl.float32)
        y0 += a0 * scale
        if BM > 1:
            y1 += a1 * scale
        if BM > 2:
            y2 += a2 * scale
        if BM > 3:
            y3 += a3 * scale
    # fmt: off
    if SPLIT:
        out_ptr += part.to(tl.int64) * m * n
    row = tl.arange(0, 1)
    finish(tl.sum(y0, axis=0)[None, :], row, col, m, n, out_ptr, out_stride, bias_ptr, low_ptr,
           up_ptr, rank, up_col, up_rank)
    if BM > 1:
        finish(tl.sum(y1, axis=0)[None, :], row + 1, col, m, n, out_ptr, out_stride, bias_ptr,
               low_ptr, up_ptr, rank, up_col, up_rank)
    if BM > 2:
        finish(tl.sum(y2, axis=0)[None, :], row + 2, col, m, n, out_ptr, out_stride, bias_ptr,
               low_ptr, up_ptr, rank, up_col, up_rank)
    if BM > 3:
        finish(tl.sum(y3, axis=0)[None, :], row + 3, col, m, n, out_ptr, out_stride, bias_ptr,
               low_ptr, up_ptr, rank, up_col, up_rank)
    # fmt: on


@triton.jit(do_not_specialize=["m", "steps"])
def gemm_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, levels_ptr, out_ptr, bias_ptr, low_ptr, up_ptr,
    m, n, k, words, groups, group, steps, x_stride, out_stride, rank, up_col, up_rank,
    BITS: tl.constexpr, KIND: tl.constexpr, XP: tl.constexpr, WP: tl.constexpr,
    HALF: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """BM rows by BN columns over `steps` tiles of BK, which `group` is a multiple of.

    WHOLE: one scale a column. XP, WP, HALF: see `flcore.pykernels.qweight.add_products`.
    """
    S: tl.constexpr = 4 if BITS == 8 else (8 if BITS == 4 else 16)  # codes of a word
    blocks = tl.cdiv(m, BM)  # neighbouring programs share a tile of the weight
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    col = (tl.program_id(0) // blocks) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    codes_ptr += row_offset(col, words)[:, None]
    scale_at = group_offset(col, groups)
    x_ptr += row.to(tl.int64)[:, None] * x_stride
    keep_row, inside = (row < m)[:, None], col < n
    acc = tl.zeros([BM, BN], tl.float32)
    if WHOLE:
        scale = tl.load(scales_ptr + scale_at, mask=inside, other=0.0).to(tl.float32)
        zero = zero_of(zeros_ptr, scale_at, inside, BITS, KIND)
        sums = tl.zeros([BM], tl.float32)
    for step in range(part * steps, part * steps + steps):
        first = step * BK
        j = (first // S + tl.arange(0, BK // S))[None, :]
        at_k = (first + tl.arange(0, BK))[None, :]
        x = tl.load(x_ptr + at_k, mask=keep_row & (at_k < k), other=0.0)
        low, high = load_words(codes_ptr, j, inside[:, None] & (j < (k + S - 1) // S), BITS)
        if not WHOLE:
            at = scale_at + (first // group) * 16
            keep = inside & (col * 0 + first < k)  # the last program may go on past K
            scale = tl.load(scales_ptr + at, mask=keep, other=0.0).to(tl.float32)
            zero = zero_of(zeros_ptr, at, keep, BITS, KIND)
        q = unfold(low, high, j, BITS, BN, BK)
        z = as_column(zero, KIND, zeros_ptr)
        if WHOLE:
            acc = add_products(x, q, z, levels_ptr, acc, KIND, XP, WP, HALF, True)
            if KIND == FLOAT_ZERO:
                sums += tl.sum(x.to(tl.float32), axis=1)
        else:
            total = tl.zeros([BM, BN], tl.float32)
            total = add_products(x, q, z, levels_ptr, total, KIND, XP, WP, HALF, True)
            acc += total * scale[None, :]
            if KIND == FLOAT_ZERO:
                offset = tl.load(zeros_ptr + at, mask=keep, other=0.0).to(tl.float32)
                acc += tl.sum(x.to(tl.float32), axis=1)[:, None] * offset[None, :]
    if WHOLE:
        acc *= scale[None, :]
        if KIND == FLOAT_ZERO:
            offset = tl.load(zeros_ptr + scale_at, mask=inside, other=0.0).to(tl.float32)
            acc += sums[:, None] * offset[None, :]
    if SPLIT:
        out_ptr += part.to(tl.int64) * m * n
    # fmt: off
    finish(acc, row, col, m, n, out_ptr, out_stride, bias_ptr, low_ptr, up_ptr, rank, up_col,
           up_rank)
    # fmt: on


@triton.jit
def as_column(zero, KIND: tl.constexpr, zeros_ptr):
    """Zeros of columns as [columns, 1]; a number stays one."""
    if zeros_ptr is None or KIND == FLOAT_ZERO:
        return zero
    else:
        return zero[:, None]


@triton.jit(do_not_specialize=["m", "parts"])
def join_kernel(
    parts_ptr, out_ptr, bias_ptr, low_ptr, up_ptr,
    m, n, parts, out_stride, rank, up_col, up_rank, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add parts [parts, m, n] in order, then bias and the product of low rank."""
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    at = row.to(tl.int64)[:, None] * n + col[None, :]
    keep = (row < m)[:, None] & (col < n)[None, :]
    size = m.to(tl.int64) * n
    acc = tl.zeros([BM, BN], tl.float32)
    for part in range(parts):
        acc += tl.load(parts_ptr + part * size + at, mask=keep, other=0.0)
    # fmt: off
    finish(acc, row, col, m, n, out_ptr, out_stride, bias_ptr, low_ptr, up_ptr, rank, up_col,
           up_rank)
    # fmt: on

"""y = x W^T + bias + low up^T in Triton with activations and weights as integers of 8 bits.

    y = sum over blocks b of fma(sx S, float(int32(sum (qx - zx) (q - Z))), y)

Activations come from ``act_quant``: codes, one scale for `act_block` values, sums of (qx - zx) over
units of k, within which the scales of both sides are constant. The tensor cores multiply signed
bytes: codes of 8 bits less 128, narrower ones as they are; the rest is

    sum (qx - zx) (q - Z) = sum qx q' - zx sum q' + (o - Z) sum (qx - zx),    q' = q - o

All integers are exact. Where the blocks of a row are not split over programs, the bits are those of
the CPU kernel, up to bias and low-rank product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flcore.pykernels.qweight import (
    FLOAT_ZERO,
    finish,
    group_offset,
    load_words,
    row_offset,
    unfold,
)

__all__ = ["int8_kernel"]


@triton.jit
def signed_codes(
    codes_ptr, block, k, first, n, words, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Codes q' [BN, BK] as int8, of k from `first` on and rows from 16 `block` on."""
    if BITS == 8:  # bytes as they lie, [block, word, row and byte], put in the order of k
        BJ: tl.constexpr = BK // 4
        i = block + tl.arange(0, BN // 16)[:, None, None]
        j = first // 4 + tl.arange(0, BJ)[None, :, None]
        at = i.to(tl.int64) * (words * 64) + j * 64 + tl.arange(0, 64)[None, None, :]
        q = tl.load(codes_ptr + at, mask=(i * 16 < n) & (j < words), other=0)
        q = tl.permute(tl.reshape(q, [BN // 16, BJ, 16, 4]), (0, 2, 1, 3))
        q = tl.reshape(q, [BN, BK])
        return q.to(tl.int8, bitcast=True) ^ -128
    else:
        S: tl.constexpr = 4 if BITS == 8 else (8 if BITS == 4 else 16)  # codes of a word
        row = block * 16 + tl.arange(0, BN)[:, None]
        j = (first // S + tl.arange(0, BK // S))[None, :]
        keep = (row < n) & (j < (k + S - 1) // S)
        low, high = load_words(codes_ptr + row_offset(row, words), j, keep, BITS)
        return unfold(low, high, j, BITS, BN, BK).to(tl.int8)


@triton.jit(do_not_specialize=["m", "units", "each"])
def int8_kernel(
    x_ptr, sx_ptr, zx_ptr, sums_ptr, codes_ptr, scales_ptr, zeros_ptr, out_ptr, bias_ptr, low_ptr,
    up_ptr,
    m, n, k, words, groups, group, units, unit, blocks, act_block, each, x_stride, out_stride, rank,
    up_col, up_rank,
    BITS: tl.constexpr, KIND: tl.constexpr, ONE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """BM rows by BN columns over `each` units of k; ONE: a unit is one tile of BK.

    units, blocks: of a row; zx_ptr: None for symmetric activations.
    """
    rows = tl.cdiv(m, BM)
    row = (tl.program_id(0) % rows) * BM + tl.arange(0, BM)
    block = (tl.program_id(0) // rows) * (BN // 16)
    col = block * 16 + tl.arange(0, BN)
    part = tl.program_id(1)
    x_ptr += row.to(tl.int64)[:, None] * x_stride
    sx_at, sums_at = row.to(tl.int64) * blocks, row.to(tl.int64) * units
    scale_at = group_offset(col, groups)
    keep_row, keep_col = row < m, col < n
    lane = tl.arange(0, BK)[None, :]
    OFFSET: tl.constexpr = 128 if BITS == 8 else 0
    y = tl.zeros([BM, BN], tl.float32)
    for b in range(part * each, tl.minimum(part * each + each, units)):
        first = b * unit
        acc = tl.zeros([BM, BN], tl.int32)
        code_sums = tl.zeros([BN], tl.int32)
        for start in range(0, BK if ONE else unit, BK):
            at = start + lane
            keep = (at < unit) & (first + at < k)
            x = tl.load(x_ptr + first + at, mask=keep_row[:, None] & keep, other=0)
            q = signed_codes(codes_ptr, block, k, first + start, n, words, BITS, BN, BK)
            acc = tl.dot(x, tl.trans(q), acc, out_dtype=tl.int32)
            if zx_ptr is not None:
                code_sums += tl.sum(tl.where(keep, q, 0).to(tl.int32), axis=1)
        sums = tl.load(sums_ptr + sums_at + b, mask=keep_row, other=0)
        at_x = sx_at + first // act_block
        sx = tl.load(sx_ptr + at_x, mask=keep_row, other=0.0)
        at_w = scale_at + (first // group) * 16
        scale = tl.load(scales_ptr + at_w, mask=keep_col, other=0.0).to(tl.float32)
        if zeros_ptr is None or KIND == FLOAT_ZERO:
            rest = OFFSET - (1 << (BITS - 1))
            acc += (sums * rest)[:, None]
        else:
            rest = OFFSET - tl.load(zeros_ptr + at_w, mask=keep_col, other=0).to(tl.int32)
            acc += sums[:, None] * rest[None, :]
        if zx_ptr is not None:
            zx = tl.load(zx_ptr + at_x, mask=keep_row, other=0).to(tl.int32)
            acc -= zx[:, None] * code_sums[None, :]
        y = tl.fma(sx[:, None] * scale[None, :], acc.to(tl.float32), y)
        if KIND == FLOAT_ZERO:
            zero = tl.load(zeros_ptr + at_w, mask=keep_col, other=0.0).to(tl.float32)
            whole = tl.zeros([BM, BN], tl.float32) + sums.to(tl.float32)[:, None]
            y = tl.fma(sx[:, None] * zero[None, :], whole, y)
    if SPLIT:
        out_ptr += part.to(tl.int64) * m * n
    # fmt: off
    finish(y, row, col, m, n, out_ptr, out_stride, bias_ptr, low_ptr, up_ptr, rank, up_col, up_rank)
    # fmt: on

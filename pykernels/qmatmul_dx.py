"""dX = dY W + low up in Triton from the packed weight of the forward product.

The contraction runs over the rows n of W and a scale belongs to a row and a group along k, so it
cannot leave the sum. A tile of the result lies in one group; dY times the scales of that group
stands in the place of dY and meets the integer codes, which are exact in bfloat16. These products
have more than 8 bits and are cut into parts (`flcore.pykernels.qweight`): 2 for 16-bit dY, which
leave 2^-17, 3 for float32. The weight is read once for every block of BM rows and never written.
Where n is split over programs, ``join_kernel`` of ``qmatmul`` adds their float32 sums in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flcore.pykernels.qmatmul import as_column, zero_of
from flcore.pykernels.qweight import (
    FLOAT_ZERO,
    add_products,
    finish,
    group_offset,
    load_words,
    row_offset,
    unfold,
)

__all__ = ["dx_kernel"]


@triton.jit(do_not_specialize=["m", "steps"])
def dx_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, levels_ptr, out_ptr, low_ptr, up_ptr,
    m, n, k, words, groups, group, steps, x_stride, out_stride, rank, up_col, up_rank,
    BITS: tl.constexpr, KIND: tl.constexpr, XP: tl.constexpr, WP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """BM rows by BK columns k over `steps` tiles of BN rows of W; BK divides `group`."""
    S: tl.constexpr = 4 if BITS == 8 else (8 if BITS == 4 else 16)  # codes of a word
    blocks = tl.cdiv(m, BM)
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    first = (tl.program_id(0) // blocks) * BK
    col = first + tl.arange(0, BK)
    part = tl.program_id(1)
    j = (first // S + tl.arange(0, BK // S))[None, :]
    inside = j < (k + S - 1) // S
    x_ptr += row.to(tl.int64)[:, None] * x_stride
    scales_at = (first // group) * 16
    keep_row = (row < m)[:, None]
    acc = tl.zeros([BM, BK], tl.float32)
    for step in range(part * steps, part * steps + steps):
        i = step * BN + tl.arange(0, BN)
        keep = i < n
        x = tl.load(x_ptr + i[None, :], mask=keep_row & keep[None, :], other=0.0).to(tl.float32)
        # fmt: off
        low, high = load_words(
            codes_ptr + row_offset(i, words)[:, None], j, inside & keep[:, None], BITS
        )
        # fmt: on
        at = group_offset(i, groups) + scales_at
        scale = tl.load(scales_ptr + at, mask=keep, other=0.0).to(tl.float32)
        zero = as_column(zero_of(zeros_ptr, at, keep, BITS, KIND), KIND, zeros_ptr)
        q = unfold(low, high, j, BITS, BN, BK)
        y = x * scale[None, :]
        acc = add_products(y, q, zero, levels_ptr, acc, KIND, XP, WP, False, False)
        if KIND == FLOAT_ZERO:
            offset = tl.load(zeros_ptr + at, mask=keep, other=0.0).to(tl.float32)
            acc += tl.sum(x * offset[None, :], axis=1)[:, None]
    if SPLIT:
        out_ptr += part.to(tl.int64) * m * k
    # fmt: off
    finish(acc, row, col, m, k, out_ptr, out_stride, None, low_ptr, up_ptr, rank, up_col, up_rank)
    # fmt: on

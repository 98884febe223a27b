"""Weights of 2 to 8 bits in Triton: from the words of the layout "tile16" to products.

A block of 16 rows and one word index hold 16 neighbouring dwords, dword r for row r, with 4 (8
bits), 8 (4 bits) or 16 (2 and 3 bits) consecutive k in it; see `flcore.reference.weight_quant`. A
tile of words [rows, words] is unfolded by broadcast shifts to codes [rows, k] in the order of k.

Products are exact in what they multiply. Codes less their zero are integers up to 255 and fp8
values have four digits: bfloat16 and float16 hold both. What has more digits is cut into bfloat16
parts of 8 bits: float32 activations into 3, levels of a codebook into as many as they need (at most
3, 2 in large products). Terms below 2^-24 (2^-16 with 2 parts) of the leading one are left out.
Scales multiply float32 sums.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from flcore.pykernels.sums import bfloat16_bits

__all__ = [
    "E4M3",
    "E5M2",
    "FLOAT_ZERO",
    "INT",
    "TABLE",
    "add_products",
    "code_values",
    "codes_at",
    "finish",
    "group_offset",
    "load_words",
    "row_offset",
    "unfold",
]

INT, FLOAT_ZERO, TABLE, E4M3, E5M2 = (tl.constexpr(code) for code in range(5))  # QWeightKind
MAGIC_BITS = tl.constexpr(0x4B000000)  # of 2^23: an integer below 2^23 or-ed in is added to it
MAGIC = tl.constexpr(8388608.0)
# The interpreter multiplies the bits of bfloat16 as integers, and truncates where it converts.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


# ---- codes ---------------------------------------------------------------------------------------


@triton.jit
def row_offset(row, words):
    """Where the words of rows begin; `words` of a row: that many for each of 16 rows of a block."""
    return (row // 16).to(tl.int64) * (words * 16) + row % 16


@triton.jit
def group_offset(row, groups):
    """Where the scales of rows begin."""
    return (row // 16).to(tl.int64) * (groups * 16) + row % 16


@triton.jit
def load_words(codes_ptr, j, keep, BITS: tl.constexpr):
    """Words j of rows at `codes_ptr`, and for 3 bits those that hold the high bits (else 0)."""
    if BITS == 3:
        chunk_ptr = codes_ptr + (j // 2) * 48
        low = tl.load(chunk_ptr + (j % 2) * 16, mask=keep, other=0)
        return low, tl.load(chunk_ptr + 32, mask=keep, other=0)
    else:
        low = tl.load(codes_ptr + j * 16, mask=keep, other=0)
        return low, low


@triton.jit
def codes_at(low, high, j, s, BITS: tl.constexpr):
    """Codes of the s-th k of words j; all of them broadcast."""
    if BITS == 8:
        return (low >> (8 * s)) & 255
    elif BITS == 4:
        return (low >> (8 * (s % 4) + 4 * (s // 4))) & 15
    else:
        q = (low >> (8 * (s % 4) + 2 * (s // 4))) & 3
        if BITS == 3:
            q |= ((high >> (8 * (s % 4) + s // 4 + 4 * (j % 2))) & 1) << 2
        return q


@triton.jit
def unfold(low, high, j, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Codes [BN, BK] of words [BN, words], whose indices are j [1, words]."""
    s = tl.arange(0, BK // low.shape[1])[None, None, :]
    q = codes_at(low[:, :, None], high[:, :, None], j[:, :, None], s, BITS)
    return tl.reshape(q, [BN, BK])


@triton.jit
def code_values(q, zero, table_ptr, KIND: tl.constexpr):
    """What codes stand for at scale 1 in float32, exact; `zero`: that of INT as float32."""
    if KIND == TABLE:
        return tl.load(table_ptr + q)
    elif KIND == E4M3:  # as float16, whose exponent is 8 larger
        half = ((q & 0x80) << 8) | ((q & 0x7F) << 7)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif KIND == E5M2:
        return (q << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (q | MAGIC_BITS).to(tl.float32, bitcast=True) - (zero + MAGIC)


# ---- products ------------------------------------------------------------------------------------


@triton.jit
def cut(x):
    """Return the first 8 bits of float32 values, not rounded as that may overflow, and the rest."""
    first = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return first, tl.where(tl.abs(x) == float("inf"), 0.0, x - first)


@triton.jit
def product(a, b, acc, HALF: tl.constexpr):
    """Return acc + a b; a and b are float16 (HALF) or bfloat16 already, or are rounded to it."""
    if HALF:
        return tl.dot(a.to(tl.float16), b.to(tl.float16), acc)
    elif INTERPRETED:
        a = (bfloat16_bits(a.to(tl.float32)).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        b = (bfloat16_bits(b.to(tl.float32)).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)


@triton.jit
def add_products(
    x, q, zero, levels_ptr, acc,
    KIND: tl.constexpr, XP: tl.constexpr, WP: tl.constexpr, HALF: tl.constexpr,
    FORWARD: tl.constexpr,
):  # fmt: skip
    """Add x w^T (FORWARD) or x w, w [N, K] being what codes q stand for, in a fixed order.

    x is taken in XP parts and a level of a codebook in WP, small parts first: the sum of the parts
    of one product is then rounded once. levels_ptr: [WP, 16] in the type of the products; they are
    looked up in 16 bits, wider ones would be copied to shared memory one by one.
    """
    MOST: tl.constexpr = XP if XP > WP else WP
    x0, x1, x2 = x, x, x
    if XP > 1:
        x0, x1 = cut(x.to(tl.float32))
    if XP > 2:
        x1, x2 = cut(x1)
    for i in tl.static_range(WP):  # part WP - 1 - i
        if KIND == TABLE:
            w = tl.load(levels_ptr + 16 * (WP - 1 - i) + q)
        else:
            w = code_values(q, zero, levels_ptr, KIND)
        if FORWARD:
            w = tl.trans(w)
        if XP > 2 and WP + 1 - i < MOST:
            acc = product(x2, w, acc, HALF)
        if XP > 1 and WP - i < MOST:
            acc = product(x1, w, acc, HALF)
        acc = product(x0, w, acc, HALF)
    return acc


# ---- results -------------------------------------------------------------------------------------


@triton.jit
def finish(
    acc, row, col, m, n, out_ptr, out_stride, bias_ptr, low_ptr, up_ptr, rank, up_col, up_rank
):  # fmt: skip
    """Add bias and the product of low rank to sums [row, col] and store them, rounded once."""
    keep_row, keep_col = row < m, col < n
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=keep_col, other=0.0)[None, :]
    if low_ptr is not None:
        for r in range(rank):
            low = tl.load(low_ptr + row.to(tl.int64) * rank + r, mask=keep_row, other=0.0)
            up = tl.load(up_ptr + col.to(tl.int64) * up_col + r * up_rank, mask=keep_col, other=0.0)
            acc += low[:, None] * up[None, :]
    pointers = out_ptr + row.to(tl.int64)[:, None] * out_stride + col[None, :]
    keep = keep_row[:, None] & keep_col[None, :]
    D: tl.constexpr = out_ptr.dtype.element_ty
    if INTERPRETED and D == tl.bfloat16:
        tl.store(pointers, bfloat16_bits(acc).to(tl.bfloat16, bitcast=True), mask=keep)
    else:
        tl.store(pointers, acc.to(D), mask=keep)

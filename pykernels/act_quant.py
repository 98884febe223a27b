"""Activations in 8 bits in Triton: scale, codes and sums of codes of every block of a row.

Formulas and rounding are those of ``csrc/cpu/act_quant.h``, and so are the bits: maxima and integer
sums do not depend on an order, every float32 operation is rounded by itself (compile with
``enable_fp_fusion=False``). A block is read twice, the second time from a cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flcore.pykernels.codes import bits_of, float_of

__all__ = ["TILE", "act_quant_kernel"]

TILE = 1024  # values of a program at a time
MAGIC, MAGIC_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)  # rounds to an integer
INFINITE = tl.constexpr(0x7F800000)
SMALL, LARGE = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)


@triton.jit
def nearest(x):
    """Integer next to a float32 below 2^22, half to even."""
    return bits_of(x + MAGIC) - MAGIC_BITS


@triton.jit
def clip_byte(q):
    """Integers kept within -128 .. 127."""
    return tl.minimum(tl.maximum(q, -128), 127)


@triton.jit
def quotient(a: tl.constexpr, x):
    """Return a / x rounded once; 0 for x = 0."""
    return tl.where(x > 0, tl.div_rn(tl.zeros_like(x) + a, tl.where(x > 0, x, 1.0)), 0.0)


@triton.jit
def act_scale(top, low, high, ASYMMETRIC: tl.constexpr):
    """Return scale, shift, inverse and zero of blocks whose largest |x| has the bits `top`."""
    finite = top < INFINITE
    absmax = float_of(tl.where(finite, top, 0))
    tiny = absmax < SMALL
    shift, back = tl.where(tiny, LARGE, 1.0), tl.where(tiny, SMALL, 1.0)
    if ASYMMETRIC:
        low, high = tl.where(finite, low, 0.0), tl.where(finite, high, 0.0)
        extent = (high * shift) * 0.5 - (low * shift) * 0.5
        inverse = quotient(127.5, extent)
        scale = tl.div_rn(extent, tl.zeros_like(extent) + 127.5) * back
        zero = clip_byte(nearest(-(low * shift) * inverse) - 128)
        zero = tl.where(finite & (top > 0), zero, 0)
    else:
        largest = absmax * shift
        inverse = quotient(127.0, largest)
        scale = tl.div_rn(largest, tl.zeros_like(largest) + 127.0) * back
        zero = top * 0
    return tl.where(finite, scale, float("nan")), shift, inverse, zero


@triton.jit(do_not_specialize=["segments", "blocks", "units"])
def act_quant_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, sums_ptr,
    segments, blocks, units, k, block, unit, x_stride, code_stride,
    ASYMMETRIC: tl.constexpr, STORED: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """R blocks of rows, T values at a time.

    blocks, units: of a row; block: values that share a scale; unit: a part of a block with a sum
    of (code - zero) of its own. STORED: the form of `quantize_activation`, where asymmetric codes
    and zeros are 128 more and sums are those of the codes as they are stored.
    """
    segment = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    inside = segment < segments
    row, first = segment // blocks, (segment % blocks) * block
    x_ptr += row.to(tl.int64) * x_stride + first
    codes_ptr += row.to(tl.int64) * code_stride + first
    length = tl.minimum(k - first, block)
    lane = tl.arange(0, T)[None, :]

    top = tl.zeros([R, 1], tl.int32)
    low = tl.zeros([R, 1], tl.float32)
    high = tl.zeros([R, 1], tl.float32)
    for start in range(0, block, T):
        keep = inside & (start + lane < length)
        x = tl.load(x_ptr + start + lane, mask=keep, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(bits_of(x) & 0x7FFFFFFF, axis=1, keep_dims=True))
        if ASYMMETRIC:
            low = tl.minimum(low, tl.min(x, axis=1, keep_dims=True))
            high = tl.maximum(high, tl.max(x, axis=1, keep_dims=True))
    scale, shift, inverse, zero = act_scale(top, low, high, ASYMMETRIC)
    used = inverse > 0  # else all zeros, or not finite
    minus = tl.where(used, zero, 0)
    if STORED and ASYMMETRIC:
        zero += 128
        minus = top * 0
    stored = tl.where(used, zero, 0)
    at = row.to(tl.int64) * blocks + segment % blocks
    tl.store(scales_ptr + at, scale, mask=inside)
    if zeros_ptr is not None:
        tl.store(zeros_ptr + at, stored.to(zeros_ptr.dtype.element_ty), mask=inside)

    for part in range(0, block, unit):
        total = tl.zeros([R, 1], tl.int32)
        end = tl.minimum(length, part + unit)
        for start in range(part, part + unit, T):
            keep = inside & (start + lane < end)
            x = tl.load(x_ptr + start + lane, mask=keep, other=0.0).to(tl.float32)
            q = nearest((x * shift) * inverse) + zero
            if STORED and ASYMMETRIC:
                q = tl.minimum(tl.maximum(q, 0), 255)
            else:
                q = clip_byte(q)
            q = tl.where(used & keep, q, 0)
            total += tl.sum(tl.where(keep, q - minus, 0), axis=1, keep_dims=True)
            tl.store(codes_ptr + start + lane, q.to(codes_ptr.dtype.element_ty), mask=keep)
        at = row.to(tl.int64) * units + (first + part) // unit
        tl.store(sums_ptr + at, total, mask=inside & (first + part < k))

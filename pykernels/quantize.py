"""Codes of buckets with feedback in Triton: update and memory to codes and new memory, one launch.

For the buckets of a program::

    s, t, u from update and memory;  scales and codes from u, and D what they decode to
    e <- t - D,  h <- h + D,  v <- s, or 0 where asked and D is not 0

Reads update and memory once and writes new memory and codes once: 12 + bits / 8 bytes a coordinate
with e in float32. Codes that need a sum over a bucket (sign, Euclidean norms, clipping) read a
second time, from the cache. An update of several layers is first put together, 8 bytes more.

The bits are those of ``csrc/cpu/codes_linear.h`` and ``codes_minifloat.h``: maxima and integers do
not depend on the order, float32 operations are rounded one by one (no fusion), float64 sums take 16
lanes and the same tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from flcore.pykernels.codes import (
    AFFINE,
    MINIFLOAT,
    ROUNDING,
    SIGN,
    affine_form,
    affine_scales,
    bits_of,
    cast_float,
    float_scale,
    grid_unit,
    halves,
    store_codes,
    store_memory,
    store_scale,
    to_grid,
    wire_scale,
)

__all__ = ["encode"]

OPTIONS = {"enable_fp_fusion": False}  # a product is rounded before it is added


# ---- the kernel ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["numel", "buckets", "k0", "k1", "round"])
def quantize_kernel(
    g_ptr, e_ptr, h_ptr, v_ptr, e_new_ptr, h_new_ptr, v_new_ptr, scales_ptr, codes_ptr, flags_ptr,
    numel, buckets, a, b, p, q, k0, k1, round,
    D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    MASK: tl.constexpr, CHECK: tl.constexpr,
    CODEC: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, S: tl.constexpr,
    STOCHASTIC: tl.constexpr, MEASURE: tl.constexpr, CLIP: tl.constexpr, LIMIT: tl.constexpr,
    LEAST: tl.constexpr, LEVELS: tl.constexpr, SHIFT: tl.constexpr,
    MANTISSA: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr, TOP: tl.constexpr,
    LARGEST: tl.constexpr, FRACTION: tl.constexpr,
    BUCKET: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Encode ROWS buckets and move their memory on, or (CHECK) only look whether all is finite.

    flags_ptr: int32, or-ed with 1 where t or u is not finite. S: type of the scales, LIMIT: the
    largest one. Codes on a grid: values LEAST .. LEVELS, code = value + SHIFT; floats: MANTISSA ..
    FRACTION, see :mod:`flcore.reference.codes_float`. Absent memory: any pointer, with its switch
    E, H or V off; M: dtype of e and v.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    first = row * BUCKET
    n = tl.minimum(tl.maximum(numel - first, 0), BUCKET)
    inside = column < n
    at = first + column
    here = row < buckets
    s, t, u, h = affine_form(g_ptr, e_ptr, h_ptr, v_ptr, at, inside, a, b, p, q, D, E, H, V, M)
    key = tl.maximum(bits_of(t) & 0x7FFFFFFF, bits_of(u) & 0x7FFFFFFF)
    bad = tl.max(tl.max(tl.where(inside & (key >= 0x7F800000), 1, 0), axis=1), axis=0)
    tl.atomic_or(flags_ptr, bad, mask=bad != 0)
    if not CHECK:
        top = tl.max(tl.where(inside, bits_of(u) & 0x7FFFFFFF, 0), axis=1)[:, None]
        if STOCHASTIC:
            random = halves(at, k0, k1, round, ROUNDING, 0)
        else:
            random = column
        if CODEC == MINIFLOAT:
            scale, inverse, stored = float_scale(top, S, EMAX, FRACTION)
            tl.store(scales_ptr + row, stored.to(scales_ptr.dtype.element_ty), mask=here)
            code, d = cast_float(
                u, scale, inverse, random, BITS, FORM, MANTISSA, EMIN, TOP, LARGEST, STOCHASTIC
            )
        elif CODEC == AFFINE:
            low, unit = affine_scales(u, inside, n, LEVELS, LIMIT, S)
            store_scale(scales_ptr, 2 * row, low, here, S)
            store_scale(scales_ptr, 2 * row + 1, unit, here, S)
            value = to_grid(u - low, unit, random, LEAST, LEVELS, STOCHASTIC)
            code = value.to(tl.int32)
            d = low + unit * value
        else:
            unit = grid_unit(
                g_ptr, e_ptr, h_ptr, v_ptr, first, n, top, a, b, p, q,
                D, E, H, V, M, CODEC, MEASURE, LEVELS, CLIP, ROWS, BUCKET,
            )  # fmt: skip
            unit = wire_scale(unit, tl.zeros_like(unit) + LIMIT, S)
            store_scale(scales_ptr, row, unit, here, S)
            if CODEC == SIGN:
                code = tl.where(u < 0, 1, 0)
                d = tl.where(u < 0, -unit, unit)
            else:
                value = to_grid(u, unit, random, LEAST, LEVELS, STOCHASTIC)
                code = value.to(tl.int32) + SHIFT
                d = unit * value
        store_codes(codes_ptr, row, n, code, inside, BITS, STRIDE, ROWS, BLOCK)
        if E:
            store_memory(e_new_ptr, at, inside, t - d, k0, k1, round, 0, M)
        if H:
            tl.store(h_new_ptr + at, h + d, mask=inside)
        if V:
            if MASK:
                s = tl.where(d != 0, 0.0, s)
            store_memory(v_new_ptr, at, inside, s, k0, k1, round, 1, M)


# ---- host side -----------------------------------------------------------------------------------


def encode(
    g: torch.Tensor,
    kept: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    scales: torch.Tensor,
    codes: torch.Tensor,
    *,
    count: int,
    factors: tuple[float, float, float, float],
    words: tuple[int, int, int],
    check: bool,
    **constants: Any,
) -> bool:
    """Encode `count` buckets and return whether all was finite; waits for the device.

    Parameters
    ----------
    g : (d,) tensor
        The update, bfloat16 as int16 like everywhere here.
    kept, new : tensors by name
        Memory e, h and v as it is, and where the new one goes.
    scales, codes : tensors
        Sections of the packet, on the device.
    factors : a, b, p, q
        Of the affine form, numbers of float32.
    words : low and high word of the seed, and the round
        Each below 2**32.
    check : bool
        Write nothing, only look whether all is finite.
    constants
        The compile-time arguments of `quantize_kernel` from D on.
    """
    flags = torch.zeros(1, dtype=torch.int32, device=g.device)
    with torch.cuda.device_of(g):
        quantize_kernel[(-(-count // constants["ROWS"]),)](
            g,
            *(kept.get(name, g) for name in "ehv"),
            *(new.get(name, g) for name in "ehv"),
            scales,
            codes,
            flags,
            g.numel(),
            count,
            *factors,
            *(word - ((word >> 31) << 32) for word in words),  # the int32 with the same bits
            E="e" in kept,
            H="h" in kept,
            V="v" in kept,
            CHECK=check,
            **constants,
            **OPTIONS,
            num_warps=min(16, max(4, constants["ROWS"] * constants["BLOCK"] // 512)),
        )
    return not flags.item()

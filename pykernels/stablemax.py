"""StableMax along a dimension in Triton: one program for some rows, forward and backward.

Formulas and their order of terms are those of ``csrc/cpu/stablemax.isa.cpp``: the sum leaves out
the largest entry of the row, from which the smallest results are then formed. Rows of up to WHOLE
classes stay on chip; longer ones are read twice, in blocks. Tiles are [rows, A, B] as in
`flcore.pykernels.rowloss_terms`: 8 terms in float32, the rest of a sum in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from flcore.pykernels.rowloss_terms import add_up, row_offset, store_rounded

from flcore.ops._stablemax_call import StableMaxCall

__all__ = ["stablemax"]

WHOLE = 16384  # classes
TILE = 1024  # entries of a program at least
FORWARD, LOG, BACKWARD, LOG_BACKWARD = (tl.constexpr(i) for i in range(4))  # csrc/api.h
INFINITY, NAN = tl.constexpr(float("inf")), tl.constexpr(float("nan"))
SMALL = tl.constexpr(2.0**-100)


@triton.jit
def element(z):
    """Return s(z), s'(z) and r of entries."""
    a = 1.0 + tl.abs(z)
    r = 1.0 / a
    return tl.where(z >= 0, a, r), tl.where(z >= 0, 1.0, r * r), r


@triton.jit
def over_classes(x, LARGEST: tl.constexpr):
    """Largest or smallest entry of each row, [rows, 1, 1]."""
    if LARGEST:
        return tl.max(tl.max(x, axis=1, keep_dims=True), axis=2, keep_dims=True)
    else:
        return tl.min(tl.min(x, axis=1, keep_dims=True), axis=2, keep_dims=True)


@triton.jit(do_not_specialize=["rows"])
def stablemax_kernel(
    x_ptr,
    v_ptr,
    out_ptr,
    rows,
    classes,
    inner,
    x_outer,
    x_row,
    x_class,
    v_outer,
    v_row,
    v_class,
    out_outer,
    out_row,
    out_class,
    STEP: tl.constexpr,
    C: tl.constexpr,
    NESTED: tl.constexpr,
    ONCE: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """One step over R rows; element (i, k) at (i // inner) outer + (i % inner) row + k class."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None, None]
    inside = row < rows
    x_ptr += row_offset(row, inner, x_outer, x_row, NESTED)
    out_ptr += row_offset(row, inner, out_outer, out_row, NESTED)
    if STEP >= BACKWARD:
        v_ptr += row_offset(row, inner, v_outer, v_row, NESTED)
    column = (tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :])[None, :, :].to(tl.int64)

    top = tl.full([R, 1, 1], -INFINITY, tl.float64)
    rest = tl.zeros([R, 1, 1], tl.float64)
    top_v = tl.zeros([R, 1, 1], tl.float64)
    rest_v = tl.zeros([R, 1, 1], tl.float64)
    z = tl.zeros([R, A, B], C)
    v = tl.zeros([R, A, B], C)
    for first in range(0, classes, A * B):
        k = first + column
        keep = inside & (k < classes)
        z = tl.load(x_ptr + k * x_class, mask=keep, other=-INFINITY).to(C)
        s, _, _ = element(z)
        most = over_classes(tl.where(z == z, z, -INFINITY), True)
        at = over_classes(tl.where(z == most, column, A * B), False)
        others = column != at
        sums = add_up(tl.where(others, s, 0.0))
        most = most.to(tl.float64)
        higher = most > top
        low, _, _ = element(tl.where(higher, top, most))
        rest += sums + low
        if STEP >= BACKWARD:
            v = tl.load(v_ptr + k * v_class, mask=keep, other=0.0).to(C)
            most_v = add_up(tl.where(others, 0.0, v))
            low_v = tl.where(higher, top_v, most_v)
            if STEP == BACKWARD:
                rest_v += add_up(tl.where(others, v * s, 0.0)) + low_v * low
            else:
                rest_v += add_up(tl.where(others, v, 0.0)) + low_v
            top_v = tl.where(higher, most_v, top_v)
        top = tl.where(higher, most, top)

    own, _, r_top = element(top)
    total = own + rest
    good = (total > 0) & (total < INFINITY)
    shrink = tl.where(total > 2.0**100, 2.0**-64, 1.0)
    inverse = tl.where(good, 1.0 / tl.where(good, total, 1.0), NAN)
    scale, factor = shrink.to(C), (inverse / shrink).to(C)
    leads = own > rest
    if STEP == LOG:
        log_total = tl.where(good, tl.log(tl.where(good, total, 1.0)), NAN)
        ratio = tl.where(good, rest / tl.where(good, own, 1.0), NAN)
        w = 1.0 + ratio
        special = (0.0 - (tl.log(w) + (ratio - (w - 1.0)) / w)).to(C)
        log_sum = log_total.to(C)
        place = top.to(C)
    if STEP == BACKWARD:
        pivot = tl.where(leads, top_v, 0.0)
        shift = tl.where(leads, top_v * rest - rest_v, -(rest_v + top_v * own)) * inverse
        pivot, shift = pivot.to(C), shift.to(C)
    if STEP == LOG_BACKWARD:
        total_v = (rest_v + top_v).to(C)
        place = tl.where(leads & good, top, NAN).to(C)
        special = ((top_v * rest - own * rest_v) * inverse * r_top).to(C)

    for first in range(0, classes, A * B):
        k = first + column
        keep = inside & (k < classes)
        if not ONCE:
            z = tl.load(x_ptr + k * x_class, mask=keep, other=0.0).to(C)
            if STEP >= BACKWARD:
                v = tl.load(v_ptr + k * v_class, mask=keep, other=0.0).to(C)
        s, slope, r = element(z)
        if STEP == FORWARD:
            result = (s * scale) * factor
        elif STEP == LOG:
            p = (s * scale) * factor
            near = p > SMALL
            size = tl.log(1.0 + tl.abs(z))
            far = tl.where(z >= 0, size, -size) - log_sum
            result = tl.where(near, tl.log(tl.where(near, p, 1.0)), far)
            result = tl.where(z == place, special, result)
        elif STEP == BACKWARD:
            result = ((slope * scale) * factor) * ((v - pivot) + shift)
        else:
            result = (v - ((s * scale) * factor) * total_v) * r
            result = tl.where(z == place, special, result)
        store_rounded(out_ptr + k * out_class, result, keep)


def stablemax(call: StableMaxCall) -> None:
    """Run one call; NumPy arrays (of the interpreter's tests) become tensors on their memory."""
    x, v, out = (_tensor(a) for a in (call.x, call.v, call.out))
    block = min(WHOLE, max(16, triton.next_power_of_2(call.classes)))
    r = max(1, TILE // block)
    if 1 not in (call.x_strides[2], call.classes):
        r = max(r, min(32, 32 * TILE // block))  # neighbours in memory are rows then
    strides = (*call.x_strides, *call.v_strides, *call.out_strides)
    stablemax_kernel[(triton.cdiv(call.rows, r),)](
        x,
        out if v is None else v,
        out,
        call.rows,
        call.classes,
        call.inner,
        *strides,
        STEP=call.step,
        C=tl.float64 if x.dtype == torch.float64 else tl.float32,
        NESTED=call.inner != call.rows,
        ONCE=call.classes <= block,
        R=triton.next_power_of_2(r),
        A=8,
        B=block // 8,
        num_warps=16 if r * block > 4096 else 4,
        enable_fp_fusion=False,
    )


def _tensor(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)

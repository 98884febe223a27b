"""The arithmetic of row losses in Triton: one logit, one row; formulas in ``reference/rowloss.py``.

Tiles are [rows, A, B], class k at [:, k // B, k % B]; numbers of a row are [rows, 1, 1]. Compute
type C: float32, or float64 for float64 logits. A sum adds at most 8 terms in C, the rest in
float64, in a fixed order: the first costs at most 4.2e-7 (7 roundings), the second nothing.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from flcore.pykernels.elementary import exp, exp_difference, expm1, log1p
from flcore.pykernels.sums import bfloat16_bits

__all__ = [
    "SOFTMAX",
    "add_up",
    "element_map",
    "finish",
    "load_targets",
    "log_weighted",
    "number",
    "plain_loss",
    "row_offset",
    "store_rounded",
]

SOFTMAX, STABLEMAX, TAYLOR = (tl.constexpr(code) for code in range(3))  # RowMap in csrc/api.h
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
FAR = tl.constexpr(2.0**64)  # R / e_y from which on its logarithm is that of S less that of e_y
# The interpreter truncates where it converts to bfloat16; a GPU rounds.
TRUNCATES = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def number(bits, C: tl.constexpr):
    """A double that the host passed as its bits (a float argument would arrive as float32)."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(C)


@triton.jit
def row_offset(row, inner, outer_stride, row_stride, NESTED: tl.constexpr):
    """Where rows begin, in elements."""
    if NESTED:
        outer = row // inner
        within = (row - outer * inner).to(tl.int64)
        return outer.to(tl.int64) * outer_stride + within * row_stride
    else:
        return row.to(tl.int64) * row_stride


@triton.jit
def store_rounded(pointers, values, keep):
    """Store values in the dtype of the pointers, rounded once to nearest even."""
    D: tl.constexpr = pointers.dtype.element_ty
    if TRUNCATES and D == tl.bfloat16:
        tl.store(pointers, bfloat16_bits(values).to(tl.bfloat16, bitcast=True), mask=keep)
    else:
        tl.store(pointers, values.to(D), mask=keep)


@triton.jit
def load_targets(
    labels_ptr, valid_ptr, row, inside, ignore_index, label_offset, classes, SHARD: tl.constexpr
):
    """Return whether rows count, their class (-1: none of these), and whether it cannot be."""
    active = inside
    if valid_ptr is not None:
        active = active & (tl.load(valid_ptr + row, mask=inside, other=0) != 0)
    if labels_ptr is None:
        y = tl.where(inside, -1, -1)
        return active, y, y > 0
    else:
        label = tl.load(labels_ptr + row, mask=inside, other=0).to(tl.int64)
        if valid_ptr is None:
            active = active & (label != ignore_index)
        y = label - label_offset
        here = (y >= 0) & (y < classes)
        bad = (y < 0) & (y >= 0) if SHARD else active & ~here
        return active, tl.where(here & active, y, -1).to(tl.int32), bad


@triton.jit
def element_map(z, prior, shift, HAS_PRIOR: tl.constexpr, MAP: tl.constexpr):
    """Return e, its slope pi f'(z) (of softmax: e), and rho of logits z.

    prior: log-prior of softmax (already in z where it is added), prior of the others.
    """
    if MAP == SOFTMAX:
        g = z + prior if HAS_PRIOR else z
        e = exp_difference(g, shift)
        return e, e, tl.where(z > -INFINITY, 1.0, tl.where(z == z, 0.0, z))
    elif MAP == STABLEMAX:
        a = 1.0 + tl.abs(z)
        rho = 1.0 / a
        f = tl.where(z >= 0.0, a, rho)
        slope = tl.where(z >= 0.0, 1.0, rho * rho)
        if HAS_PRIOR:
            f = f * prior
            slope = slope * prior
        return f, slope, rho
    else:
        masked = z == -INFINITY
        h = tl.where(masked, 0.0, 1.0 + z)
        f = tl.where(masked, 0.0, 0.5 * (h * h + 1.0))
        rho = h / tl.where(masked, 1.0, f)
        if HAS_PRIOR:
            f = f * prior
            h = h * prior
        return f, h, rho


@triton.jit
def log_weighted(z, prior, e, pivot, HAS_PRIOR: tl.constexpr, MAP: tl.constexpr):
    """Return g = ln(pi f(z)) less the pivot, which is 0 but for softmax."""
    if MAP == SOFTMAX:
        return (z + prior if HAS_PRIOR else z) - pivot
    else:
        return tl.log(e)


@triton.jit
def add_up(values):
    """Sum over the classes, float64 [rows, 1, 1]."""
    few = tl.sum(values, axis=1, keep_dims=True)
    return tl.sum(few.to(tl.float64), axis=2, keep_dims=True)


@triton.jit
def plain_loss(rest, own, y, g_y, shift, MAP: tl.constexpr):
    """Return ln S - g_y without cancellation."""
    ratio = rest / own
    if MAP == SOFTMAX:  # e_y may have lost its digits, g_y has not
        far = ~(ratio <= 1.0)
        minus_log_own = tl.where(y >= 0, shift - g_y, -tl.log(own))
    else:
        far = ~(ratio <= FAR)
        minus_log_own = -tl.log(own)
    near = log1p(tl.where(far, 0.0, ratio))
    return tl.where(far, tl.log(rest + own) + minus_log_own, near)


@triton.jit
def finish(
    rest,
    own,
    shift,
    y,
    bad,
    g_y,
    slope_y,
    rho_y,
    w_y,
    total_u,
    sum_ug,
    scale,
    smoothing,
    z_loss,
    tau,
    weight_sum,
    present,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ZLOSS: tl.constexpr,
    TAU: tl.constexpr,
    MAP: tl.constexpr,
):
    """Loss of rows, and the factors of their gradients.

        dx_k = common slope_k - smooth u_k rho_k  for k != y,   own - smooth u_y rho_y  for k = y

    u: weights outside the comp-sum term, total_u their sum (soft targets only), sum_ug that of
    u g, both float64; scale: t times the upstream gradient. Returns (loss, common, own, smooth).
    """
    C: tl.constexpr = rest.dtype
    S = rest + own
    S = tl.where((S > 0.0) & (S < INFINITY) & ~bad, S, NAN)
    loss = S - S
    slope = S - S  # dloss / dln S of everything but the comp-sum term
    if SOFT or SMOOTH or ZLOSS:
        log_sum = shift.to(tl.float64) + tl.log(S.to(tl.float64))
        extra = log_sum * 0.0
        steep = log_sum * 0.0
        if SOFT:
            extra += total_u * log_sum - sum_ug
            steep += total_u
        elif SMOOTH:
            share = (smoothing / present).to(tl.float64)
            extra += share * (weight_sum.to(tl.float64) * log_sum - sum_ug)
            steep += share * weight_sum.to(tl.float64)
        if ZLOSS:
            extra += z_loss.to(tl.float64) * log_sum * log_sum
            steep += 2.0 * z_loss.to(tl.float64) * log_sum
        loss += extra.to(C)
        slope += steep.to(C)
    common = slope / S * scale
    if SOFT:
        return loss, common, common * 0.0, scale
    else:
        keep = w_y * (1.0 - smoothing) if SMOOTH else w_y
        member = plain_loss(rest, own, y, g_y, shift, MAP)
        steepness = keep
        if TAU:
            v = (1.0 - tau) * member
            member = expm1(v) / (1.0 - tau)
            steepness = keep * exp(v)
        if SMOOTH:  # where nothing is kept the member may be infinite
            member = tl.where(smoothing < 1.0, member, 0.0)
        loss += keep * member
        own_value = common * slope_y - scale * steepness * (rest / S) * rho_y
        own_value = tl.where(y >= 0, own_value, 0.0)
        common = (slope + steepness) / S * scale
        if SMOOTH:
            return loss, common, own_value, scale * smoothing / present
        else:
            return loss, common, own_value, common * 0.0

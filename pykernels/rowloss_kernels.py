"""Row losses in Triton, a program for whole rows; what it computes is in ``rowloss_terms``.

Arguments that all kernels take in the same meaning: arrays of a `RowCall`, None where it has none;
numbers whose names end in ``_bits`` are doubles as their bits; C: compute type; R rows of A * B
classes in a program; NESTED: rows at two distances.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flcore.pykernels.rowloss_terms import (
    INFINITY,
    SOFTMAX,
    add_up,
    element_map,
    finish,
    load_targets,
    log_weighted,
    number,
    row_offset,
    store_rounded,
)

__all__ = [
    "PLAIN",
    "class_weights",
    "gain",
    "load_logits",
    "row_kernel",
    "row_scale",
    "shares",
    "store_rows",
    "target_terms",
]

NUMBERS = ["scale_bits", "margin_bits", "smoothing_bits", "z_loss_bits", "tau_bits", "gain_bits"]
PLAIN = ["rows", "inner", "ignore_index", "label_offset", *NUMBERS, "weight_bits", "present_bits"]


# ---- pieces ------------------------------------------------------------------------------------


@triton.jit
def row_scale(row_scale_ptr, row, active, scale_bits, C: tl.constexpr):
    """Factor t of the logits of rows."""
    t = tl.where(active, number(scale_bits, C), 0.0)
    if row_scale_ptr is not None:
        t = t * tl.load(row_scale_ptr + row, mask=active, other=0.0)
    return t


@triton.jit
def load_logits(
    x_ptr,
    prior_ptr,
    offset,
    k,
    y,
    t,
    active,
    limit,
    class_stride,
    margin_bits,
    C: tl.constexpr,
    MARGIN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return z and the prior (anything where there is none) of a tile."""
    if COLUMNS == 0:
        x = tl.load(
            x_ptr + offset + k.to(tl.int64) * class_stride, mask=active & (k < limit), other=0.0
        )
    else:  # loads of columns lay the tile out a row a thread: no exchange in the sums
        x = tl.load(x_ptr + offset, mask=active, other=0.0)
        for c in tl.static_range(1, COLUMNS):
            column = tl.load(x_ptr + offset + c * class_stride, mask=active, other=0.0)
            x = tl.where(k == c, column, x)
    z = x.to(C) * t
    if MARGIN:
        z = tl.where(k == y, z, z + number(margin_bits, C))
    prior = z
    if prior_ptr is not None:
        prior = tl.load(prior_ptr + k, mask=k < limit, other=0.0)
    return z, prior


@triton.jit
def shares(present_bits, totals_ptr, weight_bits, C: tl.constexpr):
    """W and the number V' of classes present."""
    if totals_ptr is None:
        return number(weight_bits, C), number(present_bits, C)
    else:
        return tl.load(totals_ptr), tl.load(totals_ptr + 1)


@triton.jit
def class_weights(
    soft_ptr,
    weight_ptr,
    prior,
    row,
    k,
    keep,
    classes,
    smoothing,
    present,
    C: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    MAP: tl.constexpr,
):
    """Weights u of ln S - g outside the comp-sum term.

    Without soft targets those of the classes present, short of the factor smoothing / V'.
    """
    there = keep
    if HAS_PRIOR:
        there = there & ((prior > -INFINITY) if MAP == SOFTMAX else (prior > 0.0))
    if soft_ptr is None:
        u = tl.where(there, 1.0, 0.0).to(C)
    else:
        u = tl.load(soft_ptr + row.to(tl.int64) * classes + k, mask=keep, other=0.0).to(C)
        if SMOOTH:
            u = (1.0 - smoothing) * u + tl.where(there, smoothing / present, 0.0)
    if weight_ptr is not None:
        u = u * tl.load(weight_ptr + k, mask=k < classes, other=0.0)
    return u


@triton.jit
def target_terms(
    x_ptr,
    weight_ptr,
    prior_ptr,
    offset,
    y,
    t,
    shift,
    class_stride,
    C: tl.constexpr,
    MAP: tl.constexpr,
):
    """Return e, slope, rho, g and w of the targets; e and slope are 0 where there is none."""
    here = y >= 0
    z = tl.load(x_ptr + offset + y.to(tl.int64) * class_stride, mask=here, other=0.0).to(C) * t
    prior = z
    w = tl.where(here, 1.0, 1.0).to(C)  # also where another shard has the target
    if prior_ptr is not None:
        prior = tl.load(prior_ptr + y, mask=here, other=0.0)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + y, mask=here, other=0.0)
    e, slope, rho = element_map(z, prior, shift, prior_ptr is not None, MAP)
    g = z + prior if prior_ptr is not None else z  # of softmax
    return tl.where(here, e, 0.0), tl.where(here, slope, 0.0), rho, g, w


@triton.jit
def gain(upstream_ptr, scale_ptr, row, active, gain_bits, C: tl.constexpr):
    """Upstream gradient of rows."""
    factor = tl.where(active, number(gain_bits, C), 0.0)
    if scale_ptr is not None:
        factor = factor * tl.load(scale_ptr)
    if upstream_ptr is not None:
        factor = factor * tl.load(upstream_ptr + row, mask=active, other=0.0)
    return factor


@triton.jit
def store_rows(pointer, row, values, active, inside):
    """Store numbers of rows, 0 for those that are left out."""
    if pointer is not None:
        tl.store(pointer + row, tl.where(active, values, 0.0), mask=inside)


# ---- a row in one program ----------------------------------------------------------------------


@triton.jit(do_not_specialize=PLAIN)
def row_kernel(
    x_ptr,
    grad_ptr,
    labels_ptr,
    soft_ptr,
    valid_ptr,
    weight_ptr,
    prior_ptr,
    row_scale_ptr,
    upstream_ptr,
    scale_ptr,
    totals_ptr,
    loss_ptr,
    rest_ptr,
    own_ptr,
    shift_ptr,
    rows,
    classes,
    inner,
    outer_stride,
    row_stride,
    class_stride,
    grad_outer_stride,
    grad_row_stride,
    grad_class_stride,
    ignore_index,
    label_offset,
    scale_bits,
    margin_bits,
    smoothing_bits,
    z_loss_bits,
    tau_bits,
    gain_bits,
    weight_bits,
    present_bits,
    C: tl.constexpr,
    MAP: tl.constexpr,
    MARGIN: tl.constexpr,
    SMOOTH: tl.constexpr,
    ZLOSS: tl.constexpr,
    TAU: tl.constexpr,
    SHARD: tl.constexpr,
    NESTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    AGAIN: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """Loss, statistics and gradient of R rows whose logits are read once."""
    HAS_PRIOR: tl.constexpr = prior_ptr is not None
    SOFT: tl.constexpr = soft_ptr is not None
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None, None]
    k = tl.arange(0, A)[None, :, None] * B + tl.arange(0, B)[None, None, :]
    inside = row < rows
    active, y, bad = load_targets(
        labels_ptr, valid_ptr, row, inside, ignore_index, label_offset, classes, SHARD
    )
    limit = classes if COLUMNS == 0 else COLUMNS  # known classes: padding costs nothing
    keep = active & (k < limit)
    offset = row_offset(row, inner, outer_stride, row_stride, NESTED)
    t = row_scale(row_scale_ptr, row, active, scale_bits, C)
    z, prior = load_logits(
        x_ptr,
        prior_ptr,
        offset,
        k,
        y,
        t,
        active,
        limit,
        class_stride,
        margin_bits,
        C,
        MARGIN,
        COLUMNS,
    )
    shift = t * 0.0
    if MAP == SOFTMAX:
        g = tl.where(keep, z + prior if HAS_PRIOR else z, -INFINITY)
        shift = tl.max(tl.max(g, axis=1, keep_dims=True), axis=2, keep_dims=True)
        shift = tl.where(shift > -INFINITY, shift, 0.0)
    e, slope, rho = element_map(z, prior, shift, HAS_PRIOR, MAP)
    rest = add_up(tl.where(keep & (k != y), e, 0.0)).to(C)

    smoothing = number(smoothing_bits, C)
    weight_sum, present = shares(present_bits, totals_ptr, weight_bits, C)
    u = e
    total_u = rest.to(tl.float64)
    sum_ug = total_u
    if SOFT or SMOOTH:
        # fmt: off
        u = class_weights(soft_ptr, weight_ptr, prior, row, k, keep, classes, smoothing, present,
                          C, SMOOTH, HAS_PRIOR, MAP)
        # fmt: on
        total_u = add_up(u)
        ug = u * log_weighted(z, prior, e, shift, HAS_PRIOR, MAP)
        sum_ug = add_up(tl.where(keep & (u != 0.0), ug, 0.0)) + total_u * shift.to(tl.float64)
    own, slope_y, rho_y, g_y, w_y = target_terms(
        x_ptr, weight_ptr, prior_ptr, offset, y, t, shift, class_stride, C, MAP
    )
    # fmt: off
    loss, common, own_value, smooth = finish(
        rest, own, shift, y, bad, g_y, slope_y, rho_y, w_y, total_u, sum_ug,
        t * gain(upstream_ptr, scale_ptr, row, active, gain_bits, C),
        smoothing, number(z_loss_bits, C), number(tau_bits, C), weight_sum, present,
        SOFT, SMOOTH, ZLOSS, TAU, MAP)
    # fmt: on
    store_rows(loss_ptr, row, loss, active, inside)
    store_rows(rest_ptr, row, rest, active, inside)
    store_rows(own_ptr, row, own, active, inside)
    store_rows(shift_ptr, row, shift, active, inside)
    if grad_ptr is not None:
        if AGAIN:  # from the cache: what would be kept does not fit into the registers
            # fmt: off
            z, prior = load_logits(x_ptr, prior_ptr, offset, k, y, t, active, limit, class_stride,
                                   margin_bits, C, MARGIN, COLUMNS)
            _, slope, rho = element_map(z, prior, shift, HAS_PRIOR, MAP)
            if SOFT or SMOOTH:
                u = class_weights(soft_ptr, weight_ptr, prior, row, k, keep, classes, smoothing,
                                  present, C, SMOOTH, HAS_PRIOR, MAP)
            # fmt: on
        grad = tl.where(k == y, own_value, common * slope)
        if SOFT or SMOOTH:
            grad = grad - smooth * u * rho
        target = row_offset(row, inner, grad_outer_stride, grad_row_stride, NESTED)
        target_ptr = grad_ptr + target + k.to(tl.int64) * grad_class_stride
        store_rounded(target_ptr, tl.where(active, grad, 0.0), inside & (k < limit))

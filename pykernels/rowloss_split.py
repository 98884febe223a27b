"""Row losses in Triton, a row over many programs; arguments as in ``rowloss_kernels``.

Parts of 8,192 classes leave their sums in a workspace, in float64; one program a few rows adds
them in order and forms loss, statistics and the factors of the gradient; an element-wise kernel
multiplies. The parts depend on the number of classes alone: same bits on every GPU and run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from flcore.pykernels.rowloss_kernels import (
    PLAIN,
    class_weights,
    gain,
    load_logits,
    row_scale,
    shares,
    store_rows,
    target_terms,
)
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

__all__ = ["finish_kernel", "gradient_kernel", "partial_kernel"]

FACTORS = tl.constexpr(4)  # numbers a row that gradient_kernel reads


@triton.jit(do_not_specialize=["splits", *PLAIN])
def partial_kernel(
    x_ptr,
    labels_ptr,
    soft_ptr,
    valid_ptr,
    weight_ptr,
    prior_ptr,
    row_scale_ptr,
    totals_ptr,
    parts_ptr,
    splits,
    rows,
    classes,
    inner,
    outer_stride,
    row_stride,
    class_stride,
    ignore_index,
    label_offset,
    scale_bits,
    margin_bits,
    smoothing_bits,
    weight_bits,
    present_bits,
    C: tl.constexpr,
    MAP: tl.constexpr,
    MARGIN: tl.constexpr,
    SMOOTH: tl.constexpr,
    SHARD: tl.constexpr,
    NESTED: tl.constexpr,
    WEIGHTS_ONLY: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """Sums over one part of one row.

    parts_ptr: float64 [4, rows, splits]: R relative to the largest exponent of the part, that
    exponent, sum of u, sum of u g. WEIGHTS_ONLY: the third alone.
    """
    HAS_PRIOR: tl.constexpr = prior_ptr is not None
    SOFT: tl.constexpr = soft_ptr is not None
    program = tl.program_id(0)
    one = tl.zeros([1, 1, 1], tl.int32)
    row = program // splits + one
    inside = row < rows
    active, y, _ = load_targets(
        labels_ptr, valid_ptr, row, inside, ignore_index, label_offset, classes, SHARD
    )
    k = tl.arange(0, A)[None, :, None] * B + tl.arange(0, B)[None, None, :]
    k = k + (program % splits) * (A * B)
    keep = active & (k < classes)
    offset = row_offset(row, inner, outer_stride, row_stride, NESTED)
    t = row_scale(row_scale_ptr, row, active, scale_bits, C)
    # fmt: off
    z, prior = load_logits(x_ptr, prior_ptr, offset, k, y, t, active, classes, class_stride,
                           margin_bits, C, MARGIN, 0)
    # fmt: on
    plane = tl.num_programs(0).to(tl.int64)
    target_ptr = parts_ptr + program + one
    if SOFT or SMOOTH:
        smoothing = number(smoothing_bits, C)
        _, present = shares(present_bits, totals_ptr, weight_bits, C)
        # fmt: off
        u = class_weights(soft_ptr, weight_ptr, prior, row, k, keep, classes, smoothing, present,
                          C, SMOOTH, HAS_PRIOR, MAP)
        # fmt: on
        total_u = add_up(u)
        tl.store(target_ptr + 2 * plane, total_u)
    if not WEIGHTS_ONLY:
        shift = t * 0.0
        if MAP == SOFTMAX:
            g = tl.where(keep, z + prior if HAS_PRIOR else z, -INFINITY)
            top = tl.max(tl.max(g, axis=1, keep_dims=True), axis=2, keep_dims=True)
            tl.store(target_ptr + plane, top.to(tl.float64))
            shift = tl.where(top > -INFINITY, top, 0.0)
        e, _, _ = element_map(z, prior, shift, HAS_PRIOR, MAP)
        tl.store(target_ptr, add_up(tl.where(keep & (k != y), e, 0.0)))
        if SOFT or SMOOTH:
            ug = u * log_weighted(z, prior, e, shift, HAS_PRIOR, MAP)
            sum_ug = add_up(tl.where(keep & (u != 0.0), ug, 0.0)) + total_u * shift.to(tl.float64)
            tl.store(target_ptr + 3 * plane, sum_ug)


@triton.jit
def load_part(parts_ptr, field, plane, at, inside, other):
    """One field of the parts of rows."""
    return tl.load(parts_ptr + field * plane + at, mask=inside, other=other)


@triton.jit(do_not_specialize=["splits", *PLAIN])
def finish_kernel(
    x_ptr,
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
    parts_ptr,
    factors_ptr,
    splits,
    rows,
    classes,
    inner,
    outer_stride,
    row_stride,
    class_stride,
    ignore_index,
    label_offset,
    scale_bits,
    smoothing_bits,
    z_loss_bits,
    tau_bits,
    gain_bits,
    weight_bits,
    present_bits,
    C: tl.constexpr,
    MAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    ZLOSS: tl.constexpr,
    TAU: tl.constexpr,
    SHARD: tl.constexpr,
    NESTED: tl.constexpr,
    GIVEN: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """Loss and statistics of R rows from at most B parts of each, and the factors of gradients.

    GIVEN: the statistics are read instead of formed. factors_ptr: C [rows, 4]: common, own,
    smooth of `finish`, shift.
    """
    SOFT: tl.constexpr = soft_ptr is not None
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None, None]
    inside = row < rows
    active, y, bad = load_targets(
        labels_ptr, valid_ptr, row, inside, ignore_index, label_offset, classes, SHARD
    )
    part = tl.arange(0, B)[None, None, :]
    plane = rows.to(tl.int64) * splits
    at = row.to(tl.int64) * splits + part
    filled = active & (part < splits)
    t = row_scale(row_scale_ptr, row, active, scale_bits, C)
    shift = t * 0.0
    if GIVEN:
        rest = tl.load(rest_ptr + row, mask=active, other=0.0)
        given = tl.load(own_ptr + row, mask=active, other=0.0)
        if MAP == SOFTMAX:
            shift = tl.load(shift_ptr + row, mask=active, other=0.0)
    else:
        sums = load_part(parts_ptr, 0, plane, at, filled, 0.0)
        if MAP == SOFTMAX:
            tops = load_part(parts_ptr, 1, plane, at, filled, -INFINITY)
            top = tl.max(tops, axis=2, keep_dims=True)
            top = tl.where(top > -INFINITY, top, 0.0)
            sums = sums * tl.exp(tops - top)
            shift = top.to(C)
        rest = tl.sum(sums, axis=2, keep_dims=True).to(C)
    total_u = rest.to(tl.float64)
    sum_ug = total_u
    if SOFT or SMOOTH:
        if SOFT:
            u = load_part(parts_ptr, 2, plane, at, filled, 0.0)
            total_u = tl.sum(u, axis=2, keep_dims=True)
        if not GIVEN:
            ug = load_part(parts_ptr, 3, plane, at, filled, 0.0)
            sum_ug = tl.sum(ug, axis=2, keep_dims=True)
    offset = row_offset(row, inner, outer_stride, row_stride, NESTED)
    own, slope_y, rho_y, g_y, w_y = target_terms(
        x_ptr, weight_ptr, prior_ptr, offset, y, t, shift, class_stride, C, MAP
    )
    if GIVEN:
        own = given
    weight_sum, present = shares(present_bits, totals_ptr, weight_bits, C)
    # fmt: off
    loss, common, own_value, smooth = finish(
        rest, own, shift, y, bad, g_y, slope_y, rho_y, w_y, total_u, sum_ug,
        t * gain(upstream_ptr, scale_ptr, row, active, gain_bits, C),
        number(smoothing_bits, C), number(z_loss_bits, C), number(tau_bits, C), weight_sum,
        present, SOFT, SMOOTH, ZLOSS, TAU, MAP)
    # fmt: on
    if not GIVEN:
        store_rows(loss_ptr, row, loss, active, inside)
        store_rows(rest_ptr, row, rest, active, inside)
        store_rows(own_ptr, row, own, active, inside)
        store_rows(shift_ptr, row, shift, active, inside)
    if factors_ptr is not None:
        target_ptr = factors_ptr + row.to(tl.int64) * FACTORS
        tl.store(target_ptr, common, mask=active)
        tl.store(target_ptr + 1, own_value, mask=active)
        tl.store(target_ptr + 2, smooth, mask=active)
        tl.store(target_ptr + 3, shift, mask=active)


@triton.jit(do_not_specialize=["blocks", *PLAIN])
def gradient_kernel(
    x_ptr,
    grad_ptr,
    labels_ptr,
    soft_ptr,
    valid_ptr,
    weight_ptr,
    prior_ptr,
    row_scale_ptr,
    totals_ptr,
    factors_ptr,
    blocks,
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
    weight_bits,
    present_bits,
    C: tl.constexpr,
    MAP: tl.constexpr,
    MARGIN: tl.constexpr,
    SMOOTH: tl.constexpr,
    SHARD: tl.constexpr,
    NESTED: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """Gradient of a block of B classes of R rows from the factors of `finish_kernel`."""
    HAS_PRIOR: tl.constexpr = prior_ptr is not None
    SOFT: tl.constexpr = soft_ptr is not None
    program = tl.program_id(0)
    row = program // blocks * R + tl.arange(0, R)[:, None, None]
    k = (program % blocks) * B + tl.arange(0, B)[None, None, :]
    inside = row < rows
    active, y, _ = load_targets(
        labels_ptr, valid_ptr, row, inside, ignore_index, label_offset, classes, SHARD
    )
    keep = active & (k < classes)
    factors_ptr += row.to(tl.int64) * FACTORS
    common = tl.load(factors_ptr, mask=active, other=0.0)
    own_value = tl.load(factors_ptr + 1, mask=active, other=0.0)
    offset = row_offset(row, inner, outer_stride, row_stride, NESTED)
    t = row_scale(row_scale_ptr, row, active, scale_bits, C)
    # fmt: off
    z, prior = load_logits(x_ptr, prior_ptr, offset, k, y, t, active, classes, class_stride,
                           margin_bits, C, MARGIN, 0)
    # fmt: on
    shift = t * 0.0
    if MAP == SOFTMAX:
        shift = tl.load(factors_ptr + 3, mask=active, other=0.0)
    _, slope, rho = element_map(z, prior, shift, HAS_PRIOR, MAP)
    grad = tl.where(k == y, own_value, common * slope)
    if SOFT or SMOOTH:
        smoothing = number(smoothing_bits, C)
        _, present = shares(present_bits, totals_ptr, weight_bits, C)
        # fmt: off
        u = class_weights(soft_ptr, weight_ptr, prior, row, k, keep, classes, smoothing, present,
                          C, SMOOTH, HAS_PRIOR, MAP)
        # fmt: on
        grad = grad - tl.load(factors_ptr + 2, mask=active, other=0.0) * u * rho
    target = row_offset(row, inner, grad_outer_stride, grad_row_stride, NESTED)
    target_ptr = grad_ptr + target + k.to(tl.int64) * grad_class_stride
    store_rounded(target_ptr, tl.where(active, grad, 0.0), inside & (k < classes))

"""Variant `triton` of products with quantized activations: quantisation, then integers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from flcore.ops._qmatmul_call import QMatmulCall
from flcore.ops._qmatmul_triton import (
    OPTIONS,
    as_tensor,
    as_weight,
    destination,
    epilogue,
    join,
    row_stride,
)
from flcore.pykernels import act_quant as quantiser
from flcore.pykernels import qmatmul_int8 as kernels
from flcore.pykernels import qmatmul_plan as plans

__all__ = ["Activations", "qmatmul_int8", "quantize", "quantize_activation"]

ALIGNMENT = 16  # bytes of the rows of codes that a product reads
LONGEST = 32768  # LONGEST in csrc/cpu/qmatmul_int8_tile.h


class Activations(NamedTuple):
    """Rows of x in 8 bits.

    Attributes
    ----------
    codes : tensor (m, k) of int8, or uint8
        Rows contiguous.
    scales : tensor (m, blocks) of float32
    zeros : tensor (m, blocks) or None
        As the codes, where x is quantised asymmetrically.
    sums : tensor (m, units) of int32
        Sums of (code - zero), or of codes as they are stored.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    sums: torch.Tensor


def quantize(x: torch.Tensor, block: int, unit: int, asymmetric: bool) -> Activations:
    """Quantise the rows of x (m, k) for a product.

    block : values that share a scale; unit : values with a sum of their own, within a block.
    Asymmetric codes and zeros are 128 less than `quantize_activation` tells them.
    """
    m, k = x.shape
    stride = -(-k // ALIGNMENT) * ALIGNMENT
    shape = (m, -(-k // block))
    a = Activations(
        torch.empty((m, stride), dtype=torch.int8, device=x.device)[:, :k],
        torch.empty(shape, dtype=torch.float32, device=x.device),
        torch.empty(shape, dtype=torch.int8, device=x.device) if asymmetric else None,
        torch.empty((m, -(-k // unit)), dtype=torch.int32, device=x.device),
    )
    _quantize(x, a, block, unit, asymmetric, stored=False)
    return a


def quantize_activation(x: Any, rows: int, k: int, block: int, out: Any) -> None:
    """Variant `triton` of act_quant; writes the arrays of `out`."""
    a = Activations(*(as_tensor(y) for y in (out.codes, out.scales, out.zeros, out.sums)))
    values = as_tensor(x.array).reshape(rows, k)
    _quantize(values, a, block, block, a.zeros is not None, stored=True)


def _quantize(
    x: torch.Tensor, a: Activations, block: int, unit: int, asymmetric: bool, *, stored: bool
) -> None:
    (m, blocks), k = a.scales.shape, x.shape[1]
    t = min(quantiser.TILE, max(16, plans.ceil_power(min(unit, k))))
    r = max(1, min(quantiser.TILE // t, plans.ceil_power(m * blocks)))
    with torch.cuda.device_of(x):
        quantiser.act_quant_kernel[(triton.cdiv(m * blocks, r),)](
            x, a.codes, a.scales, a.zeros, a.sums, m * blocks, blocks, a.sums.shape[1], k, block,
            unit, row_stride(x), a.codes.stride(0), ASYMMETRIC=asymmetric, STORED=stored, R=r,
            T=t, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def unit_of(base: int, k: int) -> int:
    """Values with one scale of x and of the weight whose products are summed in int32.

    base : the shorter of both blocks; it is cut where a sum might not fit.
    """
    if base <= LONGEST:
        return base
    if base >= k:
        pieces = -(-base // LONGEST)
        return -(-base // (pieces * ALIGNMENT)) * ALIGNMENT
    return next(d for d in range(LONGEST, 0, -ALIGNMENT) if base % d == 0)


def qmatmul_int8(call: QMatmulCall) -> None:
    """Variant `triton` of qmatmul_int8; writes ``call.out``."""
    w = as_weight(call.weight)
    x, out = as_tensor(call.x), as_tensor(call.out)
    m = x.shape[0]
    size = max(1, w.k)
    block = min(call.act_block or size, size)
    unit = unit_of(block if w.whole else min(block, w.group), size)
    a = quantize(x, block, unit, call.asymmetric)
    units = a.sums.shape[1]
    light = units == 1 and not call.asymmetric
    plan = plans.plan_int8(plans.device_of(str(x.device)), m, w.n, units, unit, light=light)
    ends = epilogue(call, call.rank, 1)
    codes = w.codes.view(torch.uint8) if w.bits == 8 else w.codes
    with torch.cuda.device_of(out):
        target, strides, mine = destination(out, plan, ends)
        tiles = triton.cdiv(m, plan.bm) * triton.cdiv(w.n, plan.bn)
        kernels.int8_kernel[(tiles, plan.splits)](
            a.codes, a.scales, a.zeros, a.sums, codes, w.scales, w.zeros, target, *mine[:3],
            m, w.n, w.k, w.words, w.groups, w.group, units, unit, a.scales.shape[1], block,
            plan.steps, row_stride(a.codes), strides, *mine[3:], BITS=w.bits, KIND=w.kind,
            ONE=unit <= plan.bk, BM=plan.bm, BN=plan.bn, BK=plan.bk, SPLIT=plan.splits > 1,
            num_warps=plan.warps, num_stages=plan.stages, **OPTIONS,
        )  # fmt: skip
        join(target, out, plan, ends)

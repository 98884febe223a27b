"""Variant `triton` of the products with quantized weights: from a `QMatmulCall` to launches."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from flcore.ops._qmatmul_call import QMatmulCall
from flcore.pykernels import qmatmul as kernels
from flcore.pykernels import qmatmul_dx as gradient
from flcore.pykernels import qmatmul_plan as plans

__all__ = ["qmatmul", "qmatmul_dx"]

OPTIONS = {"enable_fp_fusion": True}  # a sum of products: one rounding is better than two
EXACT_ROWS = 64  # rows up to which levels of a codebook are taken with all their bits


class Weight(NamedTuple):
    """A weight in the layout "tile16" as kernels take it: tensors and numbers."""

    n: int
    k: int
    bits: int
    kind: int
    group: int  # positions that share a scale; k: all
    groups: int
    words: int  # int32 of a row, where 16 rows lie side by side
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    table: torch.Tensor | None
    levels: np.ndarray | None  # as the table, on the host

    @property
    def whole(self) -> bool:
        """Whether a row has one scale."""
        return self.groups == 1


def qmatmul(call: QMatmulCall) -> None:
    """Variant `triton` of qmatmul; writes ``call.out``."""
    w = as_weight(call.weight)
    x, out = as_tensor(call.x), as_tensor(call.out)
    m = x.shape[0]
    device = plans.device_of(str(x.device))
    ends = epilogue(call, call.rank, 1)
    arrays, numbers = (w.codes, w.scales, w.zeros), (w.words, w.groups, w.group)
    with torch.cuda.device_of(out):
        if m <= plans.GEMV_ROWS:
            each = {8: 4, 4: 8}.get(w.bits, 16)
            plan = plans.plan_gemv(device, m, w.n, -(-w.k // each))
            target, strides, mine = destination(out, plan, ends)
            kernels.gemv_kernel[(triton.cdiv(w.n, plan.bn), plan.splits)](
                x, *arrays, w.table, target, *mine[:3], m, w.n, w.k, *numbers, plan.steps,
                row_stride(x), strides, *mine[3:], BITS=w.bits, KIND=w.kind, BM=plan.bm,
                BN=plan.bn, BJ=plan.bk, SPLIT=plan.splits > 1, num_warps=plan.warps, **OPTIONS,
            )  # fmt: skip
        else:
            f = factors(x, w)
            name = "gemm" if f.x_parts == f.parts == 1 else "wide"
            plan = plans.plan(device, name, m, w.n, w.k, 0 if w.whole else w.group)
            target, strides, mine = destination(out, plan, ends)
            tiles = triton.cdiv(m, plan.bm) * triton.cdiv(w.n, plan.bn)
            kernels.gemm_kernel[(tiles, plan.splits)](
                x, *arrays, f.levels, target, *mine[:3], m, w.n, w.k, *numbers, plan.steps,
                row_stride(x), strides, *mine[3:], BITS=w.bits, KIND=w.kind, XP=f.x_parts,
                WP=f.parts, HALF=f.half, WHOLE=w.whole, BM=plan.bm, BN=plan.bn, BK=plan.bk,
                SPLIT=plan.splits > 1, num_warps=plan.warps, num_stages=plan.stages, **OPTIONS,
            )  # fmt: skip
        join(target, out, plan, ends)


def qmatmul_dx(call: QMatmulCall) -> None:
    """Variant `triton` of qmatmul_dx; writes ``call.out``."""
    w = as_weight(call.weight)
    x, out = as_tensor(call.x), as_tensor(call.out)
    m = x.shape[0]
    ends = epilogue(call, 1, w.k)
    plan = plans.plan(plans.device_of(str(x.device)), "dx", m, w.k, w.n, 0 if w.whole else w.group)
    with torch.cuda.device_of(out):
        f = factors(x, w, scaled=True)
        target, strides, mine = destination(out, plan, ends)
        tiles = triton.cdiv(m, plan.bm) * triton.cdiv(w.k, plan.bn)
        gradient.dx_kernel[(tiles, plan.splits)](
            x, w.codes, w.scales, w.zeros, f.levels, target, *mine[1:3], m, w.n, w.k, w.words,
            w.groups, w.group, plan.steps, row_stride(x), strides, *mine[3:], BITS=w.bits,
            KIND=w.kind, XP=f.x_parts, WP=f.parts, BM=plan.bm, BN=plan.bk, BK=plan.bn,
            SPLIT=plan.splits > 1, num_warps=plan.warps, num_stages=plan.stages, **OPTIONS,
        )  # fmt: skip
        join(target, out, plan, ends)


# ---- arrays --------------------------------------------------------------------------------------


def as_tensor(x: Any) -> Any:
    """View a NumPy array as a tensor on its memory; bfloat16 as such."""
    if x is None:
        return None
    if isinstance(x, np.ndarray):
        if not x.flags.writeable or min(x.strides, default=0) < 0:  # torch has no such tensors
            x = x.copy()
        if x.dtype.name in ("bfloat16", "uint16"):
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)
    return x.detach()


def as_weight(weight: Any) -> Weight:
    """Return a `QuantizedTensor` as kernels take it."""
    tiled = weight.tiled()
    (n, k), bits = weight.shape, weight.scheme.bits
    codes, table = as_tensor(tiled.codes), weight.scheme.table
    if codes.data_ptr() % 4:
        codes = codes.clone()
    return Weight(
        n, k, bits, weight.scheme.kind_code, max(1, min(weight.group, k)), weight.groups,
        -(-k // 32) * bits, codes.view(torch.int32), as_tensor(tiled.scales),
        as_tensor(tiled.zeros),
        None if table is None else table_of(table.tobytes(), str(codes.device)), table,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def table_of(table: bytes, device: str) -> torch.Tensor:
    """Return the levels of a codebook on a device; copied there once, as that waits for it."""
    return torch.from_numpy(np.frombuffer(table, np.float32).copy()).to(device)


@functools.lru_cache(maxsize=64)
def levels_of(table: bytes, parts: int, device: str) -> tuple[torch.Tensor, int]:
    """Return the levels of a codebook as a sum of at most `parts` bfloat16, and their number.

    All parts of a level but the last are cut, not rounded: they have its sign, and sums of them
    need no more bits than the level has.
    """
    rest = torch.from_numpy(np.frombuffer(table, np.float32).copy())
    found: list[torch.Tensor] = []
    while not found or (bool(rest.any()) and len(found) < parts):
        first = (rest.view(torch.int32) & -65536).view(torch.float32)
        if len(found) == parts - 1:
            first = rest.bfloat16().float()
        found.append(first.bfloat16())
        rest = rest - first
    return torch.stack(found).to(device), len(found)


def row_stride(x: torch.Tensor) -> int:
    """Elements from row to row."""
    return int(x.stride(0)) if x.shape[0] > 1 else int(x.shape[1])


# ---- pieces of a call ----------------------------------------------------------------------------


class Factors(NamedTuple):
    """In what the numbers of a product on tensor cores are given to them."""

    x_parts: int
    parts: int
    half: bool  # float16
    levels: torch.Tensor | None


def factors(x: torch.Tensor, w: Weight, *, scaled: bool = False) -> Factors:
    """Return the factors of x (`scaled`: by scales of the weight) and of the codes' values.

    Levels have 24 bits, or 16 in products so large that arithmetic is the limit.
    """
    half = x.dtype == torch.float16 and not scaled
    x_parts = 3 if x.element_size() == 4 else 2 if scaled else 1
    if w.levels is None:
        return Factors(x_parts, 1, half, None)
    most = 3 if x.shape[0] <= EXACT_ROWS else 2
    levels, parts = levels_of(w.levels.tobytes(), most, str(x.device))
    if half and parts == 1 and bool(np.isfinite(w.levels.astype(np.float16)).all()):
        return Factors(1, 1, True, levels.half())
    return Factors(2 if half else x_parts, parts, False, levels)


def epilogue(call: QMatmulCall, up_col: int, up_rank: int) -> tuple[Any, ...]:
    """Bias, low, up, rank, and where in `up` the next column and the next rank are."""
    if not call.rank:
        return (as_tensor(call.bias), None, None, 0, 0, 0)
    arrays = (as_tensor(call.bias), as_tensor(call.low), as_tensor(call.up))
    return (*arrays, call.rank, up_col, up_rank)


def destination(
    out: torch.Tensor, plan: plans.Plan, ends: tuple[Any, ...]
) -> tuple[torch.Tensor, int, tuple[Any, ...]]:
    """Where a kernel writes, its row stride, and the epilogue it is left with."""
    if plan.splits == 1:
        return out, row_stride(out), ends
    parts = torch.empty((plan.splits, *out.shape), dtype=torch.float32, device=out.device)
    return parts, out.shape[1], (None, None, None, 0, 0, 0)


def join(parts: torch.Tensor, out: torch.Tensor, plan: plans.Plan, ends: tuple[Any, ...]) -> None:
    """Add the parts of a split contraction."""
    if plan.splits == 1:
        return
    m, n = out.shape
    bm, bn = (1, 256) if m <= 4 else (8, 128)
    kernels.join_kernel[(triton.cdiv(n, bn), triton.cdiv(m, bm))](
        parts, out, *ends[:3], m, n, plan.splits, row_stride(out), *ends[3:], BM=bm, BN=bn,
        num_warps=4, **OPTIONS,
    )  # fmt: skip

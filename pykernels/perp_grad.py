"""Gradients without their part along the weights, in Triton: multi-tensor, in place.

    c = w.g / (w.w + eps)      p = g - c w      g <- p ||g|| / (||p|| + eps)

Two stages of sums: a program adds 16 lanes of some tiles, another joins the tiles of a tensor. The
factors are made on the device too, so that the host waits for nothing. Sums read 2 s bytes a value,
the result 3 s; the pass that measures ||p|| is launched always and reads tensors that need it.

Tiles, lanes, trees and roundings are those of ``csrc/cpu/perp_grad.isa.cpp`` and no atomic
operation touches a sum: the bits are those of the CPU kernel, in the interpreter too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from flcore.pykernels.sums import bfloat16_bits, find_layer, pointer, to_device, widen

__all__ = ["perp_grad"]

# PERP_TILE, PERP_LANES, PERP_JOIN, PERP_CANCELS and PERP_NOTHING in csrc/api.h
TILE, LANES, JOIN = tl.constexpr(4096), tl.constexpr(16), tl.constexpr(128)
CANCELS, NOTHING = tl.constexpr(1e-8), tl.constexpr(1e-13)
GROUP = tl.constexpr(8)  # tiles a program: 128 lanes
AHEAD = tl.constexpr(16)  # steps whose loads are in flight together
BLOCK = 1024  # values a program of the last pass
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

F64, BF16 = tl.constexpr(0), tl.constexpr(3)  # DType in csrc/api.h

# Words of an entry of the table: first program, length, first tile, weight, gradient, its factors.
ENTRY = tl.constexpr(6)
# Factors of a tensor: c, alpha, whether to write, whether ||p|| is to be measured.
FACTORS = tl.constexpr(4)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def add_lanes(s):
    """Add 16 lanes: 8 to 8, 4 to 4, 2 to 2, 1 to 1; [GROUP, 16] to [GROUP, 1]."""
    s = tl.sum(tl.reshape(s, [GROUP, 2, 8]), axis=1)
    s = tl.sum(tl.reshape(s, [GROUP, 2, 4]), axis=1)
    s = tl.sum(tl.reshape(s, [GROUP, 2, 2]), axis=1)
    return tl.sum(tl.reshape(s, [GROUP, 2, 1]), axis=1)


@triton.jit(do_not_specialize=["entries"])
def sums_kernel(table_ptr, factors_ptr, tiles_ptr, entries, D: tl.constexpr, REST: tl.constexpr):
    """tiles[t] = (w.w, w.g, g.g) of each tile; REST: (||g - c w||^2, 0, 0) of tensors that need it.

    table_ptr: int64 [entries, ENTRY], addresses included; tiles_ptr: float64 [tiles, 3].
    """
    program = tl.program_id(0)
    entry_ptr = table_ptr + find_layer(table_ptr, ENTRY, entries, program) * ENTRY
    numel = tl.load(entry_ptr + 1)
    first = (program - tl.load(entry_ptr)) * GROUP
    tile = first + tl.arange(0, GROUP)[:, None]
    begin = tile * TILE
    lane = tl.arange(0, LANES)[None, :]
    w_ptr = pointer(entry_ptr + 3, D, False)
    g_ptr = pointer(entry_ptr + 4, D, False)

    longest = tl.minimum(numel - first * TILE, TILE)
    c = tl.zeros([1], tl.float64)
    if REST:
        mine_ptr = factors_ptr + tl.load(entry_ptr + 5) * FACTORS
        c = c + tl.load(mine_ptr)
        longest = tl.where(tl.load(mine_ptr + 3) > 0, longest, 0)
    ww = tl.zeros([GROUP, LANES], tl.float64)
    wg = tl.zeros([GROUP, LANES], tl.float64)
    gg = tl.zeros([GROUP, LANES], tl.float64)
    for step in range(0, (longest + LANES - 1) // LANES, AHEAD):
        for ahead in tl.static_range(AHEAD):
            in_tile = (step + ahead) * LANES + lane
            at = begin + in_tile
            inside = (at < numel) & (in_tile < TILE)
            w = widen(tl.load(w_ptr + at, mask=inside, other=0), D, 1)
            g = widen(tl.load(g_ptr + at, mask=inside, other=0), D, 1)
            if REST:
                p = g - c * w
                ww = ww + tl.where(inside, p * p, 0.0)
            else:
                ww = ww + w * w
                wg = wg + w * g
                gg = gg + g * g

    target = tiles_ptr + 3 * (tl.load(entry_ptr + 2) + tile)
    tl.store(target, add_lanes(ww), mask=begin < numel)
    if not REST:
        tl.store(target + 1, add_lanes(wg), mask=begin < numel)
        tl.store(target + 2, add_lanes(gg), mask=begin < numel)


@triton.jit
def join_kernel(rows_ptr, starts_ptr, out_ptr):
    """out[i] = sum of rows starts[i] .. starts[i + 1] - 1 of 3; a program one number of one i."""
    i, column = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)
    lane = tl.arange(0, JOIN)
    s = tl.zeros([JOIN], tl.float64)
    for first in range(begin, end, JOIN):
        row = first + lane
        s = s + tl.load(rows_ptr + 3 * row + column, mask=row < end, other=0.0)
    s = tl.sum(tl.reshape(s, [2, 64]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 32]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 16]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 8]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 4]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 2]), axis=0)
    tl.store(out_ptr + 3 * i + column, tl.sum(s, axis=0))


@triton.jit(do_not_specialize=["count"])
def factors_kernel(
    sums_ptr,
    rest_ptr,
    options_ptr,
    factors_ptr,
    count,
    RENORMALIZE: tl.constexpr,
    MEASURED: tl.constexpr,
):
    """Make the factors of `count` projections from (w.w, w.g, g.g), with ||p||^2 where MEASURED.

    sums_ptr, rest_ptr: float64 [count, 3]; options_ptr: float64 { eps, floor }.
    """
    i = tl.program_id(0) * JOIN + tl.arange(0, JOIN)
    inside = i < count
    eps, floor = tl.load(options_ptr), tl.load(options_ptr + 1)
    ww = tl.load(sums_ptr + 3 * i, mask=inside, other=0.0)
    wg = tl.load(sums_ptr + 3 * i + 1, mask=inside, other=0.0)
    gg = tl.load(sums_ptr + 3 * i + 2, mask=inside, other=0.0)
    leave = (wg == 0) | (ww + eps == 0)
    c = wg / tl.where(leave, 1.0, ww + eps)
    pp = gg - c * (2 * wg - c * ww)
    cancels = pp < CANCELS * gg
    if MEASURED:
        pp = tl.where(cancels, tl.load(rest_ptr + 3 * i, mask=inside, other=0.0), pp)
    alpha = tl.full([JOIN], 1.0, tl.float64)
    if RENORMALIZE:
        stretched = tl.sqrt(gg) / (tl.sqrt(tl.where(pp < 0, 0.0, pp)) + eps)
        alpha = tl.where(pp < floor * floor * gg, alpha, stretched)
    alpha = tl.where(pp <= NOTHING * NOTHING * gg, 0.0, alpha)
    mine_ptr = factors_ptr + FACTORS * i
    tl.store(mine_ptr, c, mask=inside)
    tl.store(mine_ptr + 1, alpha, mask=inside)
    tl.store(mine_ptr + 2, tl.where(leave, 0.0, 1.0), mask=inside)
    tl.store(mine_ptr + 3, tl.where(cancels & ~leave, 1.0, 0.0), mask=inside)


@triton.jit(do_not_specialize=["entries"])
def apply_kernel(
    table_ptr,
    factors_ptr,
    entries,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write g <- alpha (g - c w), rounded once; alpha 0 gives zeros."""
    program = tl.program_id(0)
    entry_ptr = table_ptr + find_layer(table_ptr, ENTRY, entries, program) * ENTRY
    mine_ptr = factors_ptr + tl.load(entry_ptr + 5) * FACTORS
    at = (program - tl.load(entry_ptr)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(tl.load(mine_ptr + 2) > 0, tl.load(entry_ptr + 1), 0)
    c, alpha = tl.load(mine_ptr), tl.load(mine_ptr + 1)
    g_ptr = pointer(entry_ptr + 4, D, ALIGNED) + at
    w = widen(tl.load(pointer(entry_ptr + 3, D, ALIGNED) + at, mask=inside, other=0), D, 1)
    g = widen(tl.load(g_ptr, mask=inside, other=0), D, 1)
    result = tl.where(alpha == 0, 0.0, alpha * (g - c * w))
    if D == BF16:
        tl.store(g_ptr, bfloat16_bits(result), mask=inside)
    else:
        tl.store(g_ptr, result.to(g_ptr.dtype.element_ty), mask=inside)


# ---- launchers ---------------------------------------------------------------------------------


class _Call:
    """The tables of one call, and the launches that work on all of its tensors."""

    def __init__(
        self, weights: Sequence[Any], grads: Sequence[Any], global_scope: bool, renormalize: bool
    ) -> None:
        self.device = grads[0].device
        self.layers = len(grads)
        self.global_scope, self.renormalize = global_scope, renormalize
        self.numel = np.array([v.numel for v in grads], dtype=np.int64)
        self.code = np.array([v.code for v in grads])
        self.address = np.array([[w.ptr, g.ptr] for w, g in zip(weights, grads, strict=True)])
        self.tiles = -(-self.numel // TILE.value)
        self.starts = to_device(np.insert(np.cumsum(self.tiles), 0, 0), self.device)
        self.tile_sums = self._empty(int(self.tiles.sum()))
        self.factors = self._empty(self.layers, FACTORS.value)

    def _empty(self, rows: int, columns: int = 3) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=torch.float64, device=self.device)

    def _table(self, chosen: np.ndarray, programs: np.ndarray) -> tuple[torch.Tensor, int]:
        first_tile = np.cumsum(self.tiles) - self.tiles
        factors = 0 * chosen if self.global_scope else chosen
        columns = [np.cumsum(programs) - programs, self.numel[chosen], first_tile[chosen]]
        words = np.stack([*columns, *self.address[chosen].T, factors], axis=1).astype(np.int64)
        return to_device(words.reshape(-1), self.device), int(programs.sum())

    def sums(self, rest: bool) -> torch.Tensor:
        """Return (layers, 3): dot products, or what is left of tensors that need it."""
        for code in range(4):
            chosen = np.flatnonzero((self.code == code) & (self.numel > 0))
            if len(chosen):
                table, programs = self._table(chosen, -(-self.tiles[chosen] // GROUP.value))
                arguments = (table, self.factors, self.tile_sums, len(chosen))
                sums_kernel[(programs,)](*arguments, D=code, REST=rest, **OPTIONS)
        out = self._empty(self.layers)
        columns = 1 if rest else 3
        join_kernel[(self.layers, columns)](self.tile_sums, self.starts, out, **OPTIONS)
        return out

    def decide(self, sums: torch.Tensor, rest: torch.Tensor | None, options: torch.Tensor) -> None:
        """Fill `factors`."""
        measured = rest is not None
        left = sums if rest is None else rest
        count = self.layers
        if self.global_scope:
            both = to_device(np.array([0, self.layers], dtype=np.int64), self.device)
            total, total_left = self._empty(1), self._empty(1)
            join_kernel[(1, 3)](sums, both, total, **OPTIONS)
            join_kernel[(1, 1)](left, both, total_left, **OPTIONS)
            sums, left, count = total, total_left, 1
        factors_kernel[(-(-count // JOIN.value),)](
            sums,
            left,
            options,
            self.factors,
            count,
            RENORMALIZE=self.renormalize,
            MEASURED=measured,
            **OPTIONS,
        )

    def apply(self) -> None:
        """Write the gradients."""
        is_aligned = (self.address[:, 0] | self.address[:, 1]) % 16 == 0
        for code in range(4):
            for aligned in (True, False):
                chosen = np.flatnonzero(
                    (self.code == code) & (is_aligned == aligned) & (self.numel > 0)
                )
                if len(chosen):
                    table, programs = self._table(chosen, -(-self.numel[chosen] // BLOCK))
                    arguments = (table, self.factors, len(chosen))
                    apply_kernel[(programs,)](
                        *arguments, D=code, ALIGNED=aligned, BLOCK=BLOCK, **OPTIONS
                    )


def perp_grad(
    weights: Sequence[Any],
    grads: Sequence[Any],
    *,
    global_scope: bool,
    renormalize: bool,
    eps: float,
    floor: float,
    reduce: Callable[[Any], None] | None = None,
) -> None:
    """Variant `triton`; waits for the device only to ask whether `reduce` is needed again."""
    if not grads:
        return
    call = _Call(weights, grads, global_scope, renormalize)
    with torch.cuda.device_of(call.factors):
        options = to_device(np.array([eps, floor]).view(np.int64), call.device)
        options = options.view(torch.float64)
        sums = call.sums(rest=False)
        if reduce is not None:
            reduce(sums)
        call.decide(sums, None, options)
        measured = call.factors[: 1 if global_scope else call.layers, 3]
        if reduce is None or bool(measured.any()):
            rest = call.sums(rest=True)
            if reduce is not None:
                squares = rest[:, 0].contiguous()
                reduce(squares)
                rest[:, 0] = squares
            call.decide(sums, rest, options)
        call.apply()

"""Moments of layers and affine maps of them in Triton, each row a list of layers.

    mean_l = sum_j x_j / n_l      m2_l = sum_j (x_j - mean_l)^2      out_j = scale_l x_j + shift_l

Moments read every value once (s bytes); the map reads and writes (2 s bytes). One launch for all
layers of a dtype. A row is added to an accumulator by the kernel of combine (s + 8 bytes more):
stores between the loads of a lane would leave nothing to hide their latency.

Two stages: a program sums 16 lanes of some tiles, the host joins the tiles, 24 bytes for 4096
values each. Tiles, lanes, trees and roundings are those of ``csrc/cpu/moments.isa.cpp`` and no
atomic operation touches a sum, so the bits are those of the CPU kernel, in the interpreter too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from flcore.pykernels.combine import combine
from flcore.pykernels.sums import bfloat16_bits, find_layer, pointer, to_device, widen

from flcore import _arrays
from flcore._native import core

__all__ = ["accumulate_moments", "affine", "moments"]

TILE, LANES = tl.constexpr(4096), tl.constexpr(16)  # MOMENT_TILE and MOMENT_LANES in csrc/api.h
GROUP = tl.constexpr(8)  # tiles a program: 128 lanes
AHEAD = tl.constexpr(16)  # steps whose loads are in flight together
BLOCK = 1024  # values a program of the map
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

F64, F32, F16, BF16 = (tl.constexpr(code) for code in range(4))  # DType in csrc/api.h
# Where values come from: a row, a blend, or a blend whose row has no weight and is not read.
ROWS, BLEND, SCALED = (tl.constexpr(code) for code in range(3))

# Words before the entries of the table, and of an entry: first program, length, first tile, row,
# acc, out, scale, shift.
HEAD, ENTRY = tl.constexpr(2), tl.constexpr(8)

# Results at and above this are infinite in the type.
LIMITS = [np.inf, 2.0**128 - 2.0**103, 65520.0, 2.0**128 - 2.0**119]
INFINITY = tl.constexpr(np.inf)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def value(
    table_ptr, entry_ptr, at, inside, D: tl.constexpr, OF: tl.constexpr, ALIGNED: tl.constexpr
):
    """Values of the source as float64: x, acc_weight acc + row_weight x, or acc_weight acc."""
    if OF != SCALED:
        x = tl.load(pointer(entry_ptr + 3, D, ALIGNED) + at, mask=inside, other=0)
        x = widen(x, D, 1)
    if OF == BLEND or OF == SCALED:
        acc_ptr = pointer(entry_ptr + 4, F64 if D == F64 else F32, ALIGNED)
        acc = tl.load(acc_ptr + at, mask=inside, other=0).to(tl.float64)
        z = tl.load(table_ptr).to(tl.float64, bitcast=True) * acc
        if OF == BLEND:
            z = z + tl.load(table_ptr + 1).to(tl.float64, bitcast=True) * x
        return z
    else:
        return x


@triton.jit
def sum_lanes(s):
    """Add 16 lanes: 8 to 8, 4 to 4, 2 to 2, 1 to 1; [GROUP, 16] to [GROUP, 1]."""
    s = tl.sum(tl.reshape(s, [GROUP, 2, 8]), axis=1)
    s = tl.sum(tl.reshape(s, [GROUP, 2, 4]), axis=1)
    s = tl.sum(tl.reshape(s, [GROUP, 2, 2]), axis=1)
    return tl.sum(tl.reshape(s, [GROUP, 2, 1]), axis=1)


@triton.jit(do_not_specialize=["entries"])
def moments_kernel(table_ptr, tiles_ptr, entries, D: tl.constexpr, OF: tl.constexpr):
    """tiles[t] = (pivot p, mean - p, m2) of each tile.

    table_ptr: int64 words { acc_weight, row_weight, then ENTRY words for each layer of each row },
    doubles and addresses as their bits; tiles_ptr: float64 [tiles, 3].
    """
    program = tl.program_id(0)
    entries_ptr = table_ptr + HEAD
    entry_ptr = entries_ptr + find_layer(entries_ptr, ENTRY, entries, program) * ENTRY
    numel = tl.load(entry_ptr + 1)
    first = (program - tl.load(entry_ptr)) * GROUP
    tile = first + tl.arange(0, GROUP)[:, None]
    begin = tile * TILE
    lane = tl.arange(0, LANES)[None, :]

    p = value(table_ptr, entry_ptr, begin, begin < numel, D, OF, False)
    p = tl.where((p < INFINITY) & (p > -INFINITY), p, 0.0)
    s1 = tl.zeros([GROUP, LANES], tl.float64)
    s2 = tl.zeros([GROUP, LANES], tl.float64)
    longest = tl.minimum(numel - first * TILE, TILE)
    for step in range(0, (longest + LANES - 1) // LANES, AHEAD):
        for ahead in tl.static_range(AHEAD):
            in_tile = (step + ahead) * LANES + lane
            at = begin + in_tile
            inside = (at < numel) & (in_tile < TILE)
            d = value(table_ptr, entry_ptr, at, inside, D, OF, False) - p
            s1 = tl.where(inside, s1 + d, s1)
            s2 = tl.where(inside, s2 + d * d, s2)

    s1 = sum_lanes(s1)
    s2 = sum_lanes(s2)
    shift = s1 / tl.minimum(numel - begin, TILE).to(tl.float64)
    m2 = s2 - s1 * shift
    m2 = tl.where(m2 < 0, 0.0, m2)
    target = tiles_ptr + 3 * (tl.load(entry_ptr + 2) + tile)
    tl.store(target, p, mask=begin < numel)
    tl.store(target + 1, shift, mask=begin < numel)
    tl.store(target + 2, m2, mask=begin < numel)


@triton.jit(do_not_specialize=["entries"])
def affine_kernel(
    table_ptr,
    flags_ptr,
    entries,
    D: tl.constexpr,
    OF: tl.constexpr,
    ALIGNED: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Map a layer: out = scale * values + shift; the table is that of `moments_kernel`.

    flags_ptr: int32, or-ed with 1 when a result is not finite; LIMIT: of the type, see LIMITS.
    """
    program = tl.program_id(0)
    entries_ptr = table_ptr + HEAD
    entry_ptr = entries_ptr + find_layer(entries_ptr, ENTRY, entries, program) * ENTRY
    at = (program - tl.load(entry_ptr)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(entry_ptr + 1)
    scale = tl.load(entry_ptr + 6).to(tl.float64, bitcast=True)
    shift = tl.load(entry_ptr + 7).to(tl.float64, bitcast=True)
    result = scale * value(table_ptr, entry_ptr, at, inside, D, OF, ALIGNED) + shift
    fine = (result < LIMIT) & (result > -LIMIT)  # false for NaN
    bad = tl.max(tl.where(fine | ~inside, 0, 1), axis=0)
    tl.atomic_or(flags_ptr, bad, mask=bad != 0)
    out_ptr = pointer(entry_ptr + 5, D, ALIGNED) + at
    if D == BF16:
        tl.store(out_ptr, bfloat16_bits(result), mask=inside)
    else:
        tl.store(out_ptr, result.to(out_ptr.dtype.element_ty), mask=inside)


# ---- launchers ---------------------------------------------------------------------------------


def make_table(weights: tuple[float, float], columns: Sequence[np.ndarray], programs: np.ndarray):
    """Return the words of both kernels for some entries, and the number of programs.

    columns: (entries,) each, in the order of an entry after its first program; doubles as bits.
    """
    first = np.cumsum(programs) - programs
    entries = np.stack([first, *columns], axis=1)
    head = np.array(weights, dtype=np.float64).view(np.int64)
    return np.concatenate([head, entries.reshape(-1)]), int(programs.sum())


def source(blend: Any) -> tuple[int, Sequence[Any], float, float]:
    """Return the code of where values come from, the accumulators and both weights."""
    acc, acc_weight, row_weight = blend or ([], 0.0, 1.0)
    of = ROWS if blend is None else BLEND if row_weight else SCALED
    return of.value, acc, acc_weight, row_weight


def moments(rows: Sequence[Sequence[Any]], *, blend: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Variant `triton`: mean and m2, (n, layers) each; waits for the device."""
    of, acc, acc_weight, row_weight = source(blend)
    layers, n = len(rows[0]), len(rows)
    device = rows[0][0].device if layers else "cpu"
    numel = np.array([v.numel for v in rows[0]], dtype=np.int64)
    tiles = -(-numel // TILE.value)
    first_tile = np.add.outer(np.arange(n) * tiles.sum(), np.cumsum(tiles) - tiles).reshape(-1)
    found = torch.empty((n * int(tiles.sum()), 3), dtype=torch.float64, device=device)
    codes = np.tile([v.code for v in rows[0]], n)
    numels, tiles = np.tile(numel, n), np.tile(tiles, n)
    addresses = np.array([v.ptr for row in rows for v in row], dtype=np.int64)
    accs = np.array([v.ptr for v in acc] or 0 * numels, dtype=np.int64)
    nothing = 0 * numels
    for code in range(4):
        chosen = np.flatnonzero((codes == code) & (numels > 0))
        if not len(chosen):
            continue
        columns = (numels, first_tile, addresses, accs, nothing, nothing, nothing)
        words, programs = make_table(
            (acc_weight, row_weight),
            [column[chosen] for column in columns],
            -(-tiles[chosen] // GROUP.value),
        )
        with torch.cuda.device_of(found):
            moments_kernel[(programs,)](
                to_device(words, device), found, len(chosen), D=code, OF=of, **OPTIONS
            )
    joined = found.cpu().numpy()
    mean, m2 = np.empty((2, n, layers))
    core.merge_moments(
        _arrays.address(joined),
        len(joined),
        n,
        numel.tolist(),
        _arrays.address(mean),
        _arrays.address(m2),
    )
    return mean, m2


def accumulate_moments(
    acc: Sequence[Any], row: Sequence[Any], weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Variant `triton`: mean and m2, (1, layers) each; waits for the device."""
    found = moments([row])
    combine(
        [row],
        [weight],
        layers=row,
        state=[a.array for a in acc],
        out=None,
        accumulate="float32",
        divisor=1.0,
        check=False,
    )
    return found


def affine(
    row: Sequence[Any],
    scale: Sequence[float],
    shift: Sequence[float],
    *,
    out: Sequence[Any],
    blend: Any = None,
) -> bool:
    """Variant `triton`: whether a value of `out` is not finite; waits for the device."""
    of, acc, acc_weight, row_weight = source(blend)
    device = row[0].device if row else "cpu"
    flags = torch.zeros(1, dtype=torch.int32, device=device)
    numel = np.array([v.numel for v in row], dtype=np.int64)
    codes = np.array([v.code for v in row], dtype=np.int64)
    nothing = 0 * numel
    rows = np.array([v.ptr for v in row], dtype=np.int64)
    accs = np.array([v.ptr for v in acc] or nothing, dtype=np.int64)
    outs = np.array([v.ptr for v in out], dtype=np.int64)
    # x + -0 is x for every x, so that scale 1 copies a zero of any sign
    bits = [np.array([v or -0.0 for v in shift]), np.array(scale, dtype=np.float64)]
    shifts, scales = (b.astype(np.float64).view(np.int64) for b in bits)
    aligned = (rows | accs | outs) % 16 == 0
    for code in range(4):
        for is_aligned in (True, False):
            chosen = np.flatnonzero((codes == code) & (aligned == is_aligned) & (numel > 0))
            if not len(chosen):
                continue
            columns = (numel, nothing, rows, accs, outs, scales, shifts)
            words, programs = make_table(
                (acc_weight, row_weight),
                [column[chosen] for column in columns],
                -(-numel[chosen] // BLOCK),
            )
            with torch.cuda.device_of(flags):
                affine_kernel[(programs,)](
                    to_device(words, device),
                    flags,
                    len(chosen),
                    D=code,
                    OF=of,
                    ALIGNED=is_aligned,
                    LIMIT=LIMITS[code],
                    BLOCK=BLOCK,
                    **OPTIONS,
                )
    return bool(flags.item())

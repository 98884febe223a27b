"""Local steps, shifts and ends of rounds in Triton: multi-tensor or by rows, in place.

The formulas are those of ``LocalKind`` in ``csrc/api.h``. Where a norm is needed, a program adds 16
lanes of some tiles, another joins the tiles of a group and makes the scale, and the last pass reads
it from memory: the host waits for nothing. A step reads x, g, q and writes x (4 s bytes a value, s
those of the dtype; 2 s more with a buffer), the norm reads g and q before (2 s).

Tiles, lanes, trees and roundings are those of ``csrc/cpu/local_step.isa.cpp`` and no atomic
operation touches a sum: the bits are those of the CPU kernel, in the interpreter too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from flcore.pykernels.sums import F64, INFINITY, find_layer, pointer, store_typed, to_device, widen

from flcore.ops._local_numbers import chosen_groups
from flcore.ops._local_pieces import SLOTS
from flcore.ops.local_step import KINDS

__all__ = ["local_step"]

# LOCAL_TILE, LOCAL_LANES and LOCAL_JOIN in csrc/api.h
TILE, LANES, JOIN = tl.constexpr(4096), tl.constexpr(16), tl.constexpr(128)
GROUP = tl.constexpr(8)  # tiles a program: 128 lanes
AHEAD = tl.constexpr(16)  # steps whose loads are in flight together
BLOCK = 1024  # values a program of the last pass
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

NAN = tl.constexpr(float("nan"))

STEP, NORM, SHIFT, SAM, UPDATE, DUAL, CONTROL = (tl.constexpr(i) for i in range(len(KINDS)))

# Words of an entry of the table: first program, length, first tile, group, then SLOTS.
ENTRY = tl.constexpr(9)
# Numbers of a group: rate, alpha, decay, clip, momentum.
NUMBERS = tl.constexpr(5)


# ---- kernels -----------------------------------------------------------------------------------


@triton.jit
def number(numbers_ptr, i: tl.constexpr, D: tl.constexpr):
    """Load a number of a group in the type of the arithmetic."""
    x = tl.load(numbers_ptr + i).to(tl.float64, bitcast=True)
    return x if D == F64 else x.to(tl.float32)


@triton.jit
def operand(entry_ptr, slot: tl.constexpr, at, inside, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Load values of an operand, widened to the type of the arithmetic."""
    values = tl.load(pointer(entry_ptr + 4 + slot, D, ALIGNED) + at, mask=inside, other=0)
    return widen(values, D, 1 if D == F64 else 0)


@triton.jit
def add_lanes(s):
    """Add 16 lanes: 8 to 8, 4 to 4, 2 to 2, 1 to 1; [GROUP, 16] to [GROUP, 1]."""
    s = tl.sum(tl.reshape(s, [GROUP, 2, 8]), axis=1)
    s = tl.sum(tl.reshape(s, [GROUP, 2, 4]), axis=1)
    s = tl.sum(tl.reshape(s, [GROUP, 2, 2]), axis=1)
    return tl.sum(tl.reshape(s, [GROUP, 2, 1]), axis=1)


@triton.jit(do_not_specialize=["entries"])
def squares_kernel(
    table_ptr,
    numbers_ptr,
    tiles_ptr,
    entries,
    D: tl.constexpr,
    Q: tl.constexpr,
    FULL: tl.constexpr,
):
    """tiles[t] = ||alpha g + q||^2 of each tile; FULL: of that + decay x.

    table_ptr: int64 [entries, ENTRY], addresses included; numbers_ptr: int64 [groups, NUMBERS],
    doubles as their bits; tiles_ptr: float64 [tiles].
    """
    program = tl.program_id(0)
    entry_ptr = table_ptr + find_layer(table_ptr, ENTRY, entries, program) * ENTRY
    numel = tl.load(entry_ptr + 1)
    mine_ptr = numbers_ptr + tl.load(entry_ptr + 3) * NUMBERS
    alpha, decay = number(mine_ptr, 1, D), number(mine_ptr, 2, D)
    first = (program - tl.load(entry_ptr)) * GROUP
    tile = first + tl.arange(0, GROUP)[:, None]
    begin = tile * TILE
    lane = tl.arange(0, LANES)[None, :]
    longest = tl.minimum(numel - first * TILE, TILE)
    total = tl.zeros([GROUP, LANES], tl.float64)
    for step in range(0, (longest + LANES - 1) // LANES, AHEAD):
        for ahead in tl.static_range(AHEAD):
            in_tile = (step + ahead) * LANES + lane
            at = begin + in_tile
            inside = (at < numel) & (in_tile < TILE)
            v = alpha * operand(entry_ptr, 1, at, inside, D, False)
            if Q:
                v = v + operand(entry_ptr, 2, at, inside, D, False)
            if FULL:
                v = v + decay * operand(entry_ptr, 0, at, inside, D, False)
            wide = tl.where(inside, v, 0.0).to(tl.float64)
            total = total + wide * wide
    tl.store(tiles_ptr + tl.load(entry_ptr + 2) + tile, add_lanes(total), mask=begin < numel)


@triton.jit
def scales_kernel(tiles_ptr, starts_ptr, numbers_ptr, scales_ptr, norms_ptr, KIND: tl.constexpr):
    """Join the tiles of a group, a program each: its norm, and what v is multiplied by.

    starts_ptr: int64 [groups + 1], after it eps; scales_ptr, norms_ptr: float64 [groups].
    """
    i = tl.program_id(0)
    begin, end = tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)
    lane = tl.arange(0, JOIN)
    s = tl.zeros([JOIN], tl.float64)
    for first in range(begin, end, JOIN):
        t = first + lane
        s = s + tl.load(tiles_ptr + t, mask=t < end, other=0.0)
    s = tl.sum(tl.reshape(s, [2, 64]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 32]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 16]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 8]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 4]), axis=0)
    s = tl.sum(tl.reshape(s, [2, 2]), axis=0)
    norm = tl.sqrt(tl.sum(s, axis=0))
    finite = norm < INFINITY  # false for NaN
    tl.store(norms_ptr + i, norm)
    if KIND == SAM:
        rate = tl.load(numbers_ptr + i * NUMBERS).to(tl.float64, bitcast=True)
        eps = tl.load(starts_ptr + tl.num_programs(0) + 1).to(tl.float64, bitcast=True)
        tl.store(scales_ptr + i, tl.where(finite, rate / (norm + eps), NAN))
    elif KIND == STEP:
        clip = tl.load(numbers_ptr + i * NUMBERS + 3).to(tl.float64, bitcast=True)
        scale = tl.where(finite, clip / tl.where(finite, norm, 1.0), NAN)
        tl.store(scales_ptr + i, tl.where(norm <= clip, 1.0, scale))


@triton.jit(do_not_specialize=["entries"])
def write_kernel(
    table_ptr,
    numbers_ptr,
    scales_ptr,
    entries,
    D: tl.constexpr,
    KIND: tl.constexpr,
    Q: tl.constexpr,
    SCALED: tl.constexpr,
    FULL: tl.constexpr,
    BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what KIND writes; BUFFER: 0 none, 1 without reading it, 2 with."""
    program = tl.program_id(0)
    entry_ptr = table_ptr + find_layer(table_ptr, ENTRY, entries, program) * ENTRY
    group = tl.load(entry_ptr + 3)
    mine_ptr = numbers_ptr + group * NUMBERS
    at = (program - tl.load(entry_ptr)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(entry_ptr + 1)
    rate = number(mine_ptr, 0, D)
    x = operand(entry_ptr, 0, at, inside, D, ALIGNED)
    g = operand(entry_ptr, 1, at, inside, D, ALIGNED)
    if KIND == STEP or KIND == SHIFT or KIND == SAM:
        v = number(mine_ptr, 1, D) * g
        if Q:
            v = v + operand(entry_ptr, 2, at, inside, D, ALIGNED)
        if SCALED:
            scale = tl.load(scales_ptr + group).to(x.dtype)
        else:
            scale = tl.full([], 1.0, x.dtype)
    if KIND == STEP:
        decay = number(mine_ptr, 2, D)
        d = scale * (v + decay * x) if FULL else scale * v + decay * x
        if BUFFER != 0:
            momentum = number(mine_ptr, 4, D)
            b = d
            if BUFFER == 2:
                b = momentum * operand(entry_ptr, 3, at, inside, D, ALIGNED) + d
            state_ptr = pointer(entry_ptr + 7, D, ALIGNED) + at
            store_typed(state_ptr, b, inside, D, False)
            d = d + momentum * b if NESTEROV else b
        result = x - rate * d
        target = pointer(entry_ptr + 4, D, ALIGNED) + at
    elif KIND == SHIFT or KIND == SAM:
        result = x + (rate if KIND == SHIFT else scale) * v
        target = pointer(entry_ptr + 8, D, ALIGNED) + at
    else:
        result = x - g
        target = pointer(entry_ptr + 8, D, ALIGNED) + at
        if KIND != UPDATE:
            state = operand(entry_ptr, 3, at, inside, D, ALIGNED)
            if KIND == DUAL:
                state = state + result
            else:
                state = (state - operand(entry_ptr, 2, at, inside, D, ALIGNED)) - rate * result
            store_typed(pointer(entry_ptr + 7, D, ALIGNED) + at, state, inside, D, False)
    store_typed(target, result, inside, D, False)


# ---- launchers ---------------------------------------------------------------------------------


class _Tables:
    """The pieces that take part, as kernels see them; addresses stay where they are."""

    def __init__(self, pieces: Any, active: Any) -> None:
        self.device = pieces.device
        groups = list(chosen_groups(active, pieces.groups))
        self.groups = np.array(groups, dtype=np.int64)
        first = np.array(pieces.first_piece)
        chosen = [np.arange(first[k], first[k + 1]) for k in groups]
        counts = np.array([len(c) for c in chosen], dtype=np.int64)
        piece = np.concatenate([*chosen, np.zeros(0, np.int64)]).astype(np.int64)
        numel = np.array(pieces.numel, dtype=np.int64)[piece]
        tiles = -(-numel // TILE.value)
        self.number_tiles = int(tiles.sum())
        first_tile = np.cumsum(tiles) - tiles
        ends = np.insert(np.cumsum(tiles), 0, 0)
        self.starts = ends[np.insert(np.cumsum(counts), 0, 0)]
        group = np.repeat(np.arange(len(groups)), counts)
        address = np.zeros((len(piece), len(SLOTS)), np.int64)
        for slot, name in enumerate(SLOTS):
            given = pieces.operands.get(name)
            if given is None:
                continue
            if isinstance(given.arrays, list):
                address[:, slot] = np.array(given.addresses, dtype=np.int64)[piece]
            else:
                address[:, slot] = given.base + given.stride * piece
        code = np.array(pieces.codes, dtype=np.int64)[piece]
        aligned = np.bitwise_or.reduce(address, axis=1) % 16 == 0

        def launches(programs: np.ndarray, by_alignment: bool) -> list[tuple[Any, int, int, bool]]:
            found = []
            for dtype in range(4):
                for is_aligned in (True, False) if by_alignment else (False,):
                    fits = (code == dtype) & (numel > 0)
                    if by_alignment:
                        fits &= aligned == is_aligned
                    rows = np.flatnonzero(fits)
                    if not len(rows):
                        continue
                    count = programs[rows]
                    head = [np.cumsum(count) - count, numel[rows], first_tile[rows], group[rows]]
                    words = np.concatenate([np.stack(head, axis=1), address[rows]], axis=1)
                    table = to_device(words.reshape(-1).astype(np.int64), self.device)
                    found.append((table, len(rows), int(count.sum()), dtype, is_aligned))
            return found

        self.squares = launches(-(-tiles // GROUP.value), False)
        self.writes = launches(-(-numel // BLOCK), True)


def local_step(
    pieces: Any,
    kind: str,
    *,
    rate: Any = 0.0,
    alpha: Any = 1.0,
    decay: Any = 0.0,
    clip: Any = None,
    momentum: Any = 0.0,
    full: bool = False,
    nesterov: bool = False,
    first: bool = False,
    with_q: bool | None = None,
    eps: float = 1e-7,
    active: Any = None,
    norms: Any = None,
) -> None:
    """Variant `triton`; see ``flcore.reference.local_step``. Waits for nothing."""
    if with_q is None:
        with_q = kind == "step" and "q" in pieces.operands
    tables = pieces.cache.get("tables") if active is None else None
    if tables is None:
        tables = _Tables(pieces, active)
        if active is None:
            pieces.cache["tables"] = tables
    count = len(tables.groups)
    if not count:
        return
    columns = (rate, alpha, decay, np.inf if clip is None else clip, momentum)
    values = np.empty((count, NUMBERS.value))
    for i, column in enumerate(columns):
        values[:, i] = column[tables.groups] if isinstance(column, np.ndarray) else column
    full = full and kind == "step"
    scaled = kind == "sam" or (kind == "step" and clip is not None)
    with torch.cuda.device_of(torch.empty(0, device=tables.device)):
        numbers = to_device(values.reshape(-1).view(np.int64), tables.device)
        scales = torch.empty(count, dtype=torch.float64, device=tables.device)
        if scaled or kind == "norm":
            found = torch.empty_like(scales)
            _scales(tables, kind, numbers, scales, found, with_q, full, eps)
            if norms is not None:
                _deliver_norms(norms, found, tables, pieces.groups)
        if kind == "norm":
            return
        for table, entries, programs, code, aligned in tables.writes:
            write_kernel[(programs,)](
                table,
                numbers,
                scales,
                entries,
                D=code,
                KIND=KINDS.index(kind),
                Q=with_q,
                SCALED=scaled,
                FULL=full,
                BUFFER=0 if "state" not in pieces.operands else 1 if first else 2,
                NESTEROV=nesterov,
                ALIGNED=aligned,
                BLOCK=BLOCK,
                **OPTIONS,
            )


def _scales(
    tables: _Tables,
    kind: str,
    numbers: torch.Tensor,
    scales: torch.Tensor,
    found: torch.Tensor,
    with_q: bool,
    full: bool,
    eps: float,
) -> None:
    tiles = torch.empty(tables.number_tiles, dtype=torch.float64, device=tables.device)
    for table, entries, programs, code, _ in tables.squares:
        squares_kernel[(programs,)](
            table, numbers, tiles, entries, D=code, Q=with_q, FULL=full, **OPTIONS
        )
    words = np.append(tables.starts, np.array([eps]).view(np.int64))
    starts = to_device(words, tables.device)
    scales_kernel[(len(tables.groups),)](
        tiles, starts, numbers, scales, found, KIND=KINDS.index(kind), **OPTIONS
    )


def _deliver_norms(norms: Any, found: torch.Tensor, tables: _Tables, groups: int) -> None:
    target = torch.from_numpy(norms) if isinstance(norms, np.ndarray) else norms
    if len(tables.groups) == groups:
        target.copy_(found)
    else:
        target[to_device(tables.groups.copy(), tables.device)] = found

"""Codes of buckets with feedback in Triton: update and memory to codes and new memory in one launch.

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

from collections.abc import Sequence
from typing import Any

import numpy as np
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

from flcore._arrays import View
from flcore._state import State
from flcore.errors import VariantUnavailableError
from flcore.ops import quantize as op
from flcore.reference import buckets, codes_float, wire, wire_bucket, wire_frame
from flcore.reference.buckets import Settings

__all__ = ["quantize"]

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
LONGEST = 8192  # coordinates of a bucket: one program holds it
AT_ONCE = 1024  # coordinates of a program with shorter buckets


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
            low, unit = affine_scales(u, inside, LEVELS, LIMIT, S)
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


# ---- launcher ------------------------------------------------------------------------------------

# positive levels, or steps, and what is added to make a code
GRIDS = {
    "sign": lambda s: (0, 0, 0, 1.0),
    "uniform": lambda s: (-s.levels, s.levels, (1 << (s.bits - 1)) - 1, float(1 << (s.bits - 1))),
    "ternary": lambda s: (-1, 1, 1, 2.0),
    "affine": lambda s: (0, (1 << s.bits) - 1, 0, float((1 << s.bits) - 1)),
    "minifloat": lambda s: (0, 0, 0, 1.0),
}


def _refuse(s: Settings) -> None:
    """Raise unless the kernel has this codec."""
    why = ""
    if s.codec not in GRIDS:
        why = f"it has no {s.codec} codes"
    elif s.bucket > LONGEST:
        why = f"its buckets have at most {LONGEST} coordinates, not {s.bucket}"
    elif (s.codec == "ternary" and s.form == 1) or (s.codec == "affine" and s.measure):
        why = "it has neither trits nor two means"
    elif s.codec == "minifloat" and codes_float.NAMES[s.form] == "nf4":
        why = "it has no codebooks"
    if why:
        raise VariantUnavailableError(f"quantize: variant triton cannot do this: {why}")


def _constants(s: Settings) -> dict[str, Any]:
    least, levels, shift, reach = GRIDS[s.codec](s)
    name = codes_float.NAMES[s.form] if s.codec == "minifloat" else "e4m3"
    f = codes_float.FORMATS[name]
    block = max(16, triton.next_power_of_2(s.bucket))
    return {
        "CODEC": wire.CODECS[s.codec],
        "BITS": s.bits,
        "FORM": s.form,
        "S": wire_frame.VALUE_CODES[s.values],
        "STOCHASTIC": s.stochastic,
        "MEASURE": s.measure,
        "CLIP": s.clip,
        "LIMIT": float(buckets.scale_limit(reach)),
        "LEAST": float(least),
        "LEVELS": float(levels),
        "SHIFT": shift,
        "MANTISSA": f.mantissa,
        "EMIN": f.emin,
        "EMAX": f.emax,
        "TOP": f.top,
        "LARGEST": codes_float.largest(name),
        "FRACTION": (f.top & ((1 << f.mantissa) - 1)) << (23 - f.mantissa),
        "BUCKET": s.bucket,
        "STRIDE": wire_bucket.bucket_bytes(s.codec, s.form, s.bits, s.bucket),
        "ROWS": max(1, AT_ONCE // block),
        "BLOCK": block,
    }


def _tensor(x: Any) -> torch.Tensor:
    """View an array flat, bfloat16 of any kind as int16."""
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x.view(np.int16) if x.dtype.itemsize == 2 and x.dtype != np.float16 else x)
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).reshape(-1)


def _update(views: Sequence[View]) -> tuple[torch.Tensor, int]:
    """Return the update as one tensor, and the code of its dtype."""
    if len(views) == 1:
        return _tensor(views[0].array), views[0].code
    parts = []
    for v in views:
        x = _tensor(v.array)
        parts.append(x.view(torch.bfloat16) if v.dtype == "bfloat16" else x)
    return torch.cat([x.to(torch.float32) for x in parts] or [torch.empty(0)]), 1


def quantize(
    views: Sequence[View], s: Settings, state: State | None, fields: dict[str, Any]
) -> np.ndarray | None:
    """Variant `triton`: the packet in CPU memory; waits for the device."""
    _refuse(s)
    state = state or State()
    numel = sum(v.numel for v in views)
    count = -(-numel // s.bucket)
    frame = op.packet_frame(s, numel, fields)
    g, code = _update(views)
    kept = {name: _tensor(x) for name, x in state.buffers().items()}
    new = {name: _tensor(state.new(name)) for name in kept}
    kinds = {"float32": torch.float32, "bfloat16": torch.int16, "e8m0": torch.uint8}
    scales = torch.empty(
        count * wire_bucket.scales_per_bucket(s.codec), dtype=kinds[s.values], device=g.device
    )
    codes = torch.empty(
        wire_bucket.code_bytes(s.codec, s.form, s.bits, s.bucket, numel),
        dtype=torch.uint8,
        device=g.device,
    )
    flags = torch.zeros(1, dtype=torch.int32, device=g.device)
    constants = _constants(s)
    words = (s.seed & 0xFFFFFFFF, s.seed >> 32, s.round & 0xFFFFFFFF)
    factors = [float(np.float32(x)) for x in (state.a, state.b, state.p, state.q)]
    passes = [True, False] if kept and state.in_place else [False]
    for check in passes if count else ():
        with torch.cuda.device_of(g):
            quantize_kernel[(-(-count // constants["ROWS"]),)](
                g,
                *(kept.get(name, g) for name in "ehv"),
                *(new.get(name, g) for name in "ehv"),
                scales,
                codes,
                flags,
                numel,
                count,
                *factors,
                *(word - ((word >> 31) << 32) for word in words),  # the int32 with the same bits
                D=code,
                E="e" in kept,
                H="h" in kept,
                V="v" in kept,
                M=3 if state.dtype == "bfloat16" else 1,
                MASK=state.mask,
                CHECK=check,
                **constants,
                **OPTIONS,
            )
        if flags.item():
            return None
    out = np.empty(frame.nbytes, np.uint8)
    for section, x in ((wire_frame.SCALES, scales), (wire_frame.CODES, codes)):
        if x.numel():
            data = x.view(torch.uint8).cpu().numpy()
            out[frame.offset(section) :][: data.size] = data
    frame.seal(op.address(out))
    state.commit()
    return out

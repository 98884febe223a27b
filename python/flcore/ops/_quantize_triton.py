"""Variant `triton` of quantize: the packet of the other variants from an update on a GPU.

Sections are written on the device and copied into the packet, which is in CPU memory; the
checksum is computed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flcore import _arrays
from flcore._arrays import DTYPE_CODES, View
from flcore._state import State
from flcore.errors import VariantUnavailableError
from flcore.ops.quantize import packet_frame
from flcore.pykernels.quantize import encode
from flcore.reference import buckets, codes_float, wire, wire_bucket, wire_frame
from flcore.reference.buckets import Settings

__all__ = ["quantize"]

LONGEST = 8192  # coordinates of a bucket: one program holds it
AT_ONCE = 1024  # coordinates of a program with shorter buckets

# type of the scales on the device; bfloat16 as its bits
SCALES = {"float32": torch.float32, "bfloat16": torch.int16, "e8m0": torch.uint8}


def _grid(s: Settings) -> tuple[int, int, int, float]:
    """Return least and largest value of a code, what is added to it, and the reach of a scale."""
    half = 1 << (s.bits - 1)
    steps = (1 << s.bits) - 1
    return {
        "uniform": (-s.levels, s.levels, half - 1, float(half)),
        "ternary": (-1, 1, 1, 2.0),
        "affine": (0, steps, 0, float(steps)),
    }.get(s.codec, (0, 0, 0, 1.0))


def _refuse(s: Settings) -> None:
    """Raise unless the kernel has these codes."""
    why = ""
    if s.codec not in ("sign", "uniform", "affine", "ternary", "minifloat"):
        why = f"it has no {s.codec} codes"
    elif s.bucket > LONGEST:
        why = f"its buckets have at most {LONGEST} coordinates, not {s.bucket}"
    elif s.codec == "ternary" and s.form == 1:
        why = "it has no trits"
    elif s.codec == "affine" and s.measure:
        why = "it has no two means"
    elif s.codec == "minifloat" and codes_float.NAMES[s.form] == "nf4":
        why = "it has no codebooks"
    if why:
        raise VariantUnavailableError(f"quantize: variant triton cannot do this: {why}")


def _constants(s: Settings) -> dict[str, Any]:
    """Return what the kernel is compiled for; see `quantize_kernel`."""
    least, levels, shift, reach = _grid(s)
    name = codes_float.NAMES[s.form] if s.codec == "minifloat" else "e4m3"
    f = codes_float.FORMATS[name]
    block = max(16, 1 << (s.bucket - 1).bit_length())
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
    """View an array flat, bfloat16 in any guise as int16."""
    if isinstance(x, np.ndarray):
        narrow = x.dtype.itemsize == 2 and x.dtype != np.float16
        x = torch.from_numpy(x.view(np.int16) if narrow else x)
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).reshape(-1)


def _update(views: Sequence[View]) -> tuple[torch.Tensor, int]:
    """Return the update as one tensor, and the code of its dtype."""
    if len(views) == 1:
        return _tensor(views[0].array), views[0].code
    parts = [torch.empty(0, device=views[0].device if views else "cpu")]
    for v in views:
        x = _tensor(v.array)
        x = x.view(torch.bfloat16) if v.dtype == "bfloat16" else x
        parts.append(x.to(torch.float32))
    return torch.cat(parts), DTYPE_CODES["float32"]


def quantize(
    views: Sequence[View], s: Settings, state: State | None, fields: dict[str, Any]
) -> np.ndarray | None:
    """Variant `triton`; waits for the device."""
    _refuse(s)
    state = state or State()
    numel = sum(v.numel for v in views)
    count = -(-numel // s.bucket)
    g, code = _update(views)
    kept = {name: _tensor(x) for name, x in state.buffers().items()}
    new = {name: _tensor(state.new(name)) for name in kept}
    per_bucket = wire_bucket.scales_per_bucket(s.codec)
    scales = torch.empty(count * per_bucket, dtype=SCALES[s.values], device=g.device)
    nbytes = wire_bucket.code_bytes(s.codec, s.form, s.bits, s.bucket, numel)
    codes = torch.empty(nbytes, dtype=torch.uint8, device=g.device)
    # new memory in place of the old may be written only when all of it is known to be finite
    for check in (True, False) if state.in_place else (False,):
        if count and not encode(
            g,
            kept,
            new,
            scales,
            codes,
            count=count,
            factors=tuple(float(np.float32(x)) for x in (state.a, state.b, state.p, state.q)),
            words=(s.seed & 0xFFFFFFFF, s.seed >> 32, s.round & 0xFFFFFFFF),
            check=check,
            D=code,
            M=DTYPE_CODES[state.dtype],
            MASK=state.mask,
            **_constants(s),
        ):
            return None
    frame = packet_frame(s, numel, fields)
    out = np.empty(frame.nbytes, np.uint8)
    for section, x in ((wire_frame.SCALES, scales), (wire_frame.CODES, codes)):
        if x.numel():
            data = x.view(torch.uint8).cpu().numpy()
            out[frame.offset(section) :][: data.size] = data
    frame.seal(_arrays.address(out))
    state.commit()
    return out

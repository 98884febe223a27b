"""Variant `cuda` of rotated codes: kernels/rotate.cu, queued on torch's current stream.

Sections are written on the device and copied into the packet, which is in CPU memory; the checksum
is computed there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native
from flcore._arrays import View
from flcore._state import State
from flcore.ops.quantize import packet_frame
from flcore.reference import wire_bucket, wire_frame
from flcore.reference.buckets import Settings

__all__ = ["quantize"]


def quantize(
    views: Sequence[View], s: Settings, state: State | None, fields: dict[str, Any]
) -> np.ndarray | None:
    """Arguments and packet as in ``flcore.ops.quantize``; waits for the device.

    Update and state are on one device. State without spares is looked at in a pass of its own
    before anything is written.
    """
    torch, cuda = sys.modules["torch"], _native.cuda
    state = state or State()
    views = [v for v in views if v.numel]
    numel = sum(v.numel for v in views)
    frame = packet_frame(s, numel, fields)
    out = np.empty(frame.nbytes, np.uint8)
    if views:
        where = views[0].device
        device, stream = _arrays.queue(where)
        nbytes = wire_bucket.code_bytes(s.codec, s.form, s.bits, s.bucket, numel)
        scales = torch.empty(-(-numel // s.bucket), dtype=torch.float32, device=where)
        codes = torch.empty(nbytes, dtype=torch.uint8, device=where)
        flags = torch.zeros(1, dtype=torch.int32, device=where)
        table = _layers(torch, views, where)
        for check in (True, False) if state.in_place else (False,):
            cuda.rotate(
                numel=numel,
                count=len(views),
                layers=[_arrays.address(x) for x in table],
                state=state.native(),
                bits=s.bits,
                block=s.bucket,
                measure=s.measure,
                check=check,
                seed=s.seed,
                round=s.round,
                scales=_arrays.address(scales),
                codes=_arrays.address(codes),
                flags=_arrays.address(flags),
                device=device,
                stream=stream,
            )
            if int(flags.item()):
                return None
        for section, x in ((wire_frame.SCALES, scales), (wire_frame.CODES, codes)):
            data = x.view(torch.uint8).cpu().numpy()
            out[frame.offset(section) :][: data.size] = data
    frame.seal(_arrays.address(out))
    state.commit()
    return out


def _layers(torch: Any, views: Sequence[View], where: str) -> list[Any]:
    """Upload where each layer starts, its dtype and its address."""
    host = (
        np.cumsum([0, *(v.numel for v in views)], dtype=np.int64),
        np.array([v.code for v in views], np.int32),
        np.array([v.ptr for v in views], np.uint64).view(np.int64),
    )
    return [torch.from_numpy(x).to(where) for x in host]

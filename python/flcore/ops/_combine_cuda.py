"""Variant `cuda` of the weighted sum: kernels/combine.cu, queued on torch's current stream."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from flcore import _arrays, _native
from flcore._arrays import View
from flcore.ops.combine import ACCUMULATE

__all__ = ["combine", "nonfinite"]


def combine(
    rows: Sequence[Sequence[View]],
    weights: Sequence[float],
    *,
    layers: Sequence[View],
    state: Sequence[Any] | None,
    out: Sequence[View] | None,
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """Arguments and flags as in ``flcore.ops.combine``; waits for the device only for `check`.

    A launch takes ``COMBINE_MAX_ROWS`` rows. More go through a state, group after group, in the
    same order and with the same bits.
    """
    if not layers:
        return 0
    torch, cuda = sys.modules["torch"], _native.cuda
    device, stream = _arrays.queue(layers[0].device)
    flags = torch.zeros(1, dtype=torch.int32, device=layers[0].device) if check else None
    numel, dtype = [v.numel for v in layers], [v.code for v in layers]
    step = cuda.COMBINE_MAX_ROWS
    if len(rows) > step and out is not None:
        state = _scratch(layers, accumulate) if state is None else [s.clone() for s in state]
    for first in range(0, max(len(rows), 1), step):
        last = first + step >= len(rows)
        cuda.combine(
            [v.ptr for row in rows[first : first + step] for v in row],
            weights[first : first + step],
            numel,
            dtype,
            [] if state is None else [_arrays.address(s) for s in state],
            [] if out is None or not last else [v.ptr for v in out],
            ACCUMULATE.index(accumulate),
            divisor,
            0 if flags is None else _arrays.address(flags),
            device,
            stream,
        )
    return 0 if flags is None else int(flags.item())


def nonfinite(rows: Sequence[Sequence[View]]) -> list[bool]:
    """Whether each row holds a NaN or an infinity."""
    if not rows or not rows[0]:
        return [False] * len(rows)
    torch, cuda = sys.modules["torch"], _native.cuda
    device, stream = _arrays.queue(rows[0][0].device)
    flags = torch.zeros(len(rows), dtype=torch.int32, device=rows[0][0].device)
    cuda.nonfinite(
        [v.ptr for row in rows for v in row],
        len(rows),
        [v.numel for v in rows[0]],
        [v.code for v in rows[0]],
        _arrays.address(flags),
        device,
        stream,
    )
    return [bool(f) for f in flags.tolist()]


def _scratch(layers: Sequence[View], accumulate: str) -> list[Any]:
    """Return empty sums: -0 because -0 + p is p, a zero of either sign included; bins of +0."""
    torch = sys.modules["torch"]
    if accumulate == "reproducible":
        return [torch.zeros((3, v.numel), dtype=torch.float64, device=v.device) for v in layers]
    wide = [accumulate == "float64" or v.dtype == "float64" for v in layers]
    kinds = [torch.float64 if w else torch.float32 for w in wide]
    return [
        torch.full((v.numel,), -0.0, dtype=kind, device=v.device)
        for v, kind in zip(layers, kinds, strict=True)
    ]

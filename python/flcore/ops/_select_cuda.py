"""Variant `cuda` of the order statistics: kernels/select.cu, queued on torch's current stream."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native
from flcore._arrays import View
from flcore.ops.select import MEDIANS, Mix
from flcore.reference.select import OPS

__all__ = ["select"]


def select(
    rows: Sequence[Sequence[View]],
    *,
    layers: Sequence[View],
    op: str,
    median: str,
    f: int,
    keep: int,
    mix: Mix | None,
    propagate: bool,
    out: Sequence[View],
) -> int:
    """Arguments and flags as in ``flcore.ops.select``; waits for the device unless `propagate`.

    A mixing matrix is copied to the device first.

    Raises
    ------
    InvalidInputError
        More than ``SELECT_MAX_ROWS`` rows, or values after mixing.
    """
    if not layers:
        return 0
    torch, cuda = sys.modules["torch"], _native.cuda
    where = layers[0].device
    device, stream = _arrays.queue(where)
    flags = None if propagate else torch.zeros(1, dtype=torch.int32, device=where)
    matrix = [] if mix is None else _matrix(mix, where)
    cuda.select(
        [v.ptr for row in rows for v in row],
        len(rows),
        [v.numel for v in layers],
        [v.code for v in layers],
        OPS.index(op),
        MEDIANS.index(median),
        f,
        keep,
        len(rows) if mix is None else len(mix),
        [_arrays.address(x) for x in matrix] or [0] * 4,
        [v.ptr for v in out],
        0 if flags is None else _arrays.address(flags),
        device,
        stream,
    )
    return 0 if flags is None else int(flags.item())


def _matrix(mix: Mix, where: str) -> list[Any]:
    """Upload the matrix by rows: starts, columns, coefficients in float64 and in float32.

    One coefficient too many, so that a matrix of zeros has an address as well.
    """
    torch = sys.modules["torch"]
    values = np.array([*(w for row in mix for _, w in row), 0.0])
    host = (
        np.cumsum([0, *(len(row) for row in mix)], dtype=np.int64),
        np.array([*(i for row in mix for i, _ in row), 0], dtype=np.int64),
        values,
        values.astype(np.float32),
    )
    return [torch.from_numpy(x).to(where) for x in host]

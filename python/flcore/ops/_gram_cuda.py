"""Variant `cuda` of norms, distances and products: kernels/gram.cu, on torch's current stream."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from flcore import _arrays, _native
from flcore._arrays import View
from flcore.reference.gram import KINDS

__all__ = ["gram"]


def gram(
    rows: Sequence[Sequence[View]],
    *,
    layers: Sequence[View],
    kind: str,
    wide: bool,
    segments: Sequence[Sequence[int]],
) -> np.ndarray:
    """Arguments and result as in ``flcore.ops.gram``; waits for the device.

    The same bits in every run and on every device, but not those of the CPU kernel: sums of 64
    terms in the working precision, float64 above.
    """
    n = len(rows)
    order = [j for members in segments for j in members]
    if not order:
        return np.zeros((len(segments), n) if kind == "norms" else (len(segments), n, n))
    torch, cuda = sys.modules["torch"], _native.cuda
    where = layers[0].device
    device, stream = _arrays.queue(where)
    starts = [0, *np.cumsum([layers[j].numel for j in order]).tolist()]
    ends = np.cumsum([len(members) for members in segments])
    shape = [layers[j].code for j in order], KINDS.index(kind), wide
    entries = n if kind == "norms" else n * (n + 1) // 2
    workspace = torch.empty(
        cuda.gram_workspace(n, starts, *shape), dtype=torch.float64, device=where
    )
    out = torch.empty((len(segments), entries), dtype=torch.float64, device=where)
    cuda.gram(
        [row[j].ptr for row in rows for j in order],
        n,
        starts,
        *shape,
        [0, *(starts[end] for end in ends)],
        _arrays.address(workspace),
        _arrays.address(out),
        device,
        stream,
    )
    values = out.cpu().numpy()
    if kind == "norms":
        return values
    matrix = np.zeros((len(segments), n, n))
    row, column = np.tril_indices(n)
    matrix[:, row, column] = values
    matrix[:, column, row] = values
    return matrix

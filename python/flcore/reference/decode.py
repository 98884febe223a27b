"""Adding packets into accumulators: the definition in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore.reference import wire

__all__ = ["add", "dense"]


def add(
    bodies: Sequence[wire.SparseBody], weights: Sequence[float], out: Sequence[np.ndarray]
) -> None:
    """Add ``sum_p w_p D_p`` to the flat layers of `out` (float32 or float64), in list order.

    Each product and each sum rounds once in the layer's dtype; no fma.
    """
    for body, weight in zip(bodies, weights, strict=True):
        start = 0
        for layer in out:
            here = (body.indices >= start) & (body.indices < start + layer.size)
            at = body.indices[here] - start
            kind = layer.dtype.type
            layer[at] = layer[at] + kind(weight) * body.values[here].astype(kind)
            start += layer.size


def dense(body: wire.SparseBody, numel: int) -> np.ndarray:
    """Return the decoded update as float32 (numel,): the values where kept, 0 elsewhere."""
    out = np.zeros(numel, np.float32)
    out[body.indices] = body.values
    return out

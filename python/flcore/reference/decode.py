"""Adding packets into accumulators, whatever their codec: the definition in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flcore.reference import codes_thc, low_rank, quantize, sketch, wire_bucket
from flcore.reference.wire_frame import Header

__all__ = ["DECODERS", "add", "dense"]


def _sparse(header: Header, body: Any) -> np.ndarray:
    out = np.zeros(header.numel, np.float32)
    out[body.indices] = body.values
    return out


DECODERS: dict[str, Callable[[Header, Any], np.ndarray]] = {
    "sparse": _sparse,
    **dict.fromkeys(wire_bucket.CODEC_NAMES, quantize.decode),
    "low_rank": low_rank.decode,
    "sketch": sketch.decode,
    "thc": codes_thc.decode_update,
}
"""What turns header and body of a checked packet into float32 (d,), by codec."""


def dense(header: Header, body: Any) -> np.ndarray:
    """Return the decoded update as float32 (d,): 0 where a sparse packet holds nothing."""
    return DECODERS[header.codec](header, body)


def add(
    packets: Sequence[tuple[Header, Any]], weights: Sequence[float], out: Sequence[np.ndarray]
) -> None:
    """Add ``sum_p w_p D_p`` to the flat layers of `out` (float32 or float64), in list order.

    Each product and each sum rounds once in the layer's dtype; no fma. A coordinate that a sparse
    packet does not hold is not touched.
    """
    for (header, body), weight in zip(packets, weights, strict=True):
        values = dense(header, body)
        held = np.arange(header.numel) if header.codec != "sparse" else body.indices
        start = 0
        for layer in out:
            at = held[(held >= start) & (held < start + layer.size)]
            kind = layer.dtype.type
            product = kind(weight) * values[at].astype(kind)
            layer[at - start] = layer[at - start] + product
            start += layer.size

"""Weighted sums of packets: the core of `combine` and of the rules where packets come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _native, _variants
from flcore._arrays import View
from flcore.ops._packet_rows import PacketRows, by_reference
from flcore.ops.combine import ACCUMULATE, _targets, check_terms, deliver, explain

__all__ = ["combine_packets"]


def combine_packets(
    rows: PacketRows,
    weights: Any,
    *,
    out: Sequence[Any] | None,
    accumulate: str,
    nonfinite: str,
    divisor: float,
    variant: str | None,
) -> list[Any]:
    """Sum packets with `weights` (n,), or (n, layers) where they differ from layer to layer.

    Returns the layers of the result. A packet whose weights are all 0 is not read.
    """
    w = np.array(weights, dtype=np.float64).reshape(len(rows), -1)
    active = [int(i) for i in np.flatnonzero(w.any(axis=1))]
    check_terms(len(active), accumulate)
    targets, writes_through = _targets(rows.results, rows.arrays, out, rows.layout, nonfinite)
    flags = _variants.choose("combine_packets", "cpu", variant)(
        rows.take(active),
        np.broadcast_to(w[active], (len(active), len(rows.layers))),
        layers=rows.layers,
        state=None,
        out=targets,
        accumulate=accumulate,
        divisor=divisor,
        check=nonfinite != "propagate" or accumulate == "reproducible",
    )
    explain(flags, [], "cpu", variant, nonfinite, accumulate)
    return deliver(out, targets, writes_through)


# ---- variants ----------------------------------------------------------------------------------


def _combine_packets_cpu(
    rows: PacketRows,
    weights: np.ndarray,
    *,
    layers: Sequence[View],
    state: None,
    out: Sequence[View],
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """csrc/cpu/packet_sums.h; `weights` (n, layers)."""
    numel = [v.numel for v in layers]
    return _native.core.combine_packets(
        rows.native,
        weights.reshape(-1).tolist(),
        numel,
        [v.code for v in out],
        [v.ptr for v in out],
        ACCUMULATE.index(accumulate),
        divisor,
        _native.threads_for(sum(numel) * (len(rows) + 1)),
        check,
    )


_variants.add(
    "combine_packets", "cpu", _variants.lazy(__name__, "_combine_packets_cpu"), _variants.cpu_only
)
_variants.add(
    "combine_packets",
    "reference",
    lambda: by_reference(_variants.lazy("flcore.reference.combine", "combine_scaled")()),
    _variants.cpu_only,
)

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
        w[active],
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
    """csrc/cpu/packet_sums.h; `weights` (n, 1) or (n, layers)."""
    numel = [v.numel for v in layers]
    return _native.core.combine_packets(
        rows.native,
        weights.reshape(-1).tolist(),
        weights.shape[1] > 1,
        numel,
        [v.code for v in out],
        [v.ptr for v in out],
        ACCUMULATE.index(accumulate),
        divisor,
        _native.threads_for(sum(numel) * (len(rows) + 1)),
        check,
    )


def _combine_packets_reference() -> Any:
    from flcore.reference.combine import combine_scaled

    run = by_reference(combine_scaled)

    def combine(rows: PacketRows, weights: np.ndarray, **options: Any) -> int:
        return run(rows, np.broadcast_to(weights, (len(rows), len(rows.layers))), **options)

    return combine


_variants.add("combine_packets", "cpu", lambda: _combine_packets_cpu, _variants.cpu_only)
_variants.add("combine_packets", "reference", _combine_packets_reference, _variants.cpu_only)

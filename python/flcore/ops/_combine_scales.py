"""Scales that come with updates: their check, and what they make of weights and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore._arrays import View
from flcore.errors import InvalidInputError

__all__ = ["parse_scales", "row_weights", "scaled_result"]


def parse_scales(scales: Any, n: int, layers: int, name: str = "scales") -> np.ndarray:
    """Return (n, layers) float64 from (n,) or (n, layers) numbers; NaN and infinity stay.

    Raises
    ------
    InvalidInputError
        Not numbers, or of another shape.
    """
    if _arrays.is_torch(scales):
        scales = scales.detach().cpu().numpy()
    try:
        values = np.array(scales, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"{name}: expected a number for each client, or for each layer of each client, "
            f"got {scales!r}"
        ) from None
    if values.shape not in ((n,), (n, layers)):
        raise InvalidInputError(
            f"{name}: expected shape ({n},) or ({n}, {layers}), got {values.shape}"
        )
    return np.broadcast_to(values.reshape(n, -1), (n, layers))


def row_weights(
    weights: Sequence[float], active: Sequence[int], scales: np.ndarray | None
) -> list[float] | np.ndarray:
    """Weights of the active rows: a list, or with scales (active, layers) float64."""
    chosen = [weights[i] for i in active]
    if scales is None:
        return chosen
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array(chosen, dtype=np.float64).reshape(-1, 1) * scales[list(active)]


def scaled_result(first: Sequence[View], out: Sequence[Any] | None) -> list[View]:
    """Views that tell the dtypes of the result: those of the rows, for int8 that of `out`."""
    likes = []
    for j, view in enumerate(first):
        dtype = view.dtype
        if dtype == "int8":
            given = out[j] if out is not None else None
            dtype = _arrays.dtype_name(given) if _arrays.is_array(given) else "float32"
            if dtype not in _arrays.DTYPE_CODES:
                dtype = "float32"  # a wrong `out` is then named where it is viewed
        likes.append(view._replace(dtype=dtype))
    return likes


# ---- variants ----------------------------------------------------------------------------------


def _combine_scaled_cpu(
    rows: Sequence[Sequence[View]],
    weights: np.ndarray,
    *,
    layers: Sequence[View],
    state: None,
    out: Sequence[View],
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """csrc/cpu/combine.isa.cpp with `weights` (n, layers), from rows that may be int8."""
    from flcore.ops.combine import ACCUMULATE  # which imports this module

    numel = [v.numel for v in layers]
    return _native.core.combine_scaled(
        [v.ptr for row in rows for v in row],
        len(rows),
        weights.reshape(-1).tolist(),
        numel,
        [v.code for v in layers],
        [v.code for v in out],
        [v.ptr for v in out],
        ACCUMULATE.index(accumulate),
        divisor,
        _native.threads_for(sum(numel) * (len(rows) + 1)),
        check,
    )


_variants.add("combine_scaled", "cpu", lambda: _combine_scaled_cpu, _variants.cpu_only)
_variants.add(
    "combine_scaled", "reference", _variants.lazy("flcore.reference.combine", "combine_scaled")
)

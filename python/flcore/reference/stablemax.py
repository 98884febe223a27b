r"""StableMax probabilities and their logarithms, forward and backward: the definition, in float64.

    s(x) = x + 1 for x >= 0, 1 / (1 - x) below      p = s / S, S = sum_k s(x_k)
    r = 1 / (1 + |x|)
    gradient of x from v, that of p:      p (v - sum_k v_k p_k) r
    gradient of x from v, that of log p:  (v - p sum_k v_k) r

A row whose S is 0 (all -inf), infinite or NaN is NaN. Rows that have collapsed: `collapse`.

Prieto, Barsbey, Mediano & Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv
2501.04697.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore import _arrays
from flcore.ops._stablemax_call import STEPS, CollapseCall, StableMaxCall, as_rows

__all__ = ["collapse", "elements", "stablemax"]


def elements(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return s(x) and r = 1 / (1 + |x|)."""
    a = 1 + np.abs(x)
    return np.where(x >= 0, a, np.where(np.isnan(x), x, 1 / a)), 1 / a


def stablemax(call: StableMaxCall) -> None:
    """Run one call; see `flcore.ops._stablemax_call.StableMaxCall`."""
    x = _wide(as_rows(call.x, call, call.x_strides))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        s, r = elements(x)
        top = x.argmax(-1)[..., None]
        own = np.take_along_axis(s, top, -1)
        others = s.copy()
        np.put_along_axis(others, top, 0, -1)
        rest = others.sum(-1, keepdims=True)
        total = own + rest
        total = np.where((total > 0) & (total < np.inf), total, np.nan)
        p = s / total
        name = STEPS[call.step]
        if name == "stablemax":
            result = p
        elif name == "log_stablemax":
            far = np.sign(x) * np.log1p(np.abs(x)) - np.log(total)
            result = np.where(p > 1e-9, np.log(np.where(p > 0, p, 1)), far)
            first = np.where(np.isnan(total), np.nan, -np.log1p(rest / own))
            np.put_along_axis(result, top, first, -1)  # without the difference of close numbers
        else:
            v = _wide(as_rows(call.v, call, call.v_strides))
            if name == "stablemax_backward":
                pivot = np.where(own > rest, np.take_along_axis(v, top, -1), 0)
                result = p * ((v - pivot) - ((v - pivot) * p).sum(-1, keepdims=True)) * r
            else:
                first = np.take_along_axis(v, top, -1)
                v_rest = v.copy()
                np.put_along_axis(v_rest, top, 0, -1)
                u = v_rest.sum(-1, keepdims=True)
                result = v - p * (u + first)
                first = (first * rest - own * u) / total
                np.put_along_axis(result, top, first, -1)
                result = result * r
    _store(as_rows(call.out, call, call.out_strides), result)


def _wide(x: Any) -> np.ndarray:
    return _arrays.to_float64(x).reshape(tuple(x.shape))


def _store(target: Any, values: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        _arrays.assign(target, values)


def collapse(call: CollapseCall) -> tuple[int, int, int, int, float, bool]:
    """Count rows that have collapsed; see `flcore.ops.stablemax.collapse_counts`."""
    keep = call.labels != call.ignore_index
    x, y = call.x[keep].astype(np.float64), call.labels[keep][:, None]
    if not len(x):
        return 0, 0, 0, 0, 0.0, False
    with np.errstate(invalid="ignore", over="ignore"):
        top = x.argmax(-1)[:, None]
        most, own = np.take_along_axis(x, top, -1), np.take_along_axis(x, y, -1)
        terms = np.exp(x - most)
        np.put_along_axis(terms, top, 0, -1)
        collapsed = np.isfinite(most) & (terms.sum(-1, keepdims=True) <= call.unit)
        s, _ = elements(x)
        s_own = np.take_along_axis(s, y, -1)
        np.put_along_axis(s, y, 0, -1)
        lost = np.isfinite(most) & (s.sum(-1, keepdims=True) <= call.unit * s_own)
    has_nan = bool(np.isnan(x).any())
    largest = float(np.max(np.abs(x), initial=0.0, where=(x > -np.inf)))
    counts = (int(n.sum()) for n in (keep, collapsed, collapsed & (own == most), lost))
    return (*counts, largest, has_nan)  # type: ignore[return-value]

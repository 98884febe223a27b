"""Gradients without their part along the weights: the definition, in float64.

    c = w.g / (w.w + eps)      p = g - c w      out = p ||g|| / (||p|| + eps)

w and g are one tensor and its gradient, or all of them end to end (scope "global"). Without
renormalisation the result is p. So it is when ||p|| < floor ||g||, where p is mostly rounding; at
`NOTHING` ||g|| it is nothing else, and the result is 0. w = 0 and w.g = 0 leave g as it is.

Prieto, Barsbey, Mediano & Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv
2501.04697; the renormalisation is that of the code published with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flcore import _arrays
from flcore._arrays import View

__all__ = ["NOTHING", "perp_grad"]

NOTHING = 1e-13  # PERP_NOTHING in csrc/api.h


def perp_grad(
    weights: Sequence[View],
    grads: Sequence[View],
    *,
    global_scope: bool,
    renormalize: bool,
    eps: float,
    floor: float,
    reduce: Callable[[Any], None] | None = None,
) -> None:
    """Write the module's formula over the gradients; see `flcore.ops.perp_grad`.

    `reduce` sums a float64 array over the processes that hold a shard of each tensor, in place: the
    dot products, (layers, 3), then the squares of p, (layers,).
    """
    w = [_arrays.to_float64(v.array) for v in weights]
    g = [_arrays.to_float64(v.array) for v in grads]
    add = reduce or (lambda values: None)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        sums = np.array([(a @ a, a @ b, b @ b) for a, b in zip(w, g, strict=True)]).reshape(-1, 3)
        add(sums)
        if global_scope:
            sums[:] = sums.sum(axis=0)
        ww, wg, gg = sums.T
        leave = (wg == 0) | (ww + eps == 0)
        c = wg / (ww + eps)
        p = [b - k * a for a, b, k in zip(w, g, c, strict=True)]
        rest = np.array([x @ x for x in p])
        add(rest)
        if global_scope:
            rest[:] = rest.sum()
        length, left = np.sqrt(gg), np.sqrt(rest)
        factor = np.ones(len(w))
        if renormalize:
            factor = np.where(left < floor * length, 1.0, length / (left + eps))
        factor[left <= NOTHING * length] = 0.0
        for target, x, k, same in zip(grads, p, factor, leave, strict=True):
            if not same:
                _arrays.assign(target.array, k * x if k else np.zeros_like(x))

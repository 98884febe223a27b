"""Server optimisers along the weighted sum of client updates: the definition, in float64.

    D  = sum_i weights[i] x_i / divisor      (x_i - w in the place of x_i when the rows are models)
    D += std z                               z standard normal, drawn by coordinate
    w, m, v <- the formulas of `advance`

Hsu et al., arXiv 1909.06335; Reddi et al., "Adaptive Federated Optimization", ICLR 2021,
Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays
from flcore._arrays import View
from flcore.reference import rng
from flcore.reference.combine import NONFINITE, combine

__all__ = ["advance", "combine_step"]

STEP_NONFINITE = 4  # CombineFlags in csrc/api.h


def advance(
    step: Any, d: np.ndarray, w: np.ndarray, m: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the new w, m and v after a step along `d`; `step` is a `flcore.ops.Step`."""
    if step.kind == "sgd":
        return w + step.lr * d, m, v
    if step.kind == "momentum":
        m = step.beta1 * m + d
        return w + step.lr * m, m, v
    if step.kind == "linear":
        m = step.beta1 * m + step.beta2 * d
        return w + step.lr * d + step.tau * m, m, v
    m = step.beta1 * m + (1 - step.beta1) * d
    if step.kind == "adagrad":
        v = v + d**2
    elif step.kind == "adam":
        v = step.beta2 * v + (1 - step.beta2) * d**2
    else:
        v = v - (1 - step.beta2) * d**2 * np.sign(v - d**2)
    return w + step.lr * m / (np.sqrt(v) + step.tau), m, v


def combine_step(
    rows: Sequence[Sequence[View]],
    weights: Sequence[float] | np.ndarray,
    *,
    layers: Sequence[View],
    step: Any,
    old: Sequence[Sequence[View]],
    new: Sequence[Sequence[View]],
    models: bool,
    noise: Any,
    tensors: Sequence[int],
    accumulate: str,
    divisor: float,
    check: bool,
) -> int:
    """Compute the module's formulas; see `flcore.ops.combine_step` for the arguments."""
    from flcore.ops._step import SERVER_STREAM

    flags, states = 0, len(step.states)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for j, layer in enumerate(layers):
            w = _arrays.to_float64(old[0][j].array)
            states_old = [_arrays.to_float64(s[j].array) for s in old[1:]]
            m, v = [*states_old, np.zeros(0), np.zeros(0)][:2]
            d = np.empty(layer.numel)
            values = [_arrays.to_float64(row[j].array) - (w if models else 0.0) for row in rows]
            by_layer = isinstance(weights, np.ndarray)
            flags |= combine(
                [[_arrays.view(x)] for x in values],
                [float(p[j]) for p in weights] if by_layer else list(weights),  # type: ignore
                layers=[_arrays.view(d)],
                state=None,
                out=[_arrays.view(d)],
                accumulate=accumulate,
                divisor=divisor,
                check=check,
            )
            if noise is not None:
                name = {"round": noise.round, "tensor": tensors[j], "client": SERVER_STREAM}
                d += noise.std * rng.random_normal(layer.numel, noise.seed, **name)
            results = advance(step, d, w, m, v)
            for target, result in zip(new, results[: 1 + states], strict=False):
                _arrays.assign(target[j].array, result)
                if not np.isfinite(_arrays.to_float64(target[j].array)).all():
                    flags |= STEP_NONFINITE
            if len(new) > 1 + states:
                _arrays.assign(new[-1][j].array, _arrays.to_float64(new[0][j].array))  # as stored
    return flags if check else flags & ~(NONFINITE | STEP_NONFINITE)

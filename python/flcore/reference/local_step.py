"""Local steps, shifts and ends of rounds: the definition, in float64.

For each group of pieces (the tensors of a model, or a row), with v = alpha g + q:

    step      s = min(1, clip / ||v||)            b = s v + decay x
              full: s = min(1, clip / ||v + decay x||),  b = s (v + decay x)
              state <- momentum state + b         (first: state <- b)
              x <- x - rate d,  d = b without a state, state, or b + momentum state (nesterov)
    norm      norms = ||v||
    shift     out = x + rate v
    sam       out = x + rate / (||v|| + eps) v
    update    out = x - g
    dual      out = x - g,  state <- state + out
    control   out = x - g,  state <- state - q - rate out

A norm that is not finite makes the factor of v NaN. FedProx (arXiv 1812.06127), SCAFFOLD
(1910.06378), FedDyn (2111.04263), FedCM (2106.10874) and FedSpeed (2302.10429) are this step with
different q.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flcore import _arrays

__all__ = ["clip_scale", "local_step"]


def clip_scale(norm: float, clip: float) -> float:
    """Return min(1, clip / norm), NaN for a norm that is not finite and exceeds the limit."""
    if norm <= clip:
        return 1.0
    return clip / norm if math.isfinite(norm) else math.nan


def local_step(
    pieces: Any,
    kind: str,
    *,
    rate: Any = 0.0,
    alpha: Any = 1.0,
    decay: Any = 0.0,
    clip: Any = None,
    momentum: Any = 0.0,
    full: bool = False,
    nesterov: bool = False,
    first: bool = False,
    with_q: bool | None = None,
    eps: float = 1e-7,
    active: Any = None,
    norms: Any = None,
) -> None:
    """Compute the module's formulas on `flcore.ops._local_pieces.Pieces`.

    Numbers are floats or float64 (groups,); active: None, a count of first groups, or (groups,)
    bool; norms: (groups,) float64 that "norm" fills; with_q: whether v has q.
    """
    if with_q is None:
        with_q = kind == "step" and "q" in pieces.operands
    chosen = np.ones(pieces.groups, bool)
    if isinstance(active, int):
        chosen[active:] = False
    elif active is not None:
        chosen = active
    columns = {"rate": rate, "alpha": alpha, "decay": decay, "clip": clip, "momentum": momentum}
    for k in np.flatnonzero(chosen).tolist():
        group = _Group(pieces, k)
        n = {i: c[k] if isinstance(c, np.ndarray) else c for i, c in columns.items()}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if kind in ("update", "dual", "control"):
                _end(group, kind, n["rate"])
                continue
            v = n["alpha"] * group["g"]
            if with_q:
                v = v + group["q"]
            if kind == "norm":
                norms[k] = _norm(v)
            elif kind == "shift":
                group["out"] = group["x"] + n["rate"] * v
            elif kind == "sam":
                length = _norm(v) + eps
                s = n["rate"] / length if math.isfinite(length) else math.nan
                group["out"] = group["x"] + s * v
            else:
                _step(group, v, n, full, nesterov, first)


def _norm(v: np.ndarray) -> float:
    return float(np.sqrt(v @ v))


def _end(group: _Group, kind: str, rate: float) -> None:
    u = group["x"] - group["g"]
    if kind == "dual":
        group["state"] = group["state"] + u
    elif kind == "control":
        group["state"] = group["state"] - group["q"] - rate * u
    group["out"] = u


def _step(
    group: _Group, v: np.ndarray, n: dict[str, Any], full: bool, nesterov: bool, first: bool
) -> None:
    x = group["x"]
    b = v + n["decay"] * x if full else v
    if n["clip"] is not None:
        b = clip_scale(_norm(b), n["clip"]) * b
    if not full:
        b = b + n["decay"] * x
    d = b
    if "state" in group.pieces.operands:
        state = b if first else n["momentum"] * group["state"] + b
        group["state"] = state
        d = b + n["momentum"] * state if nesterov else state
    group["x"] = x - n["rate"] * d


class _Group:
    """The pieces of one group as float64 vectors, read and written by the name of the operand."""

    def __init__(self, pieces: Any, k: int) -> None:
        self.pieces = pieces
        self.range = range(pieces.first_piece[k], pieces.first_piece[k + 1])

    def __getitem__(self, name: str) -> np.ndarray:
        operand = self.pieces.operands[name]
        parts = [_arrays.to_float64(operand.piece(p)) for p in self.range]
        return np.concatenate(parts) if parts else np.empty(0)

    def __setitem__(self, name: str, values: np.ndarray) -> None:
        operand, at = self.pieces.operands[name], 0
        for p in self.range:
            size = self.pieces.numel[p]
            _arrays.assign(operand.piece(p), values[at : at + size])
            at += size

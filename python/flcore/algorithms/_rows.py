"""The arithmetic of `flcore.algorithms.local_steps`, on NumPy arrays and torch tensors alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flcore.algorithms._fused import FusedSteps
from flcore.algorithms.step import EPSILON, Ascent, DualAscent, Shift, StepSpec

__all__ = ["Rows"]

Gradient = Callable[[Any, int], Any]


class Rows:
    """Parameters of several clients, a row each, with what their steps need.

    Parameters
    ----------
    x : (clients, d) array or tensor
        Changed in place.
    specs : one StepSpec a client
    """

    def __init__(self, x: Any, specs: Sequence[StepSpec]) -> None:
        first = specs[0]
        self.x, self.first, self.specs = x, first, specs
        self.lr = self._column([spec.lr for spec in specs])
        self.alpha = self._column([spec.alpha for spec in specs])
        self.decay = self._column([spec.decay for spec in specs])
        self.clip = self._column([math.inf if s.clip is None else s.clip for s in specs])
        self.clipped = any(spec.clip is not None for spec in specs)
        self.q = None if first.q is None else self._stack([spec.q for spec in specs])
        self.pull = self._column([spec.lr * spec.pull for spec in specs])
        self.anchor = self._stack([spec.anchor for spec in specs]) if first.pull else None
        self.free = None
        if any(spec.frozen is not None for spec in specs):
            none = np.zeros(x.shape[1], bool)
            self.free = self._stack([~(none if s.frozen is None else s.frozen) for s in specs])
        self.buffer = x * 0 if first.momentum or first.adam else None
        self.square = x * 0 if first.adam else None
        shifts: list[Any] = [spec.shift for spec in specs]
        if isinstance(first.shift, Shift):
            self.shift = self._stack([shift.vector for shift in shifts])
        elif first.shift is not None:
            self.rho = self._column([shift.rho for shift in shifts])
        if isinstance(first.shift, DualAscent):
            self.dual = self._stack([shift.dual for shift in shifts])
            self.common = self._stack([shift.common for shift in shifts])
        self.fused = FusedSteps(x, specs, self.q, None if first.adam else self.buffer)
        self.fuses = self.free is None and self.anchor is None and first.adam is None

    def step(self, n: int, k: int, gradient: Gradient) -> None:
        """Take step `k` of the first `n` clients."""
        x = self.x[:n]
        g = self._gradient(x, n, k, gradient)
        first = self.first
        if first.unit_clip is not None:
            self._clip_units(x, g)
        if first.project is not None:
            first.project(x, g)
        if self.fuses and self.fused.takes(g):
            self.fused.step(g, n, k)
            return
        bracket = self._bracket(x, g, n)
        if self.free is not None:
            bracket *= self.free[:n]
        if first.adam is not None:
            bracket = self._adam(bracket, n, k)
        elif self.buffer is not None:
            buffer = self.buffer[:n]
            buffer *= first.momentum
            buffer += bracket
            bracket = bracket + first.momentum * buffer if first.nesterov else buffer
        if self.anchor is None:
            x -= self.lr[:n] * bracket
        else:
            x -= self.lr[:n] * bracket + self.pull[:n] * (x - self.anchor[:n])

    def finish(self) -> None:
        """Give the clients what their steps changed beside x."""
        if isinstance(self.first.shift, DualAscent):
            for spec, dual in zip(self.specs, self.dual, strict=True):
                size = dual.shape[0]
                spec.shift.dual[:size] = _numpy(dual)  # type: ignore[union-attr]

    def _gradient(self, x: Any, n: int, k: int, gradient: Gradient) -> Any:
        """Give the gradient at x, or at the point beside it that the method looks at."""
        shift = self.first.shift
        if shift is None:
            return gradient(x, k)
        if isinstance(shift, Shift):
            return gradient(x + self.shift[:n], k)
        g = gradient(x, k)
        rho = self.rho[:n]
        if isinstance(shift, DualAscent):
            g = g - self.dual[:n] - self.common[:n]
            ascent = g * (rho / (_norm(g) + EPSILON))
            self.dual[:n] += ascent - self.common[:n]
            return gradient(x + ascent, k)
        assert isinstance(shift, Ascent)
        if shift.adaptive:
            ascent = x * x * g * (rho / (_norm(abs(x) * g) + EPSILON))
        elif shift.normalised and shift.merge == 1.0 and self.fused.takes(g):
            return gradient(self.fused.ascend(g, n), k)
        elif shift.normalised:
            ascent = g * (rho / (_norm(g) + EPSILON))
        else:
            ascent = g * rho
        if shift.merge == 1.0:
            return gradient(x + ascent, k)
        g = g * (1.0 - shift.merge)
        return g + shift.merge * gradient(x + ascent, k)

    def _bracket(self, x: Any, g: Any, n: int) -> Any:
        if self.first.alpha != 1.0:
            g *= self.alpha[:n]
        if self.q is not None:
            g += self.q[:n]
        full = self.first.clip_mode == "full"
        if full:
            g += self.decay[:n] * x
        if self.clipped:
            norm = _norm(g)
            limit = self.clip[:n]
            g *= limit / _largest(norm, limit)
        if not full and self.first.decay:
            g += self.decay[:n] * x
        return g

    def _clip_units(self, x: Any, g: Any) -> None:
        clip = self.first.unit_clip
        assert clip is not None
        units = int(clip.rows.max()) + 1
        rows = np.where(clip.rows < 0, units, clip.rows)[: x.shape[1]]
        weights, grads = (_norm_by(v, rows, units + 1) for v in (x, g))
        limit = clip.threshold * _largest(weights, clip.floor)
        scale = limit / _largest(grads, limit)
        scale[:, units] = 1.0
        g *= scale[:, rows]

    def _adam(self, bracket: Any, n: int, k: int) -> Any:
        assert self.first.adam is not None and self.buffer is not None and self.square is not None
        beta1, beta2, epsilon = self.first.adam
        m, v = self.buffer[:n], self.square[:n]
        m *= beta1
        m += (1 - beta1) * bracket
        v *= beta2
        v += (1 - beta2) * bracket * bracket
        m = m / (1 - beta1 ** (k + 1))
        v = v / (1 - beta2 ** (k + 1))
        return m / (v**0.5 + epsilon)

    def _column(self, numbers: Sequence[float]) -> Any:
        column = np.array(numbers, np.float64).reshape(-1, 1)
        return _like(column, self.x)

    def _stack(self, vectors: Sequence[Any]) -> Any:
        size = self.x.shape[1]
        return _like(np.stack([vector[:size] for vector in vectors]), self.x)


def _like(values: np.ndarray, x: Any) -> Any:
    """Give a copy of `values` as what `x` is: array or tensor, of its dtype, where it is."""
    if isinstance(x, np.ndarray):
        return values.astype(x.dtype)
    return x.new_tensor(values)


def _numpy(v: Any) -> np.ndarray:
    return v if isinstance(v, np.ndarray) else v.cpu().numpy()


def _norm(v: Any) -> Any:
    """Euclidean norm of each row, as a column."""
    return (v * v).sum(1)[:, None] ** 0.5


def _norm_by(v: Any, rows: np.ndarray, units: int) -> Any:
    """Euclidean norm of the values of each unit in each row, (n, units)."""
    squares = v * v
    if isinstance(v, np.ndarray):
        sums = np.stack([np.bincount(rows, row, units) for row in squares])
        return sums.astype(v.dtype) ** 0.5
    index = squares.new_tensor(rows).long().expand(len(v), -1)
    return squares.new_zeros(len(v), units).scatter_add_(1, index, squares) ** 0.5


def _largest(v: Any, limit: Any) -> Any:
    """Elementwise maximum that lets NaN through."""
    if isinstance(v, np.ndarray):
        return np.maximum(v, limit)
    return v.clamp_min(limit) if isinstance(limit, float) else v.maximum(limit)

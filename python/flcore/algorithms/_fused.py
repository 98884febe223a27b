"""The kernel of the local step under the rows of `flcore.algorithms.local_steps`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore.algorithms.step import EPSILON, Ascent, StepSpec
from flcore.ops import LocalStep

__all__ = ["FusedSteps"]


class FusedSteps:
    """Steps of the first n rows by `flcore.ops.LocalStep`, prepared once for each n.

    Parameters
    ----------
    x : (rows, d) array or tensor
        Changed in place.
    specs : one StepSpec a row
    q, buffer : like x, optional
    """

    def __init__(self, x: Any, specs: Sequence[StepSpec], q: Any, buffer: Any) -> None:
        self._x, self._q, self._buffer = x, q, buffer
        self._here = _contiguous(x)
        first = specs[0]
        self._beside = x * 0 if isinstance(first.shift, Ascent) else None
        limits = [math.inf if spec.clip is None else spec.clip for spec in specs]
        self._numbers = (
            _common([spec.lr for spec in specs]),
            _common([spec.alpha for spec in specs]),
            _common([spec.decay for spec in specs]),
            None if min(limits) == math.inf else _common(limits),
        )
        self._rho = _common([getattr(spec.shift, "rho", 0.0) for spec in specs])
        self._options: dict[str, Any] = {
            "momentum": first.momentum,
            "clip_mode": first.clip_mode,
            "nesterov": first.nesterov,
        }
        self._key: Any = None
        self._kernel: Any = None
        self._active: list[Any] = []

    def takes(self, g: Any) -> bool:
        """Whether the kernel reads this gradient where it is."""
        return self._here and g.dtype == self._x.dtype and _contiguous(g)

    def step(self, g: Any, n: int, k: int) -> None:
        """Take step `k` of the first `n` rows; g is (n, d)."""
        kernel = self._prepare(g, n)
        lr, alpha, decay, clip = self._active
        kernel.step(lr, alpha, decay, clip, first=k == 0, **self._options)

    def ascend(self, g: Any, n: int) -> Any:
        """Give ``x + rho g / (||g|| + epsilon)`` for the first `n` rows; the same memory again."""
        self._prepare(g, n).sam(_first(self._rho, n), eps=EPSILON)
        assert self._beside is not None
        return self._beside[:n]

    def _prepare(self, g: Any, n: int) -> LocalStep:
        address = g.ctypes.data if isinstance(g, np.ndarray) else g.data_ptr()
        if self._key != (n, address):
            rows = (None if a is None else a[:n] for a in (self._q, self._buffer))
            beside = None if self._beside is None else self._beside[:n]
            self._kernel = LocalStep(self._x[:n], g, *rows, out=beside)
            self._active = [_first(number, n) for number in self._numbers]
            self._key = n, address
        return self._kernel


def _contiguous(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return array.flags.c_contiguous
    return array.is_contiguous()


def _common(numbers: Sequence[float]) -> Any:
    """Give the number if all are the same, else all of them."""
    if len(set(numbers)) == 1:
        return float(numbers[0])
    return np.array(numbers, np.float64)


def _first(number: Any, n: int) -> Any:
    return number[:n] if isinstance(number, np.ndarray) else number

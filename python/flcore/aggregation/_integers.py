"""Integer and boolean layers of an update (step counters, class counts): a stated policy each.

They are small, so NumPy does the work; what matters is that they are neither scaled in their own
type (a weight of 0.25 would turn them into zeros) nor passed through float32.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["POLICIES", "IntegerLayer", "split_layers"]

POLICIES = ("mean", "max", "sum", "first")


def split_layers(layout: _updates.Layout) -> tuple[list[int], list[int]]:
    """Return the positions of the floating and of the integer layers.

    Raises
    ------
    DTypeError
        A layer is neither (complex numbers, strings, objects).
    """
    floats, integers = [], []
    for i, (_, dtype, _, _) in enumerate(layout.specs):
        if dtype in _arrays.DTYPE_CODES:
            floats.append(i)
        elif dtype == "bool" or dtype.startswith(("int", "uint")):
            integers.append(i)
        else:
            raise DTypeError(
                f"{layout.label('updates[0]', i)}: expected {_arrays.FLOATS}, an integer type or "
                f"bool, got {dtype}"
            )
    return floats, integers


class IntegerLayer:
    """Running aggregate of one integer layer.

    ``mean``: weighted mean in float64, rounded to the nearest integer (half to even).
    ``max``, ``sum``: over the clients, weights ignored; the sum is exact in 64 bits.
    ``first``: the value of the first client.
    """

    def __init__(self, like: Any, policy: str) -> None:
        if policy not in POLICIES:
            raise InvalidInputError(f"integers: expected one of {POLICIES}, got {policy!r}")
        self.like = like
        self.policy = policy
        self.value: np.ndarray | None = None

    def add(self, x: Any, weight: float) -> None:
        """Take the value of one client; `weight` counts for the mean only."""
        if not isinstance(x, np.ndarray):
            x = x.detach().cpu().numpy()
        self._fold(x * np.float64(weight) if self.policy == "mean" else x.astype(np.int64))

    def merge(self, other: IntegerLayer) -> None:
        """Take everything that `other` has seen."""
        if other.value is not None:
            self._fold(other.value)

    def _fold(self, term: np.ndarray) -> None:
        if self.value is None:
            self.value = term.copy()
        elif self.policy == "max":
            np.maximum(self.value, term, out=self.value)
        elif self.policy != "first":
            self.value = self.value + term

    def result(self, divisor: float) -> Any:
        """Return the aggregate in the kind, dtype and device of the layer."""
        assert self.value is not None
        value = np.rint(self.value / divisor) if self.policy == "mean" else self.value
        if isinstance(self.like, np.ndarray):
            return value.astype(self.like.dtype)
        torch = sys.modules["torch"]
        result = torch.from_numpy(np.ascontiguousarray(value)).to(self.like.dtype)
        return result.to(self.like.device).reshape(self.like.shape)

"""Checks of plain arguments: whole numbers, numbers, sets of clients, saved states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flcore.errors import InvalidInputError

__all__ = ["check_keys", "client_mask", "number", "vector", "whole"]


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return `value` as an int if it is a whole number in [least, most]."""
    good = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least
    if not good or (most is not None and value > most):
        span = f"from {least}" if most is None else f"in [{least}, {most}]"
        raise InvalidInputError(f"{name}: expected a whole number {span}, got {value!r}")
    return int(value)


def number(name: str, value: Any, low: float, high: float = math.inf, *, open: str = "") -> float:
    """Return `value` as a float if it is finite and in [low, high].

    `open` says which ends are left out: "", "low", "high" or "both".
    """
    good = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if good:
        good = math.isfinite(value) and low <= value <= high
        good = good and not (value == low and open in ("low", "both"))
        good = good and not (value == high and open in ("high", "both"))
    if not good:
        left = "(" if open in ("low", "both") or low == -math.inf else "["
        right = ")" if open in ("high", "both") or high == math.inf else "]"
        raise InvalidInputError(
            f"{name}: expected a finite number in {left}{low:g}, {high:g}{right}, got {value!r}"
        )
    return float(value)


def vector(
    name: str, values: Any, shape: tuple[int | None, ...] | None, *, least: float = -math.inf
) -> np.ndarray:
    """Return a float64 copy of `values`: finite, none below `least`; None: any shape or length."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInputError(f"{name}: expected numbers, got {values!r}") from None
    shape = array.shape if shape is None else shape
    want = tuple(have if w is None else w for w, have in zip(shape, array.shape, strict=False))
    if array.ndim != len(shape) or array.shape != want:
        words = str(tuple("any" if w is None else w for w in shape)).replace("'", "")
        raise InvalidInputError(f"{name}: expected shape {words}, got {array.shape}")
    wrong = ~np.isfinite(array) | (array < least)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        label = f"{name}[{', '.join(map(str, where))}]" if where else name
        expected = "a finite number" + ("" if least == -math.inf else f" from {least:g}")
        raise InvalidInputError(f"{label}: expected {expected}, got {array[where]}")
    return array


def client_mask(name: str, clients: Any, n: int) -> np.ndarray:
    """Return a (n,) bool mask from a mask, or from indices in any order, repeats allowed."""
    values = np.asarray(clients)
    if values.dtype == bool:
        if values.shape != (n,):
            raise InvalidInputError(
                f"{name}: expected a mask of shape ({n},), got shape {values.shape}"
            )
        return values.copy()
    mask = np.zeros(n, bool)
    if values.size == 0 and values.ndim == 1:
        return mask
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InvalidInputError(
            f"{name}: expected a mask of {n} booleans or a list of indices, got {clients!r}"
        )
    if values.min() < 0 or values.max() >= n:
        wrong = values[(values < 0) | (values >= n)][0]
        raise InvalidInputError(f"{name}: expected indices in [0, {n - 1}], got {wrong}")
    mask[values] = True
    return mask


def check_keys(state: Any, keys: set[str]) -> None:
    """Raise unless `state` is a mapping with exactly these keys."""
    if not isinstance(state, Mapping):
        raise InvalidInputError(f"state: expected a dict, got {type(state).__name__}")
    if set(state) != keys:
        raise InvalidInputError(f"state: expected the keys {sorted(keys)}, got {sorted(state)}")

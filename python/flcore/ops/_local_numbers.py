"""The numbers of local steps, one for all rows or one each, and which rows take part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flcore import _arrays
from flcore.errors import InvalidInputError

__all__ = ["active_rows", "chosen_groups", "parse_number"]


def parse_number(
    value: Any, name: str, groups: int | None, *, positive: bool = False
) -> float | np.ndarray:
    """Check a number, or with `groups` also float64 (groups,); `positive` allows infinity.

    Raises
    ------
    InvalidInputError
        It is neither.
    """
    if type(value) is not float:
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            value = float(value)
        elif groups is not None and not isinstance(value, bool | str) and value is not None:
            return _column(value, name, groups, positive)
        else:
            raise InvalidInputError(f"{name}: expected {_wanted(positive)}, got {value!r}")
    if value > 0 if positive else math.isfinite(value):
        return value
    raise InvalidInputError(f"{name}: expected {_wanted(positive)}, got {value!r}")


def _wanted(positive: bool) -> str:
    return "a number above 0, or None" if positive else "a finite number"


def _column(value: Any, name: str, groups: int, positive: bool) -> np.ndarray:
    if _arrays.is_torch(value):
        value = value.detach().cpu().numpy()
    try:
        column = np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        column = np.empty((0, 0))
    if column.shape != (groups,):
        raise InvalidInputError(f"{name}: expected one number, or ({groups},) of them")
    if not ((column > 0) if positive else np.isfinite(column)).all():
        raise InvalidInputError(f"{name}: expected {_wanted(positive)} in every place")
    return column


def active_rows(active: Any, groups: int) -> Any:
    """Check which rows take part: None (all), a count of first rows, or (groups,) bool.

    Raises
    ------
    InvalidInputError
        It is something else.
    """
    if active is None:
        return None
    if isinstance(active, int | np.integer) and not isinstance(active, bool):
        if 0 <= active <= groups:
            return int(active)
    else:
        flags = active.cpu().numpy() if _arrays.is_torch(active) else np.asarray(active)
        if flags.dtype == bool and flags.shape == (groups,):
            return np.ascontiguousarray(flags)
    raise InvalidInputError(
        f"active: expected ({groups},) of bool, or a number of first rows from 0 to {groups}"
    )


def chosen_groups(active: Any, groups: int) -> Iterable[int] | Sequence[int]:
    """Return the numbers of the groups that take part."""
    if active is None:
        return range(groups)
    if isinstance(active, int):
        return range(active)
    return np.flatnonzero(active).tolist()

"""How many of d coordinates a sparse codec sends: a share of them, or a number."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from flcore.errors import InvalidInputError

__all__ = ["check_ratio", "check_share", "decimal", "share_of"]


def check_ratio(ratio: float | None) -> None:
    """Raise `InvalidInputError` unless a ratio, if there is one, is in (0, 1]."""
    if ratio is not None and not 0 < ratio <= 1:
        raise InvalidInputError(f"ratio: expected 0 < ratio <= 1, got {ratio!r}")


def check_share(codec: str, ratio: float | None, k: Any) -> None:
    """Raise `InvalidInputError` unless exactly one of a ratio in (0, 1] and a k >= 1 is given."""
    if (ratio is None) == (k is None):
        raise InvalidInputError(f"{codec}: expected either ratio or k, e.g. {codec}(ratio=0.01)")
    check_ratio(ratio)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise InvalidInputError(f"k: expected an integer of at least 1, got {k!r}")


def decimal(ratio: float) -> Fraction:
    """Return a ratio as the decimal that was written.

    0.07 of 100 is 7, while 0.07 * 100 is a little more in binary.
    """
    return Fraction(repr(float(ratio)))


def share_of(numel: int, ratio: float | Fraction | None, k: int | None = None) -> int:
    """Return the entries that are sent of `numel`: k, or the ratio rounded up; at least one."""
    if k is not None:
        return min(k, numel)
    exact = ratio if isinstance(ratio, Fraction) else decimal(ratio or 0)
    return min(numel, max(1, math.ceil(exact * numel)))

"""Clipping of updates that arrive one at a time, about zero or about a centre."""

from __future__ import annotations

import math
from typing import Any

from flcore import _arrays
from flcore.aggregation._call import LARGEST_SQUARE
from flcore.aggregation._preaggregators import Clipping
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.gram import gram_views

__all__ = ["NormBound"]


class NormBound:
    """Factor of each update: ``min(1, c / ||x - v||)``.

    Parameters
    ----------
    before : Clipping
    center : list of arrays, optional
        Floating layers of v; zero when not given.
    variant : str, optional
        Which implementation of `flcore.ops.gram` runs.

    Raises
    ------
    InvalidInputError
        `before` needs all updates at once.
    NonFiniteError
        The centre holds a NaN or an infinity, or its squares overflow.
    """

    def __init__(self, before: Any, center: list[Any] | None, variant: str | None) -> None:
        if not isinstance(before, Clipping):
            raise InvalidInputError(
                "before: expected Clipping(c), which looks at one update at a time, got "
                f"{before!r}; other pre-aggregators and rules need all updates at once"
            )
        self.limit, self.center, self.variant = before.c, center, variant
        if center is not None and not self._square([self.views()]) < LARGEST_SQUARE:
            raise NonFiniteError("center: NaN or infinity found, or squares that overflow")

    def factor(self, views: list[_arrays.View]) -> float | None:
        """Return the factor of an update, in one read; None: it is not finite."""
        square = self._square([views, self.views()] if self.center else [views])
        if not square < LARGEST_SQUARE:
            return None
        norm = math.sqrt(square)
        return self.limit / norm if norm > self.limit else 1.0

    def views(self) -> list[_arrays.View]:
        """View the centre: none when that is the zero vector."""
        return [_arrays.view(x) for x in self.center or []]

    def _square(self, rows: list[list[_arrays.View]]) -> float:
        """Squared norm of one row, or squared distance of two."""
        kind = "norms" if len(rows) == 1 else "distances"
        found = gram_views(rows, kind, nonfinite="exclude", variant=self.variant)
        return float(found.norms[0] if found.distances is None else found.distances[0, 1])

    def same(self, other: NormBound) -> bool:
        """Whether two bounds clip alike."""
        if self.limit != other.limit or (self.center is None) != (other.center is None):
            return False
        pairs = zip(self.center or [], other.center or [], strict=True)
        return all(a is b or bool((a == b).all()) for a, b in pairs)

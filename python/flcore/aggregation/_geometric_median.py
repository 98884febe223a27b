"""The geometric median, by smoothed Weiszfeld steps on the n x n problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.aggregation._checks import number, whole
from flcore.aggregation._decision import Decision
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._rule import Rule, check_choice
from flcore.aggregation._solvers.centres import weiszfeld
from flcore.errors import InvalidInputError

__all__ = ["GeometricMedian"]

STARTS = ("near", "mean", "zero")
CONVENTIONS: dict[str, dict[str, Any]] = {
    "converged": dict(smoothing="relative:1e-6", iterations=256, tolerance=1e-10, start="near"),
    "byzfl": dict(smoothing=0.1, iterations=3, tolerance=None, start="zero"),
    "rfa": dict(smoothing=1e-5, iterations=4, tolerance=1e-6, start="mean"),
}


@dataclass(frozen=True)
class GeometricMedian(Rule):
    r"""The point with the smallest (weighted) sum of distances to the updates.

    Weiszfeld steps :math:`z \leftarrow \sum_i b_i x_i / \sum_i b_i` with
    :math:`b_i = a_i / \max(\nu, \lVert z - x_i \rVert)`. They need distances only, so that any
    number of them costs two reads of the data. Resists up to half of the weight, without a count of
    bad clients.

    Parameters
    ----------
    convention : {"converged", "byzfl", "rfa"}
        What the other options are by default. "converged": until the point stands still, free of
        scale and of the place of the zero vector. "byzfl": 3 steps from the zero vector,
        :math:`\nu = 0.1`. "rfa": 4 steps from the mean, :math:`\nu = 10^{-5}`, tolerance 1e-6.
    smoothing : float or str, optional
        :math:`\nu > 0`. "relative:1e-3" means that part of the median distance of the updates to
        the one in their midst. A number far above the distances turns the rule into the mean.
    iterations : int, optional
        Steps at most, at least 1.
    tolerance : float, optional
        Stop when the point moves by this part of the median distance to the updates or less; for
        "byzfl" and "rfa", when the sum of distances changes by this part of itself or less, which
        one client far out can bring about at once. 0 for never.
    start : {"near", "mean", "zero"}, optional
        First z: the mean of the ``n // 2 + 1`` updates nearest to the one in their midst, the
        weighted mean, or the zero vector. From the zero vector the result moves with the updates
        only as far as the steps have converged.
    nonfinite, accumulate
        See `Rule`.

    Notes
    -----
    Weights :math:`a_i` are example counts; all equal when not given. With an update so far out that
    squared distances to it say nothing about the others, a third read takes inner products.

    References
    ----------
    Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import GeometricMedian
    >>> updates = [np.float64(x) for x in ([0, 0], [0, 2], [2, 0], [2, 2], [1e9, 1e9])]
    >>> GeometricMedian()(updates).round(3)
    array([1.577, 1.577])
    >>> GeometricMedian("byzfl")(np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]))
    array([3.78788764, 4.78788764, 5.78788764])
    """

    convention: str = "converged"
    smoothing: float | str | None = None
    iterations: int | None = None
    tolerance: float | None = None
    start: str | None = None
    weighted: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("convention", self.convention, tuple(CONVENTIONS))
        if isinstance(self.smoothing, str):
            word, _, digits = self.smoothing.partition(":")
            try:
                part = float(digits) if word == "relative" else 0.0
            except ValueError:
                part = 0.0
            if not 0 < part < np.inf:
                raise InvalidInputError(
                    "smoothing: expected a number > 0 or a text like 'relative:1e-3', got "
                    f"{self.smoothing!r}"
                )
        elif self.smoothing is not None:
            number("smoothing", self.smoothing, 0, open="low")
        if self.iterations is not None:
            object.__setattr__(self, "iterations", whole("iterations", self.iterations, 1))
        if self.tolerance is not None:
            number("tolerance", self.tolerance, 0)
        if self.start is not None:
            check_choice("start", self.start, STARTS)

    def _option(self, name: str) -> Any:
        own = getattr(self, name)
        return CONVENTIONS[self.convention][name] if own is None else own

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        n = geometry.n
        a = np.full(n, 1 / n) if weights is None else weights / weights.sum()
        start = np.zeros(n + 1)
        away = None
        if self._option("start") == "zero":
            start[-1] = 1.0
            away = np.sqrt(geometry.norms)
        elif self._option("start") == "mean":
            start[:n] = a
        else:
            start[geometry.midst] = a[geometry.midst] / a[geometry.midst].sum()
        combination, distances, _ = weiszfeld(
            geometry.frame,
            a,
            start,
            self._smoothing(geometry),
            self._option("iterations"),
            self._option("tolerance") or None,
            away,
            movement=self.convention == "converged",
        )
        return Decision(combination, scores=distances)

    def _smoothing(self, geometry: Geometry) -> float:
        wanted = self._option("smoothing")
        if not isinstance(wanted, str):
            return float(wanted)
        return float(wanted.partition(":")[2]) * geometry.spread

"""Krum and Multi-Krum: the updates closest to the crowd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.aggregation._checks import whole
from flcore.aggregation._decision import Decision
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._rule import Rule, check_choice
from flcore.aggregation._solvers.neighbours import krum_scores
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["Krum", "MultiKrum"]


@dataclass(frozen=True)
class _Convention:
    """How one source counts: neighbours are n - f - `minus`, averaged are n - f - `fewer` rows."""

    minus: int
    fewer: int | None  # None: one row
    squared: bool = True
    mean: bool = False  # scores are means and not sums: the same order
    at_least_one: bool = False


CONVENTIONS = {
    "paper": _Convention(2, 2),
    "byzfl": _Convention(1, 0, mean=True),
    "flower": _Convention(2, None, at_least_one=True),
    "garfield": _Convention(1, 2, squared=False),
    "garfield-native": _Convention(2, 2),
    "monna": _Convention(1, 0, squared=False),
}


class _KrumRule(Rule):
    """What Krum and Multi-Krum share: options and scores."""

    convention: str
    neighbours: int | None
    squared: bool | None
    weighted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("convention", self.convention, tuple(CONVENTIONS))
        if self.neighbours is not None:
            object.__setattr__(self, "neighbours", whole("neighbours", self.neighbours, 1))
        if self.squared is not None and not isinstance(self.squared, bool | np.bool_):
            raise DTypeError(f"squared: expected True, False or None, got {self.squared!r}")

    def _scores(self, geometry: Geometry, excluded: int) -> np.ndarray:
        n = geometry.n
        f = self._bad(n, excluded)
        how = CONVENTIONS[self.convention]
        if self.neighbours is None:
            q = n - f - how.minus
            if how.at_least_one:
                q = min(max(1, q), n - 1)
            elif q < 1:
                raise InvalidInputError(
                    f"f: Krum ({self.convention}) counts the n - f - {how.minus} nearest of n = "
                    f"{n} updates; with f = {f} none are left. Use a smaller f, more clients, or "
                    "neighbours="
                )
        elif self.neighbours >= n + excluded:
            raise InvalidInputError(
                f"neighbours: expected fewer than n = {n + excluded} updates, got {self.neighbours}"
            )
        else:
            q = min(self.neighbours, n - 1)
        squared = how.squared if self.squared is None else self.squared
        scores = krum_scores(geometry.distances if squared else np.sqrt(geometry.distances), q)
        return scores / q if how.mean and q > 0 else scores

    def _average(
        self, geometry: Geometry, weights: np.ndarray | None, scores: np.ndarray, m: int
    ) -> Decision:
        """Mean of the m rows with the lowest scores."""
        coefficients = np.zeros(geometry.n)
        chosen = np.sort(geometry.order(scores)[:m])  # summed in the order of the rows
        if weights is None or m == 1:
            coefficients[chosen] = 1 / m
        else:
            coefficients[chosen] = weights[chosen] / weights[chosen].sum()
        return Decision(coefficients, scores=scores)


@dataclass(frozen=True)
class Krum(_KrumRule):
    r"""The update with the smallest sum of squared distances to its nearest neighbours.

    With :math:`D_{ij} = \lVert x_i - x_j \rVert^2`, the score of a client is the sum of the q
    smallest :math:`D_{ij}`, :math:`j \ne i`; the client with the lowest score wins, and of equal
    scores the first in the call. The result is one of the updates, bit for bit. One read of the
    data for the distances, one of the winner.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``. The proof asks for ``2 f + 2 < n``.
    convention : {"paper", "byzfl", "flower", "garfield", "garfield-native", "monna"}
        Which neighbours count. "paper", "garfield-native": q = n - f - 2, an error below 1.
        "flower": the same, but at least 1. "byzfl": q = n - f - 1, and scores are means.
        "garfield" (the Python version), "monna": q = n - f - 1 distances that are not squared.
    neighbours : int, optional
        q itself, 1 .. n - 1, instead of the convention's.
    squared : bool, optional
        Whether distances are squared, instead of the convention's.
    nonfinite, accumulate
        See `Rule`.

    Notes
    -----
    Weights choose nothing: clients of weight 0 are left out, the others are ranked alike. With a
    single neighbour (q = 1) two clients nearest to each other always tie, and the order of the call
    decides.
    A client that was left out as non-finite counts among the f bad ones.

    References
    ----------
    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    NeurIPS 2017.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import Krum
    >>> updates = np.float32([[1.0, 2.0], [1.1, 2.0], [0.9, 2.1], [1.0, 1.9], [90.0, -50.0]])
    >>> Krum(f=1)(updates)
    array([1., 2.], dtype=float32)
    """

    f: int = 0
    convention: str = "paper"
    neighbours: int | None = None
    squared: bool | None = None

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        return self._average(geometry, weights, self._scores(geometry, excluded), 1)


@dataclass(frozen=True)
class MultiKrum(_KrumRule):
    """Mean of the m updates with the lowest Krum scores.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``.
    m : int, optional
        Updates that are averaged, 1 .. n; by default those of the convention: n - f - 2 (paper,
        garfield, garfield-native), n - f (byzfl, monna), 1 (flower).
    convention, neighbours, squared
        See `Krum`.
    nonfinite, accumulate
        See `Rule`.

    Notes
    -----
    Weights choose nothing, but the mean over the chosen updates is weighted by them.

    References
    ----------
    Blanchard et al., NeurIPS 2017.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import MultiKrum
    >>> updates = np.float32([[1.0, 2.0], [1.2, 2.0], [0.8, 2.0], [1.0, 2.0], [90.0, -50.0]])
    >>> MultiKrum(f=1, m=4)(updates)
    array([1., 2.], dtype=float32)
    """

    f: int = 0
    m: int | None = None
    convention: str = "paper"
    neighbours: int | None = None
    squared: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m is not None:
            object.__setattr__(self, "m", whole("m", self.m, 1))

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        scores = self._scores(geometry, excluded)
        n = geometry.n
        fewer = CONVENTIONS[self.convention].fewer
        if self.m is not None:
            if self.m > n + excluded:
                raise InvalidInputError(
                    f"m: expected at most n = {n + excluded} updates, got {self.m}"
                )
            m = min(self.m, n)
        else:
            m = 1 if fewer is None else max(1, n - self._bad(n, excluded) - fewer)
        return self._average(geometry, weights, scores, m)

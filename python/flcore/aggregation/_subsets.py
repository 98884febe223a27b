"""Rules that choose whom to average from the geometry of the whole set: MDA, SMEA, CAF, NNA."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flcore.aggregation._checks import whole
from flcore.aggregation._decision import Decision
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._rule import Rule, check_choice
from flcore.aggregation._solvers.diameter import smallest_diameter
from flcore.aggregation._solvers.spread import filter_weights, least_spread_subset
from flcore.errors import InvalidInputError

__all__ = ["CAF", "MDA", "SMEA", "NearestNeighborAverage"]


def _mean_of(rows: np.ndarray, n: int, scores: np.ndarray | None = None) -> Decision:
    coefficients = np.zeros(n)
    coefficients[rows] = 1 / len(rows)
    return Decision(coefficients, scores=scores)


@dataclass(frozen=True)
class MDA(Rule):
    """Minimum diameter averaging: mean of the ``n - f`` updates whose largest distance is smallest.

    Exact, without listing subsets: the other f updates have to cover all pairs that are too far
    apart. Several subsets often share the smallest diameter; the first in the lexicographic order
    of the call is taken, so that this rule depends on the order of the clients.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``; 0 gives the mean.
    nonfinite, accumulate
        See `Rule`.

    Raises
    ------
    InvalidInputError
        Also when the search was given up, as its time is exponential in f in the worst case.

    References
    ----------
    El Mhamdi et al., "Genuinely Distributed Byzantine Machine Learning", PODC 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import MDA
    >>> MDA(f=1)(np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9]]))
    array([2.5, 3.5, 4.5], dtype=float32)
    """

    f: int = 0

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        n, call = geometry.n, np.argsort(geometry.index)
        f = self._bad(n, excluded)
        rows = smallest_diameter(geometry.distances[call[:, None], call], n - f)
        return _mean_of(np.sort(call[rows]), n)


@dataclass(frozen=True)
class SMEA(Rule):
    """Mean of the ``n - f`` updates whose covariance has the smallest top eigenvalue.

    Exact; of eigenvalues that agree to 1e-12, relative, the subset that is first in the
    lexicographic order of the call is taken.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``; 0 gives the mean.
    max_subsets : int
        Limit on the number of subsets, n over f; more are an error. 100,000 take some seconds at
        worst, when no update stands out.
    nonfinite, accumulate
        See `Rule`.

    References
    ----------
    Allouah et al., "On the Privacy-Robustness-Utility Trilemma in Distributed Learning", ICML 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import SMEA
    >>> SMEA(f=1)(np.float32([[1, 2], [1, 3], [2, 2], [50, -50]])).round(4)
    array([1.3333, 2.3333], dtype=float32)
    """

    f: int = 0
    max_subsets: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "max_subsets", whole("max_subsets", self.max_subsets, 1))

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        n, call = geometry.n, np.argsort(geometry.index)
        f = self._bad(n, excluded)
        if f == 0:
            return _mean_of(np.arange(n), n)
        rows, _ = least_spread_subset(geometry.frame[call[:, None], call], n - f, self.max_subsets)
        return _mean_of(np.sort(call[rows]), n)


@dataclass(frozen=True)
class CAF(Rule):
    """Covariance-bound agnostic filter: updates far along the widest direction lose weight.

    Repeats until the weights sum to ``n - 2 f``: find the direction of largest weighted variance,
    scale every weight by one minus the squared position along it, relative to the largest. The
    weighted mean of the step with the smallest variance wins.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``; 0 gives the mean.
    convention : {"paper", "byzfl"}
        Over which updates that largest position is taken. "paper": those that still have weight, so
        that one loses all of it in each step and 2 f steps suffice. "byzfl": all, which lets a
        removed update far out keep the others as they are (thousands of steps, an error after
        10,000); ByzFL itself adds a random direction for the eigenvector.
    nonfinite, accumulate
        See `Rule`.

    References
    ----------
    Allouah et al., "Towards Trustworthy Federated Learning with Untrusted Participants",
    ICML 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import CAF
    >>> CAF(f=1)(np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9]]))
    array([4., 5., 6.], dtype=float32)
    """

    f: int = 0
    convention: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("convention", self.convention, ("paper", "byzfl"))

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        n = geometry.n
        f = self._bad(n, excluded)
        if f == 0:
            return _mean_of(np.arange(n), n)
        removed_count = self.convention == "byzfl"
        return Decision(filter_weights(geometry.frame[:n, :n], f, removed_count=removed_count))


@dataclass(frozen=True)
class NearestNeighborAverage(Rule):
    """Mean of the updates nearest to one of them, itself included (NNA; MoNNA in ByzFL).

    Depends on the order of the clients through `pivot`; of updates at the same distance the first
    in the call is taken.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``.
    pivot : int
        Position in the call of the update that is trusted: the own model in decentralised learning.
    keep : int, optional
        Updates that are averaged, 1 .. n; by default ``n - f`` (all n were heard). A node that
        waits for n - f of n updates and averages the n - 2 f nearest passes that number.
    nonfinite, accumulate
        See `Rule`.

    References
    ----------
    Farhadkhani et al., "Robust Collaborative Learning with Linear Gradient Overhead", ICML 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import NearestNeighborAverage
    >>> received = np.float64([[1.0], [1.2], [0.6], [50.0]])
    >>> NearestNeighborAverage(f=1, keep=3)(received).round(4)
    array([0.9333])
    """

    f: int = 0
    pivot: int = 0
    keep: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pivot", whole("pivot", self.pivot, 0))
        if self.keep is not None:
            object.__setattr__(self, "keep", whole("keep", self.keep, 1))

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        n = geometry.n
        keep = n - self._bad(n, excluded)
        if self.keep is not None:
            if self.keep > n + excluded:
                raise InvalidInputError(
                    f"keep: expected at most n = {n + excluded} updates, got {self.keep}"
                )
            keep = min(self.keep, n)
        at = np.flatnonzero(geometry.index == self.pivot)
        if not len(at):
            raise InvalidInputError(
                f"pivot: expected the position of one of {n + excluded} updates that is finite, "
                f"got {self.pivot}"
            )
        away = geometry.distances[at[0]].copy()
        away[at[0]] = -1.0  # itself first, whoever lies on the same spot
        chosen = np.sort(geometry.order(away)[:keep])
        away[at[0]] = 0.0
        return _mean_of(chosen, n, np.sqrt(away))

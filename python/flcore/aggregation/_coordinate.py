"""Rules by coordinate: median, trimmed mean, MeaMed, Phocas. One read of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.aggregation._decision import Decision, Statistic
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._rule import Rule
from flcore.errors import InvalidInputError
from flcore.ops.select import MEDIANS

__all__ = ["MeaMed", "Median", "Phocas", "TrimmedMean"]


@dataclass(frozen=True)
class Median(Rule):
    """Median of every coordinate (Yin et al., ICML 2018).

    Parameters
    ----------
    even : {"average", "lower", "upper"}
        Median of an even number of clients: the mean of the two middle values (NumPy, ByzFL), the
        lower (torch.median) or the upper one (Garfield).

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import Median
    >>> Median()([np.float32([1, 5]), np.float32([2, 6]), np.float32([90, -7])])
    array([2., 5.], dtype=float32)
    """

    even: str = "average"
    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.even not in MEDIANS:
            raise InvalidInputError(f"even: expected one of {MEDIANS}, got {self.even!r}")

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        return Decision(statistic=Statistic("median", median=self.even))


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Mean of every coordinate without its `f` smallest and `f` largest values.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``; 0 gives the mean.

    References
    ----------
    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    ICML 2018.
    """

    f: int = 0
    needs: ClassVar[str] = "nothing"

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        return Decision(statistic=Statistic("trimmed_mean", f=self._bad(geometry.n, excluded)))


@dataclass(frozen=True)
class MeaMed(Rule):
    """Mean of the ``n - f`` values of every coordinate that are nearest to its median.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``; 0 gives the mean.
    even : {"average", "lower", "upper"}
        Median of an even number of clients; "lower" in the authors' code.

    References
    ----------
    Xie, Koyejo, Gupta, "Generalized Byzantine-tolerant SGD", arXiv 1802.10116.
    """

    f: int = 0
    even: str = "average"
    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.even not in MEDIANS:
            raise InvalidInputError(f"even: expected one of {MEDIANS}, got {self.even!r}")

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        f = self._bad(geometry.n, excluded)
        return Decision(
            statistic=Statistic("near_median", f=f, keep=geometry.n - f, median=self.even)
        )


@dataclass(frozen=True)
class Phocas(Rule):
    """Mean of the ``n - f`` values of every coordinate nearest to its trimmed mean.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``2 f < n``; also trimmed on each side for the centre.

    References
    ----------
    Xie, Koyejo, Gupta, "Phocas: dimensional Byzantine-resilient stochastic gradient descent",
    arXiv 1805.09682.
    """

    f: int = 0
    needs: ClassVar[str] = "nothing"

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        f = self._bad(geometry.n, excluded)
        return Decision(statistic=Statistic("near_trimmed", f=f, keep=geometry.n - f))

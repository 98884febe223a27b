"""Bulyan: Krum, repeated, then a trimmed mean about the median of every coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.aggregation._decision import Decision, Statistic
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._rule import Rule, check_choice
from flcore.aggregation._solvers.neighbours import krum_scores, repeated_krum
from flcore.errors import InvalidInputError
from flcore.ops.select import MEDIANS

__all__ = ["Bulyan"]


@dataclass(frozen=True)
class Bulyan(Rule):
    """Mean of the values nearest to the median, over updates that Krum selects.

    Krum picks ``n - 2 f`` updates one after the other, each from those that are left (with
    ``max(1, r - f - 2)`` neighbours among r). Then, in every coordinate, the ``n - 4 f`` of their
    values nearest to their median are averaged. This bounds what a client can do to one coordinate,
    which a distance over all of them does not see.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``n >= 4 f + 3``.
    iterative : bool
        False: take the ``n - 2 f`` lowest scores of a single Krum (``n - f - 2`` neighbours). A
        different rule, which some libraries call Bulyan.
    even : {"average", "lower", "upper"}
        Median of an even number of values, see `Median`.
    nonfinite, accumulate
        See `Rule`.

    Notes
    -----
    Depends on the order of the clients where `iterative`: in its last rounds the first phase counts
    one neighbour, two rows that are nearest to each other tie, and the lower position in the call
    wins.

    References
    ----------
    El Mhamdi, Guerraoui, Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium",
    ICML 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import Bulyan
    >>> rows = [[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5], [0.4, 0.6], [9, -9]]
    >>> Bulyan(f=1)(np.float64(rows)).round(4)
    array([0.3   , 0.3667])
    """

    f: int = 0
    iterative: bool = True
    even: str = "average"
    weighted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("iterative", self.iterative, (True, False))
        check_choice("even", self.even, MEDIANS)

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        n = geometry.n
        f = max(0, self.f - excluded)
        if n < 4 * f + 3:
            left_out = f" after {excluded} were left out" if excluded else ""
            raise InvalidInputError(
                f"f: Bulyan needs n >= 4 f + 3 updates, got f = {f} and n = {n}{left_out}"
            )
        scores = krum_scores(geometry.distances, n - f - 2)
        count = n - 2 * f
        if self.iterative:
            rows = repeated_krum(geometry.distances, geometry.index, f, count)
        else:
            rows = geometry.order(scores)[:count]
        selected = np.zeros(n, bool)
        selected[rows] = True
        statistic = Statistic("near_median", keep=count - 2 * f, median=self.even)
        return Decision(statistic=statistic, selected=selected, scores=scores)

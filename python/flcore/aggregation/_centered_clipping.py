"""Centred clipping: every update acts on a centre with a bounded length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.aggregation._checks import whole
from flcore.aggregation._decision import Decision
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._rule import Rule
from flcore.aggregation._solvers.centres import clip_about_centre
from flcore.errors import InvalidInputError

__all__ = ["CenteredClipping"]


@dataclass(frozen=True)
class CenteredClipping(Rule):
    r"""A centre, moved by the mean of the updates' differences to it, each clipped to a radius.

    :math:`v \leftarrow v + \sum_i p_i \min(1, \tau / \lVert x_i - v \rVert) (x_i - v)`, as often as
    `iterations` says. The centre is the argument ``center=`` of the call, by default the zero
    vector: with one iteration that is norm bounding. Each client moves the centre by
    :math:`p_i \tau` at most.

    The object keeps nothing between calls. To clip about the previous aggregate, pass it::

        rule, aggregate = CenteredClipping(radius=10.0), None
        for updates in rounds:
            aggregate = rule(updates, center=aggregate)

    Parameters
    ----------
    radius : float
        :math:`\tau \ge 0`; infinite gives the mean, 0 the centre.
    iterations : int
        At least 1; any number costs two reads of the data.
    nonfinite, accumulate
        See `Rule`.

    Notes
    -----
    Weights are example counts and :math:`p_i` their shares; all equal when not given. Integer
    layers get the mean of the clients' values, weighted by their part in the aggregate.

    References
    ----------
    Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021.
    Norm bounding: Sun et al., "Can You Really Backdoor Federated Learning?", arXiv 1911.07963.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import CenteredClipping
    >>> CenteredClipping(radius=5.0)([np.float32([3, 4]), np.float32([300, 400])])
    array([3., 4.], dtype=float32)
    """

    radius: float = 100.0
    iterations: int = 1
    weighted: ClassVar[bool] = True
    centred: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.radius, int | float | np.number)
        if not good or isinstance(self.radius, bool) or math.isnan(self.radius) or self.radius < 0:
            raise InvalidInputError(f"radius: expected a number >= 0, got {self.radius!r}")
        object.__setattr__(self, "iterations", whole("iterations", self.iterations, 1))

    def _needs(self) -> str:
        return "norms" if self.iterations == 1 else "distances"

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        n = geometry.n
        share = np.full(n, 1 / n) if weights is None else weights / weights.sum()
        frame = geometry.frame if self.iterations > 1 else geometry.squares
        combination, distances = clip_about_centre(
            frame, share, float(self.radius), self.iterations, np.sqrt(geometry.norms)
        )
        return Decision(combination, scores=distances)

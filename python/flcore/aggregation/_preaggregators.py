"""Pre-aggregators: linear operations on the rows before a rule, which are never carried out alone.

``NNM(f=3) >> TrimmedMean(f=3)`` is a rule. The matrix of a pre-aggregator acts on the distances and
is multiplied into the last read of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.aggregation._checks import number, whole
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._rule import PreAggregator
from flcore.aggregation._solvers.neighbours import nearest
from flcore.errors import InvalidInputError
from flcore.ops.rng import random_bits

__all__ = ["ARC", "NNM", "Bucketing", "Clipping"]


@dataclass(frozen=True)
class NNM(PreAggregator):
    """Nearest neighbour mixing: every update becomes the mean of the ``n - f`` nearest to it.

    Itself included; of updates at the same distance the first in the call is taken. Takes out what
    makes honest clients differ, before a rule that would take differences for attacks.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``f < n``; 0 makes every update the mean.

    References
    ----------
    Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity",
    AISTATS 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import NNM, TrimmedMean
    >>> (NNM(f=1) >> TrimmedMean(f=1))(np.float32([[1], [2], [3], [4], [90]]))
    array([2.5], dtype=float32)
    """

    f: int = 0
    needs: ClassVar[str] = "distances"

    def _matrix(self, geometry: Geometry, excluded: int) -> np.ndarray:
        n = geometry.n
        f = max(0, self.f - excluded)
        if f >= n:
            raise InvalidInputError(f"f: NNM needs f < n, got f = {f} and n = {n} updates")
        matrix = np.zeros((n, n))
        rows = nearest(geometry.distances, geometry.index, n - f)
        np.put_along_axis(matrix, rows, 1 / (n - f), axis=1)
        return matrix


@dataclass(frozen=True)
class Bucketing(PreAggregator):
    """Means of random buckets of `s` updates each; the last one may be smaller.

    A rule after it sees ``ceil(n / s)`` rows, of which up to f are bad: it keeps its `f`, and needs
    ``2 f < ceil(n / s)``. Depends on the order of the clients, by its nature.

    Parameters
    ----------
    s : int
        Updates a bucket, at least 1.
    seed : int
        Of the permutation; use another one in every round. The same on every machine.
    permutation : sequence of int, optional
        Positions in the call, cut into buckets in this order, instead of a random one. Clients that
        are left out (weight 0, not finite) are passed over.

    References
    ----------
    Karimireddy, He, Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing",
    ICLR 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import Bucketing, Median
    >>> rule = Bucketing(2, permutation=[0, 1, 2, 3, 4]) >> Median()
    >>> rule(np.float32([[1], [3], [4], [6], [90]]))  # means 2, 5 and 90
    array([5.], dtype=float32)
    """

    s: int = 1
    seed: int = 0
    permutation: tuple[int, ...] | None = None
    renames: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "s", whole("s", self.s, 1))
        object.__setattr__(self, "seed", whole("seed", self.seed, 0, 2**64 - 1))
        if self.permutation is not None:
            order = tuple(whole("permutation", i, 0) for i in self.permutation)
            if sorted(order) != list(range(len(order))):
                raise InvalidInputError(
                    f"permutation: expected each of 0 .. {len(order) - 1} once, got {order}"
                )
            object.__setattr__(self, "permutation", order)

    def _matrix(self, geometry: Geometry, excluded: int) -> np.ndarray:
        n = geometry.n
        in_call = np.argsort(geometry.index)
        if self.permutation is None:
            bits = random_bits(2 * n, self.seed).astype(np.uint64)
            rows = in_call[np.argsort(bits[::2] << np.uint64(32) | bits[1::2], kind="stable")]
        elif len(self.permutation) <= int(geometry.index.max()):
            raise InvalidInputError(
                f"permutation: expected the positions of all updates, got {len(self.permutation)}"
            )
        else:
            row_of = {int(i): row for row, i in enumerate(geometry.index)}
            rows = np.array([row_of[i] for i in self.permutation if i in row_of])
        matrix = np.zeros((-(-n // self.s), n))
        for bucket, row in enumerate(matrix):
            members = rows[bucket * self.s : (bucket + 1) * self.s]
            row[members] = 1 / len(members)
        return matrix


@dataclass(frozen=True)
class Clipping(PreAggregator):
    """Scales updates down to an L2 norm of at most `c`; an update is never written to.

    Parameters
    ----------
    c : float
        Positive.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import Clipping, Mean
    >>> (Clipping(5.0) >> Mean())([np.float32([3, 4]), np.float32([300, 400])])
    array([3., 4.], dtype=float32)
    """

    c: float = 2.0
    needs: ClassVar[str] = "norms"
    keeps_weights: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "c", number("c", self.c, 0, open="low"))

    def _matrix(self, geometry: Geometry, excluded: int) -> np.ndarray:
        return _clip(np.sqrt(geometry.norms), self.c)


@dataclass(frozen=True)
class ARC(PreAggregator):
    """Adaptive robust clipping: the ``floor(2 f (n - f) / n)`` longest updates lose their lead.

    They are scaled down to the longest norm among the others.

    Parameters
    ----------
    f : int
        Clients assumed bad, ``f <= n``; 0 changes nothing.

    References
    ----------
    Allouah et al., "Adaptive Gradient Clipping for Robust Federated Learning", arXiv 2405.14432.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import ARC, Mean
    >>> (ARC(f=1) >> Mean())([np.float32([3, 4]), np.float32([0, 5]), np.float32([300, 400])])
    array([2.       , 4.3333335], dtype=float32)
    """

    f: int = 0
    needs: ClassVar[str] = "norms"
    keeps_weights: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True

    def _matrix(self, geometry: Geometry, excluded: int) -> np.ndarray:
        n = geometry.n
        f = max(0, self.f - excluded)
        if f > n:
            raise InvalidInputError(f"f: ARC needs f <= n, got f = {f} and n = {n} updates")
        clipped = 2 * f * (n - f) // n
        norms = np.sqrt(geometry.norms)
        return _clip(norms, float(np.sort(norms)[n - clipped - 1]))


def _clip(norms: np.ndarray, limit: float) -> np.ndarray:
    """Diagonal matrix that scales rows down to a length of `limit`."""
    scale = np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)
    return np.diag(scale)

"""Rules on principal directions: the flag aggregator and principal gradients by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.aggregation._checks import number, vector, whole
from flcore.aggregation._decision import Decision
from flcore.aggregation._geometry import Geometry
from flcore.aggregation._rule import Rule, check_choice
from flcore.aggregation._solvers.subspace import (
    flag_coefficients,
    principal_coefficients,
    unit_products,
)
from flcore.errors import InvalidInputError

__all__ = ["FlagAggregator", "PrincipalGradient"]


@dataclass(frozen=True)
class FlagAggregator(Rule):
    r"""Projection of the unit updates on a subspace that reconstructs most of them.

    With :math:`x_i = g_i / \lVert g_i \rVert` and Y the basis of the subspace, the result is
    :math:`\frac{1}{r} \sum_i Y Y^T x_i`. Y minimises :math:`\sum_i \sqrt{1 - \lVert Y^T x_i
    \rVert^2}` by reweighted principal components. Lengths of updates do not count, so that a large
    one has no more say than a small one. Two reads of the data for any number of iterations.

    Parameters
    ----------
    dim : int, optional
        r, at least 1; by default ``(n + 1) // 2``, the authors' choice.
    iterations : int
        1 is what the authors' code does: principal components of the unit updates, for
        `pairwise` = 0. 5 to 20 find the flag median.
    pairwise : float
        Weight of the same objective over all differences of two updates.
    start : (n, r) array, optional
        Inner products of the unit updates with the columns of the first Y, in the order of the
        call. Without it all updates start with the same weight, as random directions would give
        them in high dimension.
    rescale : {"none", "mean-norm", "median-norm"}
        "none": equal updates of direction e give ``n / r * e``, the authors' scale, left to the
        learning rate. The others multiply by ``r / n`` times the mean or the median length, so that
        equal updates come out as they are; one client can blow up the mean length.
    nonfinite, accumulate
        See `Rule`.

    Notes
    -----
    Zero updates have no direction and no weight. On isotropic noise this is no better than the mean
    of unit updates; it helps when noise or attacks have structure. The result jumps where the r-th
    and the next singular value cross. Integer layers get the plain mean.

    References
    ----------
    Almasi et al., "Flag Aggregator: Scalable Distributed Training under Failures and Augmented
    Losses using Convex Optimization", ICLR 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import FlagAggregator
    >>> FlagAggregator(dim=1)([np.float32([3, 4])] * 5).round(4)
    array([3., 4.], dtype=float32)
    """

    dim: int | None = None
    iterations: int = 1
    pairwise: float = 0.0
    start: Any = None
    rescale: str = "none"
    needs: ClassVar[str] = "products"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim is not None:
            object.__setattr__(self, "dim", whole("dim", self.dim, 1))
        object.__setattr__(self, "iterations", whole("iterations", self.iterations, 1))
        object.__setattr__(self, "pairwise", number("pairwise", self.pairwise, 0))
        if self.start is not None:
            rows = vector("start", self.start, (None, None)).tolist()
            object.__setattr__(self, "start", tuple(map(tuple, rows)))  # can be compared
        check_choice("rescale", self.rescale, ("none", "mean-norm", "median-norm"))

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        n = geometry.n
        r = (n + 1) // 2 if self.dim is None else self.dim
        unit, lengths = unit_products(geometry.products)
        start = None
        if self.start is not None:
            start = np.array(self.start)
            if len(start) <= geometry.index.max():
                raise InvalidInputError(
                    f"start: expected a row for each of the updates, got shape {start.shape}"
                )
            start = start[geometry.index]
        coefficients, ratios, _ = flag_coefficients(unit, r, self.iterations, self.pairwise, start)
        scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        if self.rescale != "none":
            typical = lengths.mean() if self.rescale == "mean-norm" else np.median(lengths)
            scale *= r / n * typical
        return Decision(
            coefficients * scale, shares=np.ones(n), selected=lengths > 0, scores=1 - ratios
        )


@dataclass(frozen=True)
class PrincipalGradient(Rule):
    """Updates replaced by their principal directions, layer by layer: the server step of FedLD.

    In every floating layer each client's update becomes a sum over the principal directions of all
    clients' updates, with its own length times the direction's share of the variance; directions
    that few clients agree on shrink. Layers with one element, and those in `plain`, get the mean.
    The authors take the plain mean in the first round.

    Parameters
    ----------
    keep : float
        ``int(n * keep)`` directions stay, 0 < keep <= 1.
    plain : sequence, optional
        Keys (of a dict) or positions (of a list) of layers that get the mean: statistics of batch
        normalisation, for instance.
    nonfinite, accumulate
        See `Rule`.

    Notes
    -----
    Directions without variance are left out (with more directions than the rank of the updates the
    authors' code divides 0 by 0). The result jumps where two variances cross.

    References
    ----------
    Zeng et al., "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
    MICCAI 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import PrincipalGradient
    >>> PrincipalGradient()(np.float64([[1, 0, 0.5], [0.2, 1, 0], [1, 0.8, 1]])).round(4)
    array([0.6477, 0.5712, 0.5059])
    """

    keep: float = 0.8
    plain: tuple[Any, ...] = ()
    needs: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", number("keep", self.keep, 0, 1, open="low"))
        if isinstance(self.plain, str) or not hasattr(self.plain, "__iter__"):
            raise InvalidInputError(f"plain: expected a list of layers, got {self.plain!r}")
        object.__setattr__(self, "plain", tuple(self.plain))

    def _decide(self, geometry: Geometry, weights: np.ndarray | None, excluded: int) -> Decision:
        layers = geometry.layers
        assert layers is not None
        unknown = [key for key in self.plain if key not in layers.names]
        if unknown:
            raise InvalidInputError(f"plain: no such layers in the updates: {unknown}")
        n = geometry.n
        # float32 sums leave noise of this order where an entry is exactly zero
        zero = 1e-6 if geometry.accuracy > 2.0**-50 else 1e-12
        shares = [
            np.full(n, 1 / n)
            if size <= 1 or key in self.plain
            else principal_coefficients(products, self.keep, zero)
            for key, size, products in zip(layers.keys, layers.sizes, layers.products, strict=True)
        ]
        return Decision(by_layer=np.array(shares).reshape(-1, n))

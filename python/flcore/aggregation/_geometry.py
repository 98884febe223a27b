"""The n x n problem behind most robust rules: distances and inner products of the client rows.

Everything in here is float64 on matrices of n clients; the vectors themselves are not touched. Sums
over clients are those of `numpy.einsum` and `numpy.sum`, whose order does not depend on the number
of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

__all__ = ["Geometry", "LayerProducts"]

# A row this far out, in units of the spread of the others and times the accuracy of the distances,
# is known too coarsely from its distances alone.
COARSE = 2.0**-14


@dataclass(frozen=True)
class LayerProducts:
    """Inner products of the rows, a matrix for every floating layer.

    Attributes
    ----------
    products : (L, n, n) float64
    keys : tuple
        Name of each layer in the update: dict key or position; None for a single array.
    sizes : tuple of int
        Number of elements.
    names : tuple
        Names of all layers, integer ones too.
    """

    products: np.ndarray
    keys: tuple
    sizes: tuple[int, ...]
    names: tuple


@dataclass(frozen=True)
class Geometry:
    """n rows and an origin, known by their squared distances.

    Attributes
    ----------
    squares : (n + 1, n + 1) float64
        Squared Euclidean distances, symmetric, finite, zero diagonal. The last point is the origin:
        the zero vector, or the centre a rule was given. A part that no rule asked for is NaN.
    index : (n,) int
        Position of each row in the user's call: ties go to the lowest.
    inner : (n + 1, n + 1) float64, optional
        Inner products about the zero vector, of rows and origin.
    layers : LayerProducts, optional
        Inner products by layer.
    accuracy : float
        Relative error of `squares`, about.
    """

    squares: np.ndarray
    index: np.ndarray
    inner: np.ndarray | None = None
    layers: LayerProducts | None = None
    accuracy: float = 2.0**-53
    _frame: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        distances: np.ndarray | None,
        norms: np.ndarray,
        inner: np.ndarray | None = None,
        layers: LayerProducts | None = None,
        accuracy: float = 2.0**-53,
    ) -> Geometry:
        """Geometry about the zero vector of rows in the order of the call.

        `distances` (n, n) and `inner` (n, n) may be unknown.
        """
        n = len(norms)
        squares = np.full((n + 1, n + 1), np.nan)
        if distances is not None:
            squares[:n, :n] = distances
        squares[n, :n] = squares[:n, n] = norms
        np.fill_diagonal(squares, 0.0)
        padded = None if inner is None else np.pad(inner, (0, 1))
        return cls(squares, np.arange(n), padded, layers, accuracy)

    @property
    def n(self) -> int:
        """Number of rows, the origin not counted."""
        return len(self.index)

    @property
    def distances(self) -> np.ndarray:
        """Squared distances among the rows, (n, n)."""
        return self.squares[:-1, :-1]

    @property
    def norms(self) -> np.ndarray:
        """Squared distances to the origin, (n,)."""
        return self.squares[-1, :-1]

    @property
    def products(self) -> np.ndarray:
        """Inner products about the zero vector, (n, n)."""
        assert self.inner is not None
        return self.inner[:-1, :-1]

    # ---- what linear algebra needs -----------------------------------------------------------

    @cached_property
    def _core(self) -> int:
        """The row with the smallest median distance to the rows: one in their midst."""
        return int(np.argmin(np.median(self.distances, axis=1)))

    @property
    def midst(self) -> np.ndarray:
        """The ``n // 2 + 1`` rows nearest to the row in their midst, ascending."""
        return np.sort(self.order(self.distances[self._core])[: self.n // 2 + 1])

    @property
    def spread(self) -> float:
        """Median distance to the row in their midst: near rows outvote far ones."""
        return float(np.sqrt(np.median(self.distances[self._core])))

    @cached_property
    def far(self) -> np.ndarray:
        """Rows (n,) bool whose position among the others their distances do not tell.

        A row that is R spreads out has squared distances R^2 with errors accuracy R^2, and enters a
        combination with a weight of about 1 / R (Weiszfeld steps, clipping): what is left of it is
        wrong by accuracy * R, without a limit on R. Inner products about the zero vector are wrong
        by accuracy * R only, and leave accuracy.
        """
        away = np.sqrt(self.distances[self._core])
        return self.accuracy * away > COARSE * self.spread

    @cached_property
    def frame(self) -> np.ndarray:
        """Inner products (n + 1, n + 1) of rows and origin about a row in their midst.

        An affine combination with weights w (n + 1,) has the squared distance
        ``G_ii - 2 (G w)_i + w^T G w`` to row i. About that row the products are of the size of
        the spread, so that a common offset costs no digits.
        """
        if self._frame is not None:
            return self._frame
        away = self.squares[self._core]
        frame = (away[:, None] + away[None, :] - self.squares) / 2
        if self.inner is not None:
            toward = self.inner[self._core]
            direct = self.inner - toward[:, None] - toward[None, :] + toward[self._core]
            far = np.append(self.far, False)
            use = far[:, None] | far[None, :]
            np.fill_diagonal(use, False)
            frame = np.where(use, direct, frame)
            frame[self._core] = frame[:, self._core] = 0.0
        return frame

    # ---- order -------------------------------------------------------------------------------

    def take(self, rows: np.ndarray) -> Geometry:
        """Geometry of some of the rows, in the order given."""
        points = np.append(rows, self.n)
        layers = self.layers
        if layers is not None:
            layers = replace(layers, products=layers.products[:, rows[:, None], rows])
        return Geometry(
            self.squares[points[:, None], points],
            self.index[rows],
            None if self.inner is None else self.inner[points[:, None], points],
            layers,
            self.accuracy,
        )

    def canonical(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Order of the rows that does not depend on the order of the call.

        By norm, then by the sorted distances to the others (or inner products, if only those are
        known), then by the weight of the client. Sums over clients that run in this order have the
        same bits for any permutation of the clients; rows that tie in all of that are equal, or lie
        in exact symmetry.
        """
        if len(np.unique(self.norms)) == self.n:
            return np.argsort(self.norms)
        known = self.inner if self.inner is not None and np.isnan(self.squares).any() else None
        near = np.sort((self.squares if known is None else known)[:-1], axis=1)
        ties = (self.index,) if weights is None else (self.index, weights)
        return np.lexsort((*ties, *near.T[::-1], self.norms))

    def order(self, scores: np.ndarray) -> np.ndarray:
        """Rows from the lowest score up; of equal scores the lowest position comes first."""
        return np.lexsort((self.index, scores))

    # ---- rows that replace these -------------------------------------------------------------

    def renamed(self, index: np.ndarray) -> Geometry:
        """Return the same rows with other positions in the call."""
        return replace(self, index=index.copy())

    def mixed(self, matrix: np.ndarray, *, renames: bool = False) -> Geometry:
        """Geometry of the rows ``matrix @ x``, for an (m, n) matrix.

        `renames` says that row i is no longer about client i. Rows are affine combinations of
        rows and origin; a row that stays as it is keeps its distances exactly.
        """
        m, n = matrix.shape
        index = np.arange(m) if renames else self.index
        if m == n and (matrix == np.eye(n)).all():
            return replace(self, index=index)
        weights = np.zeros((m + 1, n + 1))
        weights[:m, :n] = matrix
        rest = 1.0 - matrix.sum(axis=1)
        weights[:m, n] = np.where(np.abs(rest) < 1e-13, 0.0, rest)
        weights[m, n] = 1.0
        diagonal = m == n and not matrix[~np.eye(n, dtype=bool)].any()
        squares = np.full((m + 1, m + 1), np.nan)
        frame = None
        if not np.isnan(self.squares).any():
            frame = sandwich(weights, self.frame)
            about = np.diagonal(frame)
            squares = np.maximum(about[:, None] + about[None, :] - 2 * frame, 0.0)
        if diagonal:
            squares[m, :m] = squares[:m, m] = np.diagonal(matrix) ** 2 * self.norms
            kept = np.append(np.diagonal(matrix) == 1.0, True)
            squares = np.where(kept[:, None] & kept[None, :], self.squares, squares)
        np.fill_diagonal(squares, 0.0)
        inner = layers = None
        if self.inner is not None:
            inner = sandwich(weights, self.inner)
        if self.layers is not None:
            products = np.stack([sandwich(matrix, p) for p in self.layers.products])
            layers = replace(self.layers, products=products)
        return Geometry(squares, index, inner, layers, self.accuracy, frame)


def sandwich(weights: np.ndarray, form: np.ndarray) -> np.ndarray:
    """Return ``weights @ form @ weights.T``, symmetric, equal rows of weights giving equal rows."""
    half = np.einsum("ai,ij->aj", weights, form)
    full = np.einsum("aj,bj->ab", half, weights)
    return (full + full.T) / 2

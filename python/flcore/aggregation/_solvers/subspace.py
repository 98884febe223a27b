"""Principal directions of the client rows: the flag median, and projected gradients.

Everything follows from the n x n inner products K of the rows; directions are combinations of rows.
"""

from __future__ import annotations

import numpy as np

__all__ = ["flag_coefficients", "principal_coefficients", "unit_products"]

FLOOR = 1e-7  # in the weights of the flag median: keeps them finite for rows inside the subspace
CUT = 1e-12  # eigenvalues of K below this, relative to the largest, are taken as zero


def unit_products(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the inner products (n, n) of rows scaled to length one, and the lengths (n,).

    Rows of length zero stay zero.
    """
    lengths = np.sqrt(np.maximum(np.diagonal(products), 0.0))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    unit = products * scale[:, None] * scale[None, :]
    np.fill_diagonal(unit, lengths > 0)
    return unit, lengths


def flag_coefficients(
    unit: np.ndarray,
    dim: int,
    iterations: int,
    pairwise: float = 0.0,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Subspace that reconstructs most unit rows well, by reweighted principal components.

    Minimises ``F(Y) = sum_i sqrt(1 - ||Y^T x_i||^2)``, plus ``pairwise / (p (p - 1))`` times the
    same over all differences, over Y with `dim` orthonormal columns, and returns the projection
    ``(1 / dim) sum_i Y Y^T x_i`` as a combination of the rows (Almasi et al., ICLR 2024). Each
    iteration weights rows and differences by ``w = (|1 - ratio| + 1e-7)^(-1/4)`` and takes the top
    left singular vectors Y of the weighted columns: with S the weights as a quadratic form on the
    rows, ``Y^T X = V^T K^(1/2)`` for the top eigenvectors V of ``K^(1/2) S K^(1/2)``.

    Parameters
    ----------
    unit : (n, n) float64
        Inner products of rows of length one or zero.
    dim, iterations : int
        At least 1. The iterations end early when F falls by less than 1e-10.
    pairwise : float
        Not negative.
    start : (n, r) float64, optional
        ``x_i^T Y`` for the first Y; zeros if not given (every row then has the same weight).

    Returns
    -------
    coefficients : (n,) float64
    ratios : (n,) float64
        ``||Y^T x_i||^2``, in [0, 1].
    objectives : list of float
        F at the start and after each iteration.
    """
    n = len(unit)
    present = np.diagonal(unit) > 0
    values, vectors = np.linalg.eigh(unit)
    kept = values > CUT * max(values[-1], 0.0)
    values, vectors = values[kept], vectors[:, kept]
    if not len(values):
        return np.zeros(n), np.zeros(n), [0.0]
    half = vectors * np.sqrt(values)  # K^(1/2) = half @ vectors.T; V is given in these coordinates
    pairs = present[:, None] & present[None, :] & ~np.eye(n, dtype=bool)
    share = pairwise / max(int(pairs.sum()), 1)

    def ratios_of(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = (p**2).sum(axis=1)
        between = ((p[:, None, :] - p[None, :, :]) ** 2).sum(axis=2) if pairwise else pairs * 0.0
        return own, between

    def objective(own: np.ndarray, between: np.ndarray) -> float:
        of_rows = np.sqrt(np.abs(1 - own))[present].sum()
        return float(of_rows + share * np.sqrt(np.abs(1 - between))[pairs].sum())

    p = np.zeros((n, dim)) if start is None else start
    own, between = ratios_of(p)
    objectives = [objective(own, between)]
    best: np.ndarray | None = None
    for _ in range(iterations):
        of_rows = np.where(present, 1 / np.sqrt(np.abs(1 - own) + FLOOR), 0.0)
        # each ordered pair: w^2 on both ends and -w^2 between them
        of_pairs = np.where(pairs, share**2 / np.sqrt(np.abs(1 - between) + FLOOR), 0.0)
        of_pairs = of_pairs + of_pairs.T
        weights = np.diag(of_rows + of_pairs.sum(axis=1)) - of_pairs
        inner = np.einsum("ia,ib->ab", half, np.einsum("ij,jb->ib", weights, half))
        top = np.linalg.eigh((inner + inner.T) / 2)[1][:, ::-1][:, :dim]
        p = np.einsum("ia,ar->ir", half, top)
        own, between = ratios_of(p)
        objectives.append(objective(own, between))
        if best is not None and objectives[-1] >= objectives[-2]:
            break
        best = top
        if objectives[-2] - objectives[-1] < 1e-10 or objectives[-1] < 1e-10:
            break
    assert best is not None
    along = np.einsum("ar,r->a", best, np.einsum("ia,ar->r", half, best))
    coefficients = np.einsum("ia,a->i", vectors / np.sqrt(values), along) / dim
    ratios = np.minimum((np.einsum("ia,ar->ir", half, best) ** 2).sum(axis=1), 1.0)
    return coefficients, ratios, objectives


def principal_coefficients(products: np.ndarray, keep: float, zero: float = 1e-12) -> np.ndarray:
    """Coefficients of the rows in FedLD's update of one tensor.

    Each row is replaced by its projections on the first ``int(n keep)`` principal directions
    ``v_j = G^T e_j`` of the set, the one on v_j with the length ``||g_i|| s_j / sum s``; the update
    is their mean. With ``G G^T / n = E diag(s) E^T`` it is ``sum_i alpha_i g_i``,
    ``alpha = sum_j (s_j / sum s) / sqrt(n s_j) (1/n) sum_i ||g_i|| sign(E_ij) e_j``
    (Zeng et al., MICCAI 2024).

    Parameters
    ----------
    products : (n, n) float64
        Inner products about the zero vector.
    keep : float
        Part of the directions that is kept, in (0, 1].
    zero : float
        Entries of unit eigenvectors up to this size have the sign 0.

    Returns
    -------
    (n,) float64
        1 / n for all when no direction is kept or all rows are zero. Directions with
        ``s_j <= 1e-10 s_1`` are left out.
    """
    n = len(products)
    values, vectors = np.linalg.eigh(products / n)
    values, vectors = values[::-1][: int(n * keep)], vectors[:, ::-1][:, : int(n * keep)]
    total = np.trace(products) / n
    if not len(values) or total <= 0:
        return np.full(n, 1 / n)
    kept = values > 1e-10 * values[0]
    values, vectors = values[kept], vectors[:, kept]
    lengths = np.sqrt(np.maximum(np.diagonal(products), 0.0))
    signs = np.where(np.abs(vectors) > zero, np.sign(vectors), 0.0)
    mean = np.einsum("i,ij->j", lengths, signs) / n
    return np.einsum("ij,j->i", vectors, values / total / np.sqrt(n * values) * mean)

"""Matrices of fixed classifiers: unit vectors, one a class, as far apart as they can be.

Made once, in float64 on the CPU, from a seed, and rounded once. The simplex in C - 1 dimensions and
the sparse frame have closed forms and are the same bits everywhere; the dense frame and the
equiangular vectors go through matrix products, so that machines with different BLAS libraries agree
to rounding in float64: make them once and send them where equality of bits is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.errors import FlcoreError, InvalidInputError

__all__ = [
    "d_simplex",
    "equiangular_basis_vectors",
    "simplex_etf",
    "sparse_frame",
    "welch_bound",
]


def simplex_etf(classes: int, features: int, *, seed: int = 0) -> np.ndarray:
    r"""Simplex equiangular tight frame ``M = sqrt(C / (C - 1)) U (I - 1 1^T / C)``.

    Parameters
    ----------
    classes, features : int
        C >= 2 vectors of d >= C dimensions.
    seed : int
        Of the uniform [0, 1) matrix whose QR factor is U.

    Returns
    -------
    (features, classes) float64 array
        Columns of length 1 that sum to 0, with cosine ``-1 / (C - 1)`` for every pair.

    Raises
    ------
    InvalidInputError
        Fewer than 2 classes, or fewer features than classes (`d_simplex` needs C - 1,
        `equiangular_basis_vectors` any number).

    References
    ----------
    Yang et al., "Inducing Neural Collapse in Imbalanced Learning", NeurIPS 2022; Li et al., "No
    Fear of Classifier Biases", ICCV 2023, arXiv 2303.10058.
    """
    _check(classes, features, classes, "a simplex frame")
    u, _ = np.linalg.qr(np.random.default_rng(seed).random((features, classes)))
    return math.sqrt(classes / (classes - 1)) * (u - u.mean(1, keepdims=True))


def sparse_frame(classes: int, features: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Simplex frame whose U has one entry a feature: the class of each feature, and its sign.

    Every class owns ``floor(features / classes)`` features, drawn at random; the rest own none.

    Parameters
    ----------
    classes, features : int
        C >= 2 and d >= C.
    seed : int
        Of the features' order and signs.

    Returns
    -------
    owner : (features,) int64 array
        Class of each feature, or -1.
    sign : (features,) int8 array
        1 or -1; 0 without a class.

    Raises
    ------
    InvalidInputError
        As `simplex_etf`.
    """
    _check(classes, features, classes, "a simplex frame")
    rng = np.random.default_rng(seed)
    each = features // classes
    order = rng.permutation(features)[: each * classes]
    owner = np.full(features, -1, np.int64)
    owner[order] = np.repeat(np.arange(classes), each)
    sign = np.where(rng.random(features) < 0.5, -1, 1).astype(np.int8)
    sign[owner < 0] = 0
    return owner, sign


def d_simplex(classes: int) -> np.ndarray:
    """Regular simplex: C unit vectors in C - 1 dimensions, without a random choice.

    Parameters
    ----------
    classes : int
        At least 2.

    Returns
    -------
    (classes, classes - 1) float64 array
        Rows of length 1 with cosine ``-1 / (C - 1)`` for every pair.

    Raises
    ------
    InvalidInputError
        Fewer than 2 classes.

    References
    ----------
    Pernici et al., "Regular Polytope Networks", 2021; Biondi et al., "Stationary Representations",
    CVPR 2024, arXiv 2405.02581.

    Examples
    --------
    >>> from flcore.nn import d_simplex
    >>> d_simplex(3).round(4)
    array([[ 0.9659, -0.2588],
           [-0.2588,  0.9659],
           [-0.7071, -0.7071]])
    """
    _check(classes, classes - 1, classes - 1, "a simplex")
    last, mean, length = simplex_numbers(classes)
    rows = np.vstack([np.eye(classes - 1), np.full(classes - 1, last)])
    return (rows - mean) / length


def simplex_numbers(classes: int) -> tuple[float, float, float]:
    """Entry a of the last row, the mean that is taken off, and the length that is divided by."""
    last = -1 / (1 + math.sqrt(classes))  # (1 - sqrt(C)) / (C - 1) without a cancellation
    mean = (1 + last) / classes
    return last, mean, math.sqrt((1 - mean) ** 2 + (classes - 2) * mean**2)


def welch_bound(classes: int, features: int) -> float:
    """Smallest largest |cosine| that `classes` vectors in `features` dimensions can have.

    ``sqrt((C - d) / (d (C - 1)))``, and 0 for d >= C (Welch, 1974).

    Examples
    --------
    >>> from flcore.nn import welch_bound
    >>> round(welch_bound(1000, 100), 5)
    0.09492
    """
    if features >= classes:
        return 0.0
    return math.sqrt((classes - features) / (features * (classes - 1)))


def equiangular_basis_vectors(
    classes: int,
    features: int,
    alpha: float,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    steps: int = 100_000,
    slice_rows: int = 130,
    progress: Callable[[int, float], None] | None = None,
) -> np.ndarray:
    """Unit vectors whose cosines all lie within ``[-alpha, alpha]``, found by gradient descent.

    Minimises ``sum_{i != j} max(|b_i . b_j| - alpha, 0)`` over unit vectors, a slice of rows at a
    time: ``slice_rows * classes`` float64 numbers of memory.

    Parameters
    ----------
    classes, features : int
        Number of vectors C and their dimension d, which may be below C.
    alpha : float
        Largest |cosine|; not below `welch_bound`.
    seed : int
        Of the normal vectors it starts from.
    lr : float
        Step size.
    steps : int
        Most steps; each takes ``4 C^2 d`` operations.
    slice_rows : int
        Rows of cosines in memory at once.
    progress : callable, optional
        ``progress(step, largest |cosine|)``, called after each step.

    Returns
    -------
    (classes, features) float64 array
        Rows of length 1 with cosines of at most ``alpha + 1e-4``.

    Raises
    ------
    InvalidInputError
        An `alpha` that no set of vectors can reach.
    FlcoreError
        `steps` were not enough; the message says how far they got.

    References
    ----------
    Shen, Sun and Wei, "Equiangular Basis Vectors", CVPR 2023.
    """
    _check(classes, features, 1, "equiangular vectors")
    bound = welch_bound(classes, features)
    if not bound <= alpha < 1:
        raise InvalidInputError(
            f"alpha: {classes} vectors in {features} dimensions have a cosine of {bound:.5f} or "
            f"more (Welch bound); expected alpha from there to 1, got {alpha!r}"
        )
    b = np.random.default_rng(seed).standard_normal((classes, features))
    largest = math.inf
    for step in range(steps + 1):
        b /= np.linalg.norm(b, axis=1, keepdims=True)
        slope = np.zeros_like(b)
        largest = 0.0
        for first in range(0, classes, slice_rows):
            part = b[first : first + slice_rows]
            cosines = part @ b.T
            cosines[np.arange(len(part)), first + np.arange(len(part))] = 0
            size = np.abs(cosines)
            largest = max(largest, float(size.max()))
            active = np.where(size > alpha, np.sign(cosines), 0)
            slope[first : first + slice_rows] += active @ b
            slope += active.T @ part
        if progress is not None:
            progress(step, largest)
        if largest <= alpha + 1e-4:
            return b
        b -= lr * slope
    raise FlcoreError(
        f"alpha: the largest cosine is {largest:.5f} after {steps} steps, asked for {alpha}; "
        f"allow more steps, another lr, or a larger alpha (the bound is {bound:.5f})"
    )


def _check(classes: Any, features: Any, needed: int, what: str) -> None:
    if classes < 2:
        raise InvalidInputError(f"classes: expected at least 2, got {classes!r}")
    if features < max(needed, 1):
        raise InvalidInputError(
            f"features: {what} of {classes} classes needs at least {max(needed, 1)}, got {features}"
        )

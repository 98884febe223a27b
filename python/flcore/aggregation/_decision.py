"""What a rule decides about the clients, and what a user is told about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Decision", "Diagnosis", "Statistic"]


@dataclass(frozen=True)
class Statistic:
    """An order statistic of every coordinate, see `flcore.ops.select`."""

    op: str
    f: int = 0
    keep: int | None = None
    median: str = "average"


@dataclass(frozen=True)
class Decision:
    """What a rule made of the n rows it saw: one of the first three, and why.

    Attributes
    ----------
    coefficients : (n,) float64, optional
        The aggregate is ``sum_i coefficients[i] x_i``, and the origin of the geometry has the rest
        to one (which matters only when the origin is a centre, not the zero vector).
    by_layer : (L, n) float64, optional
        Or every floating layer has coefficients of its own.
    statistic : Statistic, optional
        Or it is this statistic over the rows in `selected`.
    shares : (n,) float64, optional
        Weights of the mean that integer layers get; by default `coefficients`. Scaled to sum to
        one; all equal when they are all zero, or when there are no coefficients.
    selected : (n,) bool, optional
        Rows that were chosen; by default those with a coefficient that is not zero.
    scores : (n,) float64, optional
        What the choice was made by; low is good.
    """

    coefficients: np.ndarray | None = None
    by_layer: np.ndarray | None = None
    statistic: Statistic | None = None
    shares: np.ndarray | None = None
    selected: np.ndarray | None = None
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Why an aggregate is what it is; arrays are in the order of the clients of the call.

    Attributes
    ----------
    coefficients : (n,) or None
        Share of each client in the aggregate; None for rules that work by coordinate or by layer.
    scores : (m,) or None
        What the rule ranked its rows by, low is good; NaN for clients it did not see. m is n unless
        a pre-aggregator changed the number of rows.
    selected, rejected : tuple of int
        Rows the rule used and did not use.
    norms : (n,)
        L2 norm of each update, or its distance to the centre; infinite for clients left out.
    distances : (n, n) or None
        Distances between updates, if the rule looked at them; infinite to clients left out.
    nonfinite : tuple of int
        Clients that sent a NaN or an infinity.
    """

    coefficients: np.ndarray | None
    scores: np.ndarray | None
    selected: tuple[int, ...]
    rejected: tuple[int, ...]
    norms: np.ndarray
    distances: np.ndarray | None
    nonfinite: tuple[int, ...]

"""Centres that are found step by step: geometric median (Weiszfeld) and centred clipping.

Both keep an affine combination ``z = sum_i w_i x_i + w_n o`` of rows and origin and need only its
distances to the rows, ``||z - x_i||^2 = G_ii - 2 (G w)_i + w^T G w`` with G the inner products
about any fixed point (`Geometry.frame`). The vectors are never touched.
"""

from __future__ import annotations

import numpy as np

__all__ = ["clip_about_centre", "distances_to", "weiszfeld"]


def distances_to(frame: np.ndarray, combination: np.ndarray) -> np.ndarray:
    """Return the distances (n,) of the rows to a combination (n + 1,) that sums to one."""
    toward = np.einsum("ij,j->i", frame, combination)
    squares = np.diagonal(frame) - 2 * toward + (combination * toward).sum()
    return np.sqrt(np.maximum(squares[:-1], 0.0))


def weiszfeld(
    frame: np.ndarray,
    weights: np.ndarray,
    start: np.ndarray,
    smoothing: float,
    iterations: int,
    tolerance: float | None = None,
    away: np.ndarray | None = None,
    *,
    movement: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Smoothed Weiszfeld steps towards ``argmin_z sum_i a_i ||z - x_i||``.

    ``b_i = a_i / max(smoothing, ||z - x_i||)``, ``z <- sum_i b_i x_i / sum_i b_i`` (Pillutla et
    al., IEEE TSP 2022, Algorithm 2).

    Parameters
    ----------
    frame : (n + 1, n + 1) float64
        Inner products of rows and origin about any fixed point.
    weights : (n,) float64
        a_i > 0.
    start : (n + 1,) float64
        First z, as a combination of rows and origin that sums to one.
    smoothing : float
    iterations : int
        At least 1.
    tolerance : float, optional
        Stop when the sum F of weighted distances changes by at most ``tolerance * F``.
        One row far out makes F large, and the steps stop early.
    away : (n,) float64, optional
        Distances to the first z, when they are known better than from `frame`.
    movement : bool
        Stop when z moves by at most `tolerance` times the median distance instead.

    Returns
    -------
    combination : (n,) float64
        Weights of the rows, which sum to one.
    distances : (n,) float64
        Distances of the rows to the result.
    objectives : list of float
        F at the start and after each step.
    """
    z = start
    away = distances_to(frame, z) if away is None else away
    floor = max(smoothing, 1e-290)  # 1 / floor and its sums stay finite
    objectives = [float((weights * away).sum())]
    for _ in range(iterations):
        last = z
        pull = weights / np.maximum(floor, away)
        z = np.append(pull / pull.sum(), 0.0)
        away = distances_to(frame, z)
        objectives.append(float((weights * away).sum()))
        if tolerance is None:
            continue
        before, after = objectives[-2:]
        if movement:
            change = z - last
            moved = (change * np.einsum("ij,j->i", frame, change)).sum()
            if moved <= (tolerance * np.sort(away)[len(away) // 2]) ** 2:
                break
        elif abs(before - after) <= tolerance * after:
            break
    return z[:-1], away, objectives


def clip_about_centre(
    frame: np.ndarray,
    weights: np.ndarray,
    radius: float,
    iterations: int,
    away: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Centred clipping from the origin (Karimireddy, He, Jaggi, ICML 2021).

    ``v <- v + sum_i p_i min(1, radius / ||x_i - v||) (x_i - v)``.

    Parameters
    ----------
    frame : (n + 1, n + 1) float64
        Inner products of rows and origin; not looked at for one iteration.
    weights : (n,) float64
        p_i > 0, which sum to one.
    radius : float
        Not negative; may be infinite.
    iterations : int
        At least 1.
    away : (n,) float64
        Distances of the rows to the origin.

    Returns
    -------
    combination : (n,) float64
        Weights of the rows; the origin has the rest to one.
    distances : (n,) float64
        Distances of the rows to the last centre they were clipped about.
    """
    v = np.zeros(len(weights) + 1)
    v[-1] = 1.0
    for step in range(iterations):
        away = away if step == 0 else distances_to(frame, v)
        inside = away <= radius
        share = np.where(inside, 1.0, radius / np.where(inside, 1.0, away)) * weights
        v *= 1.0 - share.sum()
        v[:-1] += share
    return v[:-1], away

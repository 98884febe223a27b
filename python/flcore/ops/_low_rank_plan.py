"""Which layers a low-rank form compresses, and the factor that the first call begins with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flcore.reference import rng, streams
from flcore.reference.low_rank import Plan

__all__ = ["choose_ranks", "revive"]


def choose_ranks(
    shapes: Sequence[tuple[int, ...]], rank: int, min_compression: float
) -> tuple[int, ...]:
    """Return the rank of each layer, 0 for layers that are sent as they are.

    A layer of two or more dimensions is a matrix of n rows (the first dimension) and m columns (the
    others); it gets rank ``r = min(n, m, rank)`` if ``(n + m) r min_compression < n m``.
    """
    ranks = []
    for shape in shapes:
        n = shape[0] if shape else 0
        m = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 0
        r = min(n, m, rank)
        ranks.append(r if r and (n + m) * r * min_compression < n * m else 0)
    return tuple(ranks)


def revive(
    plan: Plan, factor: np.ndarray | None, seed: int, round: int, *, columns: bool = True
) -> np.ndarray:
    """Return a factor to begin with: the one given, with normals where a vector of it is 0.

    A factor that became 0 (a layer without gradient) would stay 0 for ever. Normals are those of
    stream `LOW_RANK` of (seed, round), element by position in Q^T (`columns`) or in the transposes
    of P, one after the other. None, or a factor of another size, counts as 0.
    """
    kind, size = ("q", plan.q) if columns else ("p", plan.p)
    if factor is None or factor.size != size:
        factor = np.zeros(size, np.float32)
    vectors = [x if columns else x.T for x in plan.parts(factor, kind)]
    dead = [~x.any(axis=1) for x in vectors]
    if not any(d.any() for d in dead):
        return factor
    factor = factor.copy()
    at = 0
    for part, chosen in zip(plan.parts(factor, kind), dead, strict=True):
        rows = part if columns else part.T
        for k in np.flatnonzero(chosen):
            rows[k] = rng.random_normal(
                rows.shape[1],
                seed,
                round=round & 0xFFFFFFFF,
                tensor=streams.LOW_RANK,
                offset=at + int(k) * rows.shape[1],
            )
        at += rows.size
    return factor

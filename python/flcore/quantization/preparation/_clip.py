"""Clipping of weights before they are rounded: a smaller range, hence a finer grid.

Lin et al., "AWQ", MLSys 2024, arXiv 2306.00978, as in the authors' code: each group of a row takes
the limit of ten that changes its own part of the output least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flcore._extras import require
from flcore.errors import InvalidInputError
from flcore.quantization.preparation._grid import as_weight_grid, span
from flcore.quantization.preparation._losses import at_least_float

__all__ = ["Clip", "clip_linear", "clip_search", "is_clipped", "strided"]

torch: Any = require("torch", extra="torch")

# Limits tried: 1, 0.95, ..., 0.55 of the largest magnitude.
STEPS, TRIES = 20, 10
# Tokens the errors are means over, at least this many where there are.
SAMPLE = 512
KEPT = ("q_", "k_", "query", "key", "Wqkv")


@dataclass(frozen=True)
class Clip:
    """Limits of the weights of a linear.

    Attributes
    ----------
    limit : torch.Tensor, [N, G]
        Largest magnitude of each group of each row.
    share : torch.Tensor, [N, G]
        The limit over the largest magnitude before, 1 to 0.55.
    before, after : float
        Sum over all groups of the mean squared error of their part of the output, rounded without
        and with the limits.
    """

    limit: Any
    share: Any
    before: float
    after: float


def is_clipped(name: str) -> bool:
    """Whether a linear of that name is clipped by default: not queries and keys."""
    return not any(part in name for part in KEPT)


def strided(x: Any) -> Any:
    """Return every (T div 512)-th row of X [T, K]; all of them for T below 1024."""
    return x[:: max(1, x.shape[0] // SAMPLE)].clone()


def clip_search(weight: Any, x: Any, weights: Any) -> Clip:
    """Find the limit of every group of every row.

    Parameters
    ----------
    weight : torch.Tensor, [N, K]
    x : torch.Tensor, [T, K]
        Inputs of the linear.
    weights : flcore.quantization.Scheme, str or UniformGrid
        How the weights are going to be rounded; a scale by group or by row.

    Notes
    -----
    ``err = mean_t (x_t (Q(clip(w, -m, m)) - w))^2`` over one group, from the g x g matrix
    ``X_g^T X_g / T``. The error is not monotone in m, so all limits are tried; the first smallest
    one wins.
    """
    grid, group = as_weight_grid(weights)
    if group == 0:
        raise InvalidInputError("weights: clipping needs a scale by group or row, not by tensor")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.shape[0] == 0:
        raise InvalidInputError(
            f"x: expected [T, {weight.shape[-1]}] with T above 0, got {tuple(x.shape)}"
        )
    weight = at_least_float(weight.detach())
    channels = weight.shape[1]
    size = span(group, channels)
    h = _moments(x.to(weight.dtype), size)
    largest = _grouped(weight, size).abs().amax(2)
    best = torch.full_like(largest, torch.inf)
    share, before = torch.ones_like(largest), 0.0
    for step in range(TRIES):
        part = 1 - step / STEPS
        limit = _spread(largest * part, size, channels)
        delta = _grouped(grid(torch.clamp(weight, -limit, limit)) - weight, size)
        by_group = delta.transpose(0, 1)
        error = ((by_group @ h) * by_group).sum(2).T
        if step == 0:
            before = float(error.sum())
        better = error < best
        best = torch.where(better, error, best)
        share = torch.where(better, torch.full_like(share, part), share)
    return Clip(largest * share, share, before, float(best.sum()))


def clip_linear(linear: Any, x: Any, weights: Any) -> Clip:
    """Clamp the weights of a linear in place, to the limits `clip_search` finds."""
    weight = linear.weight
    found = clip_search(weight, x, weights)
    size = span(as_weight_grid(weights)[1], weight.shape[1])
    limit = _spread(found.limit, size, weight.shape[1]).to(weight.dtype)
    with torch.no_grad():
        weight.copy_(torch.clamp(weight, -limit, limit))
    return found


def _grouped(values: Any, size: int) -> Any:
    """Return [N, K] as [N, G, size], zeros at the end of a short group."""
    missing = -values.shape[1] % size
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.reshape(values.shape[0], -1, size)


def _spread(by_group: Any, size: int, channels: int) -> Any:
    """Return [N, G] as [N, K]."""
    return by_group.repeat_interleave(size, 1)[:, :channels]


def _moments(x: Any, size: int) -> Any:
    """Return X_g^T X_g / T of every group, [G, size, size]."""
    groups = _grouped(x, size).transpose(0, 1)
    return groups.transpose(1, 2) @ groups / x.shape[0]

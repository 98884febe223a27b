"""The functions behind the modules of `flcore.nn`, under the name torch users look for."""

from __future__ import annotations

from torch import Tensor

from flcore import losses
from flcore.losses import cross_entropy, stablemax_cross_entropy, taylor_cross_entropy

__all__ = [
    "cross_entropy",
    "log_stablemax",
    "stablemax",
    "stablemax_cross_entropy",
    "taylor_cross_entropy",
]


def stablemax(input: Tensor, dim: int = -1) -> Tensor:
    """Return StableMax probabilities along `dim`; see `flcore.losses.stablemax`."""
    return losses.stablemax(input, dim=dim)


def log_stablemax(input: Tensor, dim: int = -1) -> Tensor:
    """Return the logarithms of the probabilities; see `flcore.losses.log_stablemax`."""
    return losses.log_stablemax(input, dim=dim)

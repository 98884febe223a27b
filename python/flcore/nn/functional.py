"""The functions behind the modules of `flcore.nn`, under the name torch users look for."""

from __future__ import annotations

from flcore.losses import (
    cross_entropy,
    log_stablemax,
    stablemax,
    stablemax_cross_entropy,
    taylor_cross_entropy,
)

__all__ = [
    "cross_entropy",
    "log_stablemax",
    "stablemax",
    "stablemax_cross_entropy",
    "taylor_cross_entropy",
]

"""Losses of training that stay exact where float32 softmax stops: torch in, torch out.

Needs torch (``pip install 'flcore[torch]'``); the NumPy form is `flcore.ops`.
"""

from __future__ import annotations

from flcore import _extras

_extras.require("torch", "torch")

from flcore.losses._cross_entropy import (  # noqa: E402  (torch is checked first)
    cross_entropy,
    stablemax_cross_entropy,
    taylor_cross_entropy,
)

__all__ = ["cross_entropy", "stablemax_cross_entropy", "taylor_cross_entropy"]

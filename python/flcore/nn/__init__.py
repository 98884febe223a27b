"""Modules of torch.nn's kind around flcore's functions. Needs torch (``flcore[torch]``)."""

from __future__ import annotations

from flcore import _extras

_extras.require("torch", "torch")

from flcore.nn import functional  # noqa: E402  (torch is checked first)
from flcore.nn._linear_losses import (  # noqa: E402
    LinearCrossEntropyLoss,
    StableMaxLinearCrossEntropyLoss,
)
from flcore.nn._losses import (  # noqa: E402
    CrossEntropyLoss,
    LogStableMax,
    StableMax,
    StableMaxCrossEntropyLoss,
)

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LogStableMax",
    "StableMax",
    "StableMaxCrossEntropyLoss",
    "StableMaxLinearCrossEntropyLoss",
    "functional",
]

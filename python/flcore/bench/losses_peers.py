"""Losses as users write them today: StableMax and softmax cross-entropy in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flcore.bench.environment import optional

__all__ = ["LossFunction", "softmax_loss", "stablemax_loss"]

LossFunction = Callable[[Any, Any], Any]
"""Logits (rows, classes) and labels (rows,) to the mean loss."""


def stablemax_loss(dtype: str) -> LossFunction:
    """StableMax cross-entropy as its users run it, in `dtype`: a chain of element-wise calls.

    The 1e-30 keeps the branch that is not taken finite.
    """
    torch: Any = optional("torch")[0]
    kind = getattr(torch, dtype)

    def loss(logits: Any, labels: Any) -> Any:
        x = logits.to(kind)
        s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
        log_p = torch.log(s / s.sum(-1, keepdim=True))
        return -log_p.gather(-1, labels[:, None]).mean()

    return loss


def softmax_loss() -> LossFunction:
    """`torch.nn.functional.cross_entropy`, whose rows are always computed in float32 or wider."""
    torch: Any = optional("torch")[0]
    return torch.nn.functional.cross_entropy  # type: ignore[no-any-return]

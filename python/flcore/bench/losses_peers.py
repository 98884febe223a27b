"""Losses as users write them today: StableMax and softmax cross-entropy, and PerpGrad, in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flcore.bench.environment import optional

__all__ = ["LossFunction", "perp_grad_step", "softmax_loss", "stablemax_loss"]

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


def perp_grad_step(weights: list[Any], gradients: list[Any]) -> None:
    """Project every gradient off its weight and give it its length back, tensor by tensor."""
    for w, g in zip(weights, gradients, strict=True):
        flat_w, flat_g = w.view(-1), g.view(-1)
        share = flat_w.dot(flat_g) / (flat_w.dot(flat_w) + 1e-30)
        across = flat_g - share * flat_w
        flat_g.copy_(across * (flat_g.norm() / (across.norm() + 1e-30)))

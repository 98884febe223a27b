"""torch.library registration of the projected gradients, which are written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from flcore._torch_ops import declare

__all__ = ["perp_grad"]


def _perp_grad(
    weights: list[Tensor],
    grads: list[Tensor],
    scope: str,
    renormalize: bool,
    eps: float,
    floor: float,
    skip_1d: bool,
) -> None:
    from flcore.ops.perp_grad import perp_grad as eager

    with torch.no_grad():
        eager(
            list(weights),
            list(grads),
            scope=scope,
            renormalize=renormalize,
            eps=eps,
            floor=floor,
            skip_1d=skip_1d,
        )


def _fake(
    weights: list[Tensor],
    grads: list[Tensor],
    scope: str,
    renormalize: bool,
    eps: float,
    floor: float,
    skip_1d: bool,
) -> None:
    return None


perp_grad = declare(
    "perp_grad(Tensor[] weights, Tensor(a!)[] grads, str scope, bool renormalize, float eps,"
    " float floor, bool skip_1d) -> ()",
    kernel=_perp_grad,
    fake=_fake,
)

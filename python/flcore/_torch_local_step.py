"""torch.library registration of the local step, which writes parameters and buffers in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore import _updates
from flcore._torch_ops import declare

__all__ = ["local_step"]


def _local_step(
    x: list[Tensor],
    g: list[Tensor],
    q: list[Tensor],
    buffer: list[Tensor],
    lr: float,
    alpha: float,
    decay: float,
    clip: float | None,
    clip_mode: str,
    momentum: float,
    nesterov: bool,
    first: bool,
) -> None:
    from flcore.ops.local_step import local_step as eager

    with torch.no_grad():
        eager(
            list(x),
            list(g),
            list(q) or None,
            lr=lr,
            alpha=alpha,
            decay=decay,
            clip=clip,
            clip_mode=clip_mode,
            momentum=momentum,
            nesterov=nesterov,
            buffer=list(buffer) or None,
            first=first,
        )


def _fake(
    x: list[Tensor],
    g: list[Tensor],
    q: list[Tensor],
    buffer: list[Tensor],
    lr: float,
    alpha: float,
    decay: float,
    clip: float | None,
    clip_mode: str,
    momentum: float,
    nesterov: bool,
    first: bool,
) -> None:
    return None


op = declare(
    "local_step(Tensor(a!)[] x, Tensor[] g, Tensor[] q, Tensor(b!)[] buffer, float lr,"
    " float alpha, float decay, float? clip, str clip_mode, float momentum, bool nesterov,"
    " bool first) -> ()",
    kernel=_local_step,
    fake=_fake,
)


def local_step(
    x: Any,
    g: Any,
    q: Any,
    lr: float,
    alpha: float,
    decay: float,
    clip: float | None,
    clip_mode: str,
    momentum: float,
    nesterov: bool,
    buffer: Any,
    first: bool,
) -> None:
    """Call the op with the tensors of structures; arguments as `flcore.ops.local_step`."""
    layout, xs = _updates.flatten(x, "x")
    op(
        xs,
        layout.layers(g, "g"),
        [] if q is None else layout.layers(q, "q"),
        [] if buffer is None else layout.layers(buffer, "buffer"),
        lr,
        alpha,
        decay,
        clip,
        clip_mode,
        momentum,
        nesterov,
        first,
    )

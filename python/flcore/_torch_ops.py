"""torch.library registration: schemas, fakes and gradients, so that torch.compile can see the ops.

Imported only when torch is there. Kernels get addresses, so eager calls without gradients skip the
dispatcher and go straight to `flcore.ops`; compiled, differentiated and fake tensors come here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flcore._torch_calls import no_context, refuse

__all__ = ["combine", "combine_layers", "declare"]

_library = torch.library.Library("flcore", "DEF")


def declare(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
    is_gradient: bool = False,
) -> Any:
    """Define ``flcore::<schema>`` with one implementation for CPU and CUDA tensors.

    `kernel` chooses the variant by the device of its tensors. With `is_gradient` a derivative of
    the op is refused with a message. Returns the default overload.
    """
    if is_gradient:
        backward, setup = refuse, no_context
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"flcore::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"flcore::{name}", backward, setup_context=setup, lib=_library
        )
    return getattr(torch.ops.flcore, name).default


# ---- combine: weighted sum of one layer of n clients -------------------------------------------


def _combine(
    rows: list[Tensor], weights: list[float], accumulate: str, nonfinite: str, divisor: float
) -> Tensor:
    from flcore.ops.combine import combine as eager

    with torch.no_grad():
        return eager(rows, weights, accumulate=accumulate, nonfinite=nonfinite, divisor=divisor)


def _combine_fake(
    rows: list[Tensor], weights: list[float], accumulate: str, nonfinite: str, divisor: float
) -> Tensor:
    return torch.empty_like(rows[0], memory_format=torch.contiguous_format)


def _combine_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, weights, _, _, divisor = inputs
    ctx.scales = [w / divisor for w in weights]


def _combine_backward(ctx: Any, grad: Tensor) -> tuple:
    return [s * grad for s in ctx.scales], None, None, None, None


combine = declare(
    # no defaults: torch strips trailing arguments that equal them, and the gradient's shape with it
    "combine(Tensor[] rows, float[] weights, str accumulate, str nonfinite, float divisor)"
    " -> Tensor",
    kernel=_combine,
    fake=_combine_fake,
    backward=_combine_backward,
    setup=_combine_setup,
)


def combine_layers(
    rows: Sequence[Sequence[Tensor]],
    weights: Sequence[float],
    accumulate: str,
    nonfinite: str,
    divisor: float,
) -> list[Tensor]:
    """Sum parsed rows `[n][layers]` with one op call a layer."""
    return [
        combine(list(layer), list(weights), accumulate, nonfinite, divisor)
        for layer in zip(*rows, strict=True)
    ]

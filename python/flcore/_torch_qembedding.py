"""torch.library operator of embedding bags over quantised tables: what torch.compile sees of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore import _torch_ops
from flcore._torch_calls import is_plain, once
from flcore._torch_qmatmul import scheme_from_text
from flcore.ops.qembedding import qembedding as _eager
from flcore.quantization import QuantizedTensor

__all__ = ["bags", "qembedding"]


def _forward(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: str,
    n: int,
    k: int,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    padding: int,
) -> Tensor:
    weight = QuantizedTensor((n, k), scheme_from_text(scheme), "rows", codes, scales, zeros)
    with torch.no_grad():
        return _eager(  # type: ignore[no-any-return]
            weight,
            indices,
            offsets,
            mode=mode,
            per_sample_weights=per_sample_weights,
            padding_idx=None if padding < 0 else padding,
        )


def _fake(codes: Tensor, *arguments: Any) -> Tensor:
    k, indices, offsets, _, mode = arguments[4:9]
    lead = indices.shape if mode == "none" else (indices if offsets is None else offsets).shape[:1]
    return codes.new_empty((*lead, k), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, scales, zeros, *numbers, indices, offsets, given, _, ctx.padding = inputs
    ctx.numbers = numbers
    ctx.save_for_backward(codes, scales, zeros, indices, offsets)
    ctx.dtype = None if given is None else given.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradient of the factors of a sum: the product of each row with the gradient of its bag."""
    codes, scales, zeros, indices, offsets = ctx.saved_tensors
    with torch.no_grad():
        rows = qembedding(codes, scales, zeros, *ctx.numbers, indices, None, None, "none", -1)
        if offsets is None:
            of_entries = grad[:, None, :]
        else:
            entries = torch.arange(indices.shape[0], device=indices.device)
            bag = torch.searchsorted(offsets.to(torch.int64), entries, right=True) - 1
            of_entries = grad[bag]
        slopes = (rows * of_entries.to(rows.dtype)).sum(-1)
        if ctx.padding >= 0:
            slopes = slopes.masked_fill(indices == ctx.padding, 0)
        slopes = slopes.to(ctx.dtype)
    return *[None] * 8, once(slopes), None, None


qembedding = _torch_ops.declare(
    "qembedding(Tensor codes, Tensor scales, Tensor? zeros, str scheme, int n, int k, "
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, str mode, int padding) -> Tensor",
    kernel=_forward,
    fake=_fake,
    backward=_backward,
    setup=_setup,
)


def bags(
    parts: tuple[Any, ...],
    indices: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    *,
    mode: str = "none",
    padding_idx: int | None = None,
) -> Tensor:
    """Rows or bags in float32, differentiable in `per_sample_weights`.

    Parameters
    ----------
    parts : tuple
        The table in the layout "rows": codes, scales, zeros, scheme, n and k.
    indices, offsets, per_sample_weights, mode, padding_idx
        As `flcore.ops.qembedding` takes them.

    Returns
    -------
    Tensor
    """
    padding = -1 if padding_idx is None else padding_idx % parts[4]
    given = [t for t in (indices, offsets, per_sample_weights) if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    call: Any = qembedding if differentiable or not is_plain(*given, parts[0]) else _forward
    return call(*parts, indices, offsets, per_sample_weights, mode, padding)  # type: ignore[no-any-return]

"""StableMax probabilities along a dimension, with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flcore._torch_calls import is_plain, no_context, refuse
from flcore.errors import DTypeError
from flcore.ops import log_stablemax as _log_stablemax
from flcore.ops import log_stablemax_backward as _log_stablemax_backward
from flcore.ops import stablemax as _stablemax
from flcore.ops import stablemax_backward as _stablemax_backward
from flcore.ops._rowloss_prepare import class_axis

__all__ = ["log_stablemax", "stablemax"]


def stablemax(x: Tensor, dim: int = -1) -> Tensor:
    """Return StableMax probabilities along `dim`, in the place of `torch.softmax`.

    Parameters
    ----------
    x : Tensor, float64, float32, float16 or bfloat16
        Logits of any shape; -inf masks an entry.
    dim : int
        Dimension whose probabilities sum to 1.

    Returns
    -------
    Tensor
        Shape and dtype of `x`: ``s(x) / sum s(x)`` with s(x) = x + 1 for x >= 0 and 1 / (1 - x)
        below.

    Raises
    ------
    DTypeError, InvalidInputError
        Not such a tensor; no such dimension.
    RuntimeError
        A gradient is differentiated again.

    Notes
    -----
    Only `x` is kept for the backward pass. Gradient ``p (v - sum v p) / (1 + |x|)`` in the dtype of
    `x`, computed in float32 (float64) and rounded once; exactly 0 where x is -inf. Works under
    torch.compile and torch.func (`grad`, `vmap`). Accuracy: `flcore.ops.stablemax.stablemax`.

    References
    ----------
    Prieto, Barsbey, Mediano & Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025,
    arXiv 2501.04697.

    Examples
    --------
    >>> import torch
    >>> from flcore.losses import stablemax
    >>> stablemax(torch.tensor([2.0, 0.0, -1.0, -3.0]))
    tensor([0.6316, 0.2105, 0.1053, 0.0526])
    """
    return _apply(x, dim, False)


def log_stablemax(x: Tensor, dim: int = -1) -> Tensor:
    """Return the logarithms of `stablemax`, in the place of `torch.log_softmax`.

    Parameters
    ----------
    x, dim
        As in `stablemax`.

    Returns
    -------
    Tensor
        Shape and dtype of `x`; -inf where it is -inf. Small ones keep their digits: the largest
        entry m has ``-log1p(R / s(x_m))``, R the sum of s over the others.

    Raises
    ------
    DTypeError, InvalidInputError, RuntimeError
        As in `stablemax`.

    Notes
    -----
    For a loss, `stablemax_cross_entropy` makes one visit where this and a gather make several.
    """
    return _apply(x, dim, True)


def _apply(x: Tensor, dim: int, log: bool) -> Tensor:
    if not isinstance(x, Tensor):
        raise DTypeError(f"x: expected a torch tensor, got {type(x).__name__}")
    if not is_plain(x):
        if torch.compiler.is_compiling() or not torch._C._functorch.peek_interpreter_stack():
            from flcore import _torch_stablemax

            return _torch_stablemax.stablemax(x, dim, log)  # type: ignore[no-any-return]
        class_axis(x, dim, "dim")  # said in terms of the caller's dimensions
        return _StableMax.apply(x, dim % x.ndim - x.ndim, log)  # type: ignore[no-any-return]
    if x.requires_grad and torch.is_grad_enabled():
        return _StableMax.apply(x, dim, log)  # type: ignore[no-any-return]
    return _forward(x, dim, log)


def _forward(x: Tensor, dim: int, log: bool) -> Tensor:
    return (_log_stablemax if log else _stablemax)(x, dim)  # type: ignore[no-any-return]


class _StableMax(torch.autograd.Function):
    """Forward pass; torch.func hands its forward the tensors under its wrappers."""

    @staticmethod
    def forward(x: Tensor, dim: int, log: bool) -> Tensor:
        return _forward(x, dim, log)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, ctx.log = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _Gradient.apply(v, x, ctx.dim, ctx.log), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, dim: int, log: bool) -> Any:
        # dim counts from the end, so a batch in front does not move it
        return _StableMax.apply(x.movedim(in_dims[0], 0), dim, log), 0


class _Gradient(torch.autograd.Function):
    """Gradient of x; differentiated again it says that it has no derivative."""

    @staticmethod
    def forward(v: Tensor, x: Tensor, dim: int, log: bool) -> Tensor:
        function = _log_stablemax_backward if log else _stablemax_backward
        return function(v, x, dim)  # type: ignore[no-any-return]

    setup_context = staticmethod(no_context)
    backward = staticmethod(refuse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], v: Tensor, x: Tensor, dim: int, log: bool) -> Any:
        both = [
            t.expand(info.batch_size, *t.shape) if at is None else t.movedim(at, 0)
            for t, at in ((v, in_dims[0]), (x, in_dims[1]))
        ]
        return _Gradient.apply(*both, dim, log), 0

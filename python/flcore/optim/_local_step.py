"""`local_step_` and `sam_perturb_`: local steps of federated methods in one's own torch loop."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flcore import _arrays
from flcore._extras import require
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._local_pieces import one_model, slots
from flcore.ops._local_shift import sam_shift
from flcore.ops.local_step import EPS, take_step

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Perturbation", "local_step_", "sam_perturb_"]


def local_step_(
    params: Tensor | Iterable[Tensor],
    q: Tensor | Sequence[Tensor] | None = None,
    *,
    lr: float,
    alpha: float = 1.0,
    decay: float = 0.0,
    clip: float | None = None,
    clip_mode: str = "reference",
    momentum: float = 0.0,
    nesterov: bool = False,
    buffers: Tensor | Sequence[Tensor] | None = None,
    first: bool = False,
) -> None:
    """Take one local step along the gradients of parameters: ``clip``, ``decay`` and ``step``.

    In the place of ``clip_grad_norm_`` and ``optimizer.step()``, and of the penalty that a method
    adds to the loss: FedProx, SCAFFOLD, FedDyn, FedSpeed, FedCM and others are vectors `q` and
    numbers, ``x <- x - lr (s (alpha g + q) + decay x)``, see `flcore.ops.local_step`. Call it after
    ``backward()``; gradients stay as they are.

    Parameters
    ----------
    params : tensor, or iterable of tensors
        With gradients in ``.grad``, on one device. Those without a gradient stay as they are.
    q, buffers : tensor or sequence of tensors, optional
        One for each of `params`, of its shape and dtype.
    lr, alpha, decay, clip, clip_mode, momentum, nesterov, first
        As `flcore.ops.local_step`. The norm is over all parameters that have a gradient.

    Raises
    ------
    InvalidInputError, DTypeError
        As `flcore.ops.local_step`; DTypeError also for sparse gradients.
    MissingDependencyError
        torch is not installed.

    Examples
    --------
    FedProx with mu = 0.1 towards the global model w:

    >>> import torch
    >>> from flcore.optim import local_step_
    >>> w = torch.tensor([1.0, 2.0])
    >>> weight = torch.nn.Parameter(w.clone())
    >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
    >>> local_step_(weight, -0.1 * w, lr=0.5, decay=0.1, clip=1.0)
    >>> weight.data
    tensor([0.6467, 1.5025])
    """
    torch: Any = sys.modules.get("torch") or require("torch", extra="torch")
    given = _tensors(torch, params, "params")
    others = {
        name: None if value is None else _tensors(torch, value, name)
        for name, value in (("q", q), ("buffers", buffers))
    }
    for name, tensors in others.items():
        if tensors is not None and len(tensors) != len(given):
            raise InvalidInputError(
                f"{name}: expected {len(given)} tensors, one a parameter, got {len(tensors)}"
            )
    keep = [i for i, p in enumerate(given) if p.grad is not None]
    for i in keep:
        _check(torch, f"params[{i}].grad", given[i].grad)
    if momentum and buffers is None:
        raise InvalidInputError("buffers: momentum needs one buffer a parameter")
    x, g = {i: given[i].detach() for i in keep}, {i: given[i].grad for i in keep}
    more = {k: None if v is None else {i: v[i] for i in keep} for k, v in others.items()}
    with torch.no_grad():
        if torch.compiler.is_compiling():
            from flcore import _torch_local_step

            _torch_local_step.op(
                *(list(tensors.values()) if tensors else [] for tensors in (x, g, *more.values())),
                float(lr),
                float(alpha),
                float(decay),
                None if clip is None else float(clip),
                clip_mode,
                float(momentum),
                nesterov,
                first,
            )
            return
        named = slots(
            x=("params", x),
            g=("grads", g),
            q=("q", more["q"]),
            state=("buffers", more["buffers"]),
        )
        pieces = one_model(named, ("x",) if buffers is None else ("x", "state"))
        take_step(
            pieces,
            lr,
            alpha,
            decay,
            clip,
            clip_mode,
            momentum,
            nesterov,
            first,
            rows=None,
            active=None,
            variant=None,
        )
        pieces.deliver()


def sam_perturb_(
    params: Tensor | Iterable[Tensor], rho: float, *, eps: float = EPS
) -> Perturbation:
    """Move parameters to where SAM takes its gradient, ``x + rho / (||g|| + eps) g``.

    Call it after ``backward()``, take the gradient there, and put the parameters back, to the bit.
    The norm is over all gradients together; nothing waits for the device.

    Parameters
    ----------
    params : tensor, or iterable of tensors
        With gradients in ``.grad``, on one device. Those without a gradient stay as they are.
    rho : float
    eps : float

    Returns
    -------
    Perturbation
        Its ``restore()`` puts the parameters back, and so does the end of a ``with`` block.

    Raises
    ------
    InvalidInputError, DTypeError
        As `flcore.ops.sam_shift`.
    MissingDependencyError
        torch is not installed.

    References
    ----------
    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR
    2021, arXiv 2010.01412.

    Examples
    --------
    >>> import torch
    >>> from flcore.optim import sam_perturb_
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> (weight @ weight / 2).backward()
    >>> with sam_perturb_(weight, 0.5):
    ...     weight.data
    tensor([3.3000, 4.4000])
    >>> weight.data
    tensor([3., 4.])
    """
    torch: Any = sys.modules.get("torch") or require("torch", extra="torch")
    chosen = []
    for i, p in enumerate(_tensors(torch, params, "params")):
        if p.grad is not None:
            _check(torch, f"params[{i}].grad", p.grad)
            chosen.append(p)
    with torch.no_grad():
        values = [p.detach() for p in chosen]
        before = [v.clone() for v in values]
        sam_shift(before, [p.grad for p in chosen], rho, eps=eps, out=values)
    return Perturbation(torch, values, before)


class Perturbation:
    """Parameters that were moved, and what they were; `sam_perturb_` makes it."""

    def __init__(self, torch: Any, values: list[Any], before: list[Any]) -> None:
        self._torch, self._values, self._before = torch, values, before

    def restore(self) -> None:
        """Put the parameters back, to the bit; a second call does nothing."""
        with self._torch.no_grad():
            for value, before in zip(self._values, self._before, strict=True):
                value.copy_(before)
        self._values = self._before = []

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def _tensors(torch: Any, given: Any, name: str) -> list[Any]:
    tensors = [given] if torch.is_tensor(given) else list(given)
    for i, x in enumerate(tensors):
        if not torch.is_tensor(x):
            raise DTypeError(f"{name}[{i}]: expected a torch tensor, got {type(x).__name__}")
    return tensors


def _check(torch: Any, name: str, grad: Any) -> None:
    dtype = _arrays.dtype_name(grad)
    if grad.layout != torch.strided or dtype not in _arrays.DTYPE_CODES:
        what = f"{grad.layout} {dtype}".replace("torch.", "")
        raise DTypeError(
            f"{name}: expected a dense float64, float32, float16 or bfloat16 gradient, got {what}"
        )

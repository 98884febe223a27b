"""`perp_grad_`: the gradients of parameters without their part along the parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flcore import _arrays
from flcore._extras import require
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops.perp_grad import FLOOR, check_options, pair_views, perp_grad, perp_grad_views

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Projection", "perp_grad_"]


def perp_grad_(
    params: Tensor | Iterable[Tensor],
    *,
    scope: str = "tensor",
    renormalize: bool = True,
    eps: float = 1e-30,
    floor: float = FLOOR,
    skip_1d: bool = False,
    process_group: Any = None,
) -> None:
    """Take out of each parameter's ``.grad`` its component along the parameter, in place.

    Call it between ``backward()`` (with the gradients all-reduced, as DDP leaves them) and
    ``optimizer.step()``; `PerpGrad` does so by itself. What it computes, its options and its cost
    are those of `flcore.ops.perp_grad`. Parameters without a gradient are left out, a parameter
    that is given twice (tied weights) is projected once.

    Parameters
    ----------
    params : tensor, or iterable of tensors
        float64, float32, float16 or bfloat16, dense, on one device with scope "global".
    scope, renormalize, eps, floor, skip_1d
        As `flcore.ops.perp_grad`.
    process_group : torch.distributed.ProcessGroup, optional
        When every process holds a shard of each parameter (FSDP, ZeRO; also DTensor): the group
        that shares them. Then all processes call with the same parameters in the same order, and
        the dot products are summed over the group, one all-reduce of four numbers a tensor (a
        second one when a gradient is nearly parallel to its weights). A parameter without a
        gradient counts as one with zeros; with `skip_1d` shards must keep their dimensions.
        Replicated parameters may be among them. With DDP gradients are equal everywhere: no group.

    Raises
    ------
    DTypeError
        A sparse, complex or integer gradient; the message names the parameter.
    InvalidInputError
        Options that cannot be used; a DTensor without `process_group`; gradients that share memory.
    MissingDependencyError
        torch is not installed.

    References
    ----------
    Prieto, Barsbey, Mediano & Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025,
    arXiv 2501.04697.

    Examples
    --------
    >>> import torch
    >>> from flcore.optim import perp_grad_
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> weight.grad = torch.tensor([1.0, 2.0])
    >>> perp_grad_(weight)
    >>> weight.grad
    tensor([-1.7889,  1.3416])
    """
    Projection(scope, renormalize, eps, floor, skip_1d, process_group)(params)


@dataclass(frozen=True)
class Projection:
    """The options of `perp_grad_`, checked; called with parameters."""

    scope: str = "tensor"
    renormalize: bool = True
    eps: float = 1e-30
    floor: float = FLOOR
    skip_1d: bool = False
    process_group: Any = None

    def __post_init__(self) -> None:
        check_options(self.scope, self.renormalize, self.eps, self.floor)

    def __call__(self, params: Tensor | Iterable[Tensor]) -> None:
        """Project the gradients of `params`."""
        torch: Any = sys.modules.get("torch") or require("torch", extra="torch")
        given: list[Any] = [params] if torch.is_tensor(params) else list(params)
        named = {id(p): (i, p) for i, p in reversed(list(enumerate(given)))}
        chosen = sorted(named.values(), key=lambda pair: pair[0])
        for i, p in chosen:
            _check(torch, i, p, self.process_group)
        with torch.no_grad():
            if self.process_group is not None:
                # collectives between kernels: outside of any compiled graph
                compiling = torch.compiler.is_compiling()
                sharded = torch.compiler.disable(self._sharded) if compiling else self._sharded
                sharded(torch, chosen)
                return
            chosen = [(i, p) for i, p in chosen if p.grad is not None]
            if torch.compiler.is_compiling():
                self._compiled([p for _, p in chosen])
                return
            for group in _by_device(chosen) if self.scope == "tensor" else [chosen]:
                self._local(group)

    def _compiled(self, params: Sequence[Tensor]) -> None:
        perp_grad(
            [p.detach() for p in params],
            [p.grad for p in params],
            scope=self.scope,
            renormalize=self.renormalize,
            eps=self.eps,
            floor=self.floor,
            skip_1d=self.skip_1d,
        )

    def _local(self, chosen: Sequence[tuple[int, Tensor]]) -> None:
        least = 2 if self.scope == "tensor" else 1
        chosen = [
            (i, p) for i, p in chosen if p.numel() >= least and not (self.skip_1d and p.ndim < 2)
        ]
        self._project([p for _, p in chosen], [p.grad for _, p in chosen], _labels(chosen))

    def _project(
        self,
        weights: Sequence[Any],
        grads: Sequence[Any],
        labels: Sequence[tuple[str, str]],
        reduce: Any = None,
    ) -> None:
        pairs = pair_views(weights, grads, labels)
        perp_grad_views(
            pairs,
            global_scope=self.scope == "global",
            renormalize=self.renormalize,
            eps=self.eps,
            floor=self.floor,
            reduce=reduce,
        )
        pairs.deliver()

    def _sharded(self, torch: Any, chosen: Sequence[tuple[int, Tensor]]) -> None:
        """Project shards: sums over the processes before anything is written.

        Every process takes part with every parameter, because the others wait for its numbers.
        """
        chosen = [(i, p) for i, p in chosen if not (self.skip_1d and p.ndim < 2)]
        weights = [_local_part(p) for _, p in chosen]
        grads = [
            torch.zeros_like(w) if p.grad is None else _local_part(p.grad)
            for (_, p), w in zip(chosen, weights, strict=True)
        ]
        several = [float(w.numel() > 1) for w in weights]
        self._project(weights, grads, _labels(chosen), _Reduce(torch, self, several))


class _Reduce:
    """Sums the numbers of the kernels over a process group, in place.

    The dot products take a fourth column along: whether the shard has several elements. A tensor of
    which no process has more than one is left alone by scope "tensor", as one of one element is.
    """

    def __init__(self, torch: Any, options: Projection, several: Sequence[float]) -> None:
        self._torch, self._options, self._several = torch, options, several

    def __call__(self, values: Any) -> None:
        torch = self._torch
        table = values if torch.is_tensor(values) else torch.from_numpy(values)
        if table.ndim == 1:
            self._sum(table)
            return
        several = torch.tensor(self._several, dtype=table.dtype, device=table.device)
        wide = torch.cat([table, several[:, None]], dim=1)
        self._sum(wide)
        if self._options.scope == "tensor":
            wide[:, 1] *= wide[:, 3] > 0  # w.g = 0: nothing to take out
        table.copy_(wide[:, :3])

    def _sum(self, table: Any) -> None:
        group = self._options.process_group
        if table.numel():
            self._torch.distributed.all_reduce(table, group=group)


def _by_device(chosen: Sequence[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    groups: dict[Any, list[tuple[int, Tensor]]] = {}
    for i, p in chosen:
        groups.setdefault(p.device, []).append((i, p))
    return list(groups.values())


def _labels(chosen: Sequence[tuple[int, Tensor]]) -> list[tuple[str, str]]:
    return [(f"params[{i}]", f"params[{i}].grad") for i, _ in chosen]


def _local_part(x: Any) -> Any:
    """Return the shard of a DTensor that is here, and any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def _check(torch: Any, i: int, p: Any, process_group: Any) -> None:
    if not torch.is_tensor(p):
        raise DTypeError(f"params[{i}]: expected a torch tensor, got {type(p).__name__}")
    grad = p.grad
    if grad is None:
        grad = p
    if hasattr(p, "to_local") and process_group is None:
        raise InvalidInputError(
            f"params[{i}]: a DTensor is a shard; give the group that shares it, "
            "process_group=param.device_mesh.get_group()"
        )
    if any(type(place).__name__ == "Partial" for place in getattr(grad, "placements", ())):
        raise InvalidInputError(
            f"params[{i}].grad: expected a gradient that has been summed, got a partial one"
        )
    dtype = _arrays.dtype_name(grad)
    if grad.layout != torch.strided or dtype not in _arrays.DTYPE_CODES:
        what = f"{grad.layout} {dtype}".replace("torch.", "")
        raise DTypeError(
            f"params[{i}].grad: expected a dense float64, float32, float16 or bfloat16 gradient, "
            f"got {what}; leave this parameter out (with PerpGrad: in a parameter group with "
            '"perp_grad": False)'
        )

"""Run a model with rounded weights and activations, in float, to see what quantising costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flcore._extras import require
from flcore.errors import InvalidInputError
from flcore.quantization.preparation._grid import ActivationGrid, as_weight_grid
from flcore.quantization.preparation._groups import ScalingGroup, find_linear
from flcore.quantization.preparation._losses import at_least_float, with_weights
from flcore.quantization.preparation._statistics import ActivationStatistics

__all__ = ["simulated"]

torch: Any = require("torch", extra="torch")


@contextmanager
def simulated(
    model: Any,
    linears: Iterable[str | ScalingGroup],
    weights: Any = None,
    activations: ActivationGrid | None = None,
    statistics: Mapping[str, ActivationStatistics] | None = None,
) -> Iterator[None]:
    """Let linears compute with rounded weights and inputs, for as long as the block runs.

    Parameters
    ----------
    model : torch.nn.Module
    linears : iterable of str or ScalingGroup
        Names of `torch.nn.Linear` modules, or groups, whose linears they are.
    weights : flcore.quantization.Scheme, str or UniformGrid, optional
        Weights stay in float without it.
    activations : ActivationGrid, optional
        Inputs stay in float without it.
    statistics : mapping, optional
        Ranges by the name of a linear (of a group: the first one), for activations of scope
        "tensor"; without it the range is that of each tensor that comes along.

    Examples
    --------
    >>> import torch
    >>> from flcore.quantization.preparation import UniformGrid, simulated
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
    >>> x = torch.eye(4)
    >>> with torch.no_grad(), simulated(model, ["0"], UniformGrid(2, symmetric=True)):
    ...     len(model(x)[:, 0].unique()) <= 3
    True
    """
    pairs = [
        pair
        for item in linears
        for pair in (
            [(name, item.linears[0]) for name in item.linears]
            if isinstance(item, ScalingGroup)
            else [(item, item)]
        )
    ]
    modules = [find_linear(model, name, "linears") for name, _ in pairs]
    rounded = [at_least_float(module.weight.detach()) for module in modules]
    if weights is not None:
        grid, _ = as_weight_grid(weights)
        rounded = [grid(weight) for weight in rounded]
    hooks = []
    if activations is not None:
        for (_, first), module in zip(pairs, modules, strict=True):
            ends = _ends(first, activations, statistics)
            hooks.append(module.register_forward_pre_hook(_rounding(activations, ends)))
    try:
        with with_weights(modules, rounded):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _ends(
    name: str, grid: ActivationGrid, statistics: Mapping[str, ActivationStatistics] | None
) -> tuple[float, ...]:
    if grid.scope != "tensor" or statistics is None:
        return ()
    if name not in statistics:
        raise InvalidInputError(f"statistics: none for {name!r}")
    found = statistics[name]
    return float(found.minimum.min()), float(found.maximum.max())


def _rounding(grid: ActivationGrid, ends: tuple[float, ...]) -> Any:
    return lambda _module, args: (grid(args[0], *ends), *args[1:])

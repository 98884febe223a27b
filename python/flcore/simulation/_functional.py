"""A module as a function of its parameters, alone and inside a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.func import functional_call

from flcore.algorithms.layout import Layout

__all__ = ["FunctionalModel", "MeanLoss"]


class FunctionalModel:
    """A module as a function of its parameters.

    Parameters
    ----------
    module : torch.nn.Module
    layout : Layout
        Of its parameters; no statistics.
    """

    def __init__(self, module: torch.nn.Module, layout: Layout) -> None:
        self.module = module
        self.shapes = dict(layout.shapes)
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self._parts: _Parts | None = None

    def stacked(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """View a (clients, d) matrix as parameters with a first dimension for the client."""
        pieces = zip(rows.split(self.sizes, 1), self.shapes.values(), strict=True)
        return [piece.view(len(rows), *shape) for piece, shape in pieces]

    def single(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """View a (d,) tensor as parameters."""
        pieces = zip(vector.split(self.sizes), self.shapes.values(), strict=True)
        return [piece.view(shape) for piece, shape in pieces]

    def __call__(
        self,
        parameters: Sequence[torch.Tensor],
        x: torch.Tensor,
        features: bool = False,
        **options: Any,
    ) -> Any:
        """Give the scores of a batch, or features and scores."""
        named = dict(zip(self.shapes, parameters, strict=True))
        if not features:
            return functional_call(self.module, named, (x,), options)
        if self._parts is None:
            self._parts = _Parts(self.module)
        named = {f"whole.{name}": value for name, value in named.items()}
        return functional_call(self._parts, named, (x,))

    def forward(self, parameters: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """Give the `flcore.algorithms.tools.Forward` of a client that trains `parameters`."""

        def forward(
            x: torch.Tensor, frozen: Any = None, *, features: bool = False, **options: Any
        ) -> Any:
            if frozen is None:
                return self(parameters, x, features, **options)
            training = self.module.training
            self.module.eval()
            try:
                return self(self.single(frozen.detach()), x, features, **options)
            finally:
                self.module.train(training)

        return lambda x, parameters=None, **options: forward(x, parameters, **options)


class _Parts(torch.nn.Module):
    """A module that gives features and scores."""

    def __init__(self, whole: torch.nn.Module) -> None:
        from flcore.simulation.models import split_features

        super().__init__()
        self.whole = whole
        self._pair = (split_features(whole),)  # in a tuple, where torch does not look for modules

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        body, head = self._pair[0]
        inner = body(x)
        return inner, head(inner)


class MeanLoss:
    """The weighted mean of the examples' losses, a `flcore.algorithms.tools.BatchLoss`.

    Parameters
    ----------
    loss : function
        Called as `torch.nn.functional.cross_entropy`.
    """

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        self._loss = loss

    def __call__(self, forward: Any, x: Any, y: Any, weight: Any, aux: Any) -> torch.Tensor:
        """Give the mean; where an example has several labels, of their mean."""
        losses = self._loss(forward(x), y, reduction="none")
        return (losses.flatten(1).mean(1) if losses.ndim > 1 else losses).mul(weight).sum()

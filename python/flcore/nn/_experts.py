"""Several networks of one kind, and a router that tells how much each of them counts."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flcore.errors import InvalidInputError

__all__ = ["ROUTING", "ExpertMixture", "routing_weights"]

ROUTING = ("full", "top", "nucleus", "sample")


def routing_weights(
    probabilities: Tensor,
    routing: str = "top",
    *,
    kept: int = 1,
    mass: float = 0.9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Turn a router's probabilities into the weights of the experts.

    Parameters
    ----------
    probabilities : (n, K) floating Tensor
        One row an input; a row adds up to 1.
    routing : {"full", "top", "nucleus", "sample"}
        The probabilities as they are; the `kept` largest; as many of the largest as it takes to
        reach `mass`; or one expert, drawn by its probability. What is kept is made to add up to 1.
    kept : int
        At "top"; 1 is a single expert. Of equal probabilities the first is taken.
    mass : float
        At "nucleus", above 0 up to 1.
    generator : torch.Generator, optional
        At "sample".

    Returns
    -------
    (n, K) Tensor of the same dtype; rows add up to 1.

    References
    ----------
    Decentralized Diffusion Models, CVPR 2025, arXiv 2501.05450.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import routing_weights
    >>> routing_weights(torch.tensor([[0.5, 0.1, 0.4]]), "nucleus", mass=0.6)
    tensor([[0.5556, 0.0000, 0.4444]])
    """
    if routing not in ROUTING:
        raise InvalidInputError(f"routing: expected one of {', '.join(ROUTING)}, got {routing!r}")
    if routing == "full":
        return probabilities
    if routing == "sample":
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return torch.zeros_like(probabilities).scatter(1, drawn, 1.0)
    values, order = probabilities.sort(dim=1, descending=True, stable=True)
    if routing == "nucleus":
        if not 0 < mass <= 1:
            raise InvalidInputError(f"mass: expected a number above 0 up to 1, got {mass!r}")
        used = values.cumsum(1) - values < mass  # what comes before it does not reach the mass
    else:
        if not 1 <= kept <= values.shape[1]:
            raise InvalidInputError(
                f"kept: expected a number of experts from 1 to {values.shape[1]}, got {kept!r}"
            )
        used = (torch.arange(values.shape[1], device=values.device) < kept).expand_as(values)
    values = values * used
    return torch.zeros_like(probabilities).scatter(1, order, values / values.sum(1, keepdim=True))


class ExpertMixture(torch.nn.Module):
    """Classifiers and a router: ``p(y | x) = sum_k r_k(x) p_k(y | x)``.

    Parameters
    ----------
    experts : sequence of torch.nn.Module
        K networks from examples to class scores.
    router : torch.nn.Module
        From examples, or from the features of `common`, to K scores, whose softmax is r.
    common : torch.nn.Module, optional
        A network that `flcore.simulation.split_features` can take apart. Its features are what
        the router gets; no gradient of the router reaches it.
    routing, kept, mass
        Of `routing_weights`, for the class scores.
    router_step : float
        Factor on gradients of the router's scores: how large its steps are beside the experts'.

    Attributes
    ----------
    chosen : (K,) Parameter
        1 for experts that may be used, 0 for those that are as good as absent.

    Examples
    --------
    >>> import torch
    >>> from flcore.nn import ExpertMixture
    >>> model = ExpertMixture([torch.nn.Linear(4, 3) for _ in range(2)], torch.nn.Linear(4, 2))
    >>> x = torch.zeros(5, 4)
    >>> model(x).shape, model(x, part="router").shape, model(x, part="experts").shape
    (torch.Size([5, 3]), torch.Size([5, 2]), torch.Size([5, 2, 3]))
    """

    def __init__(
        self,
        experts: Sequence[torch.nn.Module],
        router: torch.nn.Module,
        common: torch.nn.Module | None = None,
        *,
        routing: str = "top",
        kept: int = 1,
        mass: float = 0.9,
        router_step: float = 1.0,
    ) -> None:
        super().__init__()
        self.experts, self.router, self.common = torch.nn.ModuleList(experts), router, common
        self.chosen = torch.nn.Parameter(torch.ones(len(experts)))
        self.routing, self.kept, self.mass = routing, kept, mass
        self.router_step = router_step

    def forward(self, x: Tensor, part: str = "mixture") -> Tensor:
        """Give class scores.

        Parameters
        ----------
        x : (n, ...) Tensor
        part : {"mixture", "router", "experts", "common"}
            ``log p(y | x)``, (n, classes); scores of the router, (n, K); of each expert, (n, K,
            classes); of the common network, (n, classes).
        """
        if part == "common":
            assert self.common is not None
            return self.common(x)
        if part == "router":
            return self._route(x)
        scores = torch.stack([expert(x) for expert in self.experts], 1)
        if part == "experts":
            return scores
        absent = torch.where(self.chosen > 0, 0.0, -math.inf)
        probabilities = (self._route(x) + absent).softmax(1)
        weights = routing_weights(
            probabilities,
            self.routing,
            kept=self.kept,
            mass=self.mass,
            generator=torch.Generator(x.device).manual_seed(0),  # the same in every evaluation
        )
        return (weights.log()[:, :, None] + scores.log_softmax(2)).logsumexp(1)

    def _route(self, x: Tensor) -> Tensor:
        if self.common is not None:
            from flcore.simulation.models import split_features

            x = split_features(self.common)[0](x).detach()
        scores = self.router(x)
        if self.router_step == 1.0:
            return scores
        fixed = scores.detach()
        return fixed + self.router_step * (scores - fixed)


def generator_of(model: torch.nn.Module) -> np.random.Generator:
    """Give a generator that starts from the numbers of a network.

    What is drawn for networks beside it then depends on the run's seed, as they do.
    """
    crc = 0
    for p in model.parameters():
        crc = zlib.crc32(p.detach().numpy().tobytes(), crc)
    return np.random.default_rng(crc)


def copied(model: torch.nn.Module, rng: np.random.Generator) -> Any:
    """Copy a network."""
    return copy.deepcopy(model)


def shuffled(model: torch.nn.Module, rng: np.random.Generator) -> Any:
    """Copy a network, the numbers within each of its tensors in another order.

    Of random parameters, whatever they were drawn from, that makes others.
    """
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            order = torch.from_numpy(rng.permutation(p.numel()))
            p.copy_(p.reshape(-1)[order].view_as(p))
    return other


def linear(inputs: int, outputs: int, gain: float, rng: np.random.Generator) -> torch.nn.Linear:
    """Make a linear layer with weights from N(0, gain / inputs), and zero biases."""
    layer = torch.nn.Linear(inputs, outputs)
    draw = rng.standard_normal((outputs, inputs)) * math.sqrt(gain / inputs)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(draw))
        layer.bias.zero_()
    return layer

"""What an algorithm is: the few decisions in which federated algorithms differ.

The engine (`flcore.simulation`) owns the round: it draws the participants, runs their local
steps, moves the messages and sums them.  It asks the algorithm three questions on the way:

    client_begin(round)            how does one mini-batch gradient change a client's model?
    client_weight(examples)        how much does a client count in the mean?
    server_step(model, direction)  what does the server do with the aggregated update?

A model is a dict of named NumPy arrays here, so nothing in this package needs torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.errors import InvalidInputError

__all__ = ["Algorithm", "Parameters", "StepSpec", "local_steps", "named_views"]

Parameters = dict[str, np.ndarray]
"""A model, or a change of one: parameter name -> array."""


def named_views(vector: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> Parameters:
    """View consecutive pieces of one vector as the parameters that `shapes` names."""
    named, first = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        named[name] = vector[first : first + size].reshape(shape)
        first += size
    return named


@dataclass(frozen=True)
class StepSpec:
    """One client's local step in one round: ``x <- x - lr * (clip(g) + weight_decay * x)``.

    The decay is added after projection and clipping, so it is neither projected nor clipped.

    Parameters
    ----------
    lr : float
        Local learning rate of this round.
    weight_decay : float
    clip : float or None
        Largest Euclidean norm of the gradient over all parameters; None: no limit.
    project : callable or None
        Called with `x` and `g` before anything else, changes `g` in place; None: g as it is.
    """

    lr: float
    weight_decay: float = 0.0
    clip: float | None = None
    project: Callable[[Any, Any], None] | None = None


def local_steps(x: Any, gradients: Iterable[Callable[[Any], Any]], spec: StepSpec) -> int:
    """Run one client's local steps, one for each mini-batch, and return how many there were.

    Parameters
    ----------
    x : (d,) array or torch tensor, floating
        All parameters of the client's model in one vector; changed in place.
    gradients : iterable of functions
        One for each mini-batch in order; each maps `x` to its gradient, a (d,) vector of the
        same kind that this function may overwrite.
    spec : StepSpec

    Notes
    -----
    A step reads and writes the two vectors a handful of times; beside the forward and backward
    pass of the smallest network that is little.  NaN in a gradient passes through to `x`.
    """
    steps = 0
    for gradient in gradients:
        g = gradient(x)
        if spec.project is not None:
            spec.project(x, g)
        if spec.clip is not None:
            norm = math.sqrt(float(g @ g))
            if norm > spec.clip:
                g *= spec.clip / norm
        if spec.weight_decay:
            g += spec.weight_decay * x
        g *= spec.lr
        x -= g
        steps += 1
    return steps


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """Base of all algorithms: the options they share, and the questions they answer.

    An algorithm holds options only.  What changes during a run (models, control vectors) is kept
    by the engine, which is what lets a run be stopped and resumed.

    Parameters
    ----------
    local_lr : float
        Learning rate of the clients in round 0.
    lr_decay : float
        Factor on the local learning rate after every round.
    local_epochs : int
        Passes over a client's own data in each round it takes part in.
    batch_size : int
        Examples in a local mini-batch.  The last batch of an epoch may be smaller.
    weight_decay : float
        Coefficient of the decay added to each local gradient after clipping.
    clip : float or None
        Largest norm of a local gradient; None: no clipping.
    server_lr : float
        Step of the server along the aggregated update.
    weighting : {"examples", "uniform"}
        Whether a client counts by its number of examples (the FedAvg paper), or all count alike
        (most papers on client drift).  The two differ much when client sizes are skewed.
    """

    name: ClassVar[str]

    local_lr: float = 0.1
    lr_decay: float = 0.998
    local_epochs: int = 10
    batch_size: int = 10
    weight_decay: float = 1e-3
    clip: float | None = 10.0
    server_lr: float = 1.0
    weighting: str = "examples"

    def __post_init__(self) -> None:
        for option in ("local_lr", "lr_decay", "server_lr"):
            _check(option, getattr(self, option), lambda v: v > 0, "a number above 0")
        for option in ("local_epochs", "batch_size"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InvalidInputError(f"{option}: expected a whole number from 1, got {value!r}")
        _check("weight_decay", self.weight_decay, lambda v: v >= 0, "a number from 0")
        if self.clip is not None:
            _check("clip", self.clip, lambda v: v > 0, "a number above 0, or None for no clipping")
        if self.weighting not in ("examples", "uniform"):
            raise InvalidInputError(
                f'weighting: expected "examples" or "uniform", got {self.weighting!r}'
            )

    @abstractmethod
    def client_begin(self, round: int) -> StepSpec:
        """Give the local step that clients take in `round`, counted from 0."""

    @abstractmethod
    def client_weight(self, examples: int) -> float:
        """Give the weight of a client with that many examples; only ratios matter."""

    @abstractmethod
    def server_step(self, model: Parameters, direction: Parameters) -> Parameters:
        """Give the next global model from this one and the aggregated update."""

    def to_dict(self) -> dict[str, Any]:
        """Name and options as plain values, for configuration files."""
        return {"name": self.name, **asdict(self)}


def _check(option: str, value: Any, accept: Callable[[float], bool], expected: str) -> None:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and accept(value)):
        raise InvalidInputError(f"{option}: expected {expected}, got {value!r}")

"""What passes between an algorithm and the engine that runs it.

Server and clients keep named vectors and plain values; messages are named arrays. All of it can be
written to a file, which is what lets a run be stopped and resumed, and a client live in another
process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore.algorithms.layout import Layout, Vector
from flcore.algorithms.step import StepSpec
from flcore.errors import InvalidInputError
from flcore.ops import combine

if TYPE_CHECKING:
    from flcore.algorithms.tools import ModelTools

__all__ = [
    "Arrival",
    "Arrivals",
    "Client",
    "DataView",
    "LocalResult",
    "LocalWork",
    "Payload",
    "Server",
]

Payload = dict[str, Any]
"""A message: name -> array or number."""


@dataclass
class Server:
    """The global model and what else the server keeps.

    Parameters
    ----------
    model : (d,) array
        The global model w, all groups of it.
    layout : Layout
    population : int
        Number of all clients m.
    participants : int
        Number of clients drawn in each round S.
    state : dict
        Further vectors, by name, and plain values that JSON can hold.
    round : int
        The round being run, from 0.
    tools : ModelTools, optional
        What the server can do with a model; None where there is no model to run.
    """

    model: Vector
    layout: Layout
    population: int
    participants: int
    state: dict[str, Any] = field(default_factory=dict)
    round: int = 0
    tools: ModelTools | None = None

    def __getitem__(self, name: str) -> Any:
        return self.state[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.state[name] = value

    def zeros(self) -> Vector:
        """Give a vector of zeros as long as the model."""
        return np.zeros_like(self.model)


@dataclass
class Client:
    """One participant of one round.

    Parameters
    ----------
    id : int
        From 0 to `population` - 1.
    round : int
        From 0.
    examples : int
        Number of its training examples n_i.
    layout : Layout
    population, participants : int
        Numbers of all clients m and of those in a round S.
    state : dict
        What the client keeps from one participation to the next: vectors and plain values.
    rng : numpy.random.Generator
        For this client in this round.
    initial : (d,) array
        The model that the run started from, which every client knows.
    tools : ModelTools, optional
        What it can do with a model; None where there is no model to run.
    indices : (n_i,) int64 array
        Its examples in the training data.
    """

    id: int
    round: int
    examples: int
    layout: Layout
    population: int
    participants: int
    state: dict[str, Any]
    rng: np.random.Generator
    initial: Vector
    tools: ModelTools | None = None
    indices: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def keep(self, name: str) -> Vector:
        """Give a vector that the client keeps; zeros at first."""
        if name not in self.state:
            self.state[name] = np.zeros_like(self.initial)
        return self.state[name]


@dataclass
class DataView:
    """The mini-batches of one client in one round.

    Parameters
    ----------
    order : (total,) int64 array
        Positions in `x` of the examples of all mini-batches, one batch after another.
    sizes : list of int
        Examples in each mini-batch.
    x, y : arrays or tensors, optional
        Examples and labels; None: the training data of the run.
    """

    order: np.ndarray
    sizes: list[int]
    x: Any = None
    y: Any = None

    @classmethod
    def epochs(
        cls, indices: np.ndarray, epochs: int, batch_size: int, rng: np.random.Generator
    ) -> DataView:
        """Pass `epochs` times over the examples, in an order drawn anew for each pass."""
        n = len(indices)
        order = [indices[rng.permutation(n)] for _ in range(epochs)]
        sizes = [min(batch_size, n - first) for first in range(0, n, batch_size)]
        return cls(np.concatenate(order), sizes * epochs)

    def first(self, steps: int) -> DataView:
        """Give the first so many mini-batches."""
        sizes = self.sizes[:steps]
        return DataView(self.order[: sum(sizes)], sizes, self.x, self.y)


@dataclass
class LocalWork:
    """What a client is about to do.

    Parameters
    ----------
    start : (d,) array
        Where its model starts.
    spec : StepSpec
    aux : dict
        What the extra terms of the loss need, the same for all steps: arrays by name.
    """

    start: Vector
    spec: StepSpec
    aux: dict[str, Any] = field(default_factory=dict)


@dataclass
class LocalResult:
    """What came of it.

    Parameters
    ----------
    work : LocalWork
        What was to be done.
    end : (d,) array
        The model after it.
    steps : int
        Local steps taken K_i.
    loss : float
        Mean of the mini-batches' losses.
    """

    work: LocalWork
    end: Vector
    steps: int
    loss: float

    @property
    def start(self) -> Vector:
        """The model before."""
        return self.work.start

    @property
    def lr(self) -> float:
        """Learning rate of the steps."""
        return self.work.spec.lr

    @property
    def update(self) -> Vector:
        """The change u_i = end - start."""
        return self.end - self.work.start


@dataclass
class Arrival:
    """A message that the server has, and whose it is.

    Parameters
    ----------
    client : int
    examples : int
        Number of the client's training examples n_i.
    payload : dict
        Arrays and numbers by name; "update" may be a packet instead of an array.
    """

    client: int
    examples: int
    payload: Payload

    def __getitem__(self, name: str) -> Any:
        return self.payload[name]


class Arrivals(Sequence[Arrival]):
    """The messages of one round."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._arrivals = list(arrivals)

    def __len__(self) -> int:
        return len(self._arrivals)

    def __getitem__(self, index: Any) -> Any:
        return self._arrivals[index]

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self._arrivals)

    def sum(self, weights: Sequence[float], name: str = "update") -> Vector:
        """Sum of the arrays called `name`, each times its weight, of the messages that have one."""
        arrays, weights = self.having(name, weights)
        return combine(arrays, weights, nonfinite="propagate")

    def mean(self, weights: Sequence[float], name: str = "update") -> Vector:
        """Weighted mean of the same; of the updates, an engine may put a robust rule here."""
        arrays, weights = self.having(name, weights)
        return combine(arrays, shares(weights), nonfinite="propagate")

    def updates(self) -> list[Vector]:
        """Give the updates themselves, for a method that looks at each or has a rule of its own."""
        return [combine([a["update"]], [1.0], nonfinite="propagate") for a in self]

    def having(self, name: str, weights: Sequence[float]) -> tuple[list[Any], list[float]]:
        """Give the arrays called `name`, and the weights of the messages that have one."""
        held = [
            (arrival[name], float(weight))
            for arrival, weight in zip(self, weights, strict=True)
            if name in arrival.payload
        ]
        return [array for array, _ in held], [weight for _, weight in held]


def shares(weights: Sequence[float]) -> list[float]:
    """Give the weights divided by their sum."""
    total = float(sum(weights))
    if not total > 0:
        raise InvalidInputError(f"weights: expected a sum above 0, got {list(weights)!r}")
    return [float(weight) / total for weight in weights]


def plain(state: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Part a state into its arrays and its plain values, for a file."""
    arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
    return arrays, {k: v for k, v in state.items() if k not in arrays}

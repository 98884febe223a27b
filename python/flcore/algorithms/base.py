"""What an algorithm is: the few decisions in which federated algorithms differ.

The engine (`flcore.simulation`) owns the round: it moves the messages, runs the local steps and
counts the bytes.  It asks the algorithm, in this order:

    one_time_exchange(server, clients)   what is told once, before the first round?
    select(server, rng)                  who takes part?
    downlink(server, client)             what is a participant sent?
    client_begin(payload, client)        where does it start, and how does a gradient change it?
    data_view(client)                    which examples does each of its steps see?
    batch_loss()                         what does it minimise beside the cross-entropy?
    client_end(result, client)           what does it keep, and what does it send?
    weights(arrivals)                    how much does each message count in the mean?
    server_step(server, mean, arrivals)  what does the server do with it?

What changes during a run is kept by the engine (`Server.state`, `Client.state`); an algorithm holds
options only.  Models are vectors of NumPy here, and nothing in this package needs torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms.layout import Layout, Parameters, Vector, named_views
from flcore.algorithms.state import (
    Arrivals,
    Client,
    DataView,
    LocalResult,
    LocalWork,
    Payload,
    Server,
)
from flcore.algorithms.step import CLIP_MODES, StepSpec, local_steps
from flcore.algorithms.tools import BatchLoss
from flcore.errors import InvalidInputError
from flcore.ops import combine

__all__ = ["Algorithm", "Parameters", "StepSpec", "check_number", "local_steps", "named_views"]


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """Base of all algorithms: the options they share, and the questions they answer.

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
    clip_mode : {"reference", "full"}
        See `StepSpec`.
    local_momentum : float
        Momentum of the local steps, which starts anew in every round.
    relaxation : float
        beta: clients start from ``w + beta (w - x_last)``, x_last being where they ended last time,
        at first the initial model (an option of the FL-Simulator code base for any method).
    server_lr : float
        Step of the server along the aggregated update.
    weighting : {"examples", "uniform"}
        Whether a client counts by its number of examples (the FedAvg paper), or all count alike
        (most papers on client drift).  The two differ much when client sizes are skewed.
    selection : {"fixed", "bernoulli"}
        Whether a round has exactly S clients, drawn without replacement, or every client takes part
        with probability S / m, drawn again if that leaves none.
    """

    name: ClassVar[str]
    evaluation: ClassVar[str] = "global"
    """What is tested: the "global" model, or each client's own ("personal") on its own data."""
    statistics: ClassVar[bool] = False
    """Whether running statistics of the model (BatchNorm) are taken care of."""
    counts_absent: ClassVar[bool] = False
    """Whether `server_step` is called in rounds in which nobody answers, too."""

    local_lr: float = 0.1
    lr_decay: float = 0.998
    local_epochs: int = 10
    batch_size: int = 10
    weight_decay: float = 1e-3
    clip: float | None = 10.0
    clip_mode: str = "reference"
    local_momentum: float = 0.0
    relaxation: float = 0.0
    server_lr: float = 1.0
    weighting: str = "examples"
    selection: str = "fixed"

    def __post_init__(self) -> None:
        for option in ("local_lr", "lr_decay", "server_lr"):
            check_number(option, getattr(self, option), lambda v: v > 0, "a number above 0")
        for option in ("local_epochs", "batch_size"):
            check_whole(option, getattr(self, option))
        for option in ("weight_decay", "relaxation"):
            check_number(option, getattr(self, option), lambda v: v >= 0, "a number from 0")
        check_number(
            "local_momentum", self.local_momentum, lambda v: 0 <= v < 1, "a number from 0 below 1"
        )
        if self.clip is not None:
            check_number(
                "clip", self.clip, lambda v: v > 0, "a number above 0, or None for no clipping"
            )
        check_choice("clip_mode", self.clip_mode, CLIP_MODES)
        check_choice("weighting", self.weighting, ("examples", "uniform"))
        check_choice("selection", self.selection, ("fixed", "bernoulli"))

    # ---- what is asked ---------------------------------------------------------------------------

    def prepare_model(self, model: Any) -> Any:
        """Give the network, a `torch.nn.Module`, as the method wants it; by default as it is."""
        return model

    def architecture(self, client: int) -> str | None:
        """Name the network of a client, see `flcore.simulation.MODELS`; None: the run's."""
        return None

    def layout(self, layout: Layout) -> Layout:
        """Give the model's layout with the groups that its tensors belong to."""
        return layout

    def server_begin(self, server: Server) -> None:  # noqa: B027
        """Put into `server.state` what the server keeps beside the model."""

    def one_time_exchange(
        self, server: Server, clients: Sequence[Client]
    ) -> tuple[Sequence[Payload], Sequence[Payload]] | None:
        """Let all clients and the server tell each other something before the first round.

        Returns
        -------
        (list of Payload, list of Payload) or None
            The messages that went up and down; None: nothing was sent.
        """
        return None

    def select(self, server: Server, rng: np.random.Generator) -> list[int]:
        """Give the clients of this round, in increasing order."""
        m, s = server.population, server.participants
        if self.selection == "fixed":
            return sorted(rng.choice(m, s, replace=False).tolist())
        while not (drawn := np.flatnonzero(rng.random(m) < s / m)).size:
            pass
        return drawn.tolist()

    def downlink(self, server: Server, client: int) -> Payload:
        """Give what `client` is sent; "model" holds the shared tensors of the global model."""
        return {"model": server.layout.take(server.model)}

    def request(self, payload: Payload, client: Client) -> Payload | None:
        """Give what a client asks for when it has seen the downlink; None: nothing."""
        return None

    def reply(self, server: Server, request: Payload) -> Payload:
        """Give what the server adds to the downlink when asked."""
        return {}

    @abstractmethod
    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Give where a client starts, and its local step."""

    def data_view(self, client: Client) -> DataView:
        """Give the mini-batches of a client: `local_epochs` passes in random order."""
        return DataView.epochs(client.indices, self.local_epochs, self.batch_size, client.rng)

    def batch_loss(self) -> BatchLoss | None:
        """Give the loss of a mini-batch; None: the run's own, its mean over the examples."""
        return None

    @abstractmethod
    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Give what a client sends, "update" being the change of its shared tensors.

        A message without an "update" does not enter the mean.
        """

    def client_weight(self, examples: int) -> float:
        """Give the weight of a client with that many examples; only ratios matter."""
        return float(examples) if self.weighting == "examples" else 1.0

    def weights(self, arrivals: Arrivals) -> list[float]:
        """Give the weight of each message in the mean."""
        return [self.client_weight(arrival.examples) for arrival in arrivals]

    @abstractmethod
    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Change the server's model and state.

        Parameters
        ----------
        server : Server
        mean : (d,) array
            Weighted mean of the messages' "update".
        arrivals : Arrivals
            The messages themselves.
        """

    # ---- what most of them share -----------------------------------------------------------------

    def tested(self, population: int) -> Sequence[int]:
        """Name the clients whose models are tested, where `evaluation` is "personal"."""
        return range(population)

    def lr(self, round: int) -> float:
        """Give the local learning rate of a round."""
        return self.local_lr * self.lr_decay**round

    def own_model(self, payload: Payload, client: Client) -> Vector:
        """Give the whole model of a client: what it was sent, and the tensors that it keeps."""
        model = client.layout.put(client.initial, payload["model"])
        own = client.state.get("personal")
        return model if own is None else client.layout.put(model, own, "personal")

    def start(self, payload: Payload, client: Client) -> Vector:
        """Give the model that a client starts from."""
        model = self.own_model(payload, client)
        if self.relaxation:
            last = client.state.get("last", client.initial)
            model = model + np.asarray(self.relaxation, model.dtype) * (model - last)
        return model

    def spec(self, round: int, *, decay: float = 0.0, **numbers: Any) -> StepSpec:
        """Give the plain local step of a round, with `decay` added to the weight decay."""
        return StepSpec(
            **{
                "lr": self.lr(round),
                "decay": self.weight_decay + decay,
                "clip": self.clip,
                "clip_mode": self.clip_mode,
                "momentum": self.local_momentum,
                **numbers,
            }
        )

    def sent(self, result: LocalResult, client: Client) -> Vector:
        """Give the update of the shared tensors, and keep what stays with the client."""
        if client.layout.names("personal"):
            client.state["personal"] = client.layout.take(result.end, "personal").copy()
        if self.relaxation:
            client.state["last"] = result.end.copy()
        return client.layout.take(result.update)

    def move(self, server: Server, direction: Vector, step: float = 1.0) -> None:
        """Add `step` times a change of the shared tensors to the global model."""
        shared = server.layout.take(server.model)
        moved = combine([shared, direction], [1.0, step], nonfinite="propagate")
        server.model = server.layout.put(server.model, moved)

    def to_dict(self) -> dict[str, Any]:
        """Name and options as plain values, as JSON gives them back."""
        options = asdict(self).items()
        return {
            "name": self.name,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in options},
        }


def check_number(option: str, value: Any, accept: Callable[[float], bool], expected: str) -> None:
    """Raise InvalidInputError unless `value` is a finite number that is accepted."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and accept(value)):
        raise InvalidInputError(f"{option}: expected {expected}, got {value!r}")


def check_whole(option: str, value: Any, least: int = 1) -> None:
    """Raise InvalidInputError unless `value` is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InvalidInputError(f"{option}: expected a whole number from {least}, got {value!r}")


def check_choice(option: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InvalidInputError unless `value` is one of `choices`."""
    if value not in choices:
        known = " or ".join(f'"{choice}"' for choice in choices)
        raise InvalidInputError(f"{option}: expected {known}, got {value!r}")

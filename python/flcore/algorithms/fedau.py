"""FedAU: clients weighted by how long they stay away, for unknown rates of participation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.aggregation import ParticipationWeights
from flcore.algorithms.base import check_choice, check_whole
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import Arrivals, Client, LocalResult, LocalWork, Payload, Server
from flcore.errors import InvalidInputError

__all__ = ["FedAU"]

ESTIMATES = ("intervals", "known", "none")


@dataclass(frozen=True, kw_only=True)
class FedAU(FedAvg):
    r"""Adaptive weights for unknown participation (Wang, Ji, ICLR 2024, arXiv 2306.03401).

    Local steps are those of FedAvg.  Client n, one of N, has a weight :math:`\omega_n`, the mean of
    the intervals between the rounds it took part in, each cut at K rounds.  The server takes

    .. math::
        w^{t+1} = w^t + \frac{\eta_g}{N} \sum_{n \in S_t} \omega_n^t u_n

    and then, for **every** client, with :math:`\omega_n = 1, M_n = S_n = 0` at first,

    .. math::
        S_n \leftarrow S_n + 1; \quad \text{if } n \in S_t \text{ or } S_n = K: \;
        \omega_n \leftarrow \frac{M_n \omega_n + S_n}{M_n + 1},\;
        M_n \leftarrow M_n + 1,\; S_n \leftarrow 0 .

    The divisor is the whole population: a client that comes at rate p then counts, on average,
    :math:`p \, \omega_n = 1` times.  Rounds without participants leave the model as it is and count
    in the intervals.

    Parameters
    ----------
    cutoff : int or None
        K; None: none (the authors' configuration has 100,000).  A few times 1 / (smallest rate)
        limits the variance; ``cutoff=1`` is the plain average over all N.
    rates : tuple of float or None
        With ``selection="bernoulli"``: the rate of each client in place of S / m for all, as in
        experiments on skewed participation.  A round may then have nobody.
    estimate : {"intervals", "known", "none"}
        :math:`\omega_n` from the intervals; or 1 / `rates`; or the mean over the participants,
        which is FedAvg: what the paper compares with.

    Notes
    -----
    A client that never came has weight 1 until K rounds have passed, and K from then on; a rare
    client's update counts up to K / N times: clip where that is too much.
    """

    name: ClassVar[str] = "fedau"
    counts_absent: ClassVar[bool] = True

    weighting: str = "uniform"
    cutoff: int | None = None
    rates: tuple[float, ...] | None = None
    estimate: str = "intervals"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutoff is not None:
            check_whole("cutoff", self.cutoff)
        check_choice("estimate", self.estimate, ESTIMATES)
        if self.estimate == "known" and self.rates is None:
            raise InvalidInputError('rates: expected the rate of each client for estimate="known"')
        if self.rates is not None:
            object.__setattr__(self, "rates", tuple(self.rates))
            if not all(0 < rate <= 1 for rate in self.rates):
                raise InvalidInputError(
                    f"rates: expected numbers above 0 up to 1, got {self.rates}"
                )
            if self.selection != "bernoulli":
                raise InvalidInputError(
                    f'rates: expected selection="bernoulli", got {self.selection!r}'
                )

    def server_begin(self, server: Server) -> None:
        """Start with no interval of anybody."""
        if self.rates is not None and len(self.rates) != server.population:
            raise InvalidInputError(
                f"rates: expected one for each of {server.population} clients, "
                f"got {len(self.rates)}"
            )
        self._keep(server, ParticipationWeights(server.population, self.cutoff))

    def select(self, server: Server, rng: np.random.Generator) -> list[int]:
        """Draw every client at its own rate, if there are rates; perhaps nobody."""
        if self.rates is None:
            return super().select(server, rng)
        return np.flatnonzero(rng.random(server.population) < np.array(self.rates)).tolist()

    def downlink(self, server: Server, client: int) -> Payload:
        """Send w, and the weight that the client's update will have."""
        weight = 1.0
        if self.estimate == "intervals":
            weight = float(server["omega"][client])
        elif self.rates is not None and self.estimate == "known":
            weight = 1 / self.rates[client]
        return super().downlink(server, client) | {"weight": weight}

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Start from the global model and take plain SGD steps."""
        client.state["weight"] = payload["weight"]
        return super().client_begin(payload, client)

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_n and its weight."""
        return super().client_end(result, client) | {"weight": client.state.pop("weight")}

    def weights(self, arrivals: Arrivals) -> list[float]:
        """Give omega_n."""
        return [arrival["weight"] for arrival in arrivals]

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Add ``server_lr / N sum omega_n u_n``, then record who came."""
        clients = [arrival.client for arrival in arrivals]
        if clients:
            divisor = len(clients) if self.estimate == "none" else server.population
            self.move(server, mean, self.server_lr * (sum(self.weights(arrivals)) / divisor))
        participation = ParticipationWeights(server.population, self.cutoff)
        participation.load_state_dict({name: server[name] for name in participation.state_dict()})
        self._keep(server, participation.update(clients))

    def _keep(self, server: Server, participation: ParticipationWeights) -> None:
        server.state |= participation.state_dict() | {"omega": participation.weights.copy()}

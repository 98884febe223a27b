"""Router ensemble: every client trains its own expert, once; a router learns whom to ask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms.base import check_choice, check_number, check_whole
from flcore.algorithms.ddome import expert
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Layout, Vector
from flcore.algorithms.state import (
    Arrivals,
    Client,
    DataView,
    LocalResult,
    LocalWork,
    Payload,
    Server,
)
from flcore.algorithms.tools import BatchLoss
from flcore.errors import InvalidInputError

__all__ = ["RouterEnsemble"]


@dataclass(frozen=True, kw_only=True)
class RouterEnsemble(FedAvg):
    r"""One-shot ensemble of experts behind a router.

    After Decentralized Diffusion Models (CVPR 2025, arXiv 2501.05450), where the mean of experts
    that never met, weighted by the probability that x is of their part of the data, is the model of
    all data.  For classes this is

    .. math:: p(y | x) = \sum_k r_k(x) \, p_k(y | x), \qquad r_k(x) = p(k | x) .

    In the first round all K clients take part: each trains expert k alone, from its own random
    start, and uploads it.  All other rounds are FedAvg on the router r, the loss of client k being
    :math:`- \log r_k(x)`: clients that count by their examples give the parts their true
    frequencies.

    Parameters
    ----------
    parts : int
        K, the number of clients.
    expert_epochs : int
        Passes over a client's data that train its expert.
    routing : {"top", "full", "nucleus", "sample"}
        Which experts an input asks, see `flcore.nn.routing_weights`: the `kept` most probable, all,
        as many as have the probability `mass` together, or one drawn at random.
    kept : int
        At "top"; the paper recommends 1.
    mass : float
        At "nucleus".

    Notes
    -----
    The router is the given network with one output for each part; its parameters, like those of
    the experts but the first, are those of the given network in another order.  An expert that
    never arrived stays random: clients must not drop out of the first round.
    """

    name: ClassVar[str] = "router-ensemble"

    parts: int = 5
    expert_epochs: int = 50
    routing: str = "top"
    kept: int = 1
    mass: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("parts", "expert_epochs", "kept"):
            check_whole(option, getattr(self, option))
        if self.kept > self.parts:
            raise InvalidInputError(f"kept: expected at most parts={self.parts}, got {self.kept}")
        check_number("mass", self.mass, lambda v: 0 < v <= 1, "a number above 0 up to 1")
        check_choice("routing", self.routing, ("top", "full", "nucleus", "sample"))

    def prepare_model(self, model: Any) -> Any:
        """Make K experts and a router of the given network."""
        from torch.nn import Sequential

        from flcore.nn import _experts as nn
        from flcore.simulation.models import split_features

        rng = nn.generator_of(model)
        body, head = split_features(nn.shuffled(model, rng))
        width: Any = head.in_features
        router = Sequential(body, nn.linear(width, self.parts, 1.0, rng))
        experts = [model, *(nn.shuffled(model, rng) for _ in range(self.parts - 1))]
        return nn.ExpertMixture(
            experts, router, routing=self.routing, kept=self.kept, mass=self.mass
        )

    def layout(self, layout: Layout) -> Layout:
        """Share the router, and keep the experts at the server."""
        groups = {"router": "shared", "experts": "server"}
        return layout.grouped(lambda name: groups.get(name.split(".")[0], "frozen"))

    def batch_loss(self) -> BatchLoss:
        """Give the loss of the client's expert, or of the router."""

        def loss(forward: Any, x: Any, y: Any, weight: Any, aux: dict[str, Any]) -> Any:
            if aux["alone"]:
                log_p = forward(x, part="experts").log_softmax(2)
                log_p = log_p.gather(2, y[:, None, None].expand(-1, log_p.shape[1], 1))[:, :, 0]
            else:
                log_p = forward(x, part="router").log_softmax(1)
            return -(weight * (log_p * aux["own"]).sum(1)).sum()

        return loss

    def server_begin(self, server: Server) -> None:
        """Check that there is one client for each part."""
        if server.population != self.parts:
            raise InvalidInputError(
                f"parts: expected as many as clients, {server.population}, got {self.parts}"
            )

    def select(self, server: Server, rng: np.random.Generator) -> list[int]:
        """Take all clients in the first round."""
        if server.round == 0:
            return list(range(server.population))
        return super().select(server, rng)

    def downlink(self, server: Server, client: int) -> Payload:
        """Send the router; nothing in the first round, in which clients work alone."""
        if server.round == 0:
            return {"model": np.empty(0, np.float32)}
        return super().downlink(server, client)

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Train the client's expert in the first round, and the router in all others."""
        alone = client.round == 0
        trained = f"experts.{client.id}." if alone else "router."
        frozen = np.ones(client.layout.numel, bool)
        for name, piece in client.layout.slices.items():
            frozen[piece] = not name.startswith(trained)
        own = np.zeros(self.parts, np.float32)
        own[client.id] = 1
        start = client.initial if alone else self.start(payload, client)
        spec = replace(self.spec(client.round), frozen=frozen)
        return LocalWork(start, spec, {"own": own, "alone": alone})

    def data_view(self, client: Client) -> DataView:
        """Give `expert_epochs` passes in the first round."""
        epochs = self.expert_epochs if client.round == 0 else self.local_epochs
        return DataView.epochs(client.indices, epochs, self.batch_size, client.rng)

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send the expert, or the change of the router."""
        if result.work.aux["alone"]:
            return {"expert": expert(client.layout, client.id).take(result.end)}
        return {"update": self.sent(result, client)}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Keep the experts, or move the router."""
        if server.round:
            return super().server_step(server, mean, arrivals)
        for arrival in arrivals:
            layout = expert(server.layout, arrival.client)
            server.model = layout.put(server.model, arrival["expert"])
        return None

"""DDOME: experts for parts of the population, and a router that picks some for each client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms.base import check_choice, check_number, check_whole
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
from flcore.algorithms.step import local_steps
from flcore.algorithms.tools import BatchLoss
from flcore.errors import InvalidInputError

__all__ = ["DDOME", "best_experts", "disjoint_clients"]

Exchange = tuple[Sequence[Payload], Sequence[Payload]]


@dataclass(frozen=True, kw_only=True)
class DDOME(FedAvg):
    r"""Decentralised mixture of experts (NeurIPS 2025, arXiv 2306.08586).

    The model is M experts f(x; W_j), a router :math:`g(\hat x; W_r) \in R^M`, a softmax, and a
    *common* expert, trained by the server on its own examples before the first round and frozen,
    whose features are :math:`\hat x`.  M clients with classes as disjoint as can be are *anchors*,
    anchor q of expert q.  A round has :math:`N_a` anchors, who are sent the router and their
    expert, and :math:`N_c` others, who are sent the router, answer with

    .. math:: e_s = \mathrm{top}_K \sum_i g(\hat x_i; W_r)

    over their examples, and are sent these K experts.  Local steps go along the gradient of

    .. math::
        - \log \sum_{j \in e_s} \tilde g_j(\hat x) \, p(y | x; W_j), \qquad
        \tilde g_j = g_j / \sum_{l \in e_s} g_l ,

    an anchor's along that of :math:`- \log p(y | x; W_q) - \log g_q(\hat x)`.  The server averages
    the router over all, each expert over those who had it; an expert that nobody had stays as it
    is.  Clients that are served choose their K experts in the same way, without labels; for each
    example the one of them with the largest g speaks.

    Parameters
    ----------
    experts, kept : int
        M and K.
    anchor_share : float
        :math:`N_a` as a share of the participants, at most M; 0: no anchors.
    unseen : int
        So many clients, the last ones, never take part. They are whom the model is tested on, each
        on its own classes; 0: all are.
    hidden : int
        Hidden units of the router.
    router_step : float
        Learning rate of the router as a share of the experts'.
    renormalise : bool
        False: g in the place of its renormalised values.
    mixture : {"probabilities", "logits"}
        What is averaged: "logits" is the cross-entropy of the mean of the experts' class scores.
    common_epochs : int
        Of the common expert's training. If the server has no examples (`server_examples` of a run),
        its parameters stay random, and its features tell inputs apart less well.
    fresh : bool
        Whether experts start from random numbers of their own: those of the given network in
        another order. False: all start from the given network, which may be trained.

    Notes
    -----
    The paper's text leaves open what `renormalise` and `mixture` choose.  Beside the router, which
    is the "update" of a message, experts travel uncompressed.  After each round the server's state
    "counts" tells how many clients had each expert.  The loss is of softmax in any case.
    """

    name: ClassVar[str] = "ddome"
    evaluation: ClassVar[str] = "personal"

    experts: int = 5
    kept: int = 2
    anchor_share: float = 0.5
    unseen: int = 0
    hidden: int = 32
    router_step: float = 0.1
    renormalise: bool = True
    mixture: str = "probabilities"
    common_epochs: int = 20
    fresh: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (
            ("experts", 1),
            ("kept", 1),
            ("unseen", 0),
            ("hidden", 1),
            ("common_epochs", 0),
        ):
            check_whole(option, getattr(self, option), least)
        if self.kept > self.experts:
            raise InvalidInputError(
                f"kept: expected at most experts={self.experts}, got {self.kept}"
            )
        share = "a share from 0 to 1"
        check_number("anchor_share", self.anchor_share, lambda v: 0 <= v <= 1, share)
        check_number("router_step", self.router_step, lambda v: v > 0, "a number above 0")
        check_choice("mixture", self.mixture, ("probabilities", "logits"))
        check_choice("selection", self.selection, ("fixed",))

    # ---- model -----------------------------------------------------------------------------------

    def prepare_model(self, model: Any) -> Any:
        """Make M experts, a router and a common expert of the given network."""
        from torch.nn import ReLU, Sequential

        from flcore.nn import _experts as nn
        from flcore.simulation.models import split_features

        rng = nn.generator_of(model)
        make = nn.shuffled if self.fresh else nn.copied
        others = [make(model, rng) for _ in range(self.experts)]
        width: Any = split_features(model)[1].in_features
        router = Sequential(
            nn.linear(width, self.hidden, 2.0, rng),
            ReLU(),
            nn.linear(self.hidden, self.experts, 1.0, rng),
        )
        experts = [model, *others[1:]]
        return nn.ExpertMixture(experts, router, others[0], router_step=self.router_step)

    def layout(self, layout: Layout) -> Layout:
        """Share the router; the server keeps the experts, and sends some."""
        groups = {"router": "shared", "experts": "server"}
        return layout.grouped(lambda name: groups.get(name.split(".")[0], "frozen"))

    def batch_loss(self) -> BatchLoss:
        """Give the loss of the mixture, with the router's for anchors."""
        renormalise, probabilities = self.renormalise, self.mixture == "probabilities"

        def loss(forward: Any, x: Any, y: Any, weight: Any, aux: dict[str, Any]) -> Any:
            router, scores = forward(x, part="router"), forward(x, part="experts")
            log_g, here = router.log_softmax(1), aux["chosen"].log()  # -inf for absent experts
            log_share = (router + here).log_softmax(1)
            if not renormalise:
                log_share = log_share.where(aux["anchor"] > 0, log_g + here)
            if probabilities:
                log_p = (log_share[:, :, None] + scores.log_softmax(2)).logsumexp(1)
            else:
                log_p = (log_share.exp()[:, :, None] * scores).sum(1).log_softmax(1)
            routed = aux["anchor"] * (log_g * aux["chosen"]).sum(1)
            return -(weight * (log_p.gather(1, y[:, None])[:, 0] + routed)).sum()

        return loss

    # ---- before the first round ------------------------------------------------------------------

    def server_begin(self, server: Server) -> None:
        """Check that somebody is left who takes part."""
        if self.unseen >= server.population:
            raise InvalidInputError(
                f"unseen: expected fewer than the {server.population} clients, got {self.unseen}"
            )

    def one_time_exchange(self, server: Server, clients: Sequence[Client]) -> Exchange | None:
        """Name the anchors by what classes clients have, and give all the common expert."""
        if server.tools is None:
            return None
        up: list[Payload] = []
        if self.anchor_share:
            seen = clients[: len(clients) - self.unseen]
            if len(seen) <= self.experts:
                raise InvalidInputError(
                    f"experts: expected fewer than the {len(seen)} clients that take part, each "
                    f"having an anchor, got {self.experts}"
                )
            classes = server.tools.classes
            tools: list[Any] = [client.tools for client in seen]
            counts = [np.bincount(tool.y, minlength=classes) for tool in tools]
            server["anchors"] = disjoint_clients(np.stack(counts), self.experts)
            up = [{"classes": count} for count in counts]
        if not len(server.tools.x) or not self.common_epochs:
            return up, []
        server.model = self._with_common(server)
        common = server.layout.take(server.model, "frozen")
        return up, [{"common": common}] * len(clients)

    def _with_common(self, server: Server) -> Vector:
        """Train the common expert on the server's examples."""
        import torch

        tools: Any = server.tools
        rng = np.random.default_rng(0)
        view = DataView.epochs(np.arange(len(tools.x)), self.common_epochs, self.batch_size, rng)
        batches = np.split(view.order, np.cumsum(view.sizes)[:-1])

        def gradient(x: Any, k: int) -> Any:
            point = x[0].detach().requires_grad_()
            scores = tools.forward(tools.x[batches[k]], point, part="common")
            loss = torch.nn.functional.cross_entropy(scores, tools.y[batches[k]])
            return torch.autograd.grad(loss, point)[0][None]

        rows = torch.from_numpy(server.model.copy())[None]
        local_steps(rows, gradient, [self.spec(0)], [len(batches)])
        only = server.layout.grouped(lambda n: "shared" if n.startswith("common.") else "frozen")
        return only.put(server.model, only.take(rows[0].numpy()))

    # ---- a round ---------------------------------------------------------------------------------

    def select(self, server: Server, rng: np.random.Generator) -> list[int]:
        """Draw N_a anchors and N_c others."""
        anchors = server.state.get("anchors", [])
        others = [i for i in range(server.population - self.unseen) if i not in anchors]
        n = min(round(self.anchor_share * server.participants), len(anchors))
        drawn = rng.choice(anchors, n, replace=False).tolist() if n else []
        rest = min(server.participants - n, len(others))
        return sorted(drawn + rng.choice(others, rest, replace=False).tolist())

    def downlink(self, server: Server, client: int) -> Payload:
        """Send the router, and an anchor its expert."""
        payload = super().downlink(server, client)
        if client in server.state.get("anchors", []):
            expert = server["anchors"].index(client)
            payload |= {"anchor": expert, **self._experts(server, [expert])}
        return payload

    def request(self, payload: Payload, client: Client) -> Payload | None:
        """Ask for K experts, unless it is an anchor."""
        if "anchor" in payload:
            return None
        import torch

        model = client.layout.put(client.initial, payload["model"])
        tools: Any = client.tools
        with torch.no_grad():
            g = tools.forward(tools.x, torch.from_numpy(model), part="router").softmax(1)
        return {"experts": np.array(best_experts(g.numpy(), self.kept))}

    def reply(self, server: Server, request: Payload) -> Payload:
        """Send the experts that were asked for."""
        return self._experts(server, request["experts"].tolist())

    def own_model(self, payload: Payload, client: Client) -> Vector:
        """Give a model with the router and the experts that a client was sent."""
        model = client.layout.put(client.initial, payload["model"])
        chosen = np.zeros(self.experts, np.float32)
        for j in range(self.experts):
            if f"expert{j}" in payload:
                model = expert(client.layout, j).put(model, payload[f"expert{j}"])
                chosen[j] = 1
        client.layout.named(model)["chosen"][:] = chosen
        return model

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Train the router and the experts that were sent."""
        work = super().client_begin(payload, client)
        chosen = client.layout.named(work.start)["chosen"].copy()
        trained = {f"experts.{j}" for j in np.flatnonzero(chosen)} | {"router"}
        frozen = np.ones(client.layout.numel, bool)
        for name, piece in client.layout.slices.items():
            frozen[piece] = not trained & {name.split(".")[0], ".".join(name.split(".")[:2])}
        anchor = np.asarray("anchor" in payload, np.float32)
        aux = {"chosen": chosen, "anchor": anchor}
        return replace(work, spec=replace(work.spec, frozen=frozen), aux=aux)

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send the changes of the router and of the experts."""
        mine = np.flatnonzero(result.work.aux["chosen"])
        changes = {
            f"expert{j}": expert(client.layout, j).take(result.update) for j in mine.tolist()
        }
        return {"update": self.sent(result, client), **changes}

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Move the router, and every expert by the mean over those who had it."""
        super().server_step(server, mean, arrivals)
        weights = self.weights(arrivals)
        counts = np.zeros(self.experts, np.int64)
        for j in range(self.experts):
            counts[j] = len(arrivals.having(f"expert{j}", weights)[0])
            if counts[j]:
                only = replace(server, layout=expert(server.layout, j))
                self.move(only, arrivals.mean(weights, f"expert{j}"), self.server_lr)
                server.model = only.model
        server["counts"] = counts

    def tested(self, population: int) -> Sequence[int]:
        """Name the unseen clients, or all."""
        return range(population - self.unseen if self.unseen else 0, population)

    def _experts(self, server: Server, which: Sequence[int]) -> Payload:
        return {f"expert{j}": expert(server.layout, j).take(server.model) for j in which}


def expert(layout: Layout, j: int) -> Layout:
    """Give the layout in which expert j is what is shared."""
    return layout.grouped(lambda name: "shared" if name.startswith(f"experts.{j}.") else "server")


def best_experts(g: np.ndarray, kept: int) -> list[int]:
    """Give the experts with the largest sums over the examples, in increasing order.

    Parameters
    ----------
    g : (n, M) array
        The sums are exact, whatever the order of the rows; of equal ones the first expert wins.
    kept : int
        K, from 1 to M.

    Examples
    --------
    >>> best_experts(np.array([[0.2, 0.5, 0.3], [0.3, 0.1, 0.6]]), 2)
    [1, 2]
    """
    sums = [math.fsum(column) for column in g.T.tolist()]
    return sorted(sorted(range(len(sums)), key=lambda j: -sums[j])[:kept])


def disjoint_clients(counts: np.ndarray, wanted: int) -> list[int]:
    """Give clients that have few classes in common.

    The first is the one whose examples are of fewest classes, by the sum of squared shares; then
    always the one that overlaps least with those before, by the sum of the smaller shares. Ties go
    to fewer classes, then to the lower number.

    Parameters
    ----------
    counts : (m, classes) integers
        Examples of each class at each client.
    wanted : int

    Examples
    --------
    >>> disjoint_clients(np.array([[5, 5, 0], [9, 1, 0], [0, 0, 3], [4, 6, 0]]), 2)
    [2, 1]
    """
    shares = counts / counts.sum(1, keepdims=True)
    purity = (shares**2).sum(1)
    overlap = np.zeros(len(shares))
    found: list[int] = []
    for _ in range(wanted):
        left = [i for i in range(len(shares)) if i not in found]
        found.append(min(left, key=lambda i: (overlap[i], -purity[i], i)))
        overlap = overlap + np.minimum(shares, shares[found[-1]]).sum(1)
    return found

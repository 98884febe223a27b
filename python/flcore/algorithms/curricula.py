"""Curricula: clients see easy examples first, and the server may see easy clients first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore._extras import require
from flcore.algorithms.base import check_choice, check_number, check_whole
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Vector
from flcore.algorithms.state import (
    Arrivals,
    Client,
    DataView,
    LocalResult,
    LocalWork,
    Payload,
    Server,
)
from flcore.errors import InvalidInputError

__all__ = ["PACING", "Curriculum", "pace"]

ORDERS = ("curr", "anti", "rand", "standard")
PACING = ("linear", "quad", "root", "step", "exp", "log")


def pace(pacing: str, t: int, steps: int, n: int, full_at: float, begin: float) -> int:
    r"""Number of examples in use at step t: P(t), truncated, never above n.

    With :math:`N_0 = b N` and :math:`r = t / (a T)`,

    ====== ==============================================
    linear :math:`N_0 + (N - N_0) r`
    quad   :math:`N_0 + (N - N_0) r^2`
    root   :math:`N_0 + (N - N_0) \sqrt{r}`
    step   :math:`N_0 + N \lfloor r \rfloor`
    exp    :math:`N_0 + (N - N_0) (e^{10 r} - 1) / (e^{10} - 1)`
    log    :math:`N_0 + (N - N_0) (1 + \ln(r + e^{-10}) / 10)`
    ====== ==============================================

    Parameters
    ----------
    pacing : str
        One of `PACING`.
    t, steps : int
        Steps done, and T in all.
    n : int
        N.
    full_at, begin : float
        a, the part of T after which all is in use, and b, the part of N in use at first.

    Notes
    -----
    After Wu, Dyer, Neyshabur, "When Do Curricula Work?", ICLR 2021.

    Examples
    --------
    >>> [pace("quad", t, 100, 1000, 0.8, 0.2) for t in (0, 10, 40, 79, 80)]
    [200, 212, 400, 980, 1000]
    """
    first, length = begin * n, full_at * steps
    if t >= length:
        return n
    r = t / length
    share = {
        "linear": lambda: r,
        "quad": lambda: r**2,
        "root": lambda: math.sqrt(r),
        "step": lambda: 0.0,
        "exp": lambda: math.expm1(10 * r) / math.expm1(10),
        "log": lambda: 1 + math.log(r + math.exp(-10)) / 10,
    }[pacing]()
    # the products of decimal fractions fall short of whole numbers by some roundings
    return min(n, int(first + (n - first) * share + 1e-9 * n))


@dataclass(frozen=True, kw_only=True)
class Curriculum(FedAvg):
    r"""FedAvg with a curriculum at the clients, and one of clients (ICCV 2023, arXiv 2212.12712).

    A client scores its N examples by their cross-entropy and sorts them, ties in the order of their
    index.  With :math:`T = (\lfloor N / B \rfloor + 1) E` and t = 0 at first, it passes in random
    order, in mini-batches of B, over the first :math:`\max(P(t), \text{least})` examples, adds the
    steps to t, and goes on until :math:`t \ge T`; P is `pace`.

    Clients are ordered by their mean score in the same way: with t the client updates done so far,
    of ``rounds * S`` in all, the first P(t) clients are visited in random order, S in each round,
    and then ordered anew.

    Parameters
    ----------
    ordering : {"curr", "anti", "rand", "standard"}
        Easy examples first, hard ones first, at random with the same pacing, or all from the start,
        in the same number of steps.
    scoring : {"G", "L", "LG", "E"}
        Cross-entropy under the global model just received; the client's own model from the end of
        its last participation (G the first time); the sum of both; a fixed expert.
    pacing : str
        One of `PACING`.
    full_at, begin : float
        a and b of `pace`, for examples and for clients.
    least : int
        Fewest examples in a pass.
    expert : str or None
        For "E": a safetensors file with the tensors of the model, such as a run leaves.
    client_ordering : {"curr", "anti", "rand", "standard"}
        "standard": clients are drawn as ever.
    client_pacing : str
    rounds : int
        Length of the curriculum of clients.

    Notes
    -----
    The order of clients tells the server their losses: a number that each sends with its update.
    Who is not in the pool keeps its score from when it took part last, at first its score under the
    initial model.  The expert is sent to a client once.
    """

    name: ClassVar[str] = "curriculum"

    ordering: str = "curr"
    scoring: str = "G"
    pacing: str = "linear"
    full_at: float = 0.8
    begin: float = 0.2
    least: int = 32
    expert: str | None = None
    client_ordering: str = "standard"
    client_pacing: str = "linear"
    rounds: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("ordering", "client_ordering"):
            check_choice(option, getattr(self, option), ORDERS)
        check_choice("scoring", self.scoring, ("G", "L", "LG", "E"))
        for option in ("pacing", "client_pacing"):
            check_choice(option, getattr(self, option), PACING)
        for option in ("full_at", "begin"):
            check_number(option, getattr(self, option), lambda v: 0 <= v <= 1, "a number in [0, 1]")
        check_whole("least", self.least)
        check_whole("rounds", self.rounds)
        if (self.scoring == "E") != (self.expert is not None):
            raise InvalidInputError(
                f'expert: expected a file with scoring="E" and None without, got {self.expert!r}'
            )

    # ---- examples --------------------------------------------------------------------------------

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Order the examples under the models at hand."""
        work = super().client_begin(payload, client)
        if not self._scores():
            return work
        scores = self._score(work.start, payload.get("expert"), client)
        client.state["score"] = float(scores.mean())
        client.state["order"] = ordered(scores, self.ordering, client.rng.spawn(1)[0])
        return work

    def data_view(self, client: Client) -> DataView:
        """Give passes over a growing pool."""
        n, b = client.examples, self.batch_size
        order = client.state.pop("order", None)
        if order is None:
            order = ordered(np.zeros(n), self.ordering, client.rng.spawn(1)[0])
        total, t = (n // b + 1) * self.local_epochs, 0
        views: list[DataView] = []
        while t < total:
            size = n
            if self.ordering != "standard":
                size = pace(self.pacing, t, total, n, self.full_at, self.begin)
            pool = np.sort(order[: max(size, self.least)])  # the pass is shuffled anyway
            views.append(DataView.epochs(client.indices[pool], 1, b, client.rng))
            t += len(views[-1].sizes)
        return DataView(
            np.concatenate([view.order for view in views]),
            [size for view in views for size in view.sizes],
        )

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send u_i, and the mean score for an order of clients; keep the model for the next one."""
        if "L" in self.scoring:
            client.state["trained"] = result.end.copy()
        payload = super().client_end(result, client)
        score = client.state.pop("score", None)
        return payload | ({} if self.client_ordering == "standard" else {"score": score})

    def _scores(self) -> bool:
        return self.ordering in ("curr", "anti") or self.client_ordering in ("curr", "anti")

    def _score(self, model: Vector, expert: Vector | None, client: Client) -> np.ndarray:
        if self.scoring == "E":
            if expert is not None:
                client.state["scores"] = self._losses(expert, client)
            return client.state["scores"]
        trained = client.state.get("trained")
        if trained is None or self.scoring == "G":
            return self._losses(model, client)
        own = self._losses(trained, client)
        return own if self.scoring == "L" else own + self._losses(model, client)

    def _losses(self, model: Vector, client: Client) -> np.ndarray:
        assert client.tools is not None
        return client.tools.losses(model)

    # ---- clients ---------------------------------------------------------------------------------

    def server_begin(self, server: Server) -> None:
        """Load the expert, and start the curriculum of clients."""
        server.state |= {"pool": np.empty(0, np.int64), "visits": 0}
        if self.expert is not None:
            load = require("safetensors.numpy", extra="train").load_file
            tensors = load(self.expert)
            if {n: t.shape for n, t in tensors.items()} != server.layout.shapes:
                raise InvalidInputError(f"expert: {self.expert} holds another model")
            pieces = [tensors[name].ravel() for name in server.layout.shapes]
            server["expert"] = np.concatenate(pieces).astype(server.model.dtype)
            server["told"] = np.zeros(server.population, bool)

    def one_time_exchange(
        self, server: Server, clients: Sequence[Client]
    ) -> tuple[list[Payload], list[Payload]] | None:
        """Let all clients score their data, where clients are ordered."""
        if self.client_ordering not in ("curr", "anti"):
            return None
        down = [self.downlink(server, client.id) for client in clients]
        scores = [
            float(self._score(self.start(payload, client), payload.get("expert"), client).mean())
            for payload, client in zip(down, clients, strict=True)
        ]
        server["scores"] = np.array(scores)
        if self.expert is not None:
            server["told"][:] = True
        return [{"score": score} for score in scores], down

    def downlink(self, server: Server, client: int) -> Payload:
        """Send w, and the expert to those that have not seen it."""
        payload = super().downlink(server, client)
        if self._scores() and "expert" in server.state and not server["told"][client]:
            payload["expert"] = server["expert"]
        return payload

    def select(self, server: Server, rng: np.random.Generator) -> list[int]:
        """Give the next S clients of the pool."""
        if self.client_ordering == "standard":
            return super().select(server, rng)
        m, s = server.population, server.participants
        if not len(server["pool"]):
            order = ordered(server.state.get("scores", np.zeros(m)), self.client_ordering, rng)
            budget = self.rounds * s
            size = pace(self.client_pacing, server["visits"], budget, m, self.full_at, self.begin)
            server["pool"] = rng.permutation(order[: max(size, s)])
        drawn, server["pool"] = server["pool"][:s], server["pool"][s:]
        server["visits"] += len(drawn)
        return sorted(drawn.tolist())

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Average, and note the clients' scores."""
        super().server_step(server, mean, arrivals)
        for arrival in arrivals:
            if "told" in server.state:
                server["told"][arrival.client] = True
            if "scores" in server.state:
                server["scores"][arrival.client] = arrival["score"]


def ordered(scores: np.ndarray, ordering: str, rng: np.random.Generator) -> np.ndarray:
    """Give positions in the order that is asked for; equal scores keep theirs in "curr"."""
    if ordering == "rand":
        return rng.permutation(len(scores))
    if ordering == "standard":
        return np.arange(len(scores))
    order = np.argsort(scores, kind="stable")
    return order[::-1] if ordering == "anti" else order

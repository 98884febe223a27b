"""Two clients with quadratic losses, two parameters, exact gradients: rounds by hand, in float64.

``f_i(w) = 1/2 sum_j a_ij (w_j - b_ij)^2``, from w = (0, 0). All clients take part unless told
otherwise. The hooks of an algorithm are called as an engine calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore.algorithms import (
    Algorithm,
    Arrival,
    Arrivals,
    Client,
    Layout,
    LocalResult,
    Server,
    local_steps,
)

CURVATURE = np.array([[1.0, 2.0], [3.0, 1.0]])
OPTIMUM = np.array([[1.0, 0.0], [-1.0, 2.0]])
EXAMPLES = (1, 3)

PLAIN: dict[str, Any] = {"local_lr": 0.1, "lr_decay": 1.0, "weight_decay": 0.0, "clip": None}
"""Options of every algorithm that the tables were computed with."""


class Toy:
    """One run; `play` does a round.

    Parameters
    ----------
    algorithm : Algorithm
    steps : (int, int)
        Local steps of the two clients.
    """

    def __init__(self, algorithm: Algorithm, steps: Sequence[int] = (2, 2)) -> None:
        self.algorithm, self.steps = algorithm, steps
        layout = algorithm.layout(Layout({"w": (2,)}))
        self.server = Server(np.zeros(2), layout, population=2, participants=2)
        algorithm.server_begin(self.server)
        self.states: list[dict[str, Any]] = [{}, {}]
        algorithm.one_time_exchange(self.server, [self.client(0), self.client(1)])

    def client(self, i: int) -> Client:
        return Client(
            id=i,
            round=self.server.round,
            examples=EXAMPLES[i],
            layout=self.server.layout,
            population=2,
            participants=self.server.participants,
            state=self.states[i],
            rng=np.random.default_rng([self.server.round, i]),
            initial=np.zeros(2),
            tools=Tools(i),
        )

    def play(self, active: Sequence[int] = (0, 1)) -> np.ndarray:
        """Do one round with these clients, and give the global model."""
        arrivals = []
        self.server.participants = len(active)
        for i in active:
            client = self.client(i)
            work = self.algorithm.client_begin(self.algorithm.downlink(self.server, i), client)
            x = work.start[None].copy()
            local_steps(
                x, lambda x, k, i=i: CURVATURE[i] * (x - OPTIMUM[i]), [work.spec], [self.steps[i]]
            )
            result = LocalResult(work, x[0], self.steps[i], loss=0.0)
            arrivals.append(Arrival(i, EXAMPLES[i], self.algorithm.client_end(result, client)))
        messages = Arrivals(arrivals)
        mean = messages.mean(self.algorithm.weights(messages))
        self.algorithm.server_step(self.server, mean, messages)
        self.server.round += 1
        return self.server.model

    def rounds(self, count: int, active: Sequence[int] = (0, 1)) -> list[np.ndarray]:
        """Do several rounds, and give the global model after each."""
        return [self.play(active) for _ in range(count)]


class Tools:
    """What a client of the toy can do with a model."""

    def __init__(self, client: int) -> None:
        self._client = client

    def gradient(self, model: np.ndarray) -> np.ndarray:
        """Gradient over all examples."""
        return CURVATURE[self._client] * (model - OPTIMUM[self._client])

"""FedRAM: task and client weights learnt with small models, for the training of a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flcore.aggregation import client_weights, differential_loss
from flcore.algorithms._softmax import SoftmaxRegression
from flcore.algorithms.base import check_number, check_whole
from flcore.algorithms.fedram_proxy import Reweighting
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

__all__ = ["FedRAM", "resample"]


@dataclass(frozen=True, kw_only=True)
class FedRAM(Reweighting):
    r"""Federated reweighting and aggregation for several tasks (NeurIPS 2025), step 3.

    Client k draws its examples by task, in shares :math:`\alpha^k`, and trains by plain loss; the
    server takes

    .. math::
        \theta^G \leftarrow \theta^G + \eta_g \frac{1}{\sum_{S_t} w_k}
        \sum_{k \in S_t} w_k (\theta^k - \theta^G) .

    Where no weights are given they are learnt before the first round by steps 1 and 2 of the method
    (`FedRAMProxy`), with softmax regression as the model, one step on all examples a round, and all
    clients; their messages are counted in the first round.

    Parameters
    ----------
    task_weights : (K, T) tuple of tuples of float, or None
        alpha of each client; 0 for the tasks it has no data of.
    client_weights : (K,) tuple of float, or None
        w; both or none.
    proxy_rounds, proxy_lr : int, float
        Of steps 1 and 2.
    refresh : bool
        Whether w goes on to move, by the losses of the agent (the prose), or stays (the listing).
    tasks, eta_task, eta_client, smoothing, scope, baseline, reference_epochs
        See `FedRAMProxy`.

    Notes
    -----
    With alpha the client's own shares and uniform w this is FedAvg with uniform weights.
    """

    name: ClassVar[str] = "fedram"

    reference_epochs: int = 200
    task_weights: tuple[tuple[float, ...], ...] | None = None
    client_weights: tuple[float, ...] | None = None
    proxy_rounds: int = 50
    proxy_lr: float = 0.5
    refresh: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("proxy_rounds", self.proxy_rounds, least=0)
        check_number("proxy_lr", self.proxy_lr, lambda v: v > 0, "a number above 0")
        if (self.task_weights is None) != (self.client_weights is None):
            raise InvalidInputError("task_weights, client_weights: expected both, or none of them")
        if self.task_weights is not None and self.client_weights is not None:
            rows = tuple(tuple(map(float, row)) for row in self.task_weights)
            object.__setattr__(self, "task_weights", rows)
            object.__setattr__(self, "client_weights", tuple(map(float, self.client_weights)))

    def one_time_exchange(
        self, server: Server, clients: Sequence[Client]
    ) -> tuple[list[Payload], list[Payload]]:
        """Learn the weights, or take those that were given."""
        counts = self.count(clients)
        up: list[Payload] = [{"counts": row} for row in counts]
        down: list[Payload] = []
        if self.task_weights is None:
            self._learn(server, clients, counts, up, down)
        else:
            alpha, w = np.array(self.task_weights), np.array(self.client_weights)
            usable = alpha.shape == counts.shape and w.shape == (len(counts),)
            if not usable or (alpha < 0).any() or ((alpha * (counts > 0)).sum(1) <= 0).any():
                raise InvalidInputError(
                    f"task_weights: expected weights from 0 of {counts.shape[1]} tasks for each of "
                    f"{counts.shape[0]} clients, positive for one that it has, and as many client "
                    f"weights; got shapes {alpha.shape} and {w.shape}"
                )
            server.state |= {"task_weights": alpha, "client_weights": w / w.sum()}
        for client, alpha in zip(clients, server["task_weights"], strict=True):
            client.state["alpha"] = np.array(alpha)
            down.append({"alpha": client.state["alpha"]})
        return up, down

    def data_view(self, client: Client) -> DataView:
        """Give passes over examples drawn by task."""
        task, extra = self.task(client), client.rng.spawn(1)[0]
        views = [
            DataView.epochs(
                client.indices[resample(task, client.state["alpha"], extra)],
                1,
                self.batch_size,
                client.rng,
            )
            for _ in range(self.local_epochs)
        ]
        order = np.concatenate([view.order for view in views])
        return DataView(order, [size for view in views for size in view.sizes])

    def downlink(self, server: Server, client: int) -> Payload:
        """Send the model, and the weight that the client's update will have."""
        weight = float(server["client_weights"][client])
        return super().downlink(server, client) | {"weight": weight}

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Start from the global model and take plain SGD steps."""
        client.state["weight"] = payload["weight"]
        return super().client_begin(payload, client)

    def client_end(self, result: LocalResult, client: Client) -> Payload:
        """Send the update and its weight, and the differential loss of the agent if w moves."""
        payload = super().client_end(result, client) | {"weight": client.state.pop("weight")}
        if self.refresh:
            tools: Any = client.tools
            after, before = (
                tools.losses(model).sum(dtype=np.float64) for model in (result.end, result.start)
            )
            payload["differential"] = float(differential_loss(after, before, client.examples))
        return payload

    def weights(self, arrivals: Arrivals) -> list[float]:
        """Give w."""
        return [arrival["weight"] for arrival in arrivals]

    def server_step(self, server: Server, mean: Vector, arrivals: Arrivals) -> None:
        """Move the model along the mean, and w if it does."""
        super().server_step(server, mean, arrivals)
        if self.refresh:
            w = server["client_weights"].copy()
            here = [arrival.client for arrival in arrivals]
            gains = [arrival["differential"] for arrival in arrivals]
            w[here] = w[here].sum() * client_weights(
                w[here], gains, self.eta_client, self.smoothing
            )
            server["client_weights"] = w

    def _learn(
        self,
        server: Server,
        clients: Sequence[Client],
        counts: np.ndarray,
        up: list[Payload],
        down: list[Payload],
    ) -> None:
        """Do steps 1 and 2."""
        weights = self.begin(server, counts)
        there = counts.sum(0) > 0
        share = counts.sum(1) / counts.sum()
        models, tasks, references = [], [], []
        for client in clients:
            tools: Any = client.tools
            model = SoftmaxRegression(np.asarray(tools.x), np.asarray(tools.y), tools.classes)
            theta = np.zeros(model.size)
            for _ in range(self.reference_epochs):
                theta -= self.proxy_lr * model.gradient(theta)
            models.append(model)
            tasks.append(self.task(client))
            references.append(np.bincount(tasks[-1], model.losses(theta), counts.shape[1]))
        proxy = np.zeros(models[0].size)
        for _ in range(self.proxy_rounds):
            step, excesses, differences = np.zeros_like(proxy), [], []
            for k, (model, task) in enumerate(zip(models, tasks, strict=True)):
                before = model.losses(proxy)
                excess, factor = self.pull(server["task_weights"][k], before, references[k], task)
                moved = -self.proxy_lr * model.gradient(proxy, factor[task] / len(task))
                baseline = before if self.baseline == "global" else references[k]
                after = model.losses(proxy + moved)
                differences.append(differential_loss(after.sum(), baseline.sum(), len(task)))
                excesses.append(excess[there])
                step += share[k] * moved
                down.append({"model": np.float32(proxy), "alpha": server["task_weights"][k]})
                up.append({"update": np.float32(moved), "excess": excess, "differential": 0.0})
            proxy += step
            weights.update_tasks(np.stack(excesses)).update_clients(differences)
            self.keep(server, counts, weights)


def resample(task: np.ndarray, alpha: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give n of the n examples, with repeats, so that tasks have the shares `alpha`.

    Every task gets n times its share, rounded by the largest remainders, and from its examples as
    many whole passes as that holds, and the rest without replacement.  With the shares that the
    tasks have it is each example once.

    Parameters
    ----------
    task : (n,) integers
    alpha : (T,) numbers >= 0
        Only ratios among the tasks that occur matter.
    rng : numpy.random.Generator

    Returns
    -------
    (n,) int64 array, increasing.
    """
    n, count = len(task), np.bincount(task, minlength=len(alpha))
    share = np.where(count > 0, alpha, 0.0)
    wanted = n * share / share.sum()
    quota = np.floor(wanted + 1e-9).astype(np.int64)
    most = np.argsort(quota - wanted, kind="stable")[: n - quota.sum()]
    quota[most] += 1
    drawn = []
    for t in np.flatnonzero(quota):
        mine = np.flatnonzero(task == t)
        drawn += [mine] * int(quota[t] // len(mine))
        drawn.append(rng.permutation(mine)[: quota[t] % len(mine)])
    return np.sort(np.concatenate(drawn))
